"""Matrix products with weights of 2, 3, 4 or 8 bits: packing, and one file per way of computing
them.
"""
