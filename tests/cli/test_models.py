"""embed, score, fill, generate: of a work directory and of a model directory."""

import json
import os
import re
import shutil

import h5py
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prelm_jax.cli.main import main
from prelm_jax.errors import InputError
from prelm_jax.formats import huggingface_bert
from prelm_jax.formats.base import LoadedModel
from prelm_jax.loading import load
from prelm_jax.models.bert import BertConfig
from prelm_jax.tokenizers.wordpiece import WordPiece


@pytest.mark.parametrize("model", ["run", "model"])
def test_fill_score_embed_tokenize(folder, model, tmp_path, capsys):
    main(["fill", f"{folder}/{model}", "The old [MASK] sees a [MASK].", "--top-k", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [len(re.findall(r"\S+ 0\.\d{3}", line)) for line in lines] == [2, 2]

    main(["score", f"{folder}/{model}", f"{folder}/lines.txt"])
    scores = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [int(tokens) for _, tokens in scores][1:2] == [0]
    assert float(scores[0][0]) < float(scores[2][0]) < 0

    main(["embed", f"{folder}/{model}", f"{folder}/lines.txt", f"{tmp_path}/vectors.hdf5"])
    with h5py.File(tmp_path / "vectors.hdf5") as file:
        assert sorted(file) == ["0", "1", "2"]
        tokens = json.loads(file["0"].attrs["tokens"])
        assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]"
        assert file["0"].shape == (2, len(tokens), 16) and file["0"].dtype == np.float32
        assert file["1"].shape == (2, 0, 16)

    tokenizer = folder / model / ("tokenizer" if model == "run" else ".")
    main(["tokenize", str(tokenizer), f"{folder}/lines.txt"])
    ids = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ids[1] == [] and len(ids[0]) == len(tokens) - 2


def test_one_vector_a_line(folder, fails, tmp_path):
    lines, output = tmp_path / "lines.txt", tmp_path / "vectors.hdf5"
    lines.write_text("The old cat sees a hen.\nA dog\n")
    main(["embed", f"{folder}/model", str(lines), str(output), "--pooled"])
    with h5py.File(output) as file:
        found = file["vectors"][:]
    expected = [states[-1].mean(0) for _, states in load(folder / "model").embed(lines.read_text().splitlines())]
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)

    model, text = folder / "model", folder / "lines.txt"  # Its second line is blank.
    assert "line 2" in fails("embed", model, text, output, "--pooled")
    assert "'query'" in fails("embed", model, lines, output, "--pooled", "--prompt", "query")
    assert "--pooled" in fails("embed", model, lines, output, "--prompt", "query")
    assert "--pooled" in fails("embed", model, lines, output, "--pooled", "--tokenize")
    assert "elmo" in fails("embed", folder / "elmo-model", lines, output, "--pooled")


