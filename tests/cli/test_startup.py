"""What is imported when: a fast start, and nothing of an optional kind before it is needed."""

import json
import subprocess
import sys

import pytest

# Packages of the base installation for certain sources, tokenizers and reports only.
OCCASIONAL = {"array_record", "ftfy", "matplotlib", "pyarrow", "sentencepiece", "tensorflow_datasets"}


def imported(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after the code."""
    end = "import json, sys; print('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{end}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_nothing_else():
    assert not imported("import prelm_jax; prelm_jax.__version__") & {"jax", "numpy", "tyro", "rich", *OCCASIONAL}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["experiments"], ["tokenizer", "--help"]])
def test_help_does_not_wait_for_jax(arguments):
    code = f"from prelm_jax.cli.main import main\ntry: main({arguments})\nexcept SystemExit: pass"
    assert not imported(code) & {"jax", "flax", "numpy", "tokenizers", *OCCASIONAL}


@pytest.mark.parametrize("model", ["run", "model", "gpt-model", "elmo-model"])
def test_loading_a_model_imports_nothing_occasional(folder, model):
    found = imported(f"import prelm_jax; prelm_jax.load({str(folder / model)!r})")
    assert "jax" in found and not found & OCCASIONAL


def test_the_public_interface(folder):
    """In every order: importing a submodule does not hide the function of the same name."""
    code = f"""
import prelm_jax
assert set(prelm_jax.__all__) == {{"Run", "finetune", "load", "pretrain", "write_report"}}
from prelm_jax.pretraining import pretrain
from prelm_jax import load
model = load({str(folder / "model")!r})
from prelm_jax.loading import load as same
assert type(prelm_jax.load({str(folder / "model")!r})) is type(same({str(folder / "model")!r})) is type(model)
assert prelm_jax.Run.__name__ == "Run" and callable(prelm_jax.pretrain) and callable(prelm_jax.finetune)
try: prelm_jax.nothing
except AttributeError as error: assert "nothing" in str(error)
else: raise AssertionError
"""
    assert "jax" in imported(code)
