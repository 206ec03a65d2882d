"""One holder of a directory: locks of the kernel, leases in a store that may be slow, raced for, or away."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelm_jax import lock, storage
from prelm_jax.errors import InputError, Preempted
from prelm_jax.lock import RENEW_SECONDS, STALE_SECONDS, Files, Lease, held


@contextlib.contextmanager
def another_process(code: str, *arguments: object):
    """Runs code that prints a line when it is ready, and kills it in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


HOLD = """
import sys
from pathlib import Path
from prelm_jax.lock import held
with held(Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.read()
"""

# With a worker as the tokenizer has them, whose number it prints, and one that ends when its standard input does.
HOLD_WITH_WORKERS = """
import os, subprocess, sys
from pathlib import Path
import loky
from prelm_jax.lock import held
with held(Path(sys.argv[1])):
    worker = loky.ProcessPoolExecutor(1).submit(os.getpid).result()
    subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"])
    print("ready", flush=True)
    print(worker, flush=True)
    sys.stdin.read()
"""


def test_the_second_is_told_who_holds_it(tmp_path):
    directory = tmp_path / "runs" / "run"
    with another_process(HOLD, directory) as holder:
        for take_over in (False, True):  # The holder of a lock is alive: there is nothing to take over.
            message = rf"{directory}: .*process {holder.pid} on \S+, since \d{{4}}-"
            with pytest.raises(InputError, match=message), held(directory, take_over):
                pass
        holder.stdin.close()
        assert holder.wait() == 0
    with held(directory):
        (directory / "file").touch()
    assert [path.name for path in directory.iterdir()] == ["file"]


def test_nothing_stays_of_a_directory_without_files(tmp_path):
    with held(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
        with pytest.raises(InputError, match=f"process {os.getpid()} "), held(tmp_path / "run"):
            pass
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_holder_keeps_nothing_though_its_workers_live(tmp_path):
    with another_process(HOLD_WITH_WORKERS, tmp_path) as holder:
        with pytest.raises(InputError, match=f"process {holder.pid} "), held(tmp_path):
            pass
        worker = int(holder.stdout.readline())
        holder.kill()
        holder.wait()
        try:
            os.kill(worker, 0)  # It lives.
            with held(tmp_path):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_holder_that_ends_while_another_reads_its_name(tmp_path, monkeypatch):
    flock = lock.fcntl.flock

    def removed_meanwhile(file, operation):
        try:
            flock(file, operation)
        finally:
            (tmp_path / "lock").unlink()

    with held(tmp_path):
        monkeypatch.setattr(lock.fcntl, "flock", removed_meanwhile)
        with pytest.raises(InputError, match=f"{tmp_path}: .*process {os.getpid()} "), held(tmp_path):
            pass


@pytest.mark.parametrize("parts", [("file",), ("file", "run")])
def test_a_directory_that_cannot_be_made(tmp_path, parts):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"cannot write {tmp_path.joinpath(*parts)}"), held(tmp_path.joinpath(*parts)):
        pass


# Leases


class Fake:
    """A store in memory, shared by several holders; `races` are called between reading and creating."""

    def __init__(self):
        self.files: dict[int, bytes] = {}
        self.races = []
        self.away = False

    def numbers(self) -> list[int]:
        if self.away:
            raise OSError("the network is away")
        return list(self.files)

    def create(self, number: int, content: bytes) -> bool:
        while self.races:
            self.races.pop()()
        return self.files.setdefault(number, content) is content

    def read(self, number: int) -> bytes | None:
        return self.files.get(number)

    def write(self, number: int, content: bytes) -> None:
        self.numbers()
        self.files[number] = content

    def delete(self, number: int) -> None:
        self.files.pop(number, None)


class World:
    """A store and a clock. A process that sleeps lets the others do what `events` says, once each is due."""

    def __init__(self):
        self.store, self.time, self.events = Fake(), 0.0, []

    def lease(self) -> Lease:
        return Lease(self.store, "gs://bucket/run", lambda: self.time, self.sleep)

    def acquired(self, take_over: bool = False) -> Lease:
        lease = self.lease()
        lease.acquire(take_over)
        return lease

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        for event in self.events:
            event()


@pytest.fixture
def world() -> World:
    return World()


def test_a_live_holder_keeps_its_lease(world):
    holder = world.acquired()
    world.events = [lambda: world.time % RENEW_SECONDS or holder.check()]
    with pytest.raises(InputError, match=rf"gs://bucket/run: .*process {os.getpid()} on .*--take-over"):
        world.acquired()
    assert world.time <= RENEW_SECONDS, "the first sign of life is enough"
    holder.check()


def test_a_dead_holder_loses_it_after_a_while(world, capsys):
    dead = world.acquired()
    new = world.acquired()
    assert STALE_SECONDS <= world.time < STALE_SECONDS + RENEW_SECONDS
    assert "--take-over" in capsys.readouterr().err
    with pytest.raises(Preempted, match=rf"gs://bucket/run was taken over \(process {os.getpid()} "):
        dead.check()
    new.check()
    assert list(world.store.files) == [2]


