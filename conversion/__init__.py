"""Turns checkpoints of other formats into stores, and proves that a store is what its source is.

`conversion.convert.convert` and `conversion.verify.verify` are the library, `python -m conversion` the command line.
Importing this package imports no torch.
"""
