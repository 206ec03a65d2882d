"""The whole road on a small corpus: resumed runs equal uninterrupted ones, and a work directory is its run's alone."""

import dataclasses
import functools
import itertools
import json
import lzma
import os
import random
import re
import runpy
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import transformers
from tiny import Crash, assert_same_bits, crash, interruption, metrics, newest_checkpoint

from prelm_jax import pretraining as module
from prelm_jax.corpus.documents import Corpus
from prelm_jax.data.masking import MaskingConfig
from prelm_jax.data.streams import StreamsConfig
from prelm_jax.errors import InputError, Preempted
from prelm_jax.families import find_family
from prelm_jax.loading import load
from prelm_jax.models.elmo import ELMoConfig
from prelm_jax.pretraining import Run, pretrain
from prelm_jax.tokenizers.words import WordVocabularyConfig
from prelm_jax.train import check_schedule
from prelm_jax.training.optimizer import Adagrad, AdamW
from prelm_jax.training.parameters import path_name
from prelm_jax.training.sharding import MeshConfig
from prelm_jax.workdir import WorkDir

evaluate = functools.partial(module.evaluate, devices=1)
pytestmark = pytest.mark.usefixtures("shared_programs")
# For tests of what all families share.
bert_else_slow = pytest.mark.parametrize(
    "run",
    [family if family == "bert" else pytest.param(family, marks=pytest.mark.slow) for family in tiny.FAMILIES],
    indirect=True,
    scope="module",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """The path of a small text."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(tiny.text(seed=0))
    return str(path)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def run(request, corpus) -> Run:
    """Twelve steps of a tiny model of each family, with a checkpoint every five and an evaluation every six."""
    return dataclasses.replace(tiny.FAMILIES[request.param](), corpus=(corpus,))


KEPT_STEP, KEPT_WORDS = 2, 500


@pytest.mark.slow
def test_samples_of_elmo_need_no_whole_softmax(corpus, tmp_path):
    """Each of two devices has half of its table."""
    run = dataclasses.replace(tiny.FAMILIES["elmo"](), corpus=(corpus,))
    pretrain(tiny.with_loop(run, steps=6, samples=2, mesh=MeshConfig(devices=2)), tmp_path / "run")
    assert [len(samples) for samples in WorkDir(tmp_path / "run").read_samples().values()] == [2]


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    """The work directory of a run that nothing disturbed, and that kept some parameters; not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    pretrain(tiny.with_loop(run, keep_at_steps=(KEPT_STEP,), keep_at_words=(KEPT_WORDS,), samples=2), workdir)
    return workdir


def test_each_evaluation_takes_samples(run, uninterrupted):
    """That they leave the training as it is, the resumed runs show, which take none."""
    found = WorkDir(uninterrupted).read_samples()
    assert list(found) == [6, 12] and [len(each) for each in found.values()] == [2, 2]
    for samples in zip(*found.values(), strict=True):
        assert len({(each.given, each.expected) for each in samples}) == 1 and all(each.result for each in samples)
    given, expected = found[12][0].given, found[12][0].expected
    assert {"bert": "[MASK]" in given and expected in tiny.WORDS, "openai-gpt": expected, "elmo": "[" in given}[
        run.model.model_type
    ]


@pytest.mark.parametrize("at", [3, 8])
def test_resumed_equals_uninterrupted(run, uninterrupted, tmp_path, at):
    """Interrupted before the first checkpoint, so that the whole run is repeated, and between two."""
    workdir = tmp_path / "interrupted"
    with interruption(at, crash), pytest.raises(Crash):
        pretrain(run, workdir)
    pretrain(run, workdir)
    assert_same_bits(workdir, uninterrupted)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["10", "12"]


@bert_else_slow
def test_sigterm_saves_and_the_same_command_goes_on(run, uninterrupted, tmp_path):
    workdir = tmp_path / "stopped"
    terminate = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    with interruption(7, terminate), pytest.raises(Preempted, match="stopped by SIGTERM after step 8"):
        pretrain(run, workdir)
    assert (workdir / "checkpoints" / "8").is_dir()
    module.export(workdir, tmp_path / "exported", "newest")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "step 8 of the run" in card and "Not evaluated at step 8." in card and "|" not in card
    pretrain(run, workdir)
    assert_same_bits(workdir, uninterrupted)


@pytest.mark.parametrize("run", ["bert"], indirect=True, scope="module")
@pytest.mark.parametrize("at", [6, 12])
def test_sigterm_in_an_evaluation_puts_it_off(run, uninterrupted, tmp_path, monkeypatch, at):
    """Also in the one at the end. What is due after the step is done when the run resumes."""
    workdir = tmp_path / "stopped"
    evaluate, calls = module.HeldOut.__call__, []

    def terminate_and_evaluate(*arguments):
        calls.append(arguments)
        if len(calls) == at // 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(module.HeldOut, "__call__", terminate_and_evaluate)
    with pytest.raises(Preempted, match=f"stopped by SIGTERM after step {at}"):
        pretrain(run, workdir)
    assert metrics(workdir)[-1]["step"] == at and "evaluation/loss" not in metrics(workdir)[-1]
    pretrain(run, workdir)
    assert_same_bits(workdir, uninterrupted)
    pretrain(run, workdir)
    assert_same_bits(workdir, uninterrupted)
    assert [path.name for path in sorted((workdir / "checkpoints").iterdir())] == ["10", "12"]


@bert_else_slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(run, uninterrupted, tmp_path, capsys):
    workdir = tmp_path / "damaged"
    pretrain(tiny.with_loop(run, steps=10, evaluate_every=12), workdir)
    data = max((workdir / "checkpoints" / "10").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    pretrain(run, workdir)
    assert f"checkpoint {workdir / 'checkpoints' / '10'} is damaged" in capsys.readouterr().err
    assert (workdir / "checkpoints.damaged" / "10").is_dir()
    assert_same_bits(workdir, uninterrupted)


@bert_else_slow
def test_circumstances_may_change(run, tmp_path):
    """More steps, another mesh, a corpus that moved: the run goes on."""
    workdir = tmp_path / "run"
    pretrain(tiny.with_loop(run, steps=6), workdir)
    moved = tmp_path / "elsewhere.txt"
    moved.write_text(tiny.text(seed=0))
    pretrain(
        dataclasses.replace(
            run, corpus=(str(moved),), loop=dataclasses.replace(run.loop, mesh=MeshConfig(devices=2), steps=8)
        ),
        workdir,
    )
    assert [line["step"] for line in metrics(workdir)] == [2, 4, 6, 6, 8, 8]


def test_another_identity_is_refused_with_the_fields(run, uninterrupted, tmp_path):
    changed = dataclasses.replace(
        run,
        seed=7,
        model=dataclasses.replace(run.model, num_layers=3),
        data=dataclasses.replace(run.data, max_length=9),
    )
    with pytest.raises(InputError) as refused:
        pretrain(changed, uninterrupted)
    message = str(refused.value)
    for part in (
        f"model.num_layers ({run.model.num_layers} there, 3 here)",
        "seed (0 there, 7 here)",
        f"data.max_length ({run.data.max_length} there, 9 here)",
    ):
        assert part in message
    assert "\n" not in message and "steps" not in message

    other = tmp_path / "other.txt"
    other.write_text(tiny.text(seed=1))
    with pytest.raises(InputError, match="corpus_fingerprint"):
        pretrain(dataclasses.replace(run, corpus=(str(other),)), uninterrupted)


@bert_else_slow
def test_a_nan_stops_the_run_and_is_not_kept(run, tmp_path):
    workdir = tmp_path / "run"
    optimizer = dataclasses.replace(run.optimizer, learning_rate=1e30)
    with pytest.raises(InputError, match=r"not finite at step \d"):
        pretrain(
            dataclasses.replace(run, optimizer=optimizer, loop=dataclasses.replace(run.loop, save_every=1)), workdir
        )
    _, state = newest_checkpoint(workdir)
    for leaf in jax.tree.leaves(state):
        assert np.isfinite(leaf).all()


def test_finished_run_is_summed_up_again(run, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_text()
    summary = pretrain(run, uninterrupted)
    assert (uninterrupted / "metrics.jsonl").read_text() == before
    last = metrics(uninterrupted)[-1]
    assert {f"evaluation/{name}": value for name, value in summary.evaluation.items()} == {
        name: value for name, value in last.items() if name != "step"
    }


# ---- Extending -------------------------------------------------------------------------------------------------------


def until(run: Run, step: int) -> Run:
    """The run with a schedule that ends at a step; ELMo's has no end."""
    if not isinstance(run.optimizer, AdamW):
        return run
    return dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, decay_steps=step))


@pytest.fixture(scope="module")
def extended(run, uninterrupted, tmp_path_factory):
    """Trained to step 12, extended to 17, and from there to 21 at another peak of the rate; not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "extended"
    shutil.copytree(uninterrupted, workdir)
    pretrain(run, workdir, extend_to=17)
    pretrain(with_rate(run), workdir, extend_to=21)
    return workdir


def with_rate(run: Run) -> Run:
    return dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, learning_rate=2e-3))


def rates(workdir) -> dict[int, float]:
    """step -> the learning rate of the step before, the last to be trained."""
    return {line["step"]: line["train/learning_rate"] for line in metrics(workdir) if "train/learning_rate" in line}


@bert_else_slow
def test_an_extension_has_the_schedule_of_a_longer_run(run, extended):
    """The record says so, each step has the rate of its segment, and the last one is not at zero."""
    first, second, third = WorkDir(extended).read_record().segments
    assert [(each.from_step, each.to_step) for each in (first, second, third)] == [(0, None), (12, 17), (17, 21)]
    optimizers = [each.optimizer for each in (run, until(run, 17), until(with_rate(run), 21))]
    for segment, optimizer in zip((first, second, third), optimizers, strict=True):
        assert segment.optimizer == {"name": type(optimizer).__name__, **dataclasses.asdict(optimizer)}
    for step, rate in rates(extended).items():
        np.testing.assert_allclose(rate, optimizers[(step > 12) + (step > 17)].schedule(step - 1), rtol=1e-6)
        assert rate > 0
    assert max(rates(extended)) == 21


@pytest.mark.parametrize(
    ("run", "at"),
    [("bert", 12), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("openai-gpt", 8), ("elmo", 19)))],
    indirect=["run"],
    scope="module",
)
def test_the_old_command_resumes_an_extended_run_with_the_same_bits(run, extended, tmp_path, at):
    """Killed in any segment, on a machine that knows run.json alone; the command does not say a word of extensions."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    shutil.copy(extended / "run.json", workdir)
    with interruption(at, crash), pytest.raises(Crash):
        pretrain(run, workdir)
    pretrain(run, workdir)
    assert_same_bits(workdir, extended)
    assert WorkDir(workdir).read_record().segments == WorkDir(extended).read_record().segments


@pytest.mark.slow
def test_an_extension_keeps_the_moments(run, tmp_path):
    """To the step that the run was planned for, with the schedule that it had: no bit changes."""
    run = until(run, 12)
    pretrain(run, tmp_path / "whole")
    pretrain(tiny.with_loop(run, steps=6), tmp_path / "parts")
    pretrain(tiny.with_loop(run, steps=6), tmp_path / "parts", extend_to=12)
    assert_same_bits(tmp_path / "parts", tmp_path / "whole")


@bert_else_slow
def test_a_killed_extension_resumes_by_either_command(run, uninterrupted, extended, tmp_path, monkeypatch):
    """Killed while it claims, the directory is as before; killed later, it is extended once."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    before = (workdir / "run.json").read_text()
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Path, "replace", lambda *_: crash())
        pretrain(run, workdir, extend_to=17)
    assert (workdir / "run.json").read_text() == before
    with interruption(13, crash), pytest.raises(Crash):
        pretrain(run, workdir, extend_to=17)
    with interruption(15, crash), pytest.raises(Crash):
        pretrain(run, workdir)
    pretrain(run, workdir, extend_to=17)
    assert [segment.from_step for segment in WorkDir(workdir).read_record().segments] == [0, 12]
    assert pretrain(with_rate(run), workdir, extend_to=21).step == 21
    assert_same_bits(workdir, extended)


@bert_else_slow
def test_only_an_extension_extends(run, extended, tmp_path):
    workdir = tmp_path / "extended"
    shutil.copytree(extended, workdir)
    with pytest.raises(InputError, match="--extend-to 21: the run is at step 21 already"):
        pretrain(run, workdir, extend_to=21)
    with pytest.raises(InputError, match=rf"--extend-to 20: {tmp_path}/run holds no run"):
        pretrain(run, tmp_path / "run", extend_to=20)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"optimizer.learning_rate \(.* there, 0.002 here\).*--extend-to"):
        pretrain(with_rate(run), workdir)
    with pytest.raises(InputError, match=r"optimizer.name \(.* there, .* here\)"):
        other = tiny.elmo() if run.model.model_type != "elmo" else tiny.bert()
        pretrain(dataclasses.replace(run, optimizer=other.optimizer), workdir, extend_to=30)
    pretrain(tiny.with_loop(run, steps=40), workdir)
    assert max(line["step"] for line in metrics(workdir)) == 21
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(InputError, match="--extend-to 30: the run has no checkpoint"):
        pretrain(run, workdir, extend_to=30)


def test_steps_past_the_end_of_the_schedule(corpus, tmp_path):
    """Refused with the step where it ends and the way to train for longer, before anything is written."""
    run = tiny.with_loop(until(dataclasses.replace(tiny.bert(), corpus=(corpus,)), 12), steps=30)
    with pytest.raises(InputError, match=r"--steps 30: .* zero from step 12 on; raise --optimizer\.decay-steps"):
        pretrain(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"--steps 30: .* zero from step 12 on; .*--extend-to 30"):
        check_schedule(run, resuming=True)


def test_a_cosine_that_rounds_to_zero_has_not_ended():
    """Its last eight steps of 100,000 are zero in float32."""
    run = until(tiny.gpt(), 100_000)
    assert run.optimizer.schedule(99_999) == 0
    check_schedule(tiny.with_loop(run, steps=100_000), resuming=False)


@bert_else_slow
def test_evaluate_a_work_directory(run, uninterrupted, tmp_path):
    """Close to the sample at the end of the training, the same under any seed; other text has other figures."""
    summary = evaluate(uninterrupted)
    last = metrics(uninterrupted)[-1]
    np.testing.assert_allclose(summary.evaluation["loss"], last["evaluation/loss"], rtol=0.02)
    shutil.copytree(uninterrupted, tmp_path / "seeded")
    tiny.change_seed(tmp_path / "seeded")
    assert evaluate(tmp_path / "seeded").evaluation == summary.evaluation
    other = tmp_path / "other.txt"
    other.write_text(tiny.text(seed=5))
    assert evaluate(uninterrupted, (str(other),)).evaluation != summary.evaluation


def test_checkpoints_of_any_step(run, uninterrupted, tmp_path):
    """`step` in load, evaluate and export: a kept one, the best, the newest."""
    workdir, exported = tmp_path / "run", tmp_path / "exported"
    shutil.copytree(uninterrupted, workdir)
    record = workdir / "checkpoints" / "10" / "_CHECKPOINT_METADATA"
    content = json.loads(record.read_text())
    content["custom_metadata"]["record"]["evaluation_loss"] = 0.0  # Otherwise the newest is the best.
    record.write_text(json.dumps(content))

    params = {step: load(workdir, step).params for step in (KEPT_STEP, 10, 12, "best", "newest")}
    for step, same in ((10, "best"), (12, "newest")):
        jax.tree.map(np.testing.assert_array_equal, params[step], params[same])
    losses = [evaluate(workdir, step=step).evaluation["loss"] for step in (KEPT_STEP, "best", "newest")]
    assert losses == sorted(set(losses), reverse=True)
    assert evaluate(workdir, step=10).evaluation["loss"] == losses[1]
    with pytest.raises(InputError, match=rf"{workdir}\S+: no checkpoint of step 4; .* 10 \(best\), 12"):
        load(workdir, 4)

    module.export(workdir, exported, step=KEPT_STEP)
    model, tables = load(exported), find_family(run.model.model_type, exported).format.vocabulary_tables
    for (path, value), expected in zip(
        jax.tree_util.tree_leaves_with_path(model.params), jax.tree.leaves(params[KEPT_STEP]), strict=True
    ):
        if path_name(path) not in model.missing:
            rows = slice(model.tokenizer.vocab_size if path_name(path) in tables else None)
            np.testing.assert_array_equal(value[rows], expected[rows])
    card = (exported / "README.md").read_text()
    assert f"step {KEPT_STEP} of the run" in card and f"Not evaluated at step {KEPT_STEP}" in card
    if run.model.model_type != "elmo":
        published = transformers.AutoModelForPreTraining.from_pretrained(exported)
        assert f"Size: {published.num_parameters():,} parameters" in card
    module.export(workdir, exported)
    card = (exported / "README.md").read_text()
    assert "step 10 of the run" in card, "the best, unless told otherwise"
    module.export(uninterrupted, exported, "best")
    card, evaluated = (
        (exported / "README.md").read_text(),
        {line["step"]: line["evaluation/loss"] for line in metrics(uninterrupted) if "evaluation/loss" in line},
    )
    best = min(evaluated, key=evaluated.get)
    assert f"step {best} of the run" in card and f"after step {best}:" in card and f"{evaluated[best]:.4f}" in card


@pytest.mark.parametrize("run", ["bert"], indirect=True, scope="module")
def test_a_run_that_gains_nothing_stops(run, tmp_path, monkeypatch, capsys):
    """At a learning rate that changes no parameter the first evaluation, after step 2, stays the best."""
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, learning_rate=1e-30))
    run = tiny.with_loop(run, evaluate_every=2, stop_after_no_gain=2)
    summary = pretrain(run, tmp_path / "run")
    lines = [line for line in metrics(tmp_path / "run") if "evaluation/loss" in line]
    evaluated = {line["step"]: line["evaluation/loss"] for line in lines}
    assert list(evaluated) == [2, 4, 6] and len(set(evaluated.values())) == 1 and summary.step == 6
    assert "stopped after step 6" in capsys.readouterr().err
    before = metrics(tmp_path / "run")
    assert pretrain(run, tmp_path / "run").step == 6 and metrics(tmp_path / "run") == before, "it stays there"
    module.export(tmp_path / "run", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "step 2 of the run" in card and card.count(f"{evaluated[2]:.4f}") >= 2 and "step 6" in card
    assert pretrain(tiny.with_loop(run, stop_after_no_gain=4), tmp_path / "run").step == 10, "4 evaluations later"


def test_nothing_to_gain_by(run, tmp_path):
    with pytest.raises(InputError, match="--stop-after-no-gain 1"):
        pretrain(dataclasses.replace(tiny.with_loop(run, stop_after_no_gain=1), held_out=0.0), tmp_path)


def test_parameters_are_kept_at_steps_and_words(run, uninterrupted):
    prepared = module.prepare(run)
    tokenizer, training = prepared.tokenizer, prepared.training
    batches = run.data.build(training, tokenizer, run.batch_size, run.seed)
    model = dataclasses.replace(run.model, vocab_size=tokenizer.vocab_size).build()
    seen = np.cumsum([model.tokens(batches[step])[0] for step in range(run.loop.steps)])
    reached = 1 + int(np.argmax(seen >= KEPT_WORDS * training.tokens_per_word))
    assert seen[reached - 1] >= KEPT_WORDS * training.tokens_per_word and reached != KEPT_STEP
    kept = {path.name for path in (uninterrupted / "checkpoints.kept").iterdir()}
    assert kept == {str(KEPT_STEP), str(reached)}


@pytest.mark.parametrize("run", ["bert"], indirect=True, scope="module")
def test_the_usage_on_a_model_card_works(run, uninterrupted, tmp_path, monkeypatch):
    """transformers' own pipeline on the exported directory, by the code on the card, predicts what the model does."""
    monkeypatch.chdir(tmp_path)
    module.export(uninterrupted, "exported")
    card = Path("exported/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\nlicense: ")
    assert "step 12 of the run" in card and "after step 12" in card
    assert re.search(r"\| masked lm loss \| \d\.\d{4} \| unigram \d\.\d{4} \|", card)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    *imports, call = code.strip().splitlines()
    names: dict[str, object] = {}
    exec("\n".join(imports), names)
    predictions = eval(call, names)
    (text,) = re.findall(r'\("([^"]*\[MASK\][^"]*)"\)', call)
    (expected,) = load("exported").fill(text, top_k=len(predictions))
    assert [prediction["token_str"] for prediction in predictions] == [token for token, _ in expected]
    found = [prediction["score"] for prediction in predictions]
    np.testing.assert_allclose(found, [probability for _, probability in expected], rtol=1e-3)


def with_two_entries_more(exported, folder) -> str:
    """The path of an exported vocabulary that was made larger."""
    if (exported / "vocab.txt").exists():
        (folder / "vocab.txt").write_text((exported / "vocab.txt").read_text() + "zebra\nzebras\n")
        return str(folder / "vocab.txt")
    ids = json.loads((exported / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(ids | {"zebra</w>": len(ids), "zebras</w>": len(ids) + 1}))
    shutil.copy(exported / "merges.txt", folder)
    return str(folder / "vocab.json")


def test_continued_pretraining(run, uninterrupted, tmp_path, capsys):
    """Starts where the model stands, from a work directory or a model directory, with more tokens and positions too."""
    directory = tmp_path / "exported"
    module.export(uninterrupted, directory)
    # A warmup begins at zero, so one step changes nothing.
    warms_up = float(run.optimizer.schedule(0)) == 0
    fields = {
        "loop": dataclasses.replace(run.loop, steps=1),
        "optimizer": run.optimizer if warms_up else dataclasses.replace(run.optimizer, learning_rate=0.0),
        "init_from": str(directory),
        "seed": 3,
    }
    vocabulary = type(run.tokenizer)(path=with_two_entries_more(directory, tmp_path))
    format = find_family(run.model.model_type, directory).format
    model = dataclasses.replace(run.model, **({"max_position_embeddings": 40} if format.position_tables else {}))
    pretrain(dataclasses.replace(run, tokenizer=vocabulary, model=model, **fields), tmp_path / "larger")
    assert ("the model has 32 positions" in capsys.readouterr().err) == bool(format.position_tables)
    pretrain(dataclasses.replace(run, **{**fields, "init_from": str(uninterrupted)}), tmp_path / "same")
    old, larger, same = load(uninterrupted), load(tmp_path / "larger"), load(tmp_path / "same")
    missing = load(directory).missing  # What the published format has no place for begins afresh.
    size = old.tokenizer.vocab_size
    assert larger.tokenizer.vocab_size == size + 2
    leaves = map(jax.tree.leaves, (larger.params, same.params))
    for (path, there), from_directory, from_run in zip(
        jax.tree_util.tree_leaves_with_path(old.params), *leaves, strict=True
    ):
        is_vocabulary = path_name(path) in format.vocabulary_tables
        rows = slice(size) if is_vocabulary else slice(32 if path_name(path) in format.position_tables else None)
        np.testing.assert_array_equal(from_run[rows], there[rows])
        if path_name(path) not in missing:
            np.testing.assert_array_equal(from_directory[rows], there[rows])
        if is_vocabulary and there.ndim == 2:
            assert from_directory[size : size + 2].std() > 0.005


def test_vocabulary_smaller_than_the_tokenizer(run, tmp_path):
    model = dataclasses.replace(run.model, vocab_size=5)
    with pytest.raises(InputError, match=r"--model.vocab-size 5: the tokenizer has \d+ tokens"):
        pretrain(dataclasses.replace(run, model=model), tmp_path / "run")


@pytest.mark.parametrize("family", ["bert", "openai-gpt"])
def test_positions_beyond_the_table(family, corpus, tmp_path):
    run = dataclasses.replace(tiny.FAMILIES[family](), corpus=(corpus,))
    model = dataclasses.replace(run.model, max_position_embeddings=16)
    with pytest.raises(InputError, match="positions go up to 31, but the model's max_position_embeddings is 16"):
        pretrain(dataclasses.replace(run, model=model), tmp_path / "run")


def test_batch_that_cannot_be_divided(run, tmp_path):
    changed = dataclasses.replace(
        run, batch_size=6, accumulate=2, loop=dataclasses.replace(run.loop, mesh=MeshConfig(devices=2))
    )
    with pytest.raises(InputError, match=r"--batch-size 6 .* choose a multiple of 4"):
        pretrain(changed, tmp_path / "run")


@bert_else_slow
def test_nothing_held_out(run, tmp_path):
    """Training on everything: no evaluation, no best checkpoint, no figures in the card."""
    workdir, run = tmp_path / "run", dataclasses.replace(run, held_out=0.0)
    summary = pretrain(run, workdir)
    assert summary.evaluation == {} and summary.baselines == {}
    assert {name.partition("/")[0] for line in metrics(workdir) for name in line} == {"step", "train"}
    with pytest.raises(InputError, match=rf"{workdir} holds nothing out.*--corpus"):
        module.evaluate(workdir)
    with pytest.raises(InputError, match=r"no evaluated checkpoint; choose a --step: 10, 12"):
        module.export(workdir, tmp_path / "best", "best")
    module.export(workdir, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "Not evaluated: nothing was held out." in card and "|" not in card
    assert pretrain(run, workdir).evaluation == {}


@bert_else_slow
def test_a_validation_text(run, corpus, tmp_path):
    """It is evaluated instead of held-out documents, all the corpus is trained on, and its content is the run's."""
    text, workdir = tmp_path / "validation.txt", tmp_path / "run"
    text.write_text(tiny.text(seed=7, documents=20))
    run = dataclasses.replace(run, validation=(str(text),))
    prepared = module.prepare(run)
    assert (prepared.training.num_documents, prepared.held_out.num_documents) == (40, 20)
    summary = pretrain(run, workdir)
    evaluated = module.evaluate(workdir)
    assert module.evaluate(workdir, (str(text),)).evaluation == evaluated.evaluation
    # The fraction held out plays no part.
    assert pretrain(dataclasses.replace(run, held_out=0.5), workdir).evaluation == summary.evaluation
    module.export(workdir, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"Validation text (`{text}`), after step 12" in card and "0.0% of its documents held out" in card

    text.write_text(tiny.text(seed=8, documents=20))
    with pytest.raises(InputError, match=rf"{workdir} holds another run: validation_fingerprint"):
        pretrain(run, workdir)
    with pytest.raises(InputError, match=rf"validation {text} .*{workdir}.*--corpus"):
        module.evaluate(workdir)
    with pytest.raises(InputError, match=rf"{workdir} holds another run: .*held_out .*validation_fingerprint"):
        pretrain(dataclasses.replace(run, validation=()), workdir)


def test_without_next_sentences(tmp_path):
    """A switch of the data: the loss and the metric are gone, and documents of one sentence will do."""
    corpus = tmp_path / "lines.txt"
    corpus.write_text(tiny.text(seed=2).replace("\n\n", "\n"))
    data = dataclasses.replace(tiny.bert().data, next_sentence=False)
    run = dataclasses.replace(
        tiny.bert(),
        corpus=(f"{corpus},documents=line",),
        data=data,
        loop=dataclasses.replace(tiny.bert().loop, steps=2),
    )
    summary = pretrain(run, tmp_path / "run")
    assert set(summary.evaluation) == {"loss", "masked_lm_loss", "masked_lm_accuracy", "masked_lm_perplexity"}
    assert summary.evaluation["loss"] == summary.evaluation["masked_lm_loss"]


def test_packing(corpus, tmp_path, capsys):
    """A switch of the data: several examples in a row, on two devices and in two micro-batches."""
    run = dataclasses.replace(
        tiny.with_loop(tiny.bert(), mesh=MeshConfig(devices=2), steps=8, evaluate_every=8, log_every=1),
        corpus=(corpus,),
        data=dataclasses.replace(tiny.bert().data, short_sequence_probability=0.5, packing=True),
        accumulate=2,
    )
    summary = pretrain(run, tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    (described,) = [i for i, line in enumerate(lines) if "packed into 512 rows" in line]
    (header,) = [i for i, line in enumerate(lines) if "parameters on" in line]
    assert described < header
    packed, unpacked = (
        float(x) / 100 for x in re.findall(r"([\d.]+)% (?:of the positions|with one)", lines[described])
    )
    padding = [line["train/padding"] for line in metrics(tmp_path / "run") if "train/padding" in line]
    assert len(padding) == 8 and np.mean(padding) == pytest.approx(1 - packed, abs=0.05) and packed > unpacked + 0.1
    assert 0.4 < summary.baselines["next_sentence_accuracy"]["lengths only"] < 0.7
    shown = list(module.show_batch(run, 0))
    assert len(shown) == 8 and any(re.search(r", 2 examples\n 1: .* B .*\n  A .*\n  B .*\n 2: ", row) for row in shown)


def test_bits_per_byte_are_those_of_the_text(corpus, tmp_path):
    """From the loss and the held-out documents themselves; the baselines' as well, and the unknown tokens beside it."""
    run = dataclasses.replace(tiny.gpt(), corpus=(corpus,), loop=dataclasses.replace(tiny.gpt().loop, steps=2))
    summary = pretrain(run, tmp_path / "run")
    documents = [document.text for document in Corpus(run.corpus, run.held_out).documents("held_out")]
    tokens = sum(map(len, load(tmp_path / "run").tokenizer.encode_batch(documents)))
    per_byte = tokens / sum(len(text.encode()) for text in documents) / np.log(2)
    trigram = {name: known["trigram"] for name, known in summary.baselines.items() if "trigram" in known}
    for values in (summary.evaluation, trigram):
        np.testing.assert_allclose(values["perplexity"], np.exp(values["lm_loss"]), rtol=1e-6)
        np.testing.assert_allclose(values["bits_per_byte"], values["lm_loss"] * per_byte, rtol=1e-6)
    assert summary.unknown_tokens == 0

    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(["The cat sees ☃ in the house."] * 30))
    assert evaluate(tmp_path / "run", (str(other),)).unknown_tokens == 1 / 8


def test_chinese(real_data, tmp_path):
    """As much of `chinese_base` as trains in a moment: the published vocabulary, whole words, characters as tokens."""
    pytest.importorskip("rjieba")
    with lzma.open(real_data / "pretrain/zhwiki.txt.xz", "rt", encoding="utf-8") as file:
        (tmp_path / "zhwiki.txt").write_text(file.read(60_000))
    chinese_base = runpy.run_path(str(Path(__file__).parents[1] / "experiments/bert.py"))["chinese_base"]()
    run = dataclasses.replace(
        tiny.bert(),
        corpus=(str(tmp_path / "zhwiki.txt"),),
        tokenizer=dataclasses.replace(
            chinese_base.tokenizer, path=str(real_data / "vocab/bert-base-chinese-vocab.txt")
        ),
        data=dataclasses.replace(
            chinese_base.data,
            max_length=32,
            max_predictions=4,
            masking=MaskingConfig(whole_word=True, segmenter="jieba"),
        ),
        loop=dataclasses.replace(tiny.bert().loop, steps=6),
    )
    summary = pretrain(run, tmp_path / "run")
    assert summary.unknown_tokens < 0.01
    assert 0 < summary.evaluation["masked_lm_loss"] < np.log(21128) + 0.1
    assert (
        json.loads((tmp_path / "run" / "run.json").read_text())["identity"]["data"]["masking"]["segmenter"] == "jieba"
    )
    pieces = "".join(module.show_batch(run, 0)).split()
    assert sum("一" <= piece <= "鿿" for piece in pieces) > 100 and max(map(len, pieces)) < 30


def test_elmo_learns_thirty_words(tmp_path):
    """The reference's own smoke test (bilm-tf, tests/test_training.py), on other sentences: perplexity below 20."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "re") for b in ("b", "dan", "fest", "gu", "hil", "tor")]

    def sentence() -> str:
        """Words in their order, one left out now and then: a perplexity of about 2 can be reached."""
        places = itertools.accumulate(rng.choice([1, 2]) for _ in range(20))
        return " ".join(words[place % 30] for place in places)

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(sentence() for _ in range(12)) + "\n")
    run = dataclasses.replace(
        tiny.elmo(),
        corpus=(f"{corpus},documents=line,sentences=line",),
        held_out=0.1,
        tokenizer=WordVocabularyConfig(vocab_size=33, min_count=1),
        model=ELMoConfig(
            character_embedding_size=4,
            filters=((1, 8), (2, 8), (3, 16), (4, 32), (5, 64)),
            activation="tanh",
            num_highways=1,
            projection_size=8,
            hidden_size=16,
        ),
        data=StreamsConfig(max_length=10, num_negatives=16),
        optimizer=Adagrad(learning_rate=0.2, unroll_steps=10, clip_norm=1.0),
        batch_size=2,
        loop=dataclasses.replace(tiny.elmo().loop, steps=300, evaluate_every=300, save_every=300),
    )
    pretrain(run, tmp_path / "run")
    assert evaluate(tmp_path / "run", run.corpus).evaluation["perplexity"] < 20


def test_bfloat16_is_close_to_float32(run, uninterrupted, tmp_path):
    """Activations in bfloat16 (8 bits of mantissa), parameters and moments in float32."""
    workdir = tmp_path / "run"
    pretrain(dataclasses.replace(run, precision="bfloat16"), workdir)
    for line, exact in zip(metrics(workdir), metrics(uninterrupted), strict=True):
        name = "train/loss" if "train/loss" in line else "evaluation/loss"
        np.testing.assert_allclose(line[name], exact[name], rtol=5e-3)
        assert line != exact  # Gradient norm or accuracy differ, where losses happen to round alike.
    _, state = newest_checkpoint(workdir)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}


@bert_else_slow
def test_a_profile_is_written_on_request(run, tmp_path):
    pretrain(tiny.with_loop(run, profile=1), tmp_path / "run")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
