"""What a score is made of: facts, reads, weights, calibration, redaction, ties, and the statistics that audit them.

Knows numbers and text; does not know engines, tokens or tensors. Imports no torch.
"""
