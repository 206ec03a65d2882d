"""Metrics are valid JSON, resume at the restored step, and tell the speed of the steps alone."""

import contextlib
import json
import math
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prelm_jax.errors import InputError
from prelm_jax.training.metrics import MetricsWriter, Report, peak_flops


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


def test_tensorboard(tmp_path):
    write(tmp_path, 0, [1], tensorboard=True)
    assert any(b"train/loss" in path.read_bytes() for path in tmp_path.glob("events.out.tfevents.*"))


def test_the_speed_leaves_out_compilation_evaluations_and_saves(tmp_path, monkeypatch):
    """Steps of 2 s and 100 tokens, 60 positions of 160 being padding; whatever happens between them takes 1000 s.

    Also if the clock restarts right before the step whose line is written.
    """
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    model = types.SimpleNamespace(flops=lambda batch: 500.0)
    metrics = {"loss": jnp.float32(3), "grad_norm": jnp.float32(1), "learning_rate": jnp.float32(0)}
    metrics["tokens"] = jnp.array([100, 160])
    with contextlib.closing(MetricsWriter(tmp_path / "metrics.jsonl", 0)) as writer:
        report = Report(model, writer, peak=1000.0, start=0, steps=12, log_every=4)
        for step in range(1, 13):
            now += 1000 if step == 1 else 2
            report.wait((step, metrics, {}, 100 * step))
            if step in (1, 6, 11):
                report.evaluation(step, {"loss": 2.0})
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
            report.wait((5, metrics, {}, 0))


@pytest.mark.parametrize(("kind", "peak"), [("TPU v5", 459e12), ("TPU v5 lite", 197e12), ("NVIDIA H200", 989e12)])
def test_peak_of_a_known_chip_is_in_its_data_sheet(monkeypatch, kind, peak):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert peak_flops(jnp.dtype("bfloat16"), 4) == 4 * peak


def test_peak_of_another_device_is_measured(monkeypatch):
    """2 · 1024³ FLOPs in a quarter of a second each; the virtual devices of a CPU are one processor."""
    times = iter(np.arange(0, 100, 0.25))
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    assert peak_flops(jnp.dtype("float32"), 8) == 2 * 1024**3 / 0.25
