"""Training of ranking adapters: recipe in, a LoRA adapter in PEFT format out, with what it was made of.

Needs the extra `train` (torch, transformers, peft); importing this package does not import them.
"""
