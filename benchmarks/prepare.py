"""Time, memory and size of the token store when a corpus is prepared.

    python benchmarks/prepare.py --corpus 'corpus/*.txt.xz' [--twice] [--kills N] [--json FILE]

Runs `prelm prepare` on `experiments/bert.py:base` with an empty cache: it trains the vocabulary, tokenizes shards and
joins them. Memory is the proportional set size (PSS) of the command and all its processes, sampled five times a second.
`--twice` also measures the corpus given twice. `--kills` kills the command and its processes at random moments of
tokenization, resumes it to the end, and compares the stores.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "bert.py"


@dataclasses.dataclass(frozen=True)
class Settings:
    """`vocabulary`: a vocab.txt to use instead of training one. `threads`: cores to use."""

    corpus: tuple[str, ...]
    vocabulary: Path | None = None
    threads: int = 2
    twice: bool = False
    kills: int = 0
    json: Path | None = None


@dataclasses.dataclass
class Measured:
    """Seconds of the two phases and of all processors; peak memory of each, size of text and store, in bytes."""

    vocabulary_seconds: float
    store_seconds: float
    processor_seconds: float
    vocabulary_memory: int
    store_memory: int
    text: int
    store: int


class Command:
    """`prelm prepare`, running."""

    def __init__(self, settings: Settings, sources: tuple[str, ...], cache: Path):
        self.cache = cache
        command = [sys.executable, "-m", "prelm_jax", "prepare", f"{EXPERIMENT}:base", "--corpus", *sources]
        if settings.vocabulary:
            command += ["--tokenizer.path", str(settings.vocabulary)]
        self.process = subprocess.Popen(
            command, env=os.environ | {"PRELM_CACHE": str(cache)}, start_new_session=True, stdout=subprocess.DEVNULL
        )

    @property
    def shards(self) -> int | None:
        """The number of finished shards; None during the first phase."""
        partial = list(self.cache.glob("stores/*.partial"))
        return len(list(partial[0].glob("*.npz"))) if partial else None

    def memory(self) -> int:
        """Bytes of all processes of the session."""
        return sum(map(_memory, _session(self.process.pid)))

    def finish(self) -> None:
        if self.process.wait():
            sys.exit("prelm prepare failed")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _session(session: int) -> list[int]:
    found = []
    for process in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # The process may have ended.
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                found.append(int(process))
    return found


def _memory(process: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def measure(settings: Settings, sources: tuple[str, ...], cache: Path) -> Measured:
    start = time.monotonic()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = used.ru_utime + used.ru_stime
    command = Command(settings, sources, cache)
    began, peaks = None, [0, 0]
    try:
        while command.process.poll() is None:
            if began is None and command.shards is not None:
                began = time.monotonic()
            peaks[began is not None] = max(peaks[began is not None], command.memory())
            time.sleep(0.2)
    except KeyboardInterrupt:
        command.kill()
        raise
    command.finish()
    end = time.monotonic()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = used.ru_utime + used.ru_stime - processor
    manifests = [json.loads(path.read_text()) for path in cache.glob("stores/*/*/manifest.json")]
    text, tokens = (sum(manifest[name] for manifest in manifests) for name in ("bytes", "tokens"))
    store = sum(path.stat().st_size for path in cache.glob("stores/*/*/*"))
    measured = Measured(began - start, end - began, processor, *peaks, text, store)
    print(
        f"{text / 1e6:.0f} MB of text, {tokens:,} tokens: {began - start:.0f} s for the vocabulary, "
        f"{end - began:.0f} s for the store, {processor:.0f} s of processors; "
        f"peak memory {peaks[0] / 1e6:.0f} MB, then {peaks[1] / 1e6:.0f} MB; store {store / text:.2f} × the text"
    )
    return measured


def killed(settings: Settings, cache: Path) -> None:
    """Kills the preparation of the store and resumes it to the end; `cache` has no store yet."""
    rng = random.Random(0)
    for _ in range(settings.kills):
        command = Command(settings, settings.corpus, cache)
        before = command.shards or 0
        more = rng.randint(0, 6)
        while command.process.poll() is None and (command.shards is None or command.shards < before + more):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2))
        command.kill()
        print(f"killed with {command.shards} shards")
    Command(settings, settings.corpus, cache).finish()


def content(cache: Path) -> dict[str, str]:
    files = [path for path in sorted(cache.glob("stores/*/*/*")) if path.is_file()]
    return {str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main(settings: Settings) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.threads])
    with tempfile.TemporaryDirectory() as folder:
        once = Path(folder) / "once"
        found = {"once": measure(settings, settings.corpus, once)}
        if settings.kills:
            again = Path(folder) / "killed"
            killed(settings, again)
            same = content(once) == content(again)
            print(f"killed {settings.kills} times and resumed: {'the same store' if same else 'A DIFFERENT STORE'}")
        if settings.twice:
            found["twice"] = measure(settings, settings.corpus * 2, Path(folder) / "twice")
    if settings.json:
        settings.json.write_text(
            json.dumps({name: dataclasses.asdict(m) for name, m in found.items()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main(tyro.cli(Settings))
