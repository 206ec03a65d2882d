"""`python -m prelm_jax` is `prelm`."""

from prelm_jax.cli import main

main()
