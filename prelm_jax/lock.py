"""One holder of a directory at a time: a lock of the kernel on a local disk, a lease in a bucket or on a network disk.

The kernel frees its lock when the process ends, however it ends. A lease is a file that its holder rewrites every
20 seconds: a waiter that sees no change for 90 seconds on its own clock takes over.

    directory/lock        local: the file that is locked; it names the holder, for messages only
    directory/lease/N     elsewhere: the Nth lease, created only if absent. The highest N is the valid one
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from prelm_jax.errors import InputError, Preempted, first_line
from prelm_jax.storage import is_remote, is_shared, write_file

RENEW_SECONDS = 20.0
STALE_SECONDS = 90.0

Check = Callable[[], None]  # Raises Preempted once the directory is held by another process.


@contextlib.contextmanager
def held(directory: Path, take_over: bool = False) -> Iterator[Check]:
    """Holds a directory, which is created if need be, and removed at the end if it is still empty.

    take_over: end the lease of another process at once. Never ends a lock: its holder is alive, on this machine.

    Raises InputError at once where another process holds the directory, naming it.

        with held(Path("runs/bert-demo")) as check:
            check()  # Before each write.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {directory}: {error.strerror or error}") from None
    if not is_shared(directory):
        with _locked(directory):
            yield lambda: None
        return
    lease = Lease(Files(directory / "lease"), directory)
    lease.acquire(take_over)
    with lease.renewed():
        yield lease.check


def _identity() -> dict[str, object]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _taken(directory: Path | str, content: bytes, remedy: str) -> InputError:
    """The complaint about a directory that another process holds; `content`: of its lock or lease, which names it."""
    return InputError(
        f"{directory}: a run is in progress here ({_named(content)}): {remedy}, or choose another --workdir"
    )


def _named(content: bytes) -> str:
    holder = {"pid": "?", "host": "?", "since": "?"} | _fields(content)
    return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"


def _encode(fields: dict[str, object]) -> bytes:
    return json.dumps(fields).encode()


def _fields(content: bytes) -> dict[str, object]:
    with contextlib.suppress(ValueError):
        fields = json.loads(content)
        if isinstance(fields, dict):
            return fields
    return {}  # Not written to the end, or damaged.


