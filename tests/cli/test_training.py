"""pretrain, evaluate, export, prepare, batch, plan; and the mistakes one makes with them."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import tiny

from prelm_jax.cli.main import main
from prelm_jax.errors import InputError
from prelm_jax.planning import plan as planning

TINY = tiny.__file__


def test_pretrain_prints_metrics_next_to_baselines(folder, tmp_path, capsys):
    """Also when no step is left."""
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    main(["pretrain", f"{folder}/tiny.py:tiny", "--workdir", str(run), "--steps", "3"])
    out = capsys.readouterr().out
    for part in ("masked lm loss", "unigram", "next sentence accuracy", "majority", "lengths only"):
        assert part in out
    for command in (f"prelm export {run} DIRECTORY", f"prelm fill {run} "):
        assert f"\n  {command}" in out
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.isdecimal()] == ["3"]


def test_the_default_work_directory(folder, tmp_path, monkeypatch, capsys):
    """runs/FILE-NAME in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_file.py").write_text((folder / "tiny.py").read_text().replace("def tiny", "def very_tiny"))
    main(["pretrain", "my_file.py:very_tiny", "--steps", "1"])
    assert (tmp_path / "runs" / "my-file-very-tiny" / "run.json").is_file()
    assert "The run is in runs/my-file-very-tiny." in capsys.readouterr().out


def test_prepare_prints_statistics_of_the_corpus(folder, tmp_path, capsys):
    """A training that prepares prints the same, once."""
    (tmp_path / "corpus.txt").write_text((folder / "corpus.txt").read_text() + "\n\n" + "A dog. " * 20 + "\n\na")
    sources = [f"{tmp_path}/corpus.txt", f"{folder}/corpus.txt"]
    arguments = [f"{folder}/tiny.py:tiny", "--corpus", *sources, "--deduplicate", "--steps", "1"]
    main(["pretrain", *arguments, "--workdir", f"{tmp_path}/run"])
    printed = capsys.readouterr().err
    main(["prepare", *(argument for argument in arguments)])
    table = capsys.readouterr().out
    assert table in printed
    record = json.loads((tmp_path / "run" / "run.json").read_text())["statistics"]
    for name, of in (("documents of one sentence, %", "documents"), ("sentences of one token, %", "sentences")):
        (row,) = [line for line in table.splitlines() if name in line]
        shares = record[name]
        assert [float(x) for x in re.findall(r"\d+\.\d", row)] == shares
        assert round(sum(x * number for x, number in zip(shares, record[of], strict=True))) == pytest.approx(100, abs=2)
    main(["prepare", *arguments, "--errors", "replace", "--held-out", "0.5"])  # A new store: printed once, too.
    assert "documents" not in capsys.readouterr().err
    counts = next(line for line in table.splitlines() if re.match(r"\W*documents\b", line))
    documents = len((folder / "corpus.txt").read_text().split("\n\n"))
    assert sum(map(int, re.findall(r"\d+", counts))) == documents + 2
    assert re.search(rf"\bduplicates\b.*\b{documents}\b", table)
    main(["pretrain", *arguments, "--workdir", f"{tmp_path}/run"])
    assert "duplicates" not in capsys.readouterr().err


