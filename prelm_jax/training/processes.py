"""Several processes that train one model; the launcher sets their number, and fewer never train.

Each process reads from its environment:

    JAX_NUM_PROCESSES         number of processes; without it this is the only one
    JAX_COORDINATOR_ADDRESS   host:port of process 0
    JAX_PROCESS_ID            number of this process, from 0
    PRELM_JOIN_SECONDS        how long to wait for the others; 300 if unset

Where JAX detects the cluster (a TPU slice, Slurm), JAX_NUM_PROCESSES is enough. With all three there is a roll call
before JAX connects, because JAX aborts every process without naming the missing one. The connections of the roll call
stay open: a process that dies closes its own, and process 0 tells the others, which cannot go on without it.
"""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax

from prelm_jax.errors import InputError

HERE = "here"  # The answer of process 0 when all have come.
STOPPED = 75  # Exit code: the same command resumes.
DIED = -1
GRACE_SECONDS = 20.0  # For this process to end by itself when another one has ended.


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """In the block, this process is connected with the others that the launcher started.

    If another process dies meanwhile, this one prints a line and exits with 75, since the same command resumes. If
    another one ends early with an exit code, this one has 20 seconds to end, and then exits with the same code.

    Raises InputError if a process is missing, if two were told different numbers, or if JAX sees another number.
    """
    peers = join()
    code = 0
    try:
        yield
    except Exception:
        # When a process dies, JAX fails here in many ways: wait for the connections to tell which process it was.
        peers.wait()
        code = 1
        raise
    except BaseException as error:
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else STOPPED
        raise
    finally:
        peers.end(code)


def join() -> "Peers":
    """Connects this process with the others that the launcher started; see `joined`."""
    address, count, index = (os.environ.get(f"JAX_{x}") for x in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"))
    peers = Peers(0, {})
    try:
        count, index = int(count or 1), None if index is None else int(index)
        seconds = float(os.environ.get("PRELM_JOIN_SECONDS", 300))
        if address is not None and index is not None:
            if not (0 <= index < count and int(address.rpartition(":")[2])):
                raise ValueError
            peers = Peers(index, roll_call(address, count, index, seconds))
        elif address is not None or index is not None:
            raise ValueError
        if address is not None or "JAX_NUM_PROCESSES" in os.environ:
            # Without a roll call JAX itself notices the death of a process, by its heartbeat, and aborts. With one it
            # must not: the connections tell, and name the process.
            jax.config.update("jax_enable_recoverability", peers.connected)
            heartbeat = 100 if peers.connected else 25
            jax.distributed.initialize(
                address,
                count,
                index,
                initialization_timeout=max(1, round(seconds)),
                heartbeat_timeout_seconds=heartbeat,
            )
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
    return peers


class Peers:
    """The connections to other processes: process 0 has one to each, the others one to process 0.

    Messages are lines: the number of a process, and its exit code, or -1 if it died.
    """

    def __init__(self, index: int, connections: dict[int, socket.socket]):
        self._index, self._connections = index, connections
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._listen, args=item, daemon=True) for item in connections.items()]
        for connection in connections.values():
            # Keep-alive packets notice the crash of a whole host within 20 seconds.
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
                if hasattr(socket, name):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        for thread in self._threads:
            thread.start()

    @property
    def connected(self) -> bool:
        """Whether there are others, and connections to them."""
        return bool(self._connections)

    def wait(self) -> None:
        """Gives the threads time to end this process, if another one has died."""
        if self.connected:
            self._ended.wait(3)

    def end(self, code: int) -> None:
        """Says goodbye: this process ends now, with an exit code."""
        self._ended.set()
        if code and self.connected:
            # JAX would wait for all processes, and abort those that process 0 does not wait for.
            atexit.register(self._leave, code)
        elif self.connected and self._index:
            jax.distributed.shutdown()  # Before process 0 does, whose end would abort this one.
        self._tell(self._index, code)
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        if code == 0:
            self._wait_for_others()

    def _wait_for_others(self) -> None:
        """Process 0 leaves last."""
        deadline = time.monotonic() + GRACE_SECONDS + 2
        for thread in self._threads if self._index == 0 else ():
            thread.join(max(0, deadline - time.monotonic()))

    def _leave(self, code: int) -> None:
        self._wait_for_others()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _listen(self, other: int, connection: socket.socket) -> None:
        """Reads messages up to the end of the other process."""
        with contextlib.suppress(OSError, ValueError), connection.makefile() as messages:
            for message in messages:
                number, code = map(int, message.split())
                self._end_with(number, code)
                if number == other:
                    connection.recv(1)  # Up to its very end.
                    return
        self._end_with(other, DIED)

    def _end_with(self, other: int, code: int) -> None:
        """Ends this process, because another one has ended before its time."""
        if code == 0 or self._ended.is_set():
            return
        if self._index == 0:
            self._tell(other, code)
        if code == DIED:
            line, code = f"process {other} died: look at the log of that host; the same command resumes", STOPPED
        elif self._ended.wait(GRACE_SECONDS):
            return
        else:
            line = f"process {other} ended with exit code {code}: look at the log of that host"
        if not self._ended.is_set():
            print(f"prelm: process {self._index}: {line}", file=sys.stderr, flush=True)
            os._exit(code)

    def _tell(self, number: int, code: int) -> None:
        for other, connection in self._connections.items():
            if other != number:
                with contextlib.suppress(OSError):
                    connection.sendall(f"{number} {code}\n".encode())


