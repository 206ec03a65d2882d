"""Arguments of the command line as subjects."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny

from prelm_jax.errors import InputError
from prelm_jax.loading import load
from prelm_jax.pretraining import export, prepare, pretrain
from prelm_jax.study.opening import open_subject, split_step

TEXTS = ["The cat sees a dog.", "the zebra"]


def no_experiments(reference):
    raise InputError(f"there is no experiment {reference}")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    corpus.write_text(tiny.text(0))
    run = dataclasses.replace(tiny.gpt(), corpus=(str(corpus),), held_out=0.0, seed=3)
    return tiny.with_loop(run, steps=4, save_every=4, keep_at_steps=(1, 2))


@pytest.fixture(scope="module")
def workdir(experiment, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "gpt"
    pretrain(experiment, path)
    return path


def opened(argument, load_run=no_experiments):
    return open_subject(str(argument), load_run)


def scores(subject):
    return [score.total for score in subject.score(TEXTS)]


def test_a_run_says_what_it_has_seen(workdir, experiment):
    newest, kept = opened(workdir), opened(f"{workdir}@2")
    assert (newest.origin.step, kept.origin.step, newest.origin.seed) == (4, 2, 3)
    assert newest.name == str(workdir) and newest.family == "openai-gpt" and newest.num_layers == 2
    tokens = [line["train/tokens_seen"] for line in tiny.metrics(workdir) if "train/tokens_seen" in line]
    per_word = prepare(experiment).training.tokens_per_word
    assert len(tokens) == 2  # Of the steps 2 and 4.
    for subject, seen in zip((kept, newest), tokens, strict=True):
        assert subject.origin.words_seen == pytest.approx(seen / per_word, abs=1)
    assert newest.origin.model != kept.origin.model and scores(newest) != scores(kept)
    assert opened(f"{workdir}@newest").origin == opened(f"{workdir}@4").origin == newest.origin
    np.testing.assert_array_equal(scores(kept), [s.total for s in load(workdir, 2).score_sentences(TEXTS)])


def test_a_slash_at_the_end_is_no_part_of_the_name(workdir):
    assert opened(f"{workdir}/").name == str(workdir)


def test_flops_are_those_of_the_plan(workdir, tmp_path):
    """Of the file that `prelm plan --json` printed into the work directory."""
    planned = shutil.copytree(workdir, tmp_path / "run")
    assert opened(planned).origin.flops is None
    (planned / "plan.json").write_text('{"compiled_flops": 1.5e9, "chips": 2}')
    assert (opened(planned).origin.flops, opened(f"{planned}@2").origin.flops) == (1.2e10, 6e9)
    (planned / "plan.json").write_text('{"flops": 3}')
    with pytest.raises(InputError, match=r"plan\.json is not what prelm plan --json prints"):
        opened(planned)


def test_an_exported_model_is_the_same_model(workdir, tmp_path):
    export(workdir, tmp_path / "model")
    subject, run = opened(tmp_path / "model"), opened(workdir)
    assert subject.origin.step is None and subject.origin.words_seen is None
    assert scores(subject) == scores(run)
    embedded, again = (next(each.embed([["the", "cat"]])) for each in (subject, run))
    np.testing.assert_array_equal(embedded, again)


def test_untrained_is_the_run_before_its_first_step(workdir, experiment):
    by_run, by_name = opened(f"untrained:{workdir}"), opened("untrained:tiny:gpt", lambda reference: experiment)
    assert by_run.origin == by_name.origin and by_run.origin.step == 0 and by_run.origin.words_seen == 0
    assert scores(by_run) == scores(by_name) != scores(opened(workdir))
    # The first step of a warm-up has the learning rate 0.
    assert by_run.origin.model == opened(f"{workdir}@1").origin.model


def test_untrained_is_a_model_directory_without_its_weights(workdir, experiment, tmp_path):
    export(workdir, tmp_path / "model")
    untrained, model, run = (opened(each) for each in (f"untrained:{tmp_path}/model", tmp_path / "model", workdir))
    assert (untrained.family, untrained.num_layers, untrained.origin.step) == (model.family, model.num_layers, 0)
    assert scores(untrained) != scores(model)
    from_run = opened("untrained:tiny:gpt", lambda reference: dataclasses.replace(experiment, seed=0))
    np.testing.assert_array_equal(scores(untrained), scores(from_run))
    assert run.origin.seed == 3 and untrained.origin.seed == 0


@pytest.mark.parametrize("order", ["unigram", "trigram"])
def test_counts_of_a_run(order, workdir, experiment):
    by_run, by_name = opened(f"{order}:{workdir}"), opened(f"{order}:tiny", lambda reference: experiment)
    assert by_run.origin == by_name.origin and by_run.family == order
    assert scores(by_run) == scores(by_name)


def test_a_corpus_that_changed_is_refused(workdir, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("run.json", "tokenizer"):
        (copy / name).symlink_to(workdir / name)
    record = json.loads((workdir / "run.json").read_text())
    other = tmp_path / "other.txt"
    other.write_text(tiny.text(1))
    record["sources"]["corpus"] = [str(other)]
    (copy / "run.json").unlink()
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError) as error:
        opened(f"unigram:{copy}")
    assert str(other) in str(error.value) and str(copy) in str(error.value)


def test_steps():
    assert split_step("runs/a") == ("runs/a", "newest")
    assert split_step("runs/a@12") == ("runs/a", 12) and split_step("runs/a@best") == ("runs/a", "best")
    assert split_step("hub:a/b@main") == ("hub:a/b@main", "newest")
    with pytest.raises(InputError, match="runs/a@x"):
        split_step("runs/a@x")


def test_what_is_no_subject(workdir, tmp_path):
    with pytest.raises(InputError, match="no checkpoint of step 3"):
        opened(f"{workdir}@3")
    with pytest.raises(InputError, match="nothing"):
        opened(tmp_path / "nothing")
    with pytest.raises(InputError, match="there is no experiment bert:x"):
        opened("untrained:bert:x")
