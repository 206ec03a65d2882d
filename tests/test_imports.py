"""Imports go with the road, and each foreign library has one home (see the README's tree)."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "prelm_jax"

# What a room may import of the package, beside itself, `errors`, `paths` and `places`.
ROOMS = {
    "errors": set(),
    "paths": set(),
    "places": set(),
    "text": set(),
    "models": set(),
    "data": {"text"},
    "training": set(),
    "exchange": {"models", "text", "training.checkpoint"},
    "pretrain": {"data", "exchange", "models", "text", "training"},
    "plan": {"pretrain", "text", "training"},
    "tables": set(),
    "cli": {"data", "exchange", "models", "plan", "pretrain", "tables", "text", "training"},
    "__main__": {"cli"},
    "__init__": {"exchange"},
}

# Where a library may be imported; everywhere else in the package it may not.
HOMES = {
    "flax": ["models/"],
    "orbax": ["training/checkpoint.py"],
    "grain": ["data/loader.py"],
    "tensorflow_datasets": ["corpus/tfds.py"],
    "sentencepiece": ["tokenizers/sentencepiece.py"],
    "ftfy": ["corpus/cleaning.py"],
    "rjieba": ["data/segmentation.py"],
    "loky": ["corpus/prepare.py"],
    "apache_beam": ["corpus/beam.py"],
    "pyarrow": ["corpus/readers.py"],
    "tensorboardX": ["training/metrics.py"],
    "tyro": ["cli.py"],
    "h5py": ["exchange/"],
    "transformers": [],
    "torch": [],
}

FILES = sorted(PACKAGE.rglob("*.py"))


def imports(file: Path) -> list[str]:
    """Every module that a file imports, wherever in the file it does."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_with_the_road(file):
    path = file.relative_to(PACKAGE)
    room = path.parts[0].removesuffix(".py")
    for name in imports(file):
        if not name.startswith("prelm_jax."):
            continue
        target = name.removeprefix("prelm_jax.")
        allowed = {room, "errors", "paths", "places", *ROOMS[room]}
        assert any(f"{target}.".startswith(f"{place}.") for place in allowed), f"{path} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_libraries_stay_at_home(file):
    path = str(file.relative_to(PACKAGE))
    for name in imports(file):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or any(path.startswith(home) for home in homes), f"{path} imports {name}"
