"""`idp-jax eval` as a script: python eval.py --model NAME --tasks a,b --out results.json."""

import sys

from idp_jax.cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
