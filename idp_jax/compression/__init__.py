"""Compression of models, block by block.

`cores` are the algorithms, on arrays alone. Above them: `matrices` (one stage), `flow` (the text on
its way), `driver` (one block after another), `job` (files, going on after a kill).
"""
