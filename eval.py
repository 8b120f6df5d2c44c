"""Scores a model: python eval.py --model DIR_OR_NAME [--adapter DIR] --tasks a,b --out
results.json.
"""

import sys

from idp_jax.cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
