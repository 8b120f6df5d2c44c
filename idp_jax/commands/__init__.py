"""The commands of `idp-jax`, one file each: the only rooms that print."""
