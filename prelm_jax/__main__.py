"""`python -m prelm_jax` is `prelm`."""

from prelm_jax.cli.main import console

console()
