"""Matrix products with weights of 2, 3, 4 or 8 bits: the layout, and one file per backend."""
