"""The comparison of the families: models of one size, budgets, and branches that leave a trunk."""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from prelm_jax.cli.experiments import load_run
from prelm_jax.errors import InputError
from prelm_jax.training.parameters import path_name

SCRIPT = Path(__file__).parents[2] / "examples" / "comparison.py"


@pytest.fixture(scope="module")
def comparison():
    spec = importlib.util.spec_from_file_location("comparison", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["comparison"] = module  # For its dataclass.
    spec.loader.exec_module(module)
    return module


TABLES = ("word_embeddings", "token_embeddings", "softmax", "masked_lm_bias")


@pytest.mark.parametrize("size", ["", "_small"])
def test_sizes_differ_by_less_than_a_tenth(size):
    """Outside of vocabulary tables and softmax; the text is lower-cased for all, and no labels of pairs are trained."""
    counts = []
    for family in ("bert", "gpt1", "elmo"):
        run = load_run(f"study:{family}{size}")[1]
        model = dataclasses.replace(run.model, vocab_size=1000).build()
        params = jax.tree_util.tree_leaves_with_path(jax.eval_shape(model.init_params, jax.random.key(0)))
        tables = [leaf.size for path, leaf in params if path_name(path).startswith(TABLES)]
        assert sum(tables) >= 1000 * (run.model.hidden_size if family != "elmo" else run.model.projection_size)
        counts.append(sum(leaf.size for _, leaf in params) - sum(tables))
        assert getattr(run.tokenizer, "lowercase", True) and not getattr(run.data, "next_sentence", False)
        assert run.optimizer.decay == "none" and run.loop.keep_at_words[:10] == tuple(range(10**6, 10**7 + 1, 10**6))
    assert max(counts) < 1.1 * min(counts)


def test_a_branch_continues_the_rate_of_its_trunk(comparison):
    """Up to four fifths its schedule is the trunk's; then it falls to zero in a line."""
    for family, end in itertools.product(("bert", "gpt1", "elmo"), (1000, 333)):
        trunk = load_run(f"study:{family}")[1].optimizer
        branch = dataclasses.replace(trunk, decay="trapezoid").ending_at(end)
        left = round((1 - comparison.COOLED) * end)
        steps = np.arange(end + 1)
        rates = np.asarray(branch.schedule(steps))
        np.testing.assert_array_equal(rates[:left], np.asarray(trunk.schedule(steps))[:left])
        falls = -np.diff(rates[left + 1 :])
        assert rates[-1] == 0 < min(falls)
        np.testing.assert_allclose(falls, falls.mean(), rtol=1e-3)


def test_marks_are_babylms_or_tenths(comparison):
    assert comparison.marks(10_000_000) == [1_000_000 * n for n in (*range(1, 11), 20)]
    assert comparison.marks(1_000_000) == [100_000 * n for n in range(1, 11)]


def test_another_text_or_budget_needs_another_output(comparison, tmp_path):
    """What was trained for other options would be taken for these."""
    first = argparse.Namespace(output=tmp_path / "x", corpus=["a"], corpus_words=None, words=10, small=True, options=[])
    for _ in range(2):
        comparison.check_settings(first)
    for changed in ({"words": 20}, {"corpus": ["b"]}, {"small": False}, {"corpus_words": 5}, {"options": ["seed=1"]}):
        name = next(iter(changed)).replace("_", "-")
        with pytest.raises(InputError, match=f"{tmp_path / 'x'}.*--{name}.*--output"):
            comparison.check_settings(argparse.Namespace(**vars(first) | changed))


@pytest.fixture
def calls(comparison, monkeypatch):
    """The commands of the script, which only leave directories as a training would; the one numbered `kill` fails."""
    found = []

    def prelm(*arguments):
        found.append(arguments)
        if len(found) == found.kill:
            sys.exit(75)
        run = Path(arguments[arguments.index("--workdir") + 1])
        for name in ("checkpoints", "checkpoints.kept"):
            (run / name).mkdir(parents=True, exist_ok=True)
        (run / "lock").touch()
        with (run / "log").open("a") as log:
            log.write(f"{arguments[-1]} ")

    class Calls(list):
        kill = 0

    found = Calls()
    monkeypatch.setattr(comparison, "prelm", prelm)
    return found


def family(comparison, **steps):
    return comparison.Family("bert", "study:bert", ("--corpus", "c.txt"), {"chips": 1}, 10.0, 1e9, steps)


def test_branches_leave_the_trunk_in_order_and_resume(comparison, calls, tmp_path):
    args = argparse.Namespace(output=tmp_path)
    steps = {"words": 1000, "flops": 500}
    calls.kill = 4  # In the second branch, after the trunk has gone on.
    with pytest.raises(SystemExit):
        comparison.train(args, family(comparison, **steps), 0, ["--optimizer.learning-rate", "1"])
    comparison.train(args, family(comparison, **steps), 0, ["--optimizer.learning-rate", "1"])
    seed = tmp_path / "seed-0"
    assert [(Path(call[call.index("--workdir") + 1]).name, *call[-2:]) for call in calls] == [
        ("bert", "--steps", "400"),
        ("bert-flops", "--extend-to", "500"),
        ("bert", "--steps", "800"),
        ("bert-words", "--extend-to", "1000"),
        ("bert-flops", "--extend-to", "500"),
        ("bert-words", "--extend-to", "1000"),
    ]
    assert (seed / "bert" / "log").read_text() == "400 800 "
    assert (seed / "bert-flops" / "log").read_text() == "400 500 500 "
    assert (seed / "bert-words" / "log").read_text() == "400 800 1000 "
    assert json.loads((seed / "bert-words" / "plan.json").read_text()) == {"chips": 1}
    assert (seed / "bert" / "checkpoints.kept").is_dir() and not (seed / ".bert-words").exists()
    assert all("c.txt" in call and "--optimizer.learning-rate" in call and "study:bert" in call for call in calls)


def test_rates_are_chosen_by_held_out_loss(comparison, calls, tmp_path, monkeypatch):
    """Of short runs with a whole schedule; both rates of Muon are multiplied."""
    losses = {"bert-0.5": [5.0, 3.0], "bert-1": [4.0, 2.0], "bert-2": [1.0, 2.5]}

    class WorkDir:
        def __init__(self, path):
            self._losses = losses[Path(path).name]

        def read_metrics(self):
            return [{"step": i, comparison.LOSS: loss} for i, loss in enumerate(self._losses)] + [{"step": 9}]

    monkeypatch.setattr(comparison, "WorkDir", WorkDir)
    args = argparse.Namespace(output=tmp_path, rates=[0.5, 1.0, 2.0])
    rates = comparison.best_rates(args, family(comparison, words=1000))
    optimizer = load_run("study:bert")[1].optimizer
    assert rates == [
        *("--optimizer.learning-rate", f"{optimizer.learning_rate:g}"),
        *("--optimizer.matrix-learning-rate", f"{optimizer.matrix_learning_rate:g}"),
    ]
    assert len(calls) == 3 and all(call[call.index("--steps") + 1] == "250" for call in calls)
    assert f"{0.5 * optimizer.matrix_learning_rate:g}" in calls[0]
