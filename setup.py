"""The packages of the wheel: prelm_jax, and the folder experiments/ as prelm_jax.experiments. See pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["prelm_jax*"]), "prelm_jax.experiments"],
    package_data={"prelm_jax.serving": ["page.html"]},
    package_dir={"prelm_jax.experiments": "experiments"},
)
