"""Several processes that train one model. The launcher says how many there are; fewer never train.

Each process reads, from its environment:

    JAX_NUM_PROCESSES         how many processes there are; without it this is the only one
    JAX_COORDINATOR_ADDRESS   host:port of the first process
    JAX_PROCESS_ID            this one's number, from 0
    PRELM_JOIN_SECONDS        how long to wait for the others; 300 if unset

Where JAX knows the cluster (a TPU slice, Slurm), the first is enough. With all three there is a roll call before JAX
connects, for JAX would end every process without a word on who is missing.
"""

import contextlib
import os
import socket
import time

import jax

from prelm_jax.errors import InputError

SECONDS = 300
HERE = b"here\n"  # the first process's answer when all have come


def join() -> None:
    """Makes this process one of those that the launcher started.

    Raises InputError if not all of them come in time, if two say different things, or if JAX sees another number.
    """
    address, count, index = (os.environ.get(f"JAX_{x}") for x in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"))
    try:
        count, index = int(count or 1), None if index is None else int(index)
        seconds = float(os.environ.get("PRELM_JOIN_SECONDS", SECONDS))
        given = [address is not None, index is not None]
        if any(given) and not (all(given) and 0 <= index < count and int(address.rpartition(":")[2])):
            raise ValueError
        if any(given):
            roll_call(address, count, index, seconds)
        if any(given) or "JAX_NUM_PROCESSES" in os.environ:
            jax.distributed.initialize(address, count, index, initialization_timeout=max(1, round(seconds)))
    except ValueError as error:
        raise InputError(
            f"JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do not make one of several processes "
            f"({error or 'host:port, a number, and one below it'}): set them all, or none; on a TPU slice or under "
            "Slurm JAX_NUM_PROCESSES is enough"
        ) from None
    if jax.process_count() != count:
        raise InputError(
            f"JAX sees {jax.process_count()} processes here, but JAX_NUM_PROCESSES says {count}: "
            "start the same command on every host, with the number of hosts (tpu/launch.sh does)"
        )


def roll_call(address: str, count: int, index: int, seconds: float) -> None:
    """Waits until all processes have come to the first one's address; InputError, in each, that names who has not."""
    deadline = time.monotonic() + seconds
    answer = _report(address, count, index, deadline) if index else _hear(address, count, deadline)
    if answer != HERE:
        raise InputError(f"process {index} of {count}: {answer.decode().strip()}")


def _hear(address: str, count: int, deadline: float) -> bytes:
    """The first process: hears the others, and tells each the answer."""
    port, missing, complaint = int(address.rpartition(":")[2]), set(range(1, count)), None
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_server(port))
        except OSError as error:
            raise InputError(f"JAX_COORDINATOR_ADDRESS {address}: cannot listen there ({error.strerror})") from None
        callers = []
        while missing and not complaint and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):  # Whoever else knocks at a port is not one of us.
                caller = stack.enter_context(server.accept()[0])
                caller.settimeout(min(left, 5))
                other, others = map(int, caller.makefile().readline().split())
                callers.append(caller)
                if others != count:
                    complaint = f"process {other} was told of {others} processes, process 0 of {count}"
                elif other not in missing:
                    complaint = f"two processes have JAX_PROCESS_ID={other}"
                missing.discard(other)
        if missing and not complaint:
            names = ", ".join(map(str, sorted(missing)))
            complaint = f"process {names} did not come to {address} in time; look at the log of that host"
        answer = HERE if not complaint else f"{complaint}\n".encode()
        for caller in callers:
            with contextlib.suppress(OSError):
                caller.sendall(answer)
    return answer


def _server(port: int) -> socket.socket:
    """Listens on every address, on both families where the machine has both."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=both)


def _report(address: str, count: int, index: int, deadline: float) -> bytes:
    """Any other process: knocks until the first one opens; its answer."""
    host, _, port = address.rpartition(":")
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), left) as first:
            first.settimeout(left + 5)  # The first process has the say on who is missing, at its own deadline.
            first.sendall(f"{index} {count}\n".encode())
            if answer := first.makefile("rb").readline():
                return answer
        time.sleep(0.1)
    return f"process 0 did not answer at {address} in time; look at the log of that host".encode()
