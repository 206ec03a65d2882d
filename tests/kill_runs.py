"""Kills tiny runs with SIGKILL, again and again, while others read and try to write; nothing may be lost or spoilt.

    python tests/kill_runs.py DIRECTORY 50

It trains each kind of run in many lives. Every life saves after each step and ends by a kill: half of them at any
moment, half while a checkpoint is being written. All the time two readers use the newest checkpoint, and in each life a
rival starts the same command. In the end the run must have the bits of one that was never killed.

Findings are: other bits; a reader that fails once there is a checkpoint; a checkpoint called damaged; a rival that is
not told who trains; a life that ends by itself.

DIRECTORY/kills.json holds what was done; the same command resumes from there, with more kills if asked.
"""

import argparse
import collections
import contextlib
import io
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import tiny

STEPS_OF_A_LIFE = 8
HANGS_AFTER = 300.0  # Seconds.

SLOW_DECAY = "--optimizer.decay-steps 10000000"  # Every step changes the parameters.
PRETRAIN, EVALUATE = f"pretrain {tiny.__file__}:bert --corpus DIR/corpus.txt", "evaluate WORKDIR"
FINETUNE = "finetune finetuning:classify --init-from DIR/encoder --train DIR/train.tsv --dev DIR/dev.tsv --seeds 1"

