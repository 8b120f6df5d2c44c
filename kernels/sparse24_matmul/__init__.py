"""Matrix products with 2:4 sparse weights: the layout, and one file per backend."""
