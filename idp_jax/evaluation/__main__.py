"""`python -m idp_jax.evaluation ...`: the harness's command line, which knows `--model idp_jax`."""

from lm_eval.__main__ import cli_evaluate

import idp_jax.evaluation.lm_eval_model  # noqa: F401  # registers the model

if __name__ == "__main__":
    cli_evaluate()