def roll_call(address: str, count: int, index: int, seconds: float) -> dict[int, socket.socket]:
    """Waits until all processes have called the address of process 0; else an InputError in each names who did not.

    Returns the connections: of process 0 to all others, of another one to process 0.
    """
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        if index:
            connections, complaint = _call(stack, address, count, index, deadline)
        else:
            connections, complaint = _take_roll(stack, address, count, deadline)
        if complaint:
            raise InputError(f"process {index} of {count}: {complaint}")
        stack.pop_all()
    return connections


def _take_roll(
    stack: contextlib.ExitStack, address: str, count: int, deadline: float
) -> tuple[dict[int, socket.socket], str]:
    """Process 0: hears the others, and sends each the complaint, or HERE."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", int(address.rpartition(":")[2])), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise InputError(f"JAX_COORDINATOR_ADDRESS {address}: cannot listen there ({error.strerror})") from None
    callers, missing, complaint = [], set(range(1, count)), ""
    with server:
        while missing and not complaint and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):  # Anything else may connect to a port, too.
                caller = stack.enter_context(server.accept()[0])
                caller.settimeout(min(left, 5))
                other, others = map(int, _read_line(caller).split())
                callers.append((other, caller))
                if others != count:
                    complaint = f"process {other} was told of {others} processes, process 0 of {count}"
                elif other not in missing:
                    complaint = f"two processes have JAX_PROCESS_ID={other}"
                missing.discard(other)
    if missing and not complaint:
        names = ", ".join(map(str, sorted(missing)))
        complaint = f"process {names} did not come to {address} in time; look at the log of that host"
    for _, caller in callers:
        with contextlib.suppress(OSError):
            caller.sendall(f"{complaint or HERE}\n".encode())
    return dict(callers), complaint


def _call(
    stack: contextlib.ExitStack, address: str, count: int, index: int, deadline: float
) -> tuple[dict[int, socket.socket], str]:
    """Any other process: calls process 0 until it answers."""
    host, _, port = address.rpartition(":")
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError):
            first = stack.enter_context(socket.create_connection((host.strip("[]"), int(port)), left))
            first.settimeout(left + 5)  # Process 0 decides at its own deadline who is missing.
            first.sendall(f"{index} {count}\n".encode())
            if answer := _read_line(first):
                return {0: first}, "" if answer == HERE else answer
        time.sleep(0.1)
    return {}, f"process 0 did not answer at {address} in time; look at the log of that host"


def _read_line(connection: socket.socket) -> str:
    """A line, and not a byte after it; "" if the connection ends before."""
    line = b""
    while len(line) < 1000 and (byte := connection.recv(1)):
        if byte == b"\n":
            return line.decode(errors="replace")
        line += byte
    return ""
