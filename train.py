"""`idp-jax train` as a script: python train.py --config_path configs/X.yaml [--key value]."""

import sys

from idp_jax.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