# Kind of run: its command, devices, and the commands of two readers.
KINDS = {
    "bert": (f"{PRETRAIN} {SLOW_DECAY}", 1, ("fill WORKDIR [MASK]", EVALUATE)),
    "gpt": (f"{PRETRAIN.replace(':bert', ':gpt')} {SLOW_DECAY}", 1, ("score WORKDIR DIR/lines.txt", EVALUATE)),
    "elmo": (PRETRAIN.replace(":bert", ":elmo"), 1, ("score WORKDIR DIR/lines.txt", EVALUATE)),
    "bert-fsdp": (
        f"{PRETRAIN} {SLOW_DECAY} --mesh.devices 4 --mesh.parameters fsdp",
        4,
        ("fill WORKDIR [MASK]", EVALUATE),
    ),
    "finetuning": (
        f"{FINETUNE} --batch-size 4 --epochs 1000000 --mesh.devices 1",
        1,
        ("classify WORKDIR DIR/lines.txt", f"{EVALUATE} --test DIR/dev.tsv"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="directory for corpus, runs and kills.json")
    parser.add_argument("kills", type=int, help="kills of each kind of run")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of runs")
    arguments = parser.parse_args()
    directory = arguments.directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["PRELM_CACHE"] = str(directory / "cache")
    (directory / "corpus.txt").write_text(tiny.text(seed=0))
    (directory / "lines.txt").write_text("The cat sees a dog.\nA big bird likes the river.\n")
    import_all()
    make_task(directory)
    state = json.loads(read(directory / "kills.json") or "{}")
    findings = 0
    for kind in arguments.kinds:
        run = Run(kind, directory, state.setdefault(kind, {"kills": 0, "during_saves": 0, "rivals": 0, "findings": []}))
        done = lambda: write(directory / "kills.json", json.dumps(state, indent=1))  # noqa: E731
        run.kill_until(arguments.kills, done)
        run.compare()
        done()
        counts = {name: value for name, value in run.state.items() if name != "findings"}
        print(f"{kind}: {counts}, {len(run.state['findings'])} findings", flush=True)
        findings += len(run.state["findings"])
    sys.exit(bool(findings))


def import_all() -> None:
    """Processes are forked from this one, which has imported everything and not yet touched a device."""
    import prelm_jax.cli.dispatch
    import prelm_jax.finetuning.finetune
    import prelm_jax.loading
    import prelm_jax.pretraining  # noqa: F401


def make_task(directory: Path) -> None:
    """The files of a task, and an encoder to start from."""
    rng = random.Random(0)
    for name, number in (("train", 26), ("dev", 7)):
        rows = [(" ".join(rng.choices(tiny.WORDS, k=rng.randint(1, 20))), ("no", "yes")[i % 2]) for i in range(number)]
        lines = "".join(f"{text}\t{label}\n" for text, label in rows)
        (directory / f"{name}.tsv").write_text(f"text\tlabel\n{lines}")
    encoder = directory / "encoder"
    if not encoder.exists():
        made = Process(directory / "encoder.log", lambda: tiny.directory(encoder, "bert"), 1)
        assert made.wait() == 0, made.output()


class Run:
    """One kind of run in `directory/KIND`."""

    def __init__(self, kind: str, directory: Path, state: dict):
        command, self.devices, self.reading = KINDS[kind]
        self.state, self.directory, self.kind = state, directory, kind
        # A fine-tuning has a work directory for each seed below the one that it is given.
        seed = "seed-0" if command.startswith("finetune") else ""
        self.whole, self.killed = (directory / kind / name / seed for name in ("undisturbed", "killed"))
        self.command = [*self.words(command), "--keep", "1", "--log-every", "5", "--evaluate-every", "20"]
        self.random = random.Random(state["kills"])

    def kill_until(self, kills: int, done: Callable[[], None]) -> None:
        with self.readers():
            while self.state["kills"] < kills:
                during_save = self.life(self.state["kills"] % 2 == 0)
                self.state["kills"] += 1
                self.state["during_saves"] += during_save
                done()

    def life(self, aimed: bool) -> bool:
        """Trains until it is killed; whether that was while a checkpoint was being written."""
        start, began, left = self.steps(), time.monotonic(), self.unfinished()
        trainer = self.start("trainer", self.killed, "--steps", "1000000", "--save-every", "1")
        moment = began + (HANGS_AFTER if aimed else self.random.uniform(0, 1.5) * self.state.get("seconds", 4))
        steps, rival = self.random.randint(0, STEPS_OF_A_LIFE), None
        while trainer.running() and time.monotonic() < moment and self.steps() < start + STEPS_OF_A_LIFE:
            if rival is None and str(trainer.pid) in read(self.killed / "lock"):
                rival = self.start("rival", self.killed, "--steps", "1000000", "--save-every", "1")
            if aimed and self.steps() >= start + steps and self.unfinished() - left:
                time.sleep(self.random.uniform(0, 0.02))
                break
            time.sleep(0.001)
        if not trainer.kill():
            self.finding(f"the trainer ended by itself: {trainer.output()}")
        if aimed:
            self.state["seconds"] = round(time.monotonic() - began, 1)
        for word in ("damaged", "Traceback"):
            if word in trainer.output():
                self.finding(f"trainer: {trainer.output()}")
        if rival is not None:
            self.check_rival(rival, trainer.pid)
        return bool(self.unfinished() - left)

    def check_rival(self, rival: "Process", trainer: int) -> None:
        """It was told who trains; or came so late that it trains itself now, and is killed as well."""
        while rival.running() and str(rival.pid) not in read(self.killed / "lock"):
            time.sleep(0.01)
        if rival.kill():
            return
        self.state["rivals"] += 1
        if rival.code != 1 or f"process {trainer} on" not in rival.output():
            self.finding(f"rival: exit {rival.code}, {rival.output()}")

    def compare(self) -> None:
        """Lets both trainings reach the same step, undisturbed, and compares their bits."""
        steps = str((self.steps() // 20 + 1) * 20)
        for workdir in (self.killed, self.whole):
            trainer = self.start("last", workdir, "--steps", steps, "--save-every", "1000")
            if trainer.wait() != 0:
                self.finding(f"the last life failed: {trainer.output()}")
        if (self.killed / "checkpoints.damaged").exists():
            self.finding("a checkpoint was put aside")
        check = Process(self.log("compare"), lambda: tiny.assert_same_bits(self.killed, self.whole), self.devices)
        if check.wait() != 0:
            self.finding(f"other bits: {check.output()}")
        self.state["same_bits_at_step"] = int(steps)

    @contextlib.contextmanager
    def readers(self) -> Iterator[None]:
        commands = [self.words(command) for command in self.reading]
        logs = [self.log(f"reader-{command[0]}") for command in commands]
        readers = [
            Process(log, lambda command=command: read_forever(command, self.has_checkpoint), 1)
            for log, command in zip(logs, commands, strict=True)
        ]
        try:
            yield
        finally:
            for reader, command in zip(readers, commands, strict=True):
                while reader.running() and "read" not in reader.output():
                    time.sleep(0.1)
                if not reader.kill():
                    self.finding(f"reader {command[0]} ended: {reader.output()}")
                counts = collections.Counter(line.partition(": ")[0] for line in reader.output().splitlines())
                reads = f"reads_{command[0]}"
                self.state[reads] = self.state.get(reads, 0) + counts.pop("read", 0)
                if counts:
                    lines = [line for line in reader.output().splitlines() if line != "read"]
                    self.finding(f"reader {command[0]}: {len(lines)} lines, the first: {lines[0]}")

    def start(self, name: str, workdir: Path, *options: str) -> "Process":
        parent = workdir.parent if workdir.name == "seed-0" else workdir
        command = [*self.command, "--workdir", str(parent), *options]
        return Process(self.log(name), lambda: call(command), self.devices)

    def words(self, command: str) -> list[str]:
        """The words of a command of KINDS."""
        values = {"WORKDIR": str(self.killed), "DIR": str(self.directory)}
        return [re.sub("WORKDIR|DIR", lambda found: values[found[0]], word) for word in command.split()]

    def log(self, name: str) -> Path:
        return self.directory / self.kind / f"{name}.log"

    def steps(self) -> int:
        """The newest complete checkpoint."""
        names = os.listdir(self.killed / "checkpoints") if (self.killed / "checkpoints").is_dir() else []
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def has_checkpoint(self) -> bool:
        return self.steps() > 0

    def unfinished(self) -> set[str]:
        """Checkpoints that are being written, or that were when a life ended."""
        return {path.name for path in (self.killed / "checkpoints").glob("*tmp*")}

    def finding(self, text: str) -> None:
        self.state["findings"].append(f"kill {self.state['kills']}: {text[-2000:]}")
        print(f"{self.kind}, kill {self.state['kills']}: {text}", flush=True)


class Process:
    """A fork of this process that calls a function, with its output in a file."""

    def __init__(self, log: Path, function: Callable[[], object], devices: int):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log, self.code = log, None
        with open(log, "w") as output:
            self.pid = os.fork()
            if self.pid == 0:
                code = 1
                try:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                    import jax

                    jax.config.update("jax_num_cpu_devices", devices)
                    function()
                    code = 0
                except SystemExit as error:
                    code = error.code
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)

    def running(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def wait(self) -> int | None:
        """The exit code."""
        began = time.monotonic()
        while self.running() and time.monotonic() - began < HANGS_AFTER:
            time.sleep(0.01)
        return self.code

    def kill(self) -> bool:
        """Kills the process; whether it was still running."""
        if self.running():
            os.kill(self.pid, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def output(self) -> str:
        return read(self._log)


def call(command: list[str]) -> None:
    from prelm_jax.cli.main import main

    main(command)


def read_forever(command: list[str], has_checkpoint: Callable[[], bool]) -> None:
    """Prints a line for each time that a command succeeded, or failed though there was a checkpoint."""
    import jax

    os.nice(5)  # A slow reader sees more deletions, and the trainer has more lives in the same time.
    for number in itertools.count():
        ready, output, code = has_checkpoint(), io.StringIO(), 0
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                call(command)
        except SystemExit as error:
            code = error.code
        if code == 0 and "damaged" not in output.getvalue():
            print("read", flush=True)
        elif ready:
            print(f"exit {code}: {output.getvalue()[-500:]!r}", flush=True)
        if number % 20 == 0:
            jax.clear_caches()


def read(path: Path) -> str:
    """The text of a file; "" if there is none."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def write(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


if __name__ == "__main__":
    main()
