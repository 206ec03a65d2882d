"""Tests that need separate processes: kill -9, a full disk, several processes that train one model.

PRELM_KILLS sets the number of kills of a run; PRELM_LAYOUTS=1 moves a run through more layouts of its devices.
"""

import contextlib
import functools
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import FAMILIES, assert_same_bits, metrics, text

KILLS = int(os.environ.get("PRELM_KILLS", "3"))


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """`launch(workdir, *options, family="bert", **environment)` starts `prelm pretrain` on a tiny experiment."""
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    corpus.write_text(text(seed=0))
    running = []

    def launch(
        workdir: Path, *options: object, family: str = "bert", limit: int | None = None, **environment: object
    ) -> subprocess.Popen:
        experiment = f"tiny.py:{FAMILIES[family].__name__}"
        command = ["-m", "prelm_jax", "pretrain", Path(__file__).with_name(experiment)]
        command += ["--corpus", corpus, "--workdir", workdir, *options]
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | {name: str(value) for name, value in environment.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if limit is not None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        running.append(process)
        return process

    yield launch
    for process in running:
        process.kill()
        process.communicate()


def finish(*processes: subprocess.Popen) -> list[str]:
    """Waits until all processes succeed; returns their outputs."""
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
    return [out for out, _ in outputs]


def wait_for_step(process: subprocess.Popen, reports: int = 1) -> None:
    """Waits until the process has printed this many lines about its training."""
    for line in process.stderr:
        reports -= line.startswith("train: ")
        if reports == 0:
            return
    pytest.fail(f"the process ended with {process.wait()} before it trained")


@pytest.mark.parametrize(
    ("family", "kills"),
    [
        ("bert", 1),
        pytest.param("bert", KILLS, marks=pytest.mark.slow),
        pytest.param("openai-gpt", 1, marks=pytest.mark.slow),
        pytest.param("elmo", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_run_equals_uninterrupted(launch, tmp_path, family, kills):
    """Kills at random moments: before the first step, between steps, during saves (most steps overlap a save)."""
    launch = functools.partial(launch, family=family)
    options = ("--steps", 60 * (kills + 1), "--save-every", 10, "--log-every", 5, "--evaluate-every", 50)
    finish(launch(tmp_path / "uninterrupted", *options))
    rng = random.Random(0)
    checkpoints = tmp_path / "killed" / "checkpoints"
    during_saves = 0
    for kill in range(kills):
        process = launch(tmp_path / "killed", *options)
        if kill % 3 < 2:
            wait_for_step(process, rng.randint(1, 8))
        # Every third kill comes at any moment after the start of Python; the others within a step or a save.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(0, 5) if kill % 3 == 2 else rng.uniform(0, 0.05))
        while kill % 3 == 0 and not list(checkpoints.glob("*tmp*")):
            assert process.poll() is None
        process.kill()
        assert process.wait() == -signal.SIGKILL
        during_saves += bool(list(checkpoints.glob("*tmp*")))
    assert during_saves
    finish(launch(tmp_path / "killed", *options))
    assert_same_bits(tmp_path / "killed", tmp_path / "uninterrupted")


@pytest.mark.slow
def test_full_disk(launch, tmp_path):
    """The error names the checkpoint, the previous one stays, and the run resumes when there is room."""
    options = ("--model.hidden-size", 128, "--model.intermediate-size", 512, "--evaluate-every", 5)
    finish(launch(tmp_path / "uninterrupted", *options))
    finish(launch(tmp_path / "filled", *options, "--steps", 10))
    process = launch(tmp_path / "filled", *options, limit=200_000)  # Bytes per file; a checkpoint has larger files.
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    line = err.splitlines()[-1]
    assert line.startswith("prelm: ") and f"{tmp_path}/filled/checkpoints/12" in line and "File too large" in line
    assert "Traceback" not in err
    assert (tmp_path / "filled" / "checkpoints" / "10").is_dir()
    finish(launch(tmp_path / "filled", *options))
    assert_same_bits(tmp_path / "filled", tmp_path / "uninterrupted")


# Several processes


@pytest.fixture
def launch_many(launch):
    """`launch_many(workdir, processes, devices, *options, …)` starts processes with this number of devices each."""

    def launch_many(workdir: Path, processes: int, devices: int, *options: object, **more: object):
        options = (*options, "--mesh.devices", "None", "--log-every", 1)
        if processes == 1:
            return [launch(workdir, *options, **more, JAX_NUM_CPU_DEVICES=devices)]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        cluster = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": processes, "JAX_NUM_CPU_DEVICES": devices}
        return [launch(workdir, *options, **cluster, **more, JAX_PROCESS_ID=index) for index in range(processes)]

    return launch_many


# (processes, devices per process). A SIGTERM to one process stops the run between two layouts.
LAYOUTS = [(2, 4), (1, 8)]
if os.environ.get("PRELM_LAYOUTS"):
    LAYOUTS = [(4, 2), (2, 4), (1, 8), (1, 4)]


@pytest.mark.slow
def test_resumed_on_other_layouts_equals_uninterrupted(launch_many, tmp_path):
    *stopped, last = LAYOUTS
    for layout in stopped:
        processes = launch_many(tmp_path / "moved", *layout, "--steps", 500)
        wait_for_step(processes[0], 5)
        processes[-1].send_signal(signal.SIGTERM)
        for process in processes:
            _, err = process.communicate(timeout=300)
            assert process.returncode == 75, err
            assert "stopped by SIGTERM after step" in err
    steps = max(20, metrics(tmp_path / "moved")[-1]["step"] + 5)
    for workdir, layout in [("moved", last), ("uninterrupted", (1, 8))]:
        finish(*launch_many(tmp_path / workdir, *layout, "--steps", steps))
    moved, uninterrupted = losses(tmp_path / "moved"), losses(tmp_path / "uninterrupted")
    difference = np.abs(np.subtract(moved, uninterrupted) / uninterrupted)
    print(
        f"{steps} steps, relative difference of the losses: first {difference[0]:.1e}, largest {difference.max():.1e}"
    )
    assert_close(moved, uninterrupted)


@pytest.mark.parametrize(("index", "missing"), [(0, "process 1"), (1, "process 0")])
def test_missing_peers_are_named_in_time(launch, tmp_path, free_port, index, missing):
    cluster = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port}", "JAX_NUM_PROCESSES": 2, "JAX_PROCESS_ID": index}
    process = launch(tmp_path / "run", **cluster, PRELM_JOIN_SECONDS=0.5)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    (line,) = err.splitlines()
    assert line.startswith(f"prelm: process {index} of 2: {missing}") and f"localhost:{free_port}" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "family", ["bert", *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family != "bert")]
)
def test_stopped_on_one_process_and_resumed_on_two(launch_many, tmp_path, family):
    """With sharded parameters and moments, half of the shards on each process."""
    launch_many = functools.partial(launch_many, family=family)
    options = ("--mesh.parameters", "fsdp", "--steps", 20, "--save-every", 10, "--evaluate-every", 10)
    finish(*launch_many(tmp_path / "one", 1, 4, *options))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "20")  # As if stopped after step 10.
    outputs = finish(*launch_many(tmp_path / "two", 2, 2, *options))
    assert (tmp_path / "two" / "checkpoints" / "20").is_dir()
    assert ["training, tokens/s" in output for output in outputs] == [True, False]
    assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"))


def losses(workdir: Path) -> list[float]:
    return [line["train/loss"] for line in metrics(workdir) if "train/loss" in line]


def assert_close(found: list[float], reference: list[float]) -> None:
    """Up to the order of summation, which differs between one process and several."""
    np.testing.assert_allclose(found[0], reference[0], rtol=1e-6)
    np.testing.assert_allclose(found[:20], reference[:20], rtol=1e-4)
