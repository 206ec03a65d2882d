"""Rooms import only rooms below them, no two modules import each other, and each foreign library has one home."""

import ast
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "prelm_jax"

# A group of rooms, and one room of each group directly below it. A module imports its own group and all groups below.
BELOW = {
    ("errors", "bounds", "validation"): (),
    ("storage", "cache", "progress", "lock", "hub"): ("errors",),
    ("corpus", "tokenizers"): ("storage",),
    ("data",): ("corpus",),
    ("models",): ("storage",),
    ("training",): ("storage",),
    ("formats",): ("data", "models", "training"),
    ("inference",): ("formats",),
    ("families",): ("inference",),
    ("loading", "workdir", "run"): ("families",),
    ("report",): ("run",),
    ("train",): ("report",),
    ("pretraining",): ("train",),
    ("finetuning",): ("train",),
    ("study",): ("pretraining", "finetuning"),
    ("reporting",): ("study",),
    ("serving",): ("pretraining", "finetuning"),
    ("planning",): ("pretraining", "finetuning"),
    ("cli",): ("reporting", "serving", "planning"),
    ("__main__",): ("cli",),
    ("__init__",): ("reporting",),
}
GROUP_OF = {room: group for group in BELOW for room in group}
# The exceptions: models and batches fulfill the protocols of the contract, whose types it imports for the type checker;
# ELMo reads character ids.
CONTRACT = "training.contract"
EXCEPTIONS = {
    ("models", CONTRACT),
    ("data", CONTRACT),
    (CONTRACT, "corpus.store"),
    (CONTRACT, "tokenizers.base"),
    ("models.elmo", "tokenizers.characters"),
}

# Where a library may be imported.
HOMES = {
    "flax": ("models/",),
    "orbax": ("training/checkpoint.py",),
    "grain": ("data/loader.py",),
    "tensorflow_datasets": ("corpus/tfds.py",),
    "sentencepiece": ("tokenizers/sentencepiece.py",),
    "ftfy": ("corpus/cleaning.py",),
    "rjieba": ("data/segmentation.py",),
    "loky": ("corpus/prepare.py",),
    "apache_beam": ("corpus/beam.py",),
    "pyarrow": ("corpus/readers.py",),
    "matplotlib": ("report/page.py",),
    "huggingface_hub": ("hub.py",),
    "tensorboardX": ("training/metrics.py",),
    "tyro": ("cli/", "run.py", "finetuning/config.py"),
    "h5py": ("formats/", "inference/"),
    "starlette": ("serving/",),
    "uvicorn": ("serving/",),
    "orjson": ("serving/",),
    "sklearn": ("study/",),
    "gensim": ("study/",),
    "threadpoolctl": ("study/",),
    "transformers": (),
    "torch": (),
}


def module_name(file: Path) -> str:
    """`data.pairs` for data/pairs.py, `data` for data/__init__.py, `__init__` for the package itself."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def imported_names(file: Path) -> list[str]:
    """The full names of all imports of a file, those inside functions included."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def resolve(name: str, modules: Iterable[str]) -> str | None:
    """The module of the package that an imported name comes from: data.pairs for prelm_jax.data.pairs.PairsConfig."""
    package, _, target = name.partition(".")
    if package != PACKAGE.name:
        return None
    parts = target.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in modules), "__init__")


def imports(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    names = set(imported_names(FILES[module])) - {"prelm_jax.__version__"}
    found = {resolve(name, FILES) for name in names}
    return {target for target in found if target not in (None, module)}


def allowed_rooms(room: str) -> set[str]:
    """The rooms that modules of a room may import."""
    group = GROUP_OF[room]
    return {*group, *(other for below in BELOW[group] for other in allowed_rooms(below))}


def may_import(module: str, target: str) -> bool:
    """Whether the order of rooms allows it."""
    room, other = module.split(".")[0], target.split(".")[0]
    return other in allowed_rooms(room) or not EXCEPTIONS.isdisjoint({(room, target), (module, target)})


def find_cycle(graph: Mapping[str, Iterable[str]]) -> list[str] | None:
    """The nodes of one cycle of a directed graph, the first repeated at the end; None if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for target in sorted(graph.get(node, ())):
            if cycle := visit(target, [*path, node]):
                return cycle
        done.add(node)
        return None

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), None)


@pytest.mark.parametrize("module", FILES)
def test_order_of_rooms(module):
    assert module.split(".")[0] in GROUP_OF, f"{module}: add its room to BELOW"
    forbidden = [target for target in sorted(imports(module)) if not may_import(module, target)]
    assert not forbidden, f"{module} imports {', '.join(forbidden)}"


def test_no_import_cycles():
    """Except in cli, __init__ and __main__."""
    modules = [module for module in FILES if module.split(".")[0] not in ("cli", "__init__", "__main__")]
    cycle = find_cycle({module: imports(module) for module in modules})
    assert cycle is None, " -> ".join(cycle)


def test_find_cycle():
    tree = {"a": ["b", "c"], "b": ["d"], "c": ["d"]}
    assert find_cycle(tree) is None
    assert find_cycle({**tree, "d": ["b"]}) == ["b", "d", "b"]
    assert find_cycle({**tree, "d": ["e"], "e": ["c"]}) == ["d", "e", "c", "d"]
    assert find_cycle({"x": ["x"]}) == ["x", "x"]


def test_imports_are_found_and_resolved(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import numpy as np\nfrom prelm_jax.data.pairs import PairsConfig\n"
        "def f():\n    import prelm_jax.models.bert\n    from prelm_jax import errors\n    from prelm_jax import load\n"
    )
    modules = ("__init__", "data", "data.pairs", "models", "models.bert", "errors")
    found = [resolve(name, modules) for name in imported_names(file)]
    assert sorted(map(str, found)) == ["None", "__init__", "data.pairs", "errors", "models.bert"]
    assert may_import("data.pairs", "corpus.store") and not may_import("corpus.store", "data.pairs")
    assert may_import("models.bert", "training.contract") and not may_import("models.bert", "training.loop")
    assert may_import("tokenizers.load", "corpus.spec") and may_import("cli.main", "errors")
    assert not may_import("data.pairs", "models.bert") and not may_import("formats.bilm", "inference.base")
    assert not may_import("models.bert", "tokenizers.base")  # Models need no tokenizer.


def is_at_home(name: str, path: str) -> bool:
    """Whether a file of the package may import a library's module."""
    homes = HOMES.get(name.split(".")[0])
    return homes is None or path.startswith(homes)


@pytest.mark.parametrize("module", FILES)
def test_homes_of_libraries(module):
    path = FILES[module].relative_to(PACKAGE).as_posix()
    strangers = [name for name in imported_names(FILES[module]) if not is_at_home(name, path)]
    assert not strangers, f"{path} imports {', '.join(strangers)}"


def test_is_at_home():
    assert is_at_home("flax.linen", "models/bert.py") and not is_at_home("flax.linen", "training/loop.py")
    assert is_at_home("numpy", "data/pairs.py") and not is_at_home("torch", "models/bert.py")
