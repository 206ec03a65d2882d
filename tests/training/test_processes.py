"""The roll call: all processes come, or each is told which did not."""

import socket
import threading

import jax
import pytest

from prelm_jax.errors import InputError
from prelm_jax.training.processes import join, roll_call


@pytest.fixture
def address(free_port) -> str:
    """The address of process 0."""
    return f"localhost:{free_port}"


def call(address: str, *processes: tuple[int, int], seconds: float = 20) -> list[str]:
    """What each process (index, count) was told; "" if all had come."""
    told = [""] * len(processes)

    def run(i: int, index: int, count: int) -> None:
        try:
            for connection in roll_call(address, count, index, seconds).values():
                connection.close()
        except InputError as error:
            told[i] = str(error)

    threads = [threading.Thread(target=run, args=(i, *process)) for i, process in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_all_come(address):
    assert call(address, (2, 3), (0, 3), (1, 3)) == ["", "", ""]
    assert call(address, (0, 1)) == [""]


def test_every_process_is_told_who_is_missing(address):
    told = call(address, (0, 4), (2, 4), seconds=0.5)
    for index, line in zip((0, 2), told, strict=True):
        assert line.startswith(f"process {index} of 4: process 1, 3 did not come to {address}")


def test_without_the_first_process(address):
    told = call(address, (1, 2), seconds=0.3)
    assert told[0].startswith(f"process 1 of 2: process 0 did not answer at {address}")


def test_processes_that_were_told_different_things(address):
    assert all("process 1 was told of 3 processes, process 0 of 2" in line for line in call(address, (0, 2), (1, 3)))
    told = call(address, (0, 3), (1, 3), (1, 3))
    assert "two processes have JAX_PROCESS_ID=1" in told[0]


def test_another_client_of_the_port_is_no_process(address):
    def knock():
        while True:
            try:
                with socket.create_connection(("localhost", int(address.split(":")[1]))) as client:
                    client.sendall(b"GET / HTTP/1.1\r\n")
                    return
            except OSError:
                continue

    client = threading.Thread(target=knock)
    client.start()
    told = call(address, (0, 2), seconds=0.5)
    client.join()
    assert "process 1 did not come" in told[0]


def test_a_port_that_is_taken(address):
    with socket.create_server(("", int(address.split(":")[1]))):
        (told,) = call(address, (0, 2))
    assert told.startswith(f"JAX_COORDINATOR_ADDRESS {address}: cannot listen there (")


def test_another_number_of_processes_than_the_launcher_says_is_refused(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    join()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="JAX sees 2 processes here, but JAX_NUM_PROCESSES says 1"):
        join()


@pytest.mark.parametrize(
    "environment",
    [{"COORDINATOR_ADDRESS": "localhost:1"}, {"PROCESS_ID": "0"}, {"PROCESS_ID": "2", "COORDINATOR_ADDRESS": "a:1"}],
    ids=str,
)
def test_variables_that_do_not_fit_together(monkeypatch, environment):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    for name, value in {"NUM_PROCESSES": "2", **environment}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(InputError, match="JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do not"):
        join()
