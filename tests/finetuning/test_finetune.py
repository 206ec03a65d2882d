"""Fine-tuning from labelled files to an exported model, in a small world."""

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny

from prelm_jax import load
from prelm_jax.cli.main import main
from prelm_jax.data.examples import Columns
from prelm_jax.data.tasks import TaskBatches
from prelm_jax.errors import InputError
from prelm_jax.finetuning import finetune
from prelm_jax.finetuning.config import FineTuning
from prelm_jax.finetuning.metrics import Score
from prelm_jax.finetuning.predictions import read_predictions
from prelm_jax.finetuning.results import read_results, write_results
from prelm_jax.finetuning.task import prepare_task
from prelm_jax.models.heads import Choice, Label, Span, Tags
from prelm_jax.training.checkpoint import Checkpoints
from prelm_jax.training.loop import LoopConfig
from prelm_jax.training.optimizer import AdamW
from prelm_jax.training.parameters import path_name
from prelm_jax.training.sharding import MeshConfig

OPTIONS = [
    *("--batch-size", "4", "--epochs", "2", "--max-length", "64", "--optimizer.learning-rate", "1e-2"),
    *("--save-every", "5", "--log-every", "1", "--mesh.devices", "1", "--seeds", "1"),
]


def sentence(rng, most=9):
    return " ".join(rng.choices(tiny.WORDS, k=rng.randint(2, most)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny BERT, and files whose label is whether there is a cat; some examples are longer than 32 tokens."""
    folder = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    for name, number in (("train", 24), ("dev", 7)):
        texts = [sentence(rng, 45 if i % 8 == 3 else 9) + (" cat" if i % 2 else " dog") for i in range(number)]
        lines = [f"{text}\t{'yes' if 'cat' in text.split() else 'no'}\n" for text in texts]
        (folder / f"{name}.tsv").write_text("text\tlabel\n" + "".join(lines) + "the house\tno\nthe cat\tyes\n")
    tiny.directory(folder / "bert", "bert", max_position_embeddings=64)
    return folder


def arguments(world, workdir, *more):
    files = ["--init-from", world / "bert", "--train", world / "train.tsv", "--dev", world / "dev.tsv"]
    return [str(x) for x in ("finetune", "finetuning:classify", *files, "--workdir", workdir, *OPTIONS, *more)]


@pytest.fixture(scope="module")
def compiled():
    """The names of the programs that were compiled, or taken from the cache, so far in this module."""
    names = []

    def listen(event, duration, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return names


def programs(names):
    """How many programs of names are train steps, and how many are evaluation steps."""
    return tuple(sum(part in name for name in names) for part in ("train_step", "predict"))


@pytest.fixture(scope="module")
def trained(world, compiled):
    """The directory above two seeds of 13 steps, two epochs; neither seed compiles in the second one."""
    marks = [len(compiled)]
    for seeds in ("1", "2"):
        with tiny.interruption(7, lambda: marks.append(len(compiled))):
            main(arguments(world, world / "whole", "--seeds", seeds))
        marks.append(len(compiled))
    found = [programs(compiled[a:b]) for a, b in itertools.pairwise(marks)]
    assert min(found[0]) >= 2 and max(*found[0], *found[2]) <= 6, "train and evaluation steps of several widths"
    assert found[1] == found[3] == (0, 0)
    return world / "whole"


def test_results_and_predictions(world, trained):
    results = read_results(trained)
    assert [(each.seed, each.step, each.evaluations) for each in results.seeds] == [(0, 13, 2), (1, 13, 2)]
    assert results.labels == ("no", "yes") and results.metric == "accuracy" and results.task == "classify"
    assert (results.train_examples, results.dev_examples) == (26, 9)
    for each in results.seeds:
        predictions = read_predictions(trained / f"seed-{each.seed}" / "predictions.jsonl")
        right = [x.gold == x.prediction for x in predictions]
        assert [x.id for x in predictions] == [str(i) for i in range(9)]
        np.testing.assert_allclose(each.scores["accuracy"].value, np.mean(right))
        assert all(max(x.probabilities, key=x.probabilities.get) == x.prediction for x in predictions)
    lines = tiny.metrics(trained / "seed-0")
    evaluations = [line for line in lines if "evaluation/accuracy" in line]
    assert [line["step"] for line in evaluations] == [7, 13]
    assert evaluations[-1]["evaluation/accuracy"] == results.seeds[0].scores["accuracy"].value
    assert '"baseline/accuracy/' in (trained / "seed-0" / "metrics.jsonl").read_text()
    first = [next(line["train/loss"] for line in tiny.metrics(trained / f"seed-{seed}")) for seed in range(2)]
    assert first[0] != first[1]


@pytest.mark.usefixtures("shared_programs")
def test_an_end_in_the_middle_of_an_epoch_changes_no_bit(world, trained, tmp_path, monkeypatch):
    """After SIGTERM at step 9, which saves, and from what SIGKILL would leave there, an earlier checkpoint.

    Steps have both widths; an epoch has 6 and a half. A kill while a checkpoint is being written: kill_runs.py.
    """
    stopped, killed, saving, save = tmp_path / "stopped", tmp_path / "killed", [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, *rest: saving.append(self) or save(self, *rest))

    def stop():
        saving[-1].wait()
        shutil.copytree(stopped, killed)
        os.kill(os.getpid(), signal.SIGTERM)

    with tiny.interruption(9, stop), pytest.raises(SystemExit) as ended:
        main(arguments(world, stopped))
    assert ended.value.code == 75 and not (stopped / "results.json").exists()
    steps = {path: [int(x.name) for x in (path / "seed-0/checkpoints").glob("[0-9]*")] for path in (stopped, killed)}
    assert 0 < max(steps[killed]) < 9 <= max(steps[stopped]) < 13
    for path in (stopped, killed):
        main(arguments(world, path))
        assert tiny.newest_checkpoint(path / "seed-0")[0] == 13
        tiny.assert_same_bits(path / "seed-0", trained / "seed-0")


def test_complete_seeds_are_skipped(world, trained, monkeypatch, capsys):
    before = (trained / "results.json").read_text()
    monkeypatch.setattr(finetune, "train", lambda *_: pytest.fail("trained again"))
    main(arguments(world, trained, "--seeds", "2"))
    assert (trained / "results.json").read_text() == before
    assert "accuracy" in capsys.readouterr().out


def test_a_seed_that_stopped_early_is_complete(world, tmp_path, monkeypatch):
    early = ("--epochs", "6", "--evaluate-every", "1", "--stop-after-no-gain", "1")
    main(arguments(world, tmp_path / "run", *early))
    (before,) = read_results(tmp_path / "run").seeds
    assert 1 < before.step < 39
    monkeypatch.setattr(finetune, "train", lambda *_, **__: pytest.fail("trained again"))
    main(arguments(world, tmp_path / "run", *early))
    with pytest.raises(pytest.fail.Exception):  # There is something left to train.
        main(arguments(world, tmp_path / "run", *early[:-1], "9"))


def test_another_metric_or_positive_label_needs_no_training(world, trained, tmp_path, monkeypatch):
    """The seeds that are done are measured again, from their predictions; the first command gives the first results."""
    run = shutil.copytree(trained, tmp_path / "run")
    before = (run / "results.json").read_text()
    monkeypatch.setattr(finetune, "train", lambda *_: pytest.fail("trained again"))
    for positive in ("yes", "no"):
        main(arguments(world, run, "--metric", "f1", "--positive", positive))  # --seeds 1 leaves the other seed there.
        results = read_results(run)
        assert results.metric == "f1" and [each.seed for each in results.seeds] == [0, 1]
        for each in results.seeds:
            predictions = read_predictions(run / f"seed-{each.seed}" / "predictions.jsonl")
            right = sum(x.gold == x.prediction == positive for x in predictions)
            read = sum((x.gold == positive) + (x.prediction == positive) for x in predictions)
            np.testing.assert_allclose(each.scores["f1"].value, 2 * right / read)
    main(arguments(world, run, "--seeds", "2"))
    assert (run / "results.json").read_text() == before


def test_results_are_of_one_task(world, trained, tmp_path, capsys):
    """Any seed of another task is refused, and a seed whose directory is gone has no result."""
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run / "seed-0")
    with pytest.raises(SystemExit):
        main(arguments(world, run, "--batch-size", "8"))
    assert f"{run}/seed-1 " in capsys.readouterr().err.splitlines()[-1] and not (run / "seed-0").exists()
    task = prepare_task(make(world))
    assert [each.seed for each in finetune._done(task, run, task.baselines().keys())] == [1]
    (run / "seed-1/predictions.jsonl").unlink()  # The same command evaluates it again.
    assert not finetune._done(task, run, task.baselines().keys())
    (run / "results.json").write_text("{")
    with pytest.raises(InputError, match=rf"{run}/results.json .*delete it"):
        finetune._done(task, run, task.baselines().keys())


def test_what_is_said_about_files_and_results(world, trained, tmp_path, capsys):
    """Examples that are in both files, and that no seed is above the baseline."""
    shutil.copy(world / "train.tsv", tmp_path / "dev.tsv")
    prepare_task(make(world, dev=f"{tmp_path}/dev.tsv"))
    assert f"{tmp_path}/dev.tsv: 26 of its examples " in capsys.readouterr().err
    run = shutil.copytree(trained, tmp_path / "run")
    results = read_results(run)
    for value, found in ((0.0, True), (1.0, False)):
        seeds = [dataclasses.replace(x, scores=x.scores | {"accuracy": Score(value, 0.1)}) for x in results.seeds]
        write_results(run, dataclasses.replace(results, seeds=tuple(seeds)))
        main(arguments(world, run, "--seeds", "2"))
        assert ("--optimizer.learning-rate" in capsys.readouterr().out) == found


def test_another_task_in_the_directory_is_refused(world, trained, capsys):
    for option in ("--batch-size 8", "--optimizer.weight-decay 0.5", "--head.dropout 0.3", "--max-length 32"):
        with pytest.raises(SystemExit):
            main(arguments(world, trained, "--seeds", "2", *option.split()))
        error = capsys.readouterr().err.splitlines()[-1]
        assert str(trained / "seed-0") in error and option.split()[0].lstrip("-").replace("-", "_") in error


def test_export_and_use(world, trained, tmp_path, capsys):
    """The exported median seed and the work directory predict what the evaluation predicted."""
    main(["export", str(trained), str(tmp_path / "model")])
    median = read_results(trained).median_seed().seed
    assert f"seed {median}" in capsys.readouterr().out
    lines = (world / "dev.tsv").read_text().splitlines()[1:]
    texts = [line.partition("\t")[0] for line in lines]
    expected = read_predictions(trained / f"seed-{median}" / "predictions.jsonl")
    for source in (tmp_path / "model", trained / f"seed-{median}"):
        found = load(source).classify(texts)
        assert [each.label for each in found] == [each.prediction for each in expected]
        for each, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(each.probabilities, list(other.probabilities.values()), atol=1e-5)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "model-index" in card and "library_name: transformers" in card
    for source in (trained, tmp_path / "model"):  # Of all seeds the median.
        main(["evaluate", str(source), "--test", f"{world}/dev.tsv", "--predictions", str(tmp_path / "again.jsonl")])
        assert [(x.id, x.prediction) for x in read_predictions(tmp_path / "again.jsonl")] == [
            (x.id, x.prediction) for x in expected
        ]
        row = next(line for line in capsys.readouterr().out.splitlines() if "accuracy" in line)
        score, labels = read_results(trained).median_seed().scores["accuracy"], [line.split("\t")[1] for line in lines]
        baseline = max(map(labels.count, labels)) / len(labels)
        assert f" {100 * score.value:.1f} " in row and f" {100 * score.error:.1f} " in row
        assert f"best constant {100 * baseline:.1f}" in row
    for options, expected in ((("--seed", "7"), "--seed 7"), ((), f"({trained})")):
        source = trained if options else trained / "seed-0"  # The directory of a seed: the one above is named.
        with pytest.raises(SystemExit):
            main(["export", str(source), str(tmp_path / "other"), *options])
        assert expected in capsys.readouterr().err


def make(world, head=None, **changes):
    settings = {
        "name": "test",
        "head": head or Label(),
        "optimizer": AdamW(1e-2, 0, 1),
        "batch_size": 4,
        "epochs": 1,
        "loop": LoopConfig(steps=2, mesh=MeshConfig(devices=1)),
        "train": str(world / "train.tsv"),
        "dev": str(world / "dev.tsv"),
        "init_from": str(world / "bert"),
    }
    return FineTuning(**{**settings, **changes})


def test_what_training_starts_from(world):
    """The pretrained parameters, but for the head, and for the top layers and the pooler if these are to be fresh."""
    source = load(world / "bert").params
    loaded = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(source)}
    for layers in (0, 1):
        task = prepare_task(make(world, reinitialize_layers=layers))
        fresh = jax.jit(task.config.build().init_params)(jax.random.key(5))
        started = task.initial_params(fresh)
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(started), jax.tree.leaves(fresh), strict=True):
            name = path_name(path)
            from_fresh = name.startswith("head/") or (layers and name.startswith(("pooler/", "encoder/layer_0/")))
            rows = slice(
                0, task.frame.tokenizer.vocab_size if name.startswith("word_") else None
            )  # Others are padding.
            np.testing.assert_array_equal(x[rows], y[rows] if from_fresh else loaded[name][rows])


def test_a_profile_is_refused_in_a_bucket_before_anything_is_read(world):
    loop = LoopConfig(steps=2, mesh=MeshConfig(devices=1), profile=3)
    with pytest.raises(InputError, match=r"--profile 3: .* local directories only: gs://bucket/run"):
        finetune.finetune(make(world, loop=loop, train=str(world / "none.tsv")), "gs://bucket/run")


def test_class_weights_enter_the_training_examples_alone(world):
    """By name or balanced: the weights of the batch that training begins with, and the identity of the run."""
    found = {}
    for given in ((), ("yes=2.5",), ("balanced",)):
        task = prepare_task(make(world, class_weights=given))
        numbers = [int(row.label) for row in task.train_rows]
        found[given] = [float(row.weight) for row in task.train_rows]
        assert all(row.weight == 1 for row in task.dev_rows)
        assert task.record.identity["class_weights"] == list(given)
    assert found[()] == [1.0] * 26 and found["yes=2.5",] == [(1.0, 2.5)[x] for x in numbers]
    counts = np.bincount(numbers)
    np.testing.assert_allclose(found["balanced",], 26 / (2 * counts[numbers]), rtol=1e-6)


def test_the_directory_is_named_after_task_file_and_identity(world):
    paths = [
        finetune.default_workdir(prepare_task(make(world, **changes))) for changes in ({}, {"seed": 3}, {"warmup": 0.2})
    ]
    assert paths[0] == paths[1] != paths[2]
    assert all(
        path.parent.name == "runs" and path.name.startswith("test-train-") and len(path.name) == 19 for path in paths
    )
    shutil.copy(world / "train.tsv", world / "copy.tsv")
    copied = finetune.default_workdir(prepare_task(make(world, train=str(world / "copy.tsv"))))
    assert copied.name.removeprefix("test-copy-") == paths[0].name.removeprefix("test-train-")


def test_epochs_become_steps(world):
    run = make(world, epochs=2.5, warmup=0.2, loop=LoopConfig(steps=2**31 - 1)).scheduled(26)
    assert (run.loop.steps, run.optimizer.decay_steps, run.optimizer.warmup_steps, run.loop.evaluate_every) == (
        16,
        16,
        3,
        7,
    )
    assert make(world, epochs=2.5).scheduled(26).loop.steps == 2
    for option in ("warmup_steps", "decay_steps"):
        with pytest.raises(InputError, match=option.replace("_", "-")):
            make(world, optimizer=dataclasses.replace(AdamW(1e-2, 0, 1), **{option: 7})).scheduled(26)


MISTAKES = {
    "no file": (["--train", "none.tsv"], "none.tsv"),
    "column": (["--columns.text", "sentence"], "sentence"),
    "metric": (["--metric", "bleu"], "--metric bleu"),
    "positive label": (["--positive", "maybe"], "--positive maybe"),
    "weights of what is no label": (["--class-weights", "maybe=2"], "--class-weights maybe=2"),
    "weight that is none": (["--class-weights", "yes=-2"], "--class-weights yes=-2"),
    "length": (["--max-length", "513"], "--max-length"),
    "schedule": (["--optimizer.decay-steps", "10"], "--optimizer.decay-steps 10"),
    "loss of next tokens": (["--lm-coefficient", "0.5"], "lm_coefficient"),
    "learning rate": (["--optimizer.learning-rate", "0"], "--optimizer.learning-rate 0"),
    "epochs": (["--epochs", "1e12"], "--epochs 1e+12"),
    "directory above seeds": (["--init-from", "{world}/whole"], "{world}/whole/seed-0"),
    "layers": (["--reinitialize-layers", "2"], "--reinitialize-layers 2"),
    "batch size": (["--mesh.devices", "3"], "--batch-size 4"),
    "unknown label": (["--dev", "{folder}/unknown.tsv"], "maybe"),
    "one class": (["--dev", "{folder}/one.tsv"], "one.tsv"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.usefixtures("trained")
def test_mistakes_are_one_line(world, tmp_path, mistake, capsys):
    (tmp_path / "unknown.tsv").write_text("text\tlabel\na cat\tyes\na dog\tmaybe\n")
    (tmp_path / "one.tsv").write_text("text\tlabel\na cat\tyes\nthe cat\tyes\n")
    options, expected = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stopped:
        main(arguments(world, tmp_path / "run", *(option.format(folder=tmp_path, world=world) for option in options)))
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1 and lines[-1].startswith("prelm: ") and expected.format(world=world) in lines[-1]
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("run.json"))


def test_what_must_be_given(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "finetuning:classify", "--train", "x.tsv"])
    assert capsys.readouterr().err.splitlines()[-1].startswith("prelm: --init-from, --dev must be given")
    with pytest.raises(SystemExit):
        main(["finetune", "bert:mini"])
    assert "FineTuning" in capsys.readouterr().err


# Every kind of task

KINDS = {
    "label": (Label(), {}),
    "labels": (Label(kind="labels"), {"label": "labels"}),
    "number": (Label(kind="number"), {"pair": "pair", "label": "number"}),
    "choice": (Choice(), {"label": "right", "options": ("options",)}),
    "tags": (Tags(), {}),
    "crf": (Tags(crf=True, mix=True, lstm_size=4), {}),
    "spans": (Span(), {}),
    "frozen": (Label(mix=True, lstm_size=4), {"pair": "pair"}),
}
# Each kind, and each family with its own frames: windows, a GPT's two orders, an ELMo's texts apart. That a step of any
# head on any family fits together is tested in models/test_task.py, and their directories in formats and inference.
TRAINED = {
    "bert": ("labels", "choice", "spans"),
    "openai-gpt": ("label", "number", "tags"),
    "elmo": ("frozen", "crf"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files with the columns of all kinds, and a model of each family."""
    folder, rng = tmp_path_factory.mktemp("kinds"), random.Random(0)
    for name, number in (("train", 9), ("dev", 5)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(number):
                text, passage = sentence(rng) + " cat" * (i % 2), sentence(rng, 30)
                words = text.split()
                answers = {"text": [passage.split()[0]], "answer_start": [0]}
                fields = {
                    "text": text,
                    "pair": sentence(rng),
                    "label": ["no", "yes"][i % 2],
                    "labels": ["a", "b"][: i % 3],
                    "number": float(len(words)),
                    "options": [sentence(rng), sentence(rng), "cat"],
                    "right": i % 3,
                    "tokens": words,
                    "tags": ["B-X" if word == "cat" else "O" for word in words],
                    "question": "the cat",
                    "context": passage,
                    "answers": answers if i else {"text": [], "answer_start": []},
                }
                file.write(json.dumps(fields) + "\n")
    for family in tiny.FAMILIES:
        tiny.directory(folder / family, family)
    return folder


def task_of(folder, family, kind, **changes):
    head, columns = KINDS[kind]
    return make(
        folder,
        head,
        train=str(folder / "train.jsonl"),
        dev=str(folder / "dev.jsonl"),
        init_from=str(folder / family),
        columns=Columns(**columns),
        tune="head" if kind in ("crf", "frozen") else "all",
        lm_coefficient=0.5 if (family, kind) == ("openai-gpt", "label") else 0.0,
        symmetric=kind == "number",
        max_length=24 if kind in ("tags", "spans") else None,
        **changes,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family, kinds in TRAINED.items() for kind in kinds])
def test_every_kind_trains(folder, family, kind, tmp_path, compiled):
    """Two epochs, the results, and the model loaded from the work directory, which predicts the same.

    There are six train and six evaluation steps at most, one of each width.
    """
    marks = [len(compiled)]
    run = task_of(folder, family, kind, epochs=2, loop=LoopConfig(steps=99, mesh=MeshConfig(devices=1)))
    task = prepare_task(run)
    with tiny.interruption(task.run.loop.evaluate_every, lambda: marks.append(len(compiled))):
        _, results = finetune.finetune(run, tmp_path / "run", seeds=1)
    (seed,) = results.seeds
    assert seed.step > 3 and all(np.isfinite(score.value) for score in seed.scores.values())
    assert seed.scores.keys() == results.baselines.keys()
    assert min(programs(compiled[marks[0] : marks[1]])) >= 1 and max(programs(compiled[marks[0] :])) <= 6
    assert programs(compiled[marks[1] :])[1] == 0
    found, _ = load(tmp_path / "run" / "seed-0").predict(task.dev_examples)
    predictions = read_predictions(tmp_path / "run" / "seed-0" / "predictions.jsonl")
    for each, other in zip(found, predictions, strict=True):
        label = each.label
        if kind == "spans":
            label = label.texts[0] if label.texts else ""
        if kind == "number":
            np.testing.assert_allclose(label, other.prediction, rtol=1e-4)
        else:
            assert json.loads(json.dumps(label)) == other.prediction


def test_a_gpt_answers_no_questions(folder):
    with pytest.raises(InputError, match="GPT"):
        prepare_task(task_of(folder, "openai-gpt", "spans"))


@pytest.mark.parametrize("answered", [False, True])
def test_where_all_questions_have_answers_each_is_answered(folder, tmp_path, answered):
    """As in SQuAD 1.1, though the model prefers no answer; in a file with such a question that decides."""
    lines = (folder / "dev.jsonl").read_text().splitlines()
    (tmp_path / "dev.jsonl").write_text("".join(f"{line}\n" for line in lines[answered:]))
    task = prepare_task(dataclasses.replace(task_of(folder, "bert", "spans"), dev=f"{tmp_path}/dev.jsonl"))
    evaluation = finetune.DevEvaluation(task, task.config.build())

    def predict(params, carry, batches):
        for batch in batches:
            rows, _, width = batch["tokens"].shape
            scores = np.zeros((rows, width, 2))
            scores[:, 0] = 9
            yield {"loss": np.zeros(rows), "weight": np.ones(rows), "scores": scores}

    evaluation._predict = predict
    values = evaluation({}, {}, MeshConfig(devices=1).build())
    assert {bool(each.label.texts) for each in evaluation.predictions} == {answered}
    assert ("no_answer_f1" in values) != answered


def test_memory_is_checked_with_the_largest_batch(world, tmp_path, monkeypatch):
    """Whichever batch comes first."""

    class Seen(Exception):
        pass

    def step_memory(run, model, state, example, *rest):
        raise Seen(example["tokens"].shape)

    monkeypatch.setattr("prelm_jax.train.step_memory", step_memory)
    task = prepare_task(make(world, batch_size=2))
    widths = [TaskBatches(task.frame, task.train_rows, 2, 0).width(step) for step in range(13)]
    assert widths[0] == 24 and max(widths) == 40
    with pytest.raises(Seen, match=r"\(2, 1, 40\)"):
        finetune.finetune(make(world, batch_size=2), tmp_path / "run", seeds=1)
