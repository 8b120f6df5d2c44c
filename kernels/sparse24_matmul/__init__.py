"""Matrix products with 2:4 sparse weights (two of four consecutive inputs are kept): the layout,
and one file per way of computing them.
"""
