"""Strictness for every test: eight fake devices, warnings are errors, no silent broadcasting."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

PRELM_DATA = Path(os.environ.get("PRELM_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    """No test reads or leaves anything in the user's cache."""
    monkeypatch.setenv("PRELM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def real_data():
    """The folder of real corpora and vocabularies; tests that need it are skipped where it is absent."""
    if not PRELM_DATA.is_dir():
        pytest.skip(f"no real data at {PRELM_DATA}; set PRELM_DATA")
    return PRELM_DATA
