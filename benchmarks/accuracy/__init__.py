"""Errors of integer LayerNorms, this package's and its peers', on the same rows: `python -m benchmarks.accuracy`."""
