"""Too little memory is one line: what a step needs, what a device has, and the smallest --accumulate that fits."""

import dataclasses
import logging
import re
from types import SimpleNamespace

import jax
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from prelm_jax.errors import InputError
from prelm_jax.pretraining import pretrain
from prelm_jax.training import memory
from prelm_jax.training.chips import GiB
from prelm_jax.training.memory import StepMemory
from prelm_jax.training.sharding import MeshConfig

EXHAUSTED = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9663676416 bytes.")
OTHER = jax.errors.JaxRuntimeError("INTERNAL: something else")


class FakeStep:
    """A step whose compiled program needs 10 GiB, and 64 GiB divided by the number of micro-batches."""

    def __init__(self, accumulate, compiled=None):
        self.accumulate, self._compiled = accumulate, [] if compiled is None else compiled

    def lower(self):
        return self

    def compile(self):
        self._compiled.append(self.accumulate)
        return self

    def memory_analysis(self):
        sizes = {"argument": 6, "alias": 4, "output": 5, "temp": 3 + 64 / self.accumulate}
        return SimpleNamespace(**{f"{name}_size_in_bytes": size * GiB for name, size in sizes.items()})


def watch(limit, monkeypatch, rows=48, accumulate=1, make_step=FakeStep):
    monkeypatch.setattr(memory, "available", lambda mesh: limit * GiB)
    return StepMemory(make_step, (), accumulate, rows, MeshConfig(1).build())


@given(st.integers(12, 80), st.sampled_from([1, 2, 3]))
def test_the_smallest_number_of_micro_batches_that_fits(limit, accumulate):
    """Of the divisors of 48 rows. As few programs are compiled as bisecting ten divisors takes."""
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        watched = watch(limit, patch, accumulate=accumulate, make_step=lambda n: FakeStep(n, compiled))
        if 10 + 64 / accumulate <= limit:
            watched.check()
            assert compiled == [accumulate]
            return
        with pytest.raises(InputError) as caught:
            watched.check()
    fitting = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 48) if n > accumulate and 10 + 64 / n <= limit]
    message = str(caught.value)
    assert f"{10 + 64 / accumulate:.3g} GiB" in message and f"the {limit:.3g} GiB" in message
    assert (f"--accumulate {fitting[0]} fits" if fitting else "no --accumulate fits") in message
    assert "\n" not in message
    assert len(compiled) <= 1 + 4


def test_an_allocation_that_fails_while_running(monkeypatch):
    """Although the step would fit: part of the memory is taken, so only steps that need less are advised."""
    watched = watch(100, monkeypatch)
    watched.check()
    expected = "74 GiB, more than is free of the 100 GiB of a device: --accumulate 2 fits"
    with pytest.raises(InputError, match=expected), watched.explained():
        raise EXHAUSTED
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), watched.explained():
        raise OTHER


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Used 41.90G of 15.75G hbm.", "needs 41.9 GiB, more than the 15.8 GiB of a device"),
        ("no numbers", "needs more than is free of the 80 GiB of a device"),
    ],
)
def test_an_error_of_the_compiler(monkeypatch, text, expected):
    """TPUs refuse at compile time, with the numbers; GPUs may fail there without them."""

    class Refused(FakeStep):
        def compile(self):
            if self.accumulate < 4:
                raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {text}")
            return super().compile()

    with pytest.raises(InputError, match=rf"a step {expected}: --accumulate 4 fits"):
        watch(80, monkeypatch, make_step=Refused).check()


def test_explained():
    expected = "an evaluation needs more memory than a device has: lower --batch-size"
    with pytest.raises(InputError, match=expected), memory.explained("an evaluation", "lower --batch-size"):
        raise EXHAUSTED
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.explained("an evaluation", ""):
        raise OTHER


def test_memory_of_a_container(tmp_path, monkeypatch):
    machine, limit = memory.host_memory(), tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (tmp_path / "absent", limit))
    for text, expected in (("max\n", None), (f"{2**20}\n", 2**20), (f"{2**62}\n", None)):
        limit.write_text(text)
        found = memory.host_memory()
        assert found == expected or (expected is None and found >= machine)
    limit.write_text(f"{2**20}\n")
    assert memory.available(MeshConfig(8).build()) == 2**20 / 8
    devices = [SimpleNamespace(memory_stats=lambda: {"bytes_limit": 123, "bytes_in_use": 7})]
    assert memory.available(SimpleNamespace(local_devices=devices)) == 123


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 41.90G of "
        "15.75G hbm. Exceeded hbm capacity by 26.15G.",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (41.90G) exceeds "
        "available HBM (15.75G).",
    ],
)
def test_out_of_memory_messages_of_the_compiler(message):
    error = memory.too_large(jax.errors.JaxRuntimeError(message))
    assert error.needed == pytest.approx(41.9 * GiB)
    assert error.available == 15.75 * GiB
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    assert memory.too_large(other) is other


@pytest.fixture
def run(tmp_path):
    (tmp_path / "corpus.txt").write_text(tiny.text(seed=0))
    run = dataclasses.replace(tiny.gpt(), corpus=(str(tmp_path / "corpus.txt"),))
    return tiny.with_loop(run, steps=2, evaluate_every=2)


def test_a_refused_run_claims_no_directory(run, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "compile_program", lambda lowered: FakeStep(1))
    monkeypatch.setattr(memory, "available", lambda mesh: 20 * GiB)
    with pytest.raises(InputError, match=r"a step needs 74 GiB, more than the 20 GiB of a device: no --accumulate"):
        pretrain(run, tmp_path / "refused")
    assert not (tmp_path / "refused" / "run.json").exists()


@pytest.mark.slow
def test_the_advice_holds(run, tmp_path, monkeypatch, caplog):
    """With sizes by the compiler. A run that fits compiles its step once, and nothing else."""
    sizes, needed = [], memory.needed
    monkeypatch.setattr(memory, "needed", lambda compiled: sizes.append(needed(compiled)) or sizes[-1])
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        pretrain(run, tmp_path / "fits")
    assert caplog.text.count("Compiling jit(train_step)") == len(sizes) == 1
    limit = sizes[0] - 1
    monkeypatch.setattr(memory, "available", lambda mesh: limit)
    with pytest.raises(InputError, match=r"a step needs .*: --accumulate [248] fits$") as caught:
        pretrain(run, tmp_path / "refused")
    advised = int(re.search(r"--accumulate (\d)", str(caught.value))[1])
    pretrain(dataclasses.replace(run, accumulate=advised), tmp_path / "refused")
    assert sizes[-1] <= limit