# ---- Local disks -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    path = directory / "lock"
    try:
        file = _open_locked(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    with file:  # Closed on exec: a worker does not keep the lock.
        try:
            file.truncate(0)
            file.write(_encode(_identity()))
            file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                directory.rmdir()


def _open_locked(path: Path) -> BinaryIO:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # The holder may have removed it when it ended.
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("ab+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise _taken(path.parent, file.read(), "wait for its end, or stop it") from None
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):  # Else its holder has ended.
                stack.pop_all()
                return file


# ---- Buckets and network disks ---------------------------------------------------------------------------------------


class Files:
    """Small files of a directory, on a network disk or in a bucket: all that a lease needs. Their names are numbers."""

    def __init__(self, directory: Path):
        import fsspec

        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._files, self._root = fsspec.url_to_fs(str(directory))

    def numbers(self) -> list[int]:
        """The names of the files."""
        try:
            paths = self._files.ls(self._root, detail=False, refresh=True)
        except FileNotFoundError:  # A bucket has no empty directories.
            return []
        names = [path.rstrip("/").rpartition("/")[2] for path in paths]
        return [int(name) for name in names if name.isdecimal()]

    def create(self, number: int, content: bytes) -> bool:
        """Creates a file; False, with no change, if there is one. Of several callers one gets True."""
        try:
            # In a bucket the request says: only if there is no such object.
            with self._files.open(self._path(number), "xb") as file:
                file.write(content)
        except FileExistsError:
            return False
        return True

    def read(self, number: int) -> bytes | None:
        """The content of a file; None if there is none."""
        try:
            return self._files.cat_file(self._path(number))
        except FileNotFoundError:
            return None

    def write(self, number: int, content: bytes) -> None:
        """Creates or replaces a file."""
        if is_remote(self._directory):
            self._files.pipe_file(self._path(number), content)
            return
        write_file(self._directory / str(number), content)

    def delete(self, number: int) -> None:
        """Deletes a file, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(number))

    def _path(self, number: int) -> str:
        return f"{self._root}/{number}"


class Lease:
    """A lease of a directory. Only its holder writes its file, and only `create` hands over: one process wins."""

    def __init__(
        self,
        files: Files,
        directory: Path | str,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._files, self._directory, self._clock, self._sleep = files, directory, clock, sleep
        self._holder = _identity() | {"token": uuid.uuid4().hex}
        self._mutex = threading.Lock()
        self._number = self._renewals = 0
        self._lost = ""  # How; empty while it is held.

    def acquire(self, take_over: bool = False) -> None:
        """Takes the lease; waits only to see whether the holder of an old one is alive. InputError if it is."""
        try:
            newest, content = self._newest()
            if newest and not take_over:
                self._wait_until_stale(newest, content)
            created = self._files.create(newest + 1, self._content())
            if not created and self._files.read(newest + 1) != self._content():  # Equal: a request that was repeated.
                raise self._taken(self._newest()[1])
            self._number, self._renewed = newest + 1, self._clock()
            for number in self._files.numbers():
                if number < self._number:
                    self._files.delete(number)
        except InputError:
            raise
        except Exception as error:  # Each bucket client raises its own types.
            raise InputError(f"cannot write the lease in {self._directory}: {first_line(error)}") from None

    def check(self) -> None:
        """Renews the lease. Raises Preempted if another process has taken over."""
        self._renew()
        if self._lost:
            raise Preempted(f"{self._directory} {self._lost}: this run ends without saving")

    @contextlib.contextmanager
    def renewed(self) -> Iterator[None]:
        """Renews the lease in a thread, and gives it up at the end."""
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(RENEW_SECONDS):
                self._renew()

        thread = threading.Thread(target=renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._give_up()

    def _renew(self) -> None:
        with self._mutex:
            try:
                self._renewals += 1
                self._files.write(self._number, self._content())
                newest, content = self._newest()
                if newest != self._number:
                    self._lost = f"was taken over ({_named(content)})"
                    self._files.delete(self._number)  # Its successor had deleted it.
                self._renewed = self._clock()
            except Exception as error:  # The network is away: until others may take over, there is time to try again.
                if self._clock() - self._renewed >= STALE_SECONDS:
                    self._lost = f"could not be reached for {STALE_SECONDS:.0f} s ({first_line(error)})"

    def _give_up(self) -> None:
        with contextlib.suppress(Exception):  # Then others have to wait.
            if not self._lost:
                # The file stays: numbers never start again, so that a holder that slept cannot take itself for valid.
                self._files.write(self._number, _encode({"ended": True}))

    def _wait_until_stale(self, newest: int, content: bytes) -> None:
        """Raises InputError at the first sign of life of the holder."""
        if _fields(content).get("ended"):
            return
        start = self._clock()
        print(
            f"{self._directory} is leased ({_named(content)}): waiting up to {STALE_SECONDS:.0f} s for a sign of life; "
            "--take-over skips this",
            file=sys.stderr,
        )
        while not _fields(content).get("ended") and self._clock() - start < STALE_SECONDS:
            self._sleep(RENEW_SECONDS / 10)
            number, now = self._newest()
            if number != newest or (now != content and not _fields(now).get("ended")):
                raise self._taken(now)
            content = now

    def _newest(self) -> tuple[int, bytes]:
        number = max(self._files.numbers(), default=0)
        return number, self._files.read(number) or b""

    def _content(self) -> bytes:
        return _encode(self._holder | {"renewals": self._renewals})

    def _taken(self, content: bytes) -> InputError:
        return _taken(self._directory, content, "wait for its end, stop it, or end it with --take-over")
