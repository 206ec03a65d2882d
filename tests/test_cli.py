"""The command line: the verbs one after the other, and one clear line for a mistake."""

import json
import re
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prelm_jax.cli.main import main

EXPERIMENT = '''
"""A BERT of two seconds."""
from prelm_jax.data.pairs import PairsConfig
from prelm_jax.models.bert import BertConfig
from prelm_jax.pretraining import Run
from prelm_jax.tokenizers.wordpiece import WordPieceConfig
from prelm_jax.training.optimizer import AdamW
from prelm_jax.training.sharding import MeshConfig


def tiny():
    """As small as it gets."""
    return Run(
        corpus=("CORPUS",),
        held_out=0.3,
        tokenizer=WordPieceConfig(vocab_size=120),
        model=BertConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_position_embeddings=32),
        data=PairsConfig(max_length=32, max_predictions=4),
        optimizer=AdamW(learning_rate=1e-3, warmup_steps=3, decay_steps=100),
        batch_size=8,
        steps=2,
        mesh=MeshConfig(devices=1),
        evaluate_batches=1,
    )


def broken():
    return 1 / 0
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus, an experiment file, and the run and the model that came of it."""
    place = tmp_path_factory.mktemp("place")
    sentences = [
        f"The {a} {b} sees a {c}." for a in ("old", "new", "big") for b in ("cat", "dog") for c in ("hen", "cow")
    ]
    documents = ["\n".join(sentences[i : i + 4]) for i in range(0, len(sentences), 2)] * 3
    documents = [f"Number {i}.\n{document}" for i, document in enumerate(documents)]
    (place / "corpus.txt").write_text("\n\n".join(documents))
    (place / "tiny.py").write_text(EXPERIMENT.replace("CORPUS", str(place / "corpus.txt")))
    main(["pretrain", f"{place}/tiny.py:tiny", "--workdir", f"{place}/run", "--steps", "3"])
    main(["export", f"{place}/run", f"{place}/model"])
    gpt = [f"{Path(__file__).parent}/tiny.py:gpt", "--corpus", f"{place}/corpus.txt", "--steps", "3"]
    main(["pretrain", *gpt, "--workdir", f"{place}/gpt"])
    main(["export", f"{place}/gpt", f"{place}/gpt-model"])
    elmo = [f"{Path(__file__).parent}/tiny.py:elmo", "--corpus", f"{place}/corpus.txt", "--steps", "3"]
    main(["pretrain", *elmo, "--workdir", f"{place}/elmo"])
    main(["export", f"{place}/elmo", f"{place}/elmo-model"])
    (place / "lines.txt").write_text("The old cat sees a hen.\n\nA dog\n")
    return place


def complaint(capsys, *arguments) -> str:
    """The one line on stderr of a command that fails with exit code 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    assert stopped.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    mistakes = [line for line in lines if line.startswith("prelm: ")]
    assert mistakes == lines[-1:], "one line, and nothing after it"
    return mistakes[0]


def test_pretrain_prints_the_table_beside_baselines(place, capsys):
    main(["pretrain", f"{place}/tiny.py:tiny", "--workdir", f"{place}/run", "--steps", "3"])
    out = capsys.readouterr().out
    for part in ("masked lm loss", "unigram", "next sentence accuracy", "majority", "lengths only", "prelm export"):
        assert part in out


def test_prepare_tells_what_the_corpus_is_made_of(place, tmp_path, capsys):
    """And a training that prepares tells the same, once."""
    (tmp_path / "corpus.txt").write_text((place / "corpus.txt").read_text() + "\n\n" + "A dog. " * 20)
    arguments = [f"{place}/tiny.py:tiny", "--corpus", f"{tmp_path}/corpus.txt", f"{place}/corpus.txt", "--deduplicate"]
    main(["pretrain", *arguments, "--workdir", f"{tmp_path}/run"])
    told = capsys.readouterr().err
    main(["prepare", *arguments])
    table = capsys.readouterr().out
    assert table in told
    rows = {line[:26].strip(): line[26:].split() for line in table.splitlines()}
    documents = len((place / "corpus.txt").read_text().split("\n\n"))
    assert sum(int(number) for number in rows["documents"]) == documents + 1
    assert rows["duplicates, left out"][0] == str(documents)
    assert rows["longest word, characters"][0] == "6"
    assert len(rows["tokens in a document*"]) == 2 * 7
    main(["pretrain", *arguments, "--workdir", f"{tmp_path}/run"])
    assert "documents*" not in capsys.readouterr().err


def test_prepare_says_what_is_damaged(place, tmp_path, capsys, monkeypatch):
    """A start looks at sizes alone; preparing again reads it all."""
    monkeypatch.setenv("PRELM_CACHE", str(tmp_path))
    main(["prepare", f"{place}/tiny.py:tiny"])
    (ids,) = tmp_path.glob("stores/*/training/ids")
    content = bytearray(ids.read_bytes())
    content[0] ^= 1
    ids.write_bytes(content)
    message = complaint(capsys, "prepare", f"{place}/tiny.py:tiny")
    assert message == f"prelm: {ids} is damaged, its checksum is another: delete {ids.parents[1]} and run again"


def test_options_reach_the_run(place):
    record = json.loads((place / "run" / "run.json").read_text())
    assert record["circumstance"]["steps"] == 3
    assert record["model"]["num_layers"] == 1


@pytest.mark.parametrize("experiment", ["bert", "gpt", "elmo"])
def test_batch(place, capsys, monkeypatch, tmp_path, experiment):
    """What a step is trained on, as text: the same without a work directory, in colour on a terminal."""
    monkeypatch.chdir(tmp_path)
    arguments = ["batch", f"{Path(__file__).parent}/tiny.py:{experiment}", "--corpus", f"{place}/corpus.txt"]
    main([*arguments, "--step", "3", "--rows", "2"])
    out = capsys.readouterr().out
    assert len(re.findall("^row [01]", out, re.MULTILINE)) == 2 and "row 2" not in out
    assert "sees" in out and re.search(r"⟦\S+ → \S+⟧", out) and "\x1b" not in out
    main(arguments)
    assert capsys.readouterr().out.count("row ") == 4
    monkeypatch.setenv("FORCE_COLOR", "1")
    main([*arguments, "--step", "3", "--rows", "2"])
    coloured = capsys.readouterr().out
    assert coloured != out and re.sub(r"\x1b\[[0-9;]*m", "", coloured) == out
    assert not list(tmp_path.iterdir())


def test_evaluate(place, capsys):
    main(["evaluate", f"{place}/run"])
    on_held_out = capsys.readouterr().out
    main(["evaluate", f"{place}/run", "--corpus", f"{place}/corpus.txt"])
    assert "masked lm loss" in on_held_out
    assert capsys.readouterr().out != on_held_out


def test_the_model_card_tells_where_the_model_comes_from(place):
    card = (place / "model" / "README.md").read_text()
    assert "3 steps of 8 × 32 tokens" in card
    assert str(place / "corpus.txt") in card
    assert "library_name: transformers" in card
    assert "library_name: allennlp" in (place / "elmo-model" / "README.md").read_text()
    assert re.search(r"\| masked lm loss \| \d\.\d{4} \|", card)


@pytest.mark.parametrize("model", ["run", "model"])
def test_fill_score_embed_tokenize(place, model, tmp_path, capsys):
    """From a work directory and from a model directory alike."""
    main(["fill", f"{place}/{model}", "The old [MASK] sees a [MASK].", "--top-k", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [len(re.findall(r"\S+ 0\.\d{3}", line)) for line in lines] == [2, 2]

    main(["score", f"{place}/{model}", f"{place}/lines.txt"])
    scores = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [int(tokens) for _, tokens in scores][1:2] == [0]
    assert float(scores[0][0]) < float(scores[2][0]) < 0

    main(["embed", f"{place}/{model}", f"{place}/lines.txt", f"{tmp_path}/vectors.hdf5"])
    with h5py.File(tmp_path / "vectors.hdf5") as file:
        assert sorted(file) == ["0", "1", "2"]
        tokens = json.loads(file["0"].attrs["tokens"])
        assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]"
        assert file["0"].shape == (2, len(tokens), 16) and file["0"].dtype == np.float32
        assert file["1"].shape == (2, 0, 16)

    tokenizer = place / model / ("tokenizer" if model == "run" else ".")
    main(["tokenize", str(tokenizer), f"{place}/lines.txt"])
    ids = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ids[1] == [] and len(ids[0]) == len(tokens) - 2


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("wordpiece", ("--vocab-size", "90"), "WordPiece"),
        ("bpe", ("--num-merges", "40"), "BPE"),
        ("sentencepiece", ("--vocab-size", "60", "--model-type", "bpe"), "SentencePiece"),
        ("words", ("--vocab-size", "20"), "Words"),
    ],
)
def test_a_tokenizer_is_trained_and_inspected(place, kind, options, name, tmp_path, capsys):
    main(["tokenizer", "train", kind, f"{tmp_path}/it", "--corpus", f"{place}/corpus.txt", *options])
    assert re.search(r"wrote \S+: \d+ entries", capsys.readouterr().out)
    (tmp_path / "lines.txt").write_text("The old cat sees a hen.\nThe [old] ☃ dog ☃ ☃\n")
    main(["tokenizer", "inspect", f"{tmp_path}/it", f"{tmp_path}/lines.txt"])
    out = capsys.readouterr().out
    for part in (name, "special tokens", "longest entries", "bytes per token", "tokens per word", "The [old] ☃ dog"):
        assert part in out
    assert re.search(r"lower-cased +│ no" if kind == "words" else r"lower-cased +│ yes", out)
    main(["tokenizer", "inspect", f"{tmp_path}/it"])
    assert "bytes per token" not in capsys.readouterr().out


def test_mistakes_with_tokenizers(place, capsys, tmp_path):
    corpus = ("--corpus", place / "corpus.txt")
    assert "did you mean wordpiece?" in complaint(capsys, "tokenizer", "train", "wordpeice", tmp_path / "it", *corpus)
    assert "KIND DIRECTORY --corpus" in complaint(capsys, "tokenizer", "train")
    assert "did you mean tokenizer train?" in complaint(capsys, "tokenizer", "trian", "bpe")
    assert "--corpus" in complaint(capsys, "tokenizer", "train", "bpe", tmp_path / "it")
    assert "vocab_size=3 is too small" in complaint(
        capsys, "tokenizer", "train", "wordpiece", tmp_path / "it", *corpus, "--vocab-size", 3
    )
    assert "there is no tokenizer at" in complaint(capsys, "tokenizer", "inspect", tmp_path / "none")
    assert not (tmp_path / "it").exists()


def test_generate(place, capsys):
    """From a work directory and from a model directory alike."""

    def generate(prompt, model="gpt", seed=3) -> str:
        options = ["--max-tokens", "8", "--temperature", "0.8", "--top-k", "20", "--top-p", "0.9", "--seed", str(seed)]
        main(["generate", f"{place}/{model}", "--prompt", prompt, *options])
        return capsys.readouterr().out.removesuffix("\n")

    once = generate("The old cat")
    assert once.startswith("the old cat ")
    assert once == generate("The old cat", "gpt-model") != generate("The old cat", seed=4)
    longer = " ".join(["the old cat sees a hen ."] * 10)  # Than the window of 32: its end counts.
    assert generate(longer).startswith(longer)
    assert generate("The ☃ cat").startswith("the <unk>cat ")  # So does transformers write it.


def test_a_language_model_has_its_own_figures(place, capsys):
    main(["evaluate", f"{place}/gpt"])
    out = capsys.readouterr().out
    for part in ("lm loss", "unigram", "trigram", "perplexity", "bits per byte", "unknown tokens"):
        assert part in out


def test_elmo_embeds_with_options_of_its_own(place, capsys, tmp_path):
    """Lines that are blank, long, of long words, of emoji and Chinese; each alone, or going on from one before."""
    lines = ["The old cat sees a hen.", "", "猫 sees a 🐈", "x" * 200, "cat " * 3000, "The old cat sees a hen."]
    (tmp_path / "lines.txt").write_text("\n".join(lines))

    def embed(*options) -> list[np.ndarray]:
        main(["embed", f"{place}/elmo-model", f"{tmp_path}/lines.txt", f"{tmp_path}/vectors.hdf5", *options])
        with h5py.File(tmp_path / "vectors.hdf5") as file:
            return [file[str(i)][()] for i in range(len(lines))]

    alone, split, carried = embed(), embed("--tokenize"), embed("--state", "carry", "--batch-size", "5")
    assert [x.shape for x in alone] == [(3, n, 16) for n in (6, 0, 4, 1, 3000, 6)]
    assert split[0].shape == (3, 7, 16)
    np.testing.assert_array_equal(alone[0], alone[5])
    np.testing.assert_allclose(carried[0], alone[0], atol=1e-6)
    assert np.abs(carried[5] - alone[5]).max() > 1e-3
    arguments = (place / "model", tmp_path / "lines.txt", tmp_path / "vectors.hdf5", "--state", "warm")
    assert "--state: bert has no such option; leave it out" in complaint(capsys, "embed", *arguments)


def test_a_vocabulary_of_words_in_another_order(place, capsys, tmp_path):
    words = (place / "elmo" / "tokenizer" / "vocab.txt").read_text().split()
    (tmp_path / "vocab.txt").write_text("\n".join([*words[:3], *reversed(words[3:])]) + "\n")
    options = ("--corpus", place / "corpus.txt", "--workdir", tmp_path / "run", "--tokenizer.path")
    message = complaint(capsys, "pretrain", f"{Path(__file__).parent}/tiny.py:elmo", *options, tmp_path / "vocab.txt")
    assert "vocab.txt is not sorted by falling count, from which sampled softmax takes" in message


def test_a_family_without_that_verb(place, capsys):
    message = complaint(capsys, "fill", place / "gpt-model", "The [MASK].")
    assert message == f"prelm: {place}/gpt-model is a model of type openai-gpt, which cannot fill"
    message = complaint(capsys, "generate", place / "model", "--prompt", "The")
    assert message == f"prelm: {place}/model is a model of type bert, which cannot generate"


def test_gpt_without_enough_text(place, capsys, tmp_path):
    assert "the prompt is blank" in complaint(capsys, "generate", place / "gpt-model", "--prompt", " ")
    (tmp_path / "short.txt").write_text("A cat sees a hen.\n\nA dog.\n")
    options = ("--corpus", tmp_path / "short.txt", "--workdir", tmp_path / "run", "--tokenizer.num-merges", 0)
    message = complaint(capsys, "pretrain", f"{Path(__file__).parent}/tiny.py:gpt", *options)
    assert re.search(r"\d+ tokens to predict in \d documents do not fill a window of 32: give a larger corpus", message)


def test_mistakes_are_one_line_that_says_what_to_do(place, capsys, tmp_path):
    tiny = f"{place}/tiny.py:tiny"
    assert "did you mean pretrain?" in complaint(capsys, "pretrian", tiny)
    assert "did you mean tiny?" in complaint(capsys, "pretrain", f"{place}/tiny.py:tinny")
    assert "no such experiment file" in complaint(capsys, "pretrain", f"{place}/tinny.py:tiny")
    assert "--model.num-layers" in complaint(capsys, "pretrain", tiny, "--model.layers", "4")
    assert "invalid literal" in complaint(capsys, "pretrain", tiny, "--steps", "many")
    assert "--steps 0" in complaint(capsys, "pretrain", tiny, "--steps", "0")
    assert "there is no file" in complaint(capsys, "pretrain", tiny, "--corpus", f"{place}/none.txt")
    assert "not a work directory" in complaint(capsys, "evaluate", tmp_path)
    assert "neither a model directory" in complaint(capsys, "fill", tmp_path, "[MASK]")
    assert 'no "[MASK]"' in complaint(capsys, "fill", place / "model", "no mask here")
    assert "FILE.py:FUNCTION" in complaint(capsys, "pretrain")
    assert "prelm batch FILE.py:FUNCTION" in complaint(capsys, "batch", "--step", "1")
    assert "--step -1: steps are counted from 0" in complaint(capsys, "batch", tiny, "--step", "-1")
    assert "did you mean tiny?" in complaint(capsys, "batch", f"{place}/tiny.py:tinny")
    assert "FILE.py:FUNCTION" in complaint(capsys, "prepare")
    assert "--workdir" in complaint(capsys, "prepare", f"{place}/tiny.py:tiny", "--workdir", tmp_path)


def test_text_that_will_not_do(place, capsys, tmp_path):
    def pretrain(content: bytes, *options) -> str:
        (tmp_path / "text.txt").write_bytes(content)
        corpus = ("--corpus", tmp_path / "text.txt", "--workdir", tmp_path / "run")
        return complaint(capsys, "pretrain", f"{place}/tiny.py:tiny", *corpus, *options)

    assert pretrain(b"") == f"prelm: the corpus {tmp_path}/text.txt holds no text: give files with text in them"
    assert pretrain(b"A cat.\n\xff\n") == (
        f"prelm: {tmp_path}/text.txt is not UTF-8 at byte 7: convert the file, or read such bytes as U+FFFD with "
        "--errors replace"
    )
    one_document = b"The old cat sees a hen. The dog sees a cow.\n"
    message = pretrain(one_document)
    assert message.startswith("prelm: no next sentences in this corpus: 1 documents, 1 with two sentences or more")
    assert message.endswith("give a corpus of several documents, or --data.no-next-sentence")
    assert "held-out side: raise --held-out" in pretrain(one_document, "--data.no-next-sentence")


def test_numbers_that_do_not_fit_each_other(place, capsys, tmp_path):
    def pretrain(*options) -> str:
        return complaint(capsys, "pretrain", f"{place}/tiny.py:tiny", "--workdir", tmp_path / "run", *options)

    assert "vocab_size=3 is too small for the" in pretrain("--tokenizer.vocab-size", 3)
    assert "--model.vocab-size 20: the tokenizer has" in pretrain("--model.vocab-size", 20)
    message = (
        "--batch-size 6 cannot be divided into 1 micro-batches (--accumulate) for 4 devices: choose a multiple of 4"
    )
    assert message in pretrain("--batch-size", 6, "--mesh.devices", 4)
    assert "--batch-size 8 cannot be divided into 3 micro-batches" in pretrain("--accumulate", 3)
    assert "--model.num-heads 3 does not divide --model.hidden-size 16" in pretrain("--model.num-heads", 3)
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_work_directories_that_will_not_do(place, capsys, tmp_path, monkeypatch):
    tiny = f"{place}/tiny.py:tiny"
    message = complaint(capsys, "pretrain", tiny, "--workdir", place / "run", "--seed", 7, "--model.num-layers", 2)
    assert "holds another run, which differs in model.num_layers (1 there, 2 here), seed (0 there, 7 here)" in message
    file = place / "corpus.txt"
    assert complaint(capsys, "pretrain", tiny, "--workdir", file) == f"prelm: cannot write {file}: File exists"
    assert "cannot write" in complaint(capsys, "pretrain", tiny, "--workdir", file / "run")
    assert "cannot write" in complaint(capsys, "export", place / "run", file / "model")

    def refuse(path, *arguments):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("os.mkdir", refuse)
        message = complaint(capsys, "pretrain", tiny, "--workdir", tmp_path / "run")
    assert message == f"prelm: cannot write {tmp_path}/run: Permission denied"


def test_one_of_several_processes_needs_its_number(place, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    message = complaint(capsys, "pretrain", f"{place}/tiny.py:tiny", "--workdir", tmp_path / "run")
    assert "JAX_NUM_PROCESSES and JAX_PROCESS_ID do not make" in message and "'two'" in message


def test_what_a_newer_version_wrote(place, capsys, tmp_path):
    for name, old, new in [("run.json", '"format": 1', '"format": 2'), ("checkpoints/3/_CHECKPOINT_METADATA", "", "")]:
        shutil.copytree(place / "run", tmp_path / "run", dirs_exist_ok=True)
        file = tmp_path / "run" / name
        content = file.read_text()
        file.write_text(content.replace(old, new) if old else re.sub(r'"format": ?2', '"format": 3', content))
        assert file.read_text() != content
        assert "upgrade" in complaint(capsys, "fill", tmp_path / "run", "[MASK]")
        assert "upgrade" in complaint(
            capsys, "pretrain", f"{place}/tiny.py:tiny", "--workdir", tmp_path / "run", "--steps", 3
        )


def test_models_that_are_not_whole(place, capsys, tmp_path):
    file = tmp_path / "model" / "model.safetensors"

    def fill(name, tensor=None) -> str:
        shutil.copytree(place / "model", tmp_path / "model", dirs_exist_ok=True)
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors if tensor is None else tensors | {name: tensor}, file)
        return complaint(capsys, "fill", tmp_path / "model", "[MASK]")

    name = "bert.encoder.layer.0.output.dense.weight"
    assert f"no tensor {name} [16, 32]" in fill(name)
    assert f"tensor {name} is [32, 16], but config.json asks for [16, 32]" in fill(name, np.ones((32, 16)))


def test_an_experiment_that_raises_shows_its_own_traceback(place):
    with pytest.raises(ZeroDivisionError):
        main(["pretrain", f"{place}/tiny.py:broken"])


def test_plan(place, capsys):
    tiny = f"{place}/tiny.py:tiny"
    main(["plan", tiny, "--topology", "local", "--json", "--batch-size", "4"])
    planned = json.loads(capsys.readouterr().out)
    assert planned["batch_size"] == 4 and planned["tokens"] == 4 * 32 and planned["bound"] == "compute"
    main(["plan", tiny, "--topology", "local"])
    out = capsys.readouterr().out
    assert all(word in out for word in ("memory", "parameters", "compute", "MFU", "days"))
    assert "--topology v5e:5x5: not one of v4:{2x2x1," in complaint(capsys, "plan", tiny, "--topology", "v5e:5x5")
    assert "--mesh.devices 9: there are 8" in complaint(
        capsys, "plan", tiny, "--topology", "local", "--mesh.devices", 9
    )
    assert "usage: prelm plan FILE.py:FUNCTION" in complaint(capsys, "plan")


def test_help(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    assert all(
        verb in out
        for verb in (
            "pretrain",
            "plan",
            "batch",
            "evaluate",
            "export",
            "tokenize",
            "embed",
            "score",
            "fill",
            "generate",
        )
    )
    with pytest.raises(SystemExit) as stopped:
        main(["score", "--help"])
    assert stopped.value.code == 0
    assert "log-probability" in capsys.readouterr().out


def test_python_m_prelm_jax(monkeypatch, capsys):
    import runpy

    monkeypatch.setattr(sys, "argv", ["prelm", "--help"])
    runpy.run_module("prelm_jax", run_name="__main__")
    assert "pretrain" in capsys.readouterr().out
