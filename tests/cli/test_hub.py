"""Models of the Hugging Face hub, from a cache without access to the hub."""

import fnmatch
import shutil

import pytest
from huggingface_hub import constants

from prelm_jax import load
from prelm_jax.cli.main import main
from prelm_jax.hub import fetch
from prelm_jax.workdir import WorkDir

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A cache folder with one model, as the client lays it out, and a client that is offline."""
    cache = tmp_path / "hub"
    repository = cache / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(REVISION)
    shutil.copytree(folder / "model", repository / "snapshots" / REVISION)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository


@pytest.mark.parametrize("name", ["hub:owner/tiny", "hub:owner/tiny@main", f"hub:owner/tiny@{REVISION}"])
def test_a_model_in_the_cache_is_found_with_its_revision(name, folder, hub, capsys):
    assert fetch(name) == (f"hub:owner/tiny@{REVISION}", hub / "snapshots" / REVISION)
    text = "The old cat sees a hen."
    assert list(load(name).score([text])) == list(load(folder / "model").score([text]))
    main(["fill", name, "The [MASK] sees a hen."])
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", ["hub:owner/other", "hub:owner/tiny@v2", "hub:", "hub:a/b/c", "hub:owner/tiny@../x"])
def test_a_model_that_is_not_there(name, hub, fails):
    assert name in fails("fill", name, "The [MASK] sees a hen.")


def test_the_folders_of_sentence_transformers_are_fetched(folder, hub, monkeypatch, tmp_path):
    asked = []
    found = shutil.copytree(folder / "model", tmp_path / "snapshots" / REVISION)

    def download(repository, **options):
        asked.append((repository, options["revision"], options["allow_patterns"]))
        return str(found)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    fetch("hub:owner/tiny")
    assert len(asked) == 1
    (found / "modules.json").write_text("[]")
    fetch("hub:owner/tiny")
    repository, revision, patterns = asked[2]
    assert (repository, revision) == ("owner/tiny", REVISION)
    names = ["1_Pooling/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "onnx/config.json"]
    assert [any(fnmatch.fnmatch(name, each) for each in patterns) for name in names] == [True, True, False, False]


def test_other_files_of_weights_are_not_read(hub, fails):
    snapshot = hub / "snapshots" / REVISION
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    assert "safetensors" in fails("fill", "hub:owner/tiny", "The [MASK] sees a hen.")


def test_a_run_records_the_revision_that_it_starts_from(folder, hub, tmp_path):
    options = ["--init-from", "hub:owner/tiny", "--tokenizer.path", f"{folder}/model", "--steps", "1"]
    main(["pretrain", f"{folder}/tiny.py:tiny", *options, "--workdir", f"{tmp_path}/run"])
    assert WorkDir(tmp_path / "run").read_record().identity["init_from"] == f"hub:owner/tiny@{REVISION}"
