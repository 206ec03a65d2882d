"""The loop on a toy model: which checkpoints are kept, resuming, evaluation, predictions."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prelm_jax.errors import InputError, Preempted
from prelm_jax.models.heads import ScalarMix
from prelm_jax.training import loop
from prelm_jax.training.checkpoint import Checkpoints
from prelm_jax.training.loop import LoopConfig
from prelm_jax.training.metrics import MetricsWriter
from prelm_jax.training.optimizer import AdamW, decays
from prelm_jax.training.parameters import path_name
from prelm_jax.training.sharding import MeshConfig, shard_batch
from prelm_jax.training.step import (
    Keys,
    TrainState,
    abstract_state,
    evaluated_means,
    make_evaluate,
    make_predict,
    make_train_step,
    new_state,
)

ROWS, LAYERS, SIZE = 16, 3, 8


class Toy:
    """A linear regression on a scalar mix of layers, of which only the second tells the target.

    It counts its rows in the carry, and adds noise to the metrics, to show which key it got.
    """

    coefficients = {"error": 1.0}  # noqa: RUF012
    replicated = (r"(^|/)frozen/",)
    tables = ()
    matrices = ()

    def rate(self, path):
        return 1.0

    def init_params(self, key):
        mix = ScalarMix().init(key, jnp.zeros((LAYERS, 1, 1, SIZE)), jnp.ones((1, 1), bool))["params"]
        output = {"kernel": 0.1 * jax.random.normal(key, (SIZE, 1)), "bias": jnp.zeros(1)}
        return {"mix": mix, "output": output, "frozen": {"kernel": jnp.ones((SIZE, 1))}}

    def init_carry(self, batch_size):
        return {"rows": jnp.zeros((batch_size, 1))}

    def values(self, params, batch):
        mask = jnp.ones((len(batch["target"]), 1), bool)
        mixed = ScalarMix().apply({"params": params["mix"]}, batch["layers"].swapaxes(0, 1)[:, :, None], mask)[:, 0]
        return (mixed @ params["output"]["kernel"])[:, 0] + params["output"]["bias"]

    def loss(self, params, carry, batch, key, train):
        error, weight = jnp.square(self.values(params, batch) - batch["target"]), batch["weight"]
        metrics = {"noise": (jax.random.uniform(key), jnp.ones(())), "train": (jnp.float32(train), jnp.ones(()))}
        return {"error": ((error * weight).sum(), weight.sum())}, metrics, {"rows": carry["rows"] + 1}

    def weights(self, batch):
        return {"error": batch["weight"].sum()}

    def tokens(self, batch):
        return jnp.array([batch["weight"].sum().astype(jnp.int32), batch["weight"].size])

    def flops(self, batch):
        return 1.0

    def check(self, batch):
        pass

    def predict(self, params, carry, batch):
        return {"row": batch["row"], "value": self.values(params, batch) + 0 * carry["rows"][:, 0]}


def make_batch(step):
    rng = np.random.default_rng(step)
    layers = rng.normal(size=(ROWS, LAYERS, SIZE)).astype(np.float32)
    weight = (rng.random(ROWS) < 0.7).astype(np.float32)
    target = layers[:, 1] @ np.linspace(-1, 1, SIZE).astype(np.float32)
    return {"layers": layers, "target": target, "weight": weight, "row": np.arange(ROWS, dtype=np.int32)}


LAYOUT = dict.fromkeys(make_batch(0), "rows")


OPTIMIZER = AdamW(learning_rate=0.05, warmup_steps=3, decay_steps=300, weight_decay=0.1)


@dataclasses.dataclass(frozen=True)
class Config:
    loop: LoopConfig
    optimizer: AdamW = OPTIMIZER
    accumulate: int = 1
    seed: int = 0
    precision: str = "float32"


class Crash(Exception):
    pass


def train(workdir, config, evaluate=lambda step: float(step), interrupt=None):
    """Trains or resumes in `workdir`. `evaluate(step)` is the evaluation loss; `interrupt(step)` runs before a step."""
    mesh, model = config.loop.mesh.build(), Toy()
    interrupt = interrupt or (lambda step: None)
    with (
        jax.set_mesh(mesh),
        contextlib.closing(Checkpoints(workdir / "checkpoints", config.loop.keep)) as checkpoints,
    ):
        abstract = abstract_state(model, config.optimizer, ROWS, mesh, config.loop.mesh.parameters)
        restored = checkpoints.restore(abstract.items())
        if restored is None:
            state = new_state(model, config.optimizer, ROWS, config.seed, abstract)
        else:
            state = TrainState.from_items(restored[1])
        start = int(state.step)

        def batches():
            for step in range(start, config.loop.steps):
                interrupt(step)
                yield step, shard_batch(make_batch(step), LAYOUT, mesh)

        workdir.mkdir(exist_ok=True)
        with contextlib.closing(MetricsWriter(workdir / "metrics.jsonl", start)) as writer:
            state, _ = loop.train(
                config,
                model,
                state,
                make_train_step(model, config.optimizer, config.accumulate, LAYOUT, abstract),
                batches(),
                loop.Evaluation(lambda state: {"loss": evaluate(int(jax.device_get(state.step)))}, str, lambda: None),
                checkpoints,
                writer,
                workdir,
                tokens_per_word=1.5,
            )
        return state


def lines(workdir):
    """metrics.jsonl without timings."""
    parsed = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in parsed]


def steps(workdir, directory="checkpoints"):
    return sorted(int(path.name) for path in (workdir / directory).iterdir())


def metadata(workdir):
    """What each checkpoint records: checksums of all arrays, tokens seen, evaluation loss."""
    files = (
        workdir / directory / str(step) / "_CHECKPOINT_METADATA"
        for directory in ("checkpoints", "checkpoints.kept")
        for step in steps(workdir, directory)
    )
    return {str(file.parent.relative_to(workdir)): json.loads(file.read_text())["custom_metadata"] for file in files}


# Which checkpoints are kept

KEEPING = Config(
    LoopConfig(
        steps=22,
        mesh=MeshConfig(devices=1),
        save_every=5,
        keep=2,
        keep_at_steps=(3, 10),
        keep_at_words=(50, 51, 90),
        evaluate_every=4,
        log_every=1,
    )
)
LOSSES = {4: 2.0, 8: 1.0, 12: 1.5, 16: 1.0, 20: 3.0, 22: 2.0}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(workdir, KEEPING, LOSSES.get)
    return workdir


def test_the_newest_the_best_and_the_requested_checkpoints_are_kept(uninterrupted):
    """The evaluations after steps 4 and 8 improve on all before, so they save, too."""
    assert steps(uninterrupted) == [8, 20, 22]
    seen = np.cumsum([make_batch(step)["weight"].sum() for step in range(22)])
    reached = {1 + int(np.argmax(seen >= 1.5 * words)) for words in (50, 51, 90)}
    assert steps(uninterrupted, "checkpoints.kept") == sorted({3, 10, *reached})
    recorded = metadata(uninterrupted)
    assert set(recorded["checkpoints/22"]["checksums"]) == {"params", "opt_state", "progress"}
    assert set(recorded["checkpoints.kept/10"]["checksums"]) == {"params", "progress"}
    for name, checkpoint in recorded.items():
        step = int(name.split("/")[1])
        assert checkpoint["record"]["tokens_seen"] == seen[step - 1]
        assert checkpoint["record"]["evaluation_loss"] == LOSSES.get(step)
    logged = [line["train/tokens_seen"] for line in lines(uninterrupted) if "train/tokens_seen" in line]
    assert logged == seen.tolist()


@pytest.mark.parametrize("signaled", [False, True], ids=["crash", "sigterm"])
@pytest.mark.parametrize("interruptions", [(2, 9), (8, 13, 20)], ids=str)
def test_resumed_equals_uninterrupted(uninterrupted, tmp_path, interruptions, signaled):
    """The same bits, the same checkpoints, the same metrics."""
    for at in interruptions:

        def interrupt(step, at=at):
            if step == at:
                if not signaled:
                    raise Crash
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Preempted if signaled else Crash):
            train(tmp_path / "run", KEEPING, LOSSES.get, interrupt)
        if signaled:
            assert at + 1 in steps(tmp_path / "run")
    train(tmp_path / "run", KEEPING, LOSSES.get)
    assert metadata(tmp_path / "run") == metadata(uninterrupted)
    assert lines(tmp_path / "run") == lines(uninterrupted)


def test_saving_and_evaluating_may_copy_arrays(tmp_path, monkeypatch):
    """On a GPU, Orbax copies arrays to the host in ways that the steps' transfer guard refuses."""
    copied = []

    def copy(*names):
        copied.extend(names)
        return float(jnp.ones(()))  # from host to device, which a CPU refuses too

    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, *arguments: (copy("save"), save(self, *arguments)))
    config = dataclasses.replace(KEEPING, loop=LoopConfig(steps=2, mesh=MeshConfig(devices=1)))
    train(tmp_path, config, lambda step: copy("evaluation"))
    assert copied == ["evaluation", "save"]


