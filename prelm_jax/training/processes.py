"""Several processes that train one model; the launcher sets their number, and fewer never train.

Each process reads from its environment:

    JAX_NUM_PROCESSES         number of processes; without it this is the only one
    JAX_COORDINATOR_ADDRESS   host:port of process 0
    JAX_PROCESS_ID            number of this process, from 0
    PRELM_JOIN_SECONDS        how long to wait for the others; 300 if unset

Where JAX detects the cluster (a TPU slice, Slurm), JAX_NUM_PROCESSES is enough. With all three there is a roll call
before JAX connects, because JAX aborts every process without naming the missing one.
"""

import contextlib
import os
import socket
import time

import jax

from prelm_jax.errors import InputError

HERE = b"here\n"  # The answer of process 0 when all are there.


def join() -> None:
    """Connects this process with the others that the launcher started.

    Raises InputError if one is missing, if two were told different things, or if JAX sees another number.
    """
    address, count, index = (os.environ.get(f"JAX_{x}") for x in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"))
    try:
        count, index = int(count or 1), None if index is None else int(index)
        seconds = float(os.environ.get("PRELM_JOIN_SECONDS", 300))
        if address is not None and index is not None:
            if not (0 <= index < count and int(address.rpartition(":")[2])):
                raise ValueError
            roll_call(address, count, index, seconds)
        elif address is not None or index is not None:
            raise ValueError
        if address is not None or "JAX_NUM_PROCESSES" in os.environ:
            jax.distributed.initialize(address, count, index, initialization_timeout=max(1, round(seconds)))
    except ValueError as error:
        raise InputError(
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do not make a cluster "
            f"({error or 'expected host:port, a number, and a smaller number'}): set all of them, or none; on a TPU "
            "slice or under Slurm JAX_NUM_PROCESSES is enough"
        ) from None
    if jax.process_count() != count:
        raise InputError(
            f"JAX sees {jax.process_count()} processes here, but JAX_NUM_PROCESSES says {count}: "
            "start the same command on every host, with the number of hosts (tpu/launch.sh does)"
        )


def roll_call(address: str, count: int, index: int, seconds: float) -> None:
    """Waits until all processes have called the address of process 0; else an InputError in each names who did not."""
    deadline = time.monotonic() + seconds
    answer = _report(address, count, index, deadline) if index else _take_roll(address, count, deadline)
    if answer != HERE:
        raise InputError(f"process {index} of {count}: {answer.decode().strip()}")


def _take_roll(address: str, count: int, deadline: float) -> bytes:
    """Process 0: hears the others, and sends each the answer."""
    port, missing, complaint = int(address.rpartition(":")[2]), set(range(1, count)), None
    both = socket.has_dualstack_ipv6()
    with contextlib.ExitStack() as stack:
        try:
            family = socket.AF_INET6 if both else socket.AF_INET
            server = stack.enter_context(socket.create_server(("", port), family=family, dualstack_ipv6=both))
        except OSError as error:
            raise InputError(f"JAX_COORDINATOR_ADDRESS {address}: cannot listen there ({error.strerror})") from None
        callers = []
        while missing and not complaint and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):  # Anything else may connect to a port, too.
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
        answer = f"{complaint}\n".encode() if complaint else HERE
        for caller in callers:
            with contextlib.suppress(OSError):
                caller.sendall(answer)
    return answer


def _report(address: str, count: int, index: int, deadline: float) -> bytes:
    """Any other process: calls process 0 until it answers."""
    host, _, port = address.rpartition(":")
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), left) as first:
            first.settimeout(left + 5)  # Process 0 decides at its own deadline who is missing.
            first.sendall(f"{index} {count}\n".encode())
            if answer := first.makefile("rb").readline():
                return answer
        time.sleep(0.1)
    return f"process 0 did not answer at {address} in time; look at the log of that host".encode()
