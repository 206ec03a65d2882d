"""Metrics are valid JSON, resume at the restored step, and tell the speed of the steps alone."""

import contextlib
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.errors import InputError
from prelm_jax.training.metrics import MetricsWriter, Pending, Report, peak_flops, read_metrics


def write(workdir, resume_at, steps, tensorboard=False):
    with contextlib.closing(MetricsWriter(workdir / "metrics.jsonl", resume_at, tensorboard)) as writer:
        for step in steps:
            writer.write(step, {"train/loss": step / 2})


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_lines_after_the_restored_step_are_written_again(tmp_path):
    write(tmp_path, 0, [2, 4, 6, 8])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "train/lo')  # A kill in the middle of a line.
    write(tmp_path, 4, [6])
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]
    assert lines(tmp_path)[-1] == {"step": 6, "train/loss": 3.0}


def test_infinity_is_still_json(tmp_path):
    with contextlib.closing(MetricsWriter(tmp_path / "metrics.jsonl", 0)) as writer:
        writer.write(1, {"train/grad_norm": math.inf})
    assert lines(tmp_path) == [{"step": 1, "train/grad_norm": "inf"}]


NAMES = st.sampled_from(["train/loss", "perf/mfu", "evaluation/loss", "baseline/loss/unigram"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(NAMES | st.text(), x, max_size=3),
)
LIKE_METRICS = st.fixed_dictionaries({"step": JSON | st.integers(0, 9)}, optional=dict.fromkeys(["train/x", "y"], JSON))
DEEP, HUGE = b"[" * 100_000, b'{"step": 1, "train/loss": 1' + b"0" * 400 + b"}"
LINES = st.one_of(
    st.binary(max_size=40).filter(lambda line: b"\n" not in line),
    (JSON | LIKE_METRICS).map(lambda x: json.dumps(x).encode()),
    st.sampled_from([DEEP, HUGE, b'{"step": 1, "train/loss": 1e999}', b'{"step": 1, "\\ud800": 1}']),
)


@settings(max_examples=200)
@given(st.lists(LINES, max_size=6), st.integers(0, 9))
def test_lines_that_no_writer_wrote_are_left_out(tmp_path_factory, content, resume_at):
    """What is read are steps and numbers, each kind of metrics once a step; to resume writes no other line again."""
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    path.write_bytes(b"\n".join([b'{"step": 4, "train/loss": "inf"}', *content, b'{"step": 5, "train/lo']))
    found = read_metrics(path)
    for line in found:
        assert type(line["step"]) is int and line["step"] >= 0
        assert all(isinstance(x, int | float) and not isinstance(x, bool) for x in line.values())
        assert [f"{name} {x:.4f}".encode() for name, x in line.items()]
    kinds = [(line["step"], *(name.partition("/")[0] for name in line if name != "step")) for line in found]
    assert len({kind[:2] for kind in kinds}) == len(found)
    assert (4, "train") in {kind[:2] for kind in kinds}
    MetricsWriter(path, resume_at).close()
    kept = repr([line for line in found if line["step"] <= resume_at])
    assert kept == repr(read_metrics(path)) == repr(lines_read_back(path))


def lines_read_back(path):
    """By JSON alone: each line is an object, infinite values are strings."""
    parsed = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    return [{name: float(x) if isinstance(x, str) else x for name, x in line.items()} for line in parsed]


def test_the_last_of_two_lines_of_a_step_and_kind_is_read(tmp_path):
    lines = [{"step": 2, "train/loss": 1.0}, {"step": 2, "evaluation/loss": 3.0}, {"step": 2, "train/loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(tmp_path / "metrics.jsonl") == lines[1:]


def test_tensorboard(tmp_path):
    write(tmp_path, 0, [1], tensorboard=True)
    assert any(b"train/loss" in path.read_bytes() for path in tmp_path.glob("events.out.tfevents.*"))


def test_the_speed_leaves_out_compilation_evaluations_and_saves(tmp_path, monkeypatch):
    """Steps of 2 s and 100 tokens, 60 positions of 160 being padding; whatever happens between them takes 1000 s.

    Also if the clock restarts right before the step whose line is written.
    """
    now = 0.0
    monkeypatch.setattr("prelm_jax.training.metrics.time", types.SimpleNamespace(perf_counter=lambda: now))
    model = types.SimpleNamespace(flops=lambda batch: 500.0)
    metrics = {"loss": jnp.float32(3), "grad_norm": jnp.float32(1), "learning_rate": jnp.float32(0)}
    metrics["tokens"] = jnp.array([100, 160])
    with contextlib.closing(MetricsWriter(tmp_path / "metrics.jsonl", 0)) as writer:
        report = Report(model, writer, peak=1000.0, start=0, steps=12, log_every=4)
        for step in range(1, 13):
            now += 1000 if step == 1 else 2
            report.wait(Pending(step, metrics, {}, 100 * step))
            if step in (1, 6, 11):
                report.evaluation(step, {"loss": 2.0}, "loss 2")
                now += 1000
                report.restart_clock()
        report.close()
    logged = [line for line in lines(tmp_path) if "train/loss" in line]
    assert [line["step"] for line in logged] == [4, 8, 12]
    for line in logged:
        assert line["perf/seconds_per_step"] == 2
        assert line["perf/tokens_per_second"] == 50
        assert line["perf/mfu"] == 0.25
        assert line["train/padding"] == 60 / 160
        assert line["train/tokens_seen"] == 100 * line["step"]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_step_that_is_not_finite_is_an_error(tmp_path, name):
    metrics = {"loss": jnp.float32(3), "grad_norm": jnp.float32(1)} | {name: jnp.float32(math.nan)}
    with contextlib.closing(MetricsWriter(tmp_path / "metrics.jsonl", 0)) as writer:
        report = Report(types.SimpleNamespace(), writer, peak=1.0, start=0, steps=10, log_every=1)
        with contextlib.closing(report), pytest.raises(InputError, match=r"not finite at step 5 .*nan"):
            report.wait(Pending(5, metrics, {}, 0))


@pytest.mark.parametrize(("kind", "peak"), [("TPU v5", 459e12), ("TPU v5 lite", 197e12), ("NVIDIA H200", 989e12)])
def test_peak_of_a_known_chip_is_in_its_data_sheet(monkeypatch, kind, peak):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert peak_flops(jnp.dtype("bfloat16"), 4) == 4 * peak


def test_peak_of_another_device_is_measured(monkeypatch):
    """2 · 1024³ FLOPs in a quarter of a second each; the virtual devices of a CPU are one processor."""
    times = iter(np.arange(0, 100, 0.25))
    clock = types.SimpleNamespace(perf_counter=lambda: next(times))
    monkeypatch.setattr("prelm_jax.training.metrics.time", clock)
    assert peak_flops(jnp.dtype("float32"), 8) == 2 * 1024**3 / 0.25