def test_the_speed_is_that_of_the_steps_alone(tmp_path, monkeypatch):
    """Steps of 2 s; compilation, an evaluation and a save take 1000 s each, and a save comes every other step."""
    now = 0.0

    def wait(seconds):
        nonlocal now
        now += seconds

    def evaluate(step):
        wait(1000)
        return float(step)

    save = Checkpoints.save
    monkeypatch.setattr("prelm_jax.training.metrics.time", types.SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr("prelm_jax.training.loop.peak_flops", lambda *_: 1.0)
    monkeypatch.setattr(Checkpoints, "save", lambda *arguments: (wait(1000), save(*arguments)))
    settings = LoopConfig(steps=12, mesh=MeshConfig(devices=1), save_every=2, evaluate_every=4, log_every=4)
    train(tmp_path, Config(settings), evaluate, interrupt=lambda step: wait(2 if step else 1000))
    written = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [line["perf/seconds_per_step"] for line in written if "train/loss" in line] == [2, 2, 2]


def test_an_evaluation_that_is_not_finite_is_an_error_and_saves_nothing(tmp_path):
    settings = LoopConfig(steps=6, mesh=MeshConfig(devices=1), save_every=2, evaluate_every=4, log_every=4)
    with pytest.raises(InputError, match="nan after step 4"):
        train(tmp_path, Config(settings), evaluate=lambda step: math.nan)
    assert [(tmp_path / "checkpoints" / name).exists() for name in ("2", "4")] == [True, False]


def test_a_trace_ends_with_the_training(tmp_path):
    """Another one can be written by the same process."""
    settings = LoopConfig(steps=40, mesh=MeshConfig(devices=1), profile=20, log_every=50)

    def interrupt(step):
        if step == 12:
            raise Crash

    for name in "ab":
        with pytest.raises(Crash):
            train(tmp_path / name, Config(settings), interrupt=interrupt)
        assert list((tmp_path / name / "profile").rglob("*.xplane.pb"))


# Training a head


@pytest.mark.parametrize("parameters", ["replicated", "fsdp"])
def test_a_scalar_mix_learns_its_layer(tmp_path, parameters):
    mesh = MeshConfig(devices=4, parameters=parameters)
    config = Config(LoopConfig(steps=80, mesh=mesh, evaluate_every=80, log_every=80), OPTIMIZER)
    state = train(tmp_path / "run", config)
    assert lines(tmp_path / "run")[0]["train/error"] < 0.1
    mixture = np.exp(state.params["mix"]["weights"]) / np.exp(state.params["mix"]["weights"]).sum()
    assert mixture[1] > 0.7 and float(state.params["mix"]["gamma"]) > 1.1
    sharded = {
        path_name(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
        if not leaf.sharding.is_fully_replicated
    }
    assert sharded == ({"output/kernel"} if parameters == "fsdp" else set())
    assert decays({"mix": {"weights": 0, "gamma": 0}, "crf": {"transitions": 0}, "tags": {"kernel": 0, "bias": 0}}) == {
        "mix": {"weights": False, "gamma": False},
        "crf": {"transitions": False},
        "tags": {"kernel": True, "bias": False},
    }


# Evaluation and predictions


def test_an_evaluation_does_not_depend_on_the_seed_but_on_the_batch():
    model = Toy()
    evaluate = make_evaluate(model)
    params, carry = model.init_params(jax.random.key(0)), model.init_carry(ROWS)
    values = [evaluated_means(model, evaluate(params, carry, [make_batch(0)] * n)) for n in (1, 1, 2)]
    assert values[0] == values[1]
    assert values[0]["noise"] != values[2]["noise"]
    assert {value["train"] for value in values} == {0}


class Ticks(Toy):
    """The sum of batch n after a fresh carry is 2^24 + 2n; the sum of two such sums may have no float32."""

    def loss(self, params, carry, batch, key, train):
        ticks = carry["rows"][0, 0]
        one, nothing = jnp.ones(()), jnp.zeros(())
        return {"error": (2.0**24 + 2 * ticks, one)}, {"never": (nothing, nothing)}, {"rows": carry["rows"] + 1}


@pytest.mark.parametrize(("num_steps", "ticks"), [(None, 0 + 1 + 2 + 3 + 4), (2, 0 + 1 + 0 + 1 + 0), (1, 0)])
def test_sums_of_an_evaluation_are_exact_and_rows_begin_with_a_fresh_carry(num_steps, ticks):
    model = Ticks()
    carry = model.init_carry(ROWS)
    batches = (make_batch(0) for _ in range(5))
    totals = make_evaluate(model)(model.init_params(jax.random.key(0)), carry, batches, num_steps)
    assert totals["error"] == (5 * 2.0**24 + 2 * ticks, 5)
    error = totals["error"][0] / 5
    assert evaluated_means(model, totals) == {"loss": error, "error": error}  # What has no weight is left out.


def test_a_step_gets_the_dropout_key_of_its_number():
    model, config = Toy(), KEEPING
    mesh = config.loop.mesh.build()
    with jax.set_mesh(mesh):
        abstract = abstract_state(model, config.optimizer, ROWS, mesh, "replicated")
        state = new_state(model, config.optimizer, ROWS, 0, abstract)
        train_step = make_train_step(model, config.optimizer, 1, LAYOUT, abstract)
        key = Keys.from_seed(0).dropout
        for step in range(2):
            state, metrics = train_step(state, shard_batch(make_batch(step), LAYOUT, mesh), key)
            assert metrics["noise"] == jax.random.uniform(jax.random.fold_in(key, step))
            assert metrics["train"] == 1


def test_the_streams_of_a_seed():
    keys, other = Keys.from_seed(3), Keys.from_seed(4)
    init, dropout = jax.random.split(jax.random.key(3))
    assert keys.init == init and keys.dropout == dropout
    assert keys.init != other.init and keys.dropout != other.dropout


@pytest.mark.parametrize("mesh_config", [MeshConfig(1), MeshConfig(8), MeshConfig(8, "fsdp", slices=2)], ids=str)
def test_predictions_cover_every_row_in_order(mesh_config):
    model, mesh = Toy(), mesh_config.build()
    params, carry = model.init_params(jax.random.key(0)), model.init_carry(ROWS)
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        batches = (shard_batch(make_batch(step), LAYOUT, mesh) for step in range(3))
        sharded = jax.device_put((params, carry), jax.NamedSharding(mesh, jax.P()))
        predictions = list(make_predict(model)(*sharded, batches))
    assert len(predictions) == 3
    for step, found in enumerate(predictions):
        np.testing.assert_array_equal(found["row"], np.arange(ROWS))
        np.testing.assert_allclose(found["value"], model.values(params, make_batch(step)), rtol=1e-5, atol=1e-6)
