"""Ops over tensors, each with a reference and one or more back ends.

Knows tensors; knows nothing of requests, models, text or HTTP. Import an op from its folder:
`from uma_kernels.linear import linear`.
"""
