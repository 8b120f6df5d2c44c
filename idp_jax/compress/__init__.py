"""Compression of weights: array-only cores (one algorithm per file, nothing of the model in them)
and the driver above them.
"""
