"""metrics.jsonl: valid JSON always, lines after the restored step dropped, TensorBoard if asked."""

import contextlib
import json
import math
import types

import jax
import jax.numpy as jnp
import pytest

from prelm_jax.training.metrics import MetricsWriter, peak_flops


def write(workdir, resume_at, steps, tensorboard=False):
    with contextlib.closing(MetricsWriter(workdir, resume_at, tensorboard)) as writer:
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


def test_what_is_not_finite_is_still_json(tmp_path):
    with contextlib.closing(MetricsWriter(tmp_path, 0)) as writer:
        writer.write(1, {"train/grad_norm": math.inf})
    assert lines(tmp_path) == [{"step": 1, "train/grad_norm": "inf"}]


def test_tensorboard(tmp_path):
    write(tmp_path, 0, [1], tensorboard=True)
    assert any(b"train/loss" in path.read_bytes() for path in tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.parametrize(("kind", "peak"), [("TPU v5", 459e12), ("TPU v5 lite", 197e12), ("NVIDIA H200", 989e12)])
def test_peak_of_a_known_device_is_its_data_sheets(monkeypatch, kind, peak):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert peak_flops(jnp.dtype("bfloat16"), 4) == 4 * peak


def test_peak_of_another_device_is_measured_once_for_all_that_share_it():
    # The virtual devices of a CPU are one processor; no processor does a FLOP in a femtosecond.
    assert 1e8 < peak_flops(jnp.dtype("float32"), 1_000_000) < 1e15
