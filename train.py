"""Trains a prompt, a prefix, a LoRA or an IDP pool: python train.py --config_path configs/X.yaml
[--key value].
"""

import sys

from idp_jax.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
