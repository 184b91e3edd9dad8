"""The parts every model is made of, written once over the ops of `uma_kernels`.

Knows tensors of one step and weights; does not know architectures, files, requests or queues.
"""