def test_export_for_sentence_transformers(folder, fails, tmp_path):
    """The old form, which every version of the library and text-embeddings-inference read."""
    target = tmp_path / "model"
    main(["export", f"{folder}/run", str(target), "--sentence-transformers"])
    modules = json.loads((target / "modules.json").read_text())
    assert [(module["path"], module["type"]) for module in modules] == [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
    ]
    assert json.loads((target / "1_Pooling/config.json").read_text()) == {
        "word_embedding_dimension": 16,
        "pooling_mode_cls_token": False,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    settings = json.loads((target / "sentence_bert_config.json").read_text())
    assert settings == {"max_seq_length": 32, "do_lower_case": False}
    for path in (target, folder / "model"):
        np.testing.assert_array_equal(next(load(path).vectors(["A dog"])), next(load(target).vectors(["A dog"])))
    main(["export", f"{folder}/run", str(target), "--sentence-transformers"])  # Over the first.
    assert "openai-gpt" in fails("export", folder / "gpt", tmp_path / "gpt", "--sentence-transformers")
    assert not (tmp_path / "gpt").exists()


def test_embed_never_replaces_its_inputs_or_a_device(folder, fails, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    lines = tmp_path / "lines.txt"
    lines.write_text("The old cat")
    (tmp_path / "hard.txt").hardlink_to(lines)
    (tmp_path / "soft.txt").symlink_to(lines)
    (tmp_path / "weights").hardlink_to(tmp_path / "model/model.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    names = [
        "lines.txt",
        "hard.txt",
        "soft.txt",
        "model",
        "model/config.json",
        "model/new.hdf5",
        "weights",
        "model/../lines.txt",
    ]
    for output in (
        *(tmp_path / name for name in names),
        "/dev/null",
        "/dev/full",
        tmp_path,
        tmp_path / "none/vectors.hdf5",
    ):
        assert f"{output}" in fails("embed", tmp_path / "model", lines, output)
    os.mkfifo(tmp_path / "pipe")
    assert " is a pipe" in fails("embed", tmp_path / "model", lines, tmp_path / "pipe")
    (tmp_path / "pipe").unlink()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_byte_order_mark_and_carriage_returns_are_no_tokens(folder, tmp_path, capsys):
    (tmp_path / "plain.txt").write_bytes(b"cat sees\n\na dog\n")
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfcat sees\r\n\r\na dog\r\n")

    def printed(command, model, name) -> str:
        main([command, f"{folder}/{model}", f"{tmp_path}/{name}.txt"])
        return capsys.readouterr().out

    def embedded(name) -> list[str]:
        main(["embed", f"{folder}/elmo-model", f"{tmp_path}/{name}.txt", f"{tmp_path}/vectors.hdf5"])
        with h5py.File(tmp_path / "vectors.hdf5") as file:
            return [file[str(i)].attrs["tokens"] for i in range(3)]

    assert printed("score", "gpt-model", "plain") == printed("score", "gpt-model", "marked")
    for run in ("run", "gpt", "elmo"):
        assert printed("tokenize", f"{run}/tokenizer", "plain") == printed("tokenize", f"{run}/tokenizer", "marked")
    assert embedded("plain") == embedded("marked")


def test_generate(folder, capsys):
    def generate(prompt, model="gpt", seed=3) -> str:
        options = ["--max-tokens", "8", "--temperature", "0.8", "--top-k", "20", "--top-p", "0.9", "--seed", str(seed)]
        main(["generate", f"{folder}/{model}", "--prompt", prompt, *options])
        return capsys.readouterr().out.removesuffix("\n")

    once = generate("The old cat")
    assert once.startswith("the old cat ")
    assert once == generate("The old cat", "gpt-model") != generate("The old cat", seed=4)
    longer = " ".join(["the old cat sees a hen ."] * 10)  # Than the window of 32: its end counts.
    assert generate(longer).startswith(longer)
    assert generate("The ☃ cat").startswith("the <unk>cat ")  # As transformers writes it.


def test_options_of_elmo(folder, fails, tmp_path):
    """Lines that are blank, long, of long words, of emoji and Chinese; each alone, or continued from an earlier one."""
    lines = ["The old cat sees a hen.", "", "猫 sees a 🐈", "x" * 200, "cat " * 3000, "The old cat sees a hen."]
    (tmp_path / "lines.txt").write_text("\n".join(lines))

    def embed(*options) -> list[np.ndarray]:
        main(["embed", f"{folder}/elmo-model", f"{tmp_path}/lines.txt", f"{tmp_path}/vectors.hdf5", *options])
        with h5py.File(tmp_path / "vectors.hdf5") as file:
            return [file[str(i)][()] for i in range(len(lines))]

    alone, split, carried = embed(), embed("--tokenize"), embed("--state", "carry", "--batch-size", "5")
    assert [x.shape for x in alone] == [(3, n, 16) for n in (6, 0, 4, 1, 3000, 6)]
    assert split[0].shape == (3, 7, 16)
    np.testing.assert_array_equal(alone[0], alone[5])
    np.testing.assert_allclose(carried[0], alone[0], atol=1e-6)
    assert np.abs(carried[5] - alone[5]).max() > 1e-3
    arguments = (folder / "model", tmp_path / "lines.txt", tmp_path / "vectors.hdf5", "--state", "warm")
    message = fails("embed", *arguments)
    assert "--state" in message and "bert" in message


@pytest.mark.parametrize(
    "arguments",
    [["embed", "m", "in", "out"], ["score", "m", "in"], ["fill", "m", "[MASK]"], ["generate", "m", "--prompt", "x"]],
)
def test_options_reach_load(monkeypatch, arguments):
    received = []

    def load(*arguments):
        received.append(arguments)
        raise InputError("enough")

    monkeypatch.setattr("prelm_jax.loading.load", load)
    options = [[], ["--step", "best"], ["--step", "30"]]
    expected = [("m", "newest", True), ("m", "best", True), ("m", 30, True)]
    if arguments[0] != "generate":  # No BERT generates.
        options, expected = [*options, ["--cased"]], [*expected, ("m", "newest", False)]
    for option in options:
        with pytest.raises(SystemExit):
            main([*arguments, *option])
    assert received == expected


def test_cased_is_for_a_vocab_txt_without_settings(tmp_path):
    """As transformers does, a model directory that does not say whether it lower-cases is taken to."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "cat"]
    config = BertConfig(len(tokens), 16, 1, 2, 32)
    params = jax.jit(config.build().init_params)(jax.random.key(0))
    model = tmp_path / "model"
    model.mkdir()
    huggingface_bert.FORMAT.write(LoadedModel(config, params, WordPiece(tokens, lowercase=False)), model)
    (tmp_path / "lines.txt").write_text("The cat\n")

    def tokens(*options) -> list[str]:
        main(["embed", f"{model}", f"{tmp_path}/lines.txt", f"{tmp_path}/vectors.hdf5", *options])
        with h5py.File(tmp_path / "vectors.hdf5") as file:
            return json.loads(file["0"].attrs["tokens"])[1:-1]

    assert tokens() == ["The", "cat"]
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model / name).unlink()
    assert tokens("--cased") == ["The", "cat"] and tokens() == ["[UNK]", "cat"]


def test_a_family_without_the_command(folder, fails):
    message = fails("fill", folder / "gpt-model", "The [MASK].")
    assert message == f"prelm: {folder}/gpt-model is a model of type openai-gpt, which cannot fill."
    message = fails("generate", folder / "model", "--prompt", "The")
    assert message == f"prelm: {folder}/model is a model of type bert, which cannot generate."


def test_what_is_no_model_or_no_text(folder, fails, tmp_path):
    assert str(tmp_path) in fails("fill", tmp_path, "[MASK]")
    assert "[MASK]" in fails("fill", folder / "model", "no mask here")
    assert "blank" in fails("generate", folder / "gpt-model", "--prompt", " ")
    assert f"{tmp_path}/none.txt" in fails("score", folder / "model", tmp_path / "none.txt")


def test_models_that_are_not_complete(folder, fails, tmp_path):
    file = tmp_path / "model" / "model.safetensors"

    def fill(name, tensor=None) -> str:
        shutil.copytree(folder / "model", tmp_path / "model", dirs_exist_ok=True)
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors if tensor is None else tensors | {name: tensor}, file)
        return fails("fill", tmp_path / "model", "[MASK]")

    name = "bert.encoder.layer.0.output.dense.weight"
    assert f"{name} [16, 32]" in fill(name)
    message = fill(name, np.ones((32, 16)))
    assert name in message and "[32, 16]" in message and "[16, 32]" in message
