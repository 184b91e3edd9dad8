"""Random shapes, layouts and values for every compiled op, each case against what the op is specified to compute.

`python -m tests.fuzz` runs thousands of them, `test_fuzz.py` a few hundred in the normal tests.
"""