def test_damage_of_the_cache_is_mended(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PRELM_CACHE", str(tmp_path))
    main(["prepare", f"{folder}/tiny.py:tiny"])
    (ids,) = tmp_path.glob("stores/*/training/ids")
    (vocabulary,) = tmp_path.glob("vocabularies/*.txt")
    contents = {path: path.read_bytes() for path in (ids, vocabulary)}
    printed = capsys.readouterr().out
    ids.write_bytes(bytes([contents[ids][0] ^ 1]) + contents[ids][1:])
    vocabulary.write_bytes(contents[vocabulary].replace(b'"the"', b'"teh"'))
    main(["prepare", f"{folder}/tiny.py:tiny"])
    out, err = capsys.readouterr()
    assert f"{ids} is damaged" in err and out == printed
    assert contents == {path: path.read_bytes() for path in contents}


@pytest.mark.parametrize("experiment", ["bert", "gpt", "elmo"])
def test_batch(folder, capsys, monkeypatch, tmp_path, experiment):
    """A training batch as text, without a work directory; in color on a terminal."""
    monkeypatch.chdir(tmp_path)
    arguments = ["batch", f"{TINY}:{experiment}", "--corpus", f"{folder}/corpus.txt"]
    main([*arguments, "--step", "3", "--rows", "2"])
    out = capsys.readouterr().out
    assert len(re.findall("^row [01]", out, re.MULTILINE)) == 2 and "row 2" not in out
    assert "sees" in out and re.search(r"⟦\S+ → \S+⟧", out) and "\x1b" not in out
    main(arguments)
    assert capsys.readouterr().out.count("row ") == 4
    monkeypatch.setenv("FORCE_COLOR", "1")
    main([*arguments, "--step", "3", "--rows", "2"])
    colored = capsys.readouterr().out
    assert colored != out and re.sub(r"\x1b\[[0-9;]*m", "", colored) == out
    assert not list(tmp_path.iterdir())


def test_evaluate(folder, capsys, fails):
    """The step of the weights, the part of the text and the number of targets are printed with the figures."""
    evaluate = ["evaluate", f"{folder}/run", "--mesh.devices", "1"]
    main(evaluate)
    held_out = capsys.readouterr().out
    assert "step 3, all of the text" in held_out and re.search(r"masked lm loss .* [\d,]+ +│\n", held_out)
    main([*evaluate, "--step", "3", "--batch-size", "3"])
    assert capsys.readouterr().out == held_out
    main([*evaluate, "--corpus", f"{folder}/corpus.txt"])
    assert capsys.readouterr().out != held_out
    main([*evaluate, "--sample", "0.3"])
    assert re.search(r"step 3, [23]\d\.\d\d% of the text", capsys.readouterr().out)
    for option, value in (("--sample", "0"), ("--batch-size", "0"), ("--mesh.devices", "9")):
        assert f"{option} {value}" in fails(*evaluate, option, value)


def test_evaluate_by_experiment(folder, capsys, fails):
    """For a model from outside of the package, whose classes only its experiment knows."""
    main(["evaluate", f"{folder}/gpt"])
    by_record = capsys.readouterr().out
    main(["evaluate", f"{TINY}:gpt", "--workdir", f"{folder}/gpt"])  # The options of the training are in run.json.
    assert capsys.readouterr().out == by_record
    assert "--workdir" in fails("evaluate", f"{folder}/tiny.py:tiny")
    assert "Did you mean tiny?" in fails("evaluate", f"{folder}/tiny.py:tinny", "--workdir", folder / "run")
    message = fails("evaluate", f"{folder}/tiny.py:tiny", "--workdir", folder / "gpt")
    assert f"{folder}/gpt" in message and "openai-gpt" in message


@pytest.mark.parametrize(("word", "step"), [("best", "best"), ("2", 2), (None, "newest")])
def test_steps_reach_evaluate_and_export(folder, monkeypatch, word, step):
    received = []

    def record(*arguments):
        received.append(arguments)
        raise InputError("enough")

    monkeypatch.setattr("prelm_jax.pretraining.evaluate", record)
    monkeypatch.setattr("prelm_jax.pretraining.export", record)
    option = [] if word is None else ["--step", word]
    for arguments in (
        ["evaluate", "gs://somewhere"],
        ["evaluate", f"{TINY}:bert", "--workdir", "somewhere", "--corpus", "a", "b"],
        ["export", "somewhere", "there"],
    ):
        with pytest.raises(SystemExit):
            main([*arguments, *option])
    assert received == [
        ("gs://somewhere", (), step, None, 1.0, None, None),
        ("somewhere", ("a", "b"), step, tiny.bert(), 1.0, None, None),
        ("somewhere", Path("there"), None if word is None else step, False),
    ]


def test_a_language_model_is_evaluated_in_its_own_units(folder, capsys):
    main(["evaluate", f"{folder}/gpt"])
    out = capsys.readouterr().out
    for part in ("lm loss", "unigram", "trigram", "perplexity", "bits per byte", "unknown tokens"):
        assert part in out


def test_the_model_card_says_where_the_model_comes_from(folder):
    card = (folder / "model" / "README.md").read_text()
    assert "3 steps of 8 × 32 tokens" in card
    assert str(folder / "corpus.txt") in card
    assert f"Command: `prelm {shlex.join(sys.argv[1:])}`" in card
    assert "library_name: transformers" in card
    assert "library_name: allennlp" in (folder / "elmo-model" / "README.md").read_text()
    assert re.search(r"\| masked lm loss \| \d\.\d{4} \|", card)


def test_plan(folder, capsys, fails, monkeypatch):
    tiny = f"{folder}/tiny.py:tiny"
    compiled, compile_step = {}, planning.compile_step

    def compile_once(run, mesh, work):
        if (run, mesh) not in compiled:
            compiled[run, mesh] = compile_step(run, mesh, work)
        return compiled[run, mesh]

    monkeypatch.setattr(planning, "compile_step", compile_once)
    main(["plan", tiny, "--topology", "local", "--json", "--batch-size", "4"])
    planned = json.loads(capsys.readouterr().out)
    assert planned["batch_size"] == 4 and planned["tokens"] == 4 * 32 and planned["bound"] == "compute"
    main(["plan", tiny, "--topology", "local", "--batch-size", "4"])
    out = capsys.readouterr().out
    assert all(word in out for word in ("memory", "parameters", "compute", "MFU", "days"))
    assert "--topology v5e:5x5" in fails("plan", tiny, "--topology", "v5e:5x5")
    assert "--mesh.devices 9" in fails("plan", tiny, "--topology", "local", "--mesh.devices", 9)
    assert "--topology must be given" in fails("plan", tiny)


def test_mistakes_in_options(folder, fails, tmp_path):
    tiny = f"{folder}/tiny.py:tiny"
    assert "'many'" in fails("pretrain", tiny, "--steps", "many")
    assert "--steps 0" in fails("pretrain", tiny, "--steps", "0")
    assert f"{folder}/none.txt" in fails("pretrain", tiny, "--corpus", f"{folder}/none.txt")
    assert f"{tmp_path}" in fails("evaluate", tmp_path)
    assert "--step -1" in fails("batch", tiny, "--step", "-1")
    assert "--rows -1" in fails("batch", tiny, "--rows", "-1")
    assert "--workdir" in fails("prepare", tiny, "--workdir", tmp_path)


def test_corpora_that_cannot_be_used(folder, fails, tmp_path):
    def pretrain(content: bytes, *options) -> str:
        (tmp_path / "text.txt").write_bytes(content)
        corpus = ("--corpus", tmp_path / "text.txt", "--workdir", tmp_path / "run")
        return fails("pretrain", f"{folder}/tiny.py:tiny", *corpus, *options)

    assert f"{tmp_path}/text.txt" in pretrain(b"")
    message = pretrain(b"A cat.\n\xff\n")
    assert f"{tmp_path}/text.txt" in message and "byte 7" in message and "--errors replace" in message
    one_document = b"The old cat sees a hen. The dog sees a cow.\n"
    message = pretrain(one_document, "--held-out", 0)
    assert "1 documents, 1 with two sentences" in message and "--data.no-next-sentence" in message


@pytest.mark.parametrize("experiment", ["bert", "gpt", "elmo"])
@pytest.mark.parametrize(
    ("documents", "fraction", "parts"),
    [
        (1, 0.05, ["is one document", "text.txt,documents=line", "--validation", "--held-out 0"]),
        (1, 0.99, ["is one document", "text.txt,documents=line", "--validation", "--held-out 0"]),
        (4, 1e-9, ["4 documents", "none is held out", "--held-out 1e-09", "--validation", "--held-out 0"]),
        (4, 0.999999, ["4 documents", "none is left to train on", "--held-out 0.999999"]),
    ],
)
def test_a_corpus_that_the_fraction_held_out_does_not_split(fails, tmp_path, experiment, documents, fraction, parts):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Document {i} sees a hen.\nThe dog sees a cow." for i in range(documents)))
    options = ("--corpus", text, "--workdir", tmp_path / "run", "--held-out", fraction)
    message = fails("pretrain", f"{TINY}:{experiment}", *options)
    for part in [*parts, str(text)]:
        assert part in message
    assert not (tmp_path / "run").exists()


def test_a_text_to_evaluate_on_that_is_too_small(folder, fails, tmp_path):
    """A message of the batches says which side it is about, and which option gives another."""
    (tmp_path / "one.txt").write_text("A cat sees a hen. The dog sees a cow.")
    options = ("--validation", tmp_path / "one.txt", "--workdir", tmp_path / "run")
    message = fails("pretrain", f"{folder}/tiny.py:tiny", *options)
    assert "the text to evaluate on" in message and "1 documents" in message and "another with --validation" in message


@pytest.mark.slow
def test_a_corpus_of_one_document_that_is_cut(bert_folder, fails, tmp_path, capsys):
    """What the message proposes works: lines as documents, a validation text, everything to train on."""
    (tmp_path / "text.txt").write_text(
        "\n".join((bert_folder / "corpus.txt").read_text().split("\n\n")[0].split("\n") * 5)
    )
    text, validation = f"{tmp_path}/text.txt", f"{bert_folder}/corpus.txt"
    command = ["pretrain", f"{bert_folder}/tiny.py:tiny", "--data.no-next-sentence", "--steps", "1"]
    command += ["--tokenizer.path", f"{bert_folder}/run/tokenizer", "--corpus"]
    assert f"{text} is one document" in fails(*command, text, "--workdir", tmp_path / "none")
    main([*command, f"{text},documents=line", "--workdir", str(tmp_path / "lines")])
    main([*command, text, "--validation", validation, "--workdir", str(tmp_path / "validation")])
    assert "masked lm loss" in capsys.readouterr().out
    main([*command, text, "--held-out", "0", "--workdir", str(tmp_path / "all")])
    out = capsys.readouterr().out
    assert "masked lm loss" not in out and "nothing is held out" in out and "--extend-to" in out
    assert "--corpus" in fails("evaluate", tmp_path / "all")


def test_an_extension_ends_later(folder, fails):
    options = ("--workdir", folder / "run", "--extend-to", 3)
    assert "--extend-to 3: the run is at step 3" in fails("pretrain", f"{folder}/tiny.py:tiny", *options)


@pytest.mark.slow
def test_extending_by_the_command(bert_folder, tmp_path, capsys, monkeypatch):
    """The hint at the end of a training tells how; the card lists both commands."""
    monkeypatch.setattr(sys, "argv", ["prelm", "pretrain"])
    run, command = tmp_path / "run", ["pretrain", f"{bert_folder}/tiny.py:tiny", "--steps", "3", "--workdir"]
    shutil.copytree(bert_folder / "run", run)
    main([*command, str(run), "--extend-to", "4"])
    assert "--extend-to" in capsys.readouterr().out
    main([*command, str(run)])
    assert "steps 4 to 4" in capsys.readouterr().err
    main(["export", str(run), str(tmp_path / "model")])
    card = (tmp_path / "model" / "README.md").read_text()
    assert "step 4 of the run" in card and "after step 4:" in card
    assert "From step 3: `prelm" in card


def test_a_corpus_too_short_for_a_window(folder, fails, tmp_path):
    (tmp_path / "short.txt").write_text("A cat sees a hen.\n\nA dog.\n")
    options = ("--corpus", tmp_path / "short.txt", "--held-out", 0, "--tokenizer.num-merges", 0)
    message = fails("pretrain", f"{TINY}:gpt", *options, "--workdir", tmp_path / "run")
    assert re.search(r"\d+ tokens .* \d documents .* 32\b", message)


def test_an_unsorted_vocabulary_of_words(folder, fails, tmp_path):
    words = (folder / "elmo" / "tokenizer" / "vocab.txt").read_text().split()
    (tmp_path / "vocab.txt").write_text("\n".join([*words[:3], *reversed(words[3:])]) + "\n")
    options = ("--corpus", folder / "corpus.txt", "--workdir", tmp_path / "run", "--tokenizer.path")
    message = fails("pretrain", f"{TINY}:elmo", *options, tmp_path / "vocab.txt")
    assert f"{tmp_path}/vocab.txt" in message and "sorted" in message


def test_numbers_that_do_not_fit_each_other(folder, fails, tmp_path):
    def pretrain(*options) -> str:
        return fails("pretrain", f"{folder}/tiny.py:tiny", "--workdir", tmp_path / "run", *options)

    assert re.search("vocab[_-]size[= ]3 ", pretrain("--tokenizer.vocab-size", 3))
    assert "--model.vocab-size 20: " in pretrain("--model.vocab-size", 20)
    message = pretrain("--batch-size", 6, "--mesh.devices", 4)
    assert "--batch-size 6" in message and "4 devices" in message and "multiple of 4" in message
    message = pretrain("--accumulate", 3)
    assert "--batch-size 8" in message and "3 micro-batches (--accumulate)" in message
    assert "token_types go up to 1, but the model's type_vocab_size is 1" in pretrain("--model.type-vocab-size", 1)
    assert "--model.num-heads 3: must divide the hidden size, 16" in pretrain("--model.num-heads", 3)
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_work_directories_that_cannot_be_used(folder, fails, tmp_path, monkeypatch):
    tiny = f"{folder}/tiny.py:tiny"
    message = fails("pretrain", tiny, "--workdir", folder / "run", "--seed", 7, "--model.num-layers", 2)
    assert "model.num_layers (1 there, 2 here)" in message and "seed (0 there, 7 here)" in message
    file = folder / "corpus.txt"
    assert f"cannot write {file}" in fails("pretrain", tiny, "--workdir", file)
    assert "cannot write" in fails("pretrain", tiny, "--workdir", file / "run")
    assert "cannot write" in fails("export", folder / "run", file / "model")
    for inside in ("model", "checkpoints/model", "checkpoints/3", "."):
        assert f"{folder}/run" in fails("export", folder / "run", folder / "run" / inside)
    assert not (folder / "run/model").exists() and not (folder / "run/checkpoints/model").exists()

    def refuse(path, *arguments):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("os.mkdir", refuse)
        message = fails("pretrain", tiny, "--workdir", tmp_path / "run")
    assert f"cannot write {tmp_path}/run" in message


def test_a_refused_start_leaves_the_directory_to_the_mended_command(folder, fails, tmp_path):
    """Also in a directory that another run claimed, and that holds no checkpoint."""
    command = ("pretrain", f"{folder}/tiny.py:tiny", "--workdir", tmp_path / "run", "--steps", 1)
    for model in (tmp_path / "absent", folder / "corpus.txt"):
        assert str(model) in fails(*command, "--init-from", model)
    assert not (tmp_path / "run").exists()
    main([str(argument) for argument in command])
    assert (tmp_path / "run/checkpoints/1").is_dir()


def test_an_export_leaves_the_model_that_the_run_started_from(folder, fails, tmp_path):
    for name in ("run", "model"):
        shutil.copytree(folder / name, tmp_path / name)
    record = json.loads((tmp_path / "run/run.json").read_text())
    record["identity"]["init_from"] = str(tmp_path / "model")
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert f"{tmp_path}/model" in fails("export", tmp_path / "run", tmp_path / "model")
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_one_of_several_processes_needs_its_number(folder, fails, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    message = fails("pretrain", f"{folder}/tiny.py:tiny", "--workdir", tmp_path / "run")
    assert "JAX_NUM_PROCESSES" in message and "JAX_PROCESS_ID" in message and "'two'" in message


def test_directories_of_a_newer_version(folder, fails, tmp_path):
    for name in ("run.json", "checkpoints/3/_CHECKPOINT_METADATA"):
        shutil.copytree(folder / "run", tmp_path / "run", dirs_exist_ok=True)
        file = tmp_path / "run" / name
        content = file.read_text()
        file.write_text(re.sub(r'"format": ?\d+', '"format": 99', content))
        assert file.read_text() != content
        assert "version of prelm_jax" in fails("fill", tmp_path / "run", "[MASK]")
        options = ("--workdir", tmp_path / "run", "--steps", 3)
        assert "version of prelm_jax" in fails("pretrain", f"{folder}/tiny.py:tiny", *options)