def test_taking_over_waits_for_nothing(world, capsys):
    alive = world.acquired()
    new = world.acquired(take_over=True)
    assert world.time == 0 and capsys.readouterr().err == ""
    with pytest.raises(Preempted):
        alive.check()
    new.check()


def test_a_lease_that_was_given_up_is_free_at_once(world):
    for _ in range(3):
        with world.acquired().renewed():
            pass
    assert world.time == 0 and list(world.store.files) == [3]


def test_a_holder_that_slept_through_two_others(world):
    """Numbers never start again: otherwise it would take the file of a third for its own."""
    first = world.acquired()
    with world.acquired(take_over=True).renewed():
        pass
    with world.acquired().renewed():
        pass
    with pytest.raises(Preempted):
        first.check()
    world.acquired().check()


@pytest.mark.parametrize("take_over", [False, True])
def test_of_several_waiters_one_wins(world, take_over):
    world.acquired()
    winners = []
    # Another waiter found the same lease stale, and is faster.
    world.store.races = [lambda: winners.append(world.acquired(take_over=True))]
    with pytest.raises(InputError, match="a run is in progress here"):
        world.acquired(take_over)
    winners[0].check()


def test_a_request_that_was_repeated_after_its_answer_got_lost(world):
    lease = world.lease()
    world.store.races = [lambda: world.store.files.setdefault(1, lease._content())]
    lease.acquire()
    lease.check()


def test_a_network_that_is_away_for_a_while(world):
    holder = world.acquired()
    world.store.away = True
    world.time += STALE_SECONDS - 1
    holder.check()
    world.store.away = False
    holder.check()
    world.store.away = True
    world.time += STALE_SECONDS
    with pytest.raises(Preempted):
        holder.check()
    with pytest.raises(InputError, match="cannot write the lease in gs://bucket/run: the network is away"):
        world.acquired()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_lease_that_cannot_be_read_is_one(world, content):
    world.store.files[7] = content
    world.acquired().check()
    assert world.time >= STALE_SECONDS and list(world.store.files) == [8]


@given(st.lists(st.sampled_from(["start", "take over", "renew", "give up"]), max_size=12), st.data())
def test_never_two_holders(actions, data):
    """After any sequence of actions of any processes, at most one passes its check."""
    world, leases = World(), []
    for action in actions:
        if action in ("start", "take over"):
            with contextlib.suppress(InputError):
                leases.append(world.acquired(action == "take over"))
        elif leases:
            lease = data.draw(st.sampled_from(leases))
            with contextlib.suppress(Preempted):
                if action == "renew":
                    lease.check()
                else:
                    lease._give_up()
                    leases.remove(lease)
    valid = 0
    for lease in leases:
        with contextlib.suppress(Preempted):
            lease.check()
            valid += 1
    assert valid <= 1


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_files_of_a_directory_are_a_store(tmp_path, scheme):
    """`memory` is a file system of the library that reaches buckets."""
    directory = tmp_path / "lease"
    if scheme:
        directory = FakeBucketPath(f"{scheme}{directory}")
    store = Files(directory)
    assert store.numbers() == [] and store.read(1) is None
    assert store.create(1, b"a") and not store.create(1, b"b")
    assert store.read(1) == b"a"
    store.write(1, b"c")
    store.write(10, b"d")
    assert sorted(store.numbers()) == [1, 10] and store.read(1) == b"c"
    store.delete(1)
    store.delete(1)
    assert store.numbers() == [10]


class FakeBucketPath(str):
    def mkdir(self, **_) -> None:
        pass


def test_of_many_that_create_a_file_one_succeeds(tmp_path):
    store, barrier, created = Files(tmp_path), threading.Barrier(8), []

    def create() -> None:
        barrier.wait()
        created.append(store.create(1, b"x"))

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(created) == [False] * 7 + [True]


MOUNTS = r"""
/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/vdb /home/local\040disk xfs rw 0 0
bucket /mnt/bucket fuse.gcsfuse rw 0 0
tmpfs /mnt/bucket/scratch tmpfs rw 0 0
""".strip()


@pytest.mark.parametrize(
    ("path", "shared"),
    [
        ("/data/run", False),
        ("/home/me/run", True),
        ("/home/local disk/run", False),
        ("/mnt/bucket/run", True),
        ("/mnt/bucket/scratch/run", False),
        ("/homes/run", False),
    ],
)
def test_network_disks_are_found_among_the_mounts(monkeypatch, path, shared):
    monkeypatch.setattr(storage, "_read_mounts", lambda: MOUNTS)
    assert storage.is_shared(storage.Path(path)) is shared
    assert storage.is_shared("gs://bucket/run")


def test_a_network_disk_gets_a_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "is_shared", lambda path: True)
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.01)
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.05)
    with held(tmp_path) as check:
        check()
        assert json.loads((tmp_path / "lease" / "1").read_text())["pid"] == os.getpid()
        with held(tmp_path, take_over=True) as check_other:
            with pytest.raises(Preempted):
                check()
            check_other()
    with held(tmp_path):
        pass
    assert [path.name for path in (tmp_path / "lease").iterdir()] == ["3"]
