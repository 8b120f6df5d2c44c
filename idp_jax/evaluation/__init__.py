"""Measuring models: perplexity, harness tasks, generated text, latency, and how sure we may be of a
difference.

Import from the modules; the harness is loaded only by those that need it.
"""
