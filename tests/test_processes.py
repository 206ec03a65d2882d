"""Tests that need separate processes: kill -9, a full disk, several processes that train one model.

What needs no process of its own runs in this one, on devices of the same number. PRELM_LAYOUTS=1 moves a run through
more layouts of its devices.
"""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import FAMILIES, assert_same_bits, metrics, text

from prelm_jax.cli.main import main
from prelm_jax.lock import held

SLOW_DECAY = ("--optimizer.decay-steps", 1_000_000)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """`arguments(workdir, *options, family="bert")`: of `prelm` that pretrains a tiny experiment."""
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    corpus.write_text(text(seed=0))

    def arguments(workdir: Path, *options: object, family: str = "bert") -> list[str]:
        experiment = Path(__file__).with_name(f"tiny.py:{FAMILIES[family].__name__}")
        return list(map(str, ["pretrain", experiment, "--corpus", corpus, "--workdir", workdir, *options]))

    return arguments


@pytest.fixture(scope="module")
def train(arguments):
    """`train(workdir, *options, family="bert")` pretrains in this process."""
    return lambda *words, **family: main(arguments(*words, **family))


@pytest.fixture(scope="module")
def launch(arguments):
    """`launch(workdir, *options, family="bert", **environment)` starts a process that pretrains."""
    running = []

    def launch(
        workdir: Path,
        *options: object,
        family: str = "bert",
        limit: int | None = None,
        code: str | None = None,
        **environment: object,
    ) -> subprocess.Popen:
        program = ["-m", "prelm_jax"] if code is None else ["-c", code]
        process = subprocess.Popen(
            [sys.executable, *program, *arguments(workdir, *options, family=family)],
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


def test_killed_run_equals_uninterrupted(launch, train, tmp_path):
    """A kill during a save."""
    options = ("--steps", 60, "--save-every", 5, "--log-every", 5, "--evaluate-every", 50)
    train(tmp_path / "uninterrupted", *options)
    checkpoints = tmp_path / "killed" / "checkpoints"
    process = launch(tmp_path / "killed", *options)
    wait_for_step(process, 2)
    while not list(checkpoints.glob("*tmp*")):
        assert process.poll() is None
    process.kill()
    assert process.wait() == -signal.SIGKILL
    train(tmp_path / "killed", *options)
    assert_same_bits(tmp_path / "killed", tmp_path / "uninterrupted")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills"), [("bert", 3), ("finetuning", 1)])
def test_kills_while_others_read_and_try_to_write(tmp_path, kind, kills):
    script = Path(__file__).with_name("kill_runs.py")
    command = [sys.executable, script, tmp_path, str(kills), "--kinds", kind]
    path = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    state = json.loads((tmp_path / "kills.json").read_text())[kind]
    assert state["kills"] == kills and state["same_bits_at_step"] > 0 and state["reads_evaluate"] > 0


@pytest.mark.slow
def test_full_disk(launch, train, tmp_path):
    """The error names the checkpoint, the previous one stays, and the run resumes when there is room."""
    options = ("--model.hidden-size", 128, "--model.intermediate-size", 512, "--evaluate-every", 5)
    train(tmp_path / "uninterrupted", *options)
    train(tmp_path / "filled", *options, "--steps", 10)
    process = launch(tmp_path / "filled", *options, limit=200_000)  # Bytes per file; a checkpoint has larger files.
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    line = err.splitlines()[-1]
    assert line.startswith("prelm: ") and f"{tmp_path}/filled/checkpoints/12" in line and "File too large" in line
    assert "Traceback" not in err
    assert (tmp_path / "filled" / "checkpoints" / "10").is_dir()
    train(tmp_path / "filled", *options)
    assert_same_bits(tmp_path / "filled", tmp_path / "uninterrupted")


# Several processes


@pytest.fixture
def launch_many(launch):
    """`launch_many(workdir, processes, devices, *options, …)` starts processes with this number of devices each."""

    def launch_many(workdir: Path, processes: int, devices: int, *options: object, **more: object):
        options = (*options, "--mesh.devices", "None", "--log-every", 1)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        cluster = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": processes, "JAX_NUM_CPU_DEVICES": devices}
        return [launch(workdir, *options, **cluster, **more, JAX_PROCESS_ID=index) for index in range(processes)]

    return launch_many


# (processes, devices per process). A SIGTERM to one process stops the run; it ends in this one, on eight devices.
LAYOUTS = [(4, 2), (2, 4), (2, 2)] if os.environ.get("PRELM_LAYOUTS") else [(2, 4)]


@pytest.mark.slow
def test_resumed_on_other_layouts_equals_uninterrupted(launch_many, train, tmp_path):
    decay = ("--optimizer.decay-steps", 500)
    for layout in LAYOUTS:
        processes = launch_many(tmp_path / "moved", *layout, *decay, "--steps", 500)
        wait_for_step(processes[0], 5)
        processes[-1].send_signal(signal.SIGTERM)
        for process in processes:
            _, err = process.communicate(timeout=300)
            assert process.returncode == 75, err
            assert "stopped by SIGTERM after step" in err
    steps = max(20, metrics(tmp_path / "moved")[-1]["step"] + 5)
    for workdir in ("moved", "uninterrupted"):
        train(tmp_path / workdir, *decay, "--steps", steps, "--mesh.devices", "None", "--log-every", 1)
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


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_the_death_of_a_process_ends_the_others_in_time(launch_many, tmp_path, dead):
    processes = launch_many(tmp_path / "run", 2, 1, "--steps", 100_000, *SLOW_DECAY)
    wait_for_step(processes[0], 3)
    processes[dead].kill()
    died = time.monotonic()
    _, err = processes[1 - dead].communicate(timeout=300)
    assert time.monotonic() - died < 30
    assert processes[1 - dead].returncode == 75
    assert err.splitlines()[-1].startswith(f"prelm: process {1 - dead}: process {dead} died")
    assert "Traceback" not in err and "    @ " not in err, "no dump of a stack"


@pytest.mark.slow
def test_the_refusal_of_a_process_ends_the_others(launch_many, tmp_path):
    """Process 0 is told that another run is in progress; process 1 knows nothing of that."""
    with held(tmp_path / "run"):
        refused, other = launch_many(tmp_path / "run", 2, 1, "--steps", 100_000, *SLOW_DECAY)
        _, err = refused.communicate(timeout=300)
        _, other_err = other.communicate(timeout=300)
    assert refused.returncode == 1 and f"a run is in progress here (process {os.getpid()} on " in err.splitlines()[-1]
    assert other.returncode == 1
    assert other_err.splitlines()[-1].startswith("prelm: process 1: process 0 ended with exit code 1")


# A network disk whose leases go stale within a second.
ON_A_NETWORK_DISK = """
import sys
from prelm_jax import lock
from prelm_jax.cli.main import main
lock.is_shared = lambda path: True
lock.RENEW_SECONDS, lock.STALE_SECONDS = 0.1, 1.0
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_that_was_stopped_for_longer_than_its_lease_saves_no_more(launch, tmp_path):
    """SIGSTOP between two saves, another run takes over, SIGCONT."""
    options = ("--save-every", 10, "--keep", 1)
    sleeper = launch(tmp_path / "run", *options, "--steps", 100_000, *SLOW_DECAY, code=ON_A_NETWORK_DISK)
    wait_for_step(sleeper)
    sleeper.send_signal(signal.SIGSTOP)
    while list((tmp_path / "run" / "checkpoints").glob("*tmp*")):
        sleeper.send_signal(signal.SIGCONT)
        sleeper.send_signal(signal.SIGSTOP)
    successor = launch(tmp_path / "run", *options, "--steps", 100_000, *SLOW_DECAY, code=ON_A_NETWORK_DISK)
    wait_for_step(successor)
    sleeper.send_signal(signal.SIGCONT)
    _, err = sleeper.communicate(timeout=300)
    assert sleeper.returncode == 75
    assert f"{tmp_path}/run was taken over (process {successor.pid} on " in err.splitlines()[-1]
    successor.send_signal(signal.SIGTERM)
    _, err = successor.communicate(timeout=300)
    assert successor.returncode == 75 and "damaged" not in err, err


@pytest.mark.parametrize("family", ["bert", pytest.param("elmo", marks=pytest.mark.slow)])
def test_stopped_on_one_process_and_resumed_on_two(launch_many, train, tmp_path, family):
    """With sharded parameters and moments, half of the shards on each process. GPT's batch has the layout of BERT's."""
    options = ("--mesh.parameters", "fsdp", "--steps", 20, "--save-every", 10, "--evaluate-every", 10)
    train(tmp_path / "one", *options, "--mesh.devices", 4, "--log-every", 1, family=family)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "20")  # As if stopped after step 10.
    outputs = finish(*launch_many(tmp_path / "two", 2, 2, *options, family=family))
    assert (tmp_path / "two" / "checkpoints" / "20").is_dir()
    assert ["training, tokens/s" in output for output in outputs] == [True, False]
    assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"))


def losses(workdir: Path) -> list[float]:
    return [line["train/loss"] for line in metrics(workdir) if "train/loss" in line]


def assert_close(found: list[float], reference: list[float]) -> None:
    """Up to the order of summation, which differs between one process and several."""
    np.testing.assert_allclose(found[0], reference[0], rtol=1e-6)
    np.testing.assert_allclose(found[:20], reference[:20], rtol=1e-4)
