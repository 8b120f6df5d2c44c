"""The compression algorithms, one a file: they know arrays only, nothing of a model."""
