"""Time to loss: from raw text to held-out loss against wall time, ours and what people would run instead.

    python benchmarks/time_to_loss.py bert --corpus simplewiki.txt.xz --json bert.json --picture docs/time_to_loss.svg
    python benchmarks/time_to_loss.py gpt --corpus 'novels/*.txt.xz,documents=file' --json gpt.json
    python benchmarks/time_to_loss.py elmo --corpus simplewiki.txt.xz --json elmo.json

Each contender is a process of its own (ours: `prelm pretrain`; the others: peers.py), with the same cores. Its clock
starts with the process and an empty cache, so it has imports, vocabulary, preparation and compilation on it. Nobody
evaluates on the clock: a contender saves its parameters twenty times, and is evaluated after its end, on the same
held-out targets (BERT: the same masks, 15 %) in the ids of the same vocabulary.

The number of steps is the one that fills the minutes, after a trial of a few steps, so that every schedule ends in
time; ours is also trained for shorter times (`--shorter`). The time to a loss is where the line between two snapshots,
of any of these runs, first reaches it.

Peers are tuned first: `--trials N` trains each peer N times, for the full minutes, with other rates, warm-ups, batches,
lengths and masking rates, and then uses the best. `--tuned RECORD` takes the best of another record. What the record
holds already is not repeated, so the same command resumes; the best trial is also the run of its seed. With --draw
RECORD … only the picture is drawn. Needs the extra `test`, and `pip install accelerate` for hf-trainer.

Trials and seeds take many times ten minutes on a CPU. A GPU can train them instead, on the clock of that CPU: but for
rounding, the loss after a number of steps does not depend on the machine, and each step takes a CPU the same time.

    python benchmarks/time_to_loss.py gpt … --trials 7 --only-speeds --json gpt.json    # on the CPU
    python benchmarks/time_to_loss.py gpt … --trials 7 --gpu --jobs 8 --json gpt.json   # on a machine with a GPU

The second command trains for the steps that the CPU manages in the minutes, and writes the seconds that it needs.
"""

import dataclasses
import functools
import itertools
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

import harness
import jax
import numpy as np
import peers
import torch
import tyro
from harness import OURS

from prelm_jax import pretraining
from prelm_jax.cli.experiments import load_run
from prelm_jax.corpus.documents import Corpus
from prelm_jax.data.evaluation import EvaluationBatches
from prelm_jax.formats.base import abstract_params
from prelm_jax.run import Run
from prelm_jax.training.step import evaluated_means, make_evaluate
from prelm_jax.workdir import WorkDir

SNAPSHOTS = 20
MUON = "-muon"  # The end of the name of a peer that has Muon too.
CONTENDERS = {
    "bert": ("hf-trainer", "torch-bert", "torch-bert-muon", OURS),
    "gpt": ("torch-gpt", "torch-gpt-muon", OURS),
    "elmo": ("torch-elmo", OURS),
}
EXPERIMENTS = {"bert": "bert:mini", "gpt": "gpt1:mini", "elmo": "elmo:mini"}
METRICS = {"bert": "masked_lm_loss", "gpt": "lm_loss", "elmo": "loss"}
UNITS = {"bert": "masked-LM loss, nats", "gpt": "bits per byte", "elmo": "loss, nats per word"}
# What the trials of a peer choose from; the first values are those of a peer without trials.
CHOICES: dict[str, tuple[Any, ...]] = {
    "learning_rate": (1e-3, 5e-4, 2e-3, 4e-3),
    "warmup": (0.06, 0.02, 0.15),
    "batch_size": (32, 16, 64),
    "length": (64, 32, 128),
    "masking": (0.15, 0.3, 0.4),
    "muon_rate": (0.0,),
}
MUON_RATES = (0.02, 0.01, 0.05)
ELMO_CHOICES = {"learning_rate": (0.2, 0.1, 0.4), "length": (20,)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to train, on what, for how long."""

    family: tyro.conf.Positional[Literal["bert", "gpt", "elmo"]]
    corpus: tuple[str, ...] = ()
    experiment: str | None = None  # Of ours, whose sizes all have: bert:mini, gpt1:mini or elmo:mini.
    arguments: str = ""  # More options of `prelm pretrain`, but not of its sizes: "--batch-size 64".
    contenders: tuple[str, ...] = ()  # All of the family if none are named.
    minutes: float = 10.0
    shorter: tuple[float, ...] = (5.0, 10 / 3, 2.0)  # Minutes of more runs of ours.
    seeds: int = 3
    threads: int = 2
    trials: int = 0
    tuned: Path | None = None
    evaluated_tokens: int = 100_000
    calibration_steps: int = 60
    only_speeds: bool = False  # Measure how long the steps of all contenders take, and no more.
    gpu: bool = False  # Train on the GPU of this machine, on the clock of the CPU that the record is of.
    jobs: int = 1  # Trainings at a time on the GPU; on the CPU there is one.
    json: Path | None = None
    picture: Path | None = None
    draw: tuple[Path, ...] = ()


Attempt = dict[str, Any]  # contender, seed, minutes, tuning, steps, device, seconds and losses of the snapshots
Speed = dict[str, Any]  # contender, tuning, seconds of a step and before the first


class Race:
    """The texts, the vocabulary and the held-out targets that all contenders share, in a directory."""

    def __init__(self, s: Settings, directory: Path):
        self.s, self.directory = s, directory
        self.device = torch.device("cuda" if s.gpu else "cpu")
        self.reference = s.experiment or EXPERIMENTS[s.family]
        _, run, _ = load_run(self.reference)
        self.texts = {side: directory / f"{side}.txt" for side in ("training", "held_out")}
        split = Corpus(s.corpus, run.held_out)
        for side, path in self.texts.items():
            with path.open("w", encoding="utf-8") as file:
                for document in split.documents(side):
                    file.write(re.sub(r"\n\s*\n", "\n", document.text.strip()) + "\n\n")
        os.environ["PRELM_CACHE"] = str(directory / "cache")
        run = dataclasses.replace(run, corpus=(str(self.texts["training"]),), validation=(str(self.texts["held_out"]),))
        prepared = pretraining.prepare(run, print_new=False)
        self.run: Run = dataclasses.replace(run, model=pretraining.with_vocabulary(run.model, prepared.tokenizer))
        self.held_out = prepared.held_out
        prepared.tokenizer.save(directory / "tokenizer")
        sizes = dataclasses.asdict(self.run.model) | {"num_negatives": getattr(run.data, "num_negatives", 0)}
        (directory / "model.json").write_text(json.dumps(sizes))
        self.sizes = sizes
        if s.family == "elmo":  # The peer's text is split into sentences and words.
            store, spell = prepared.training, prepared.training.spellings
            begin_W, bytes_ = spell.offsets, spell.bytes.tobytes()
            words = [bytes_[a:b].decode() for a, b in itertools.pairwise(begin_W)]
            with (directory / "words.txt").open("w", encoding="utf-8") as file:
                for a, b in itertools.pairwise(store.sentence_offsets):
                    file.write(" ".join(words[i] for i in store.ids[a:b]) + "\n")
        data = dataclasses.replace(run.data, next_sentence=False) if s.family == "bert" else run.data
        rows = data.evaluation(self.held_out, prepared.tokenizer)
        self.batches = EvaluationBatches(rows, 32, min(1.0, s.evaluated_tokens / self.held_out.num_tokens))

    def command(self, attempt: Attempt, at: list[int], directory: Path) -> tuple[list[str], Path]:
        """The command that trains a contender, and the directory of its snapshots, named by their steps."""
        steps, seed = at[-1], attempt["seed"]
        if attempt["contender"] == OURS:
            workdir = directory / "run"
            ends = [f"--steps={steps}", *(f"--optimizer.decay-steps={steps}" for _ in [0] if self.has_schedule)]
            options = [f"--corpus={self.texts['training']}", "--held-out=0", f"--seed={seed}", "--mesh.devices=1"]
            kept = ["--keep-at-steps", *map(str, at)]
            command = [sys.executable, "-m", "prelm_jax", "pretrain", self.reference, f"--workdir={workdir}"]
            return [*command, *options, *ends, *shlex.split(self.s.arguments), *kept], workdir / "checkpoints.kept"
        peer = attempt["contender"].removesuffix(MUON)
        text = self.directory / "words.txt" if self.s.family == "elmo" else self.texts["training"]
        options = {"peer": peer, "text": text, "tokenizer": self.directory / "tokenizer", "snapshots": directory}
        options |= {"model": self.directory / "model.json", "seed": seed, "threads": self.s.threads}
        options |= {"device": self.device}
        options |= {f"tuning.{name.replace('_', '-')}": value for name, value in attempt["tuning"].items()}
        command = [sys.executable, str(Path(__file__).with_name("peers.py"))]
        command += [f"--{name}={value}" for name, value in options.items()]
        return [*command, "--snapshot-at", *map(str, at)], directory

    @property
    def has_schedule(self) -> bool:
        """Whether the optimizer of ours has a schedule that ends."""
        return hasattr(self.run.optimizer, "decay_steps")

    def train(self, attempt: Attempt, at: list[int], directory: Path) -> tuple[dict[int, float], Path]:
        """Runs a contender: the seconds after which each snapshot was there, and where they are.

        On a CPU from an empty cache.
        """
        command, snapshots = self.command(attempt, at, directory)
        environment = os.environ | {"OMP_NUM_THREADS": str(self.s.threads), "HF_HUB_OFFLINE": "1"}
        environment |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "TOKENIZERS_PARALLELISM": "true"}
        if not self.s.gpu:
            environment |= {"PRELM_CACHE": str(directory / "cache"), "JAX_PLATFORMS": "cpu"}
        seconds: dict[int, float] = {}
        with (directory / "log").open("w") as log:
            start = time.perf_counter()
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            try:
                while True:
                    ended, now = process.poll() is not None, time.perf_counter() - start
                    for step in [step for step in at if step not in seconds and (snapshots / str(step)).exists()]:
                        seconds[step] = now
                    if ended:
                        break
                    time.sleep(0.05)
            finally:
                process.kill()
        if process.returncode or len(seconds) < len(at):
            raise SystemExit(f"{' '.join(command)} failed:\n{(directory / 'log').read_text()[-3000:]}")
        return seconds, snapshots

    def evaluate(self, attempt: Attempt, steps: list[int], snapshots: Path) -> list[float]:
        """The held-out loss of snapshots, in the unit of the family."""
        metric = METRICS[self.s.family]
        of_snapshot = self._ours if attempt["contender"] == OURS else self._peers
        losses = of_snapshot(attempt, steps, snapshots)
        if self.s.family == "gpt":
            return [self.run.data.derived_metrics(metric, x, self.held_out)["bits_per_byte"] for x in losses]
        return list(losses)

    def _ours(self, attempt: Attempt, steps: list[int], snapshots: Path) -> Iterator[float]:
        model, batches = self.run.model.build(), [self.batches[i] for i in range(len(self.batches))]
        evaluate, workdir = make_evaluate(model), WorkDir(snapshots.parent)
        carry = model.init_carry(self.batches.batch_size)
        for step in steps:
            _, params = workdir.read_params(abstract_params(self.run.model), step)
            placed = (jax.device_put(batch) for batch in batches)
            totals = evaluate(params, carry, placed, self.batches.num_steps)
            yield evaluated_means(model, totals)[METRICS[self.s.family]]

    @torch.no_grad()
    def _peers(self, attempt: Attempt, steps: list[int], snapshots: Path) -> Iterator[float]:
        weights = {"bert": "masked_weights", "gpt": "weights", "elmo": "forward_weights"}[self.s.family]
        batches = [self.batches[i] for i in range(len(self.batches))]
        if self.s.family == "elmo":  # bilm-tf's words have 50 columns.
            for batch in batches:
                columns = 50 - batch["characters"].shape[1]
                batch["characters"] = np.pad(batch["characters"], ((0, 0), (0, columns)), constant_values=260)
        states = self.batches.num_steps if self.s.family == "elmo" else len(batches)  # Batches from one zero state.
        for step in steps:
            total = count = 0.0
            for i, batch in enumerate(batches):
                if i % states == 0:
                    peer = attempt["contender"].removesuffix(MUON)
                    with self.device:
                        model, loss = peers.build(peer, self.sizes, self.batches.batch_size)
                    model.load_state_dict(torch.load(snapshots / str(step), self.device, weights_only=True))
                    model.eval()
                if weight := float(batch[weights].sum()):
                    nll = loss(peers.to_torch(batch, self.device)).item()
                    total, count = total + weight * nll, count + weight
            yield total / count

    def speed(self, contender: str, tuning: dict[str, Any], record: dict) -> Speed:
        """How long a contender's steps take, from the record if that has the same sizes, else by a short training."""

        def sizes(contender: str, tuning: dict[str, Any]) -> tuple[Any, ...]:
            return contender, *(tuning.get(name) for name in ("batch_size", "length", "masking"))

        for speed in record["speeds"]:
            if sizes(speed["contender"], speed["tuning"]) == sizes(contender, tuning):
                return speed
        if self.s.gpu:
            reason = f"--json {self.s.json} has no speed of {contender} {tuning}"
            raise SystemExit(f"{reason}: measure it on the CPU, by the same command with --only-speeds")
        n = self.s.calibration_steps
        attempt = {"contender": contender, "seed": 0, "tuning": tuning}
        with tempfile.TemporaryDirectory(dir=self.directory) as directory:
            seconds, _ = self.train(attempt, [n // 3, n], Path(directory))
        step = (seconds[n] - seconds[n // 3]) / (n - n // 3)
        speed = {"contender": contender, "tuning": tuning, "step": step, "before": seconds[n] - n * step}
        record["speeds"].append(speed)
        print(f"{contender} {tuning}: {1e3 * step:.0f} ms a step after {speed['before']:.0f} s", flush=True)
        return speed

    def attempt(self, contender: str, seed: int, minutes: float, tuning: dict[str, Any], speed: Speed) -> Attempt:
        """Trains and evaluates a contender for some minutes."""
        attempt = {"contender": contender, "seed": seed, "minutes": minutes, "tuning": tuning}
        steps = int(0.98 * (60 * minutes - speed["before"]) / speed["step"])
        if steps < SNAPSHOTS:
            raise SystemExit(f"{contender}: {minutes:.1f} minutes are {steps} steps; give more")
        at = [round(steps * (i + 1) / SNAPSHOTS) for i in range(SNAPSHOTS)]
        with tempfile.TemporaryDirectory(dir=self.directory) as directory:
            seconds, snapshots = self.train(attempt, at, Path(directory))
            attempt["losses"] = self.evaluate(attempt, at, snapshots)
        if self.s.gpu:
            seconds = {step: speed["before"] + step * speed["step"] for step in at}
        attempt |= {"device": self.device.type, "steps": steps, "seconds": [seconds[step] for step in at]}
        attempt["before"] = seconds[at[0]] - (seconds[at[-1]] - seconds[at[0]]) / (at[-1] - at[0]) * at[0]
        print(
            f"{contender}, seed {seed}, {minutes:.1f} minutes: {attempt['losses'][-1]:.4f} after {steps} steps, "
            f"{seconds[at[-1]]:.0f} s, of which {attempt['before']:.0f} s before the first step",
            flush=True,
        )
        return attempt


def default_tuning(family: str, contender: str) -> dict[str, Any]:
    """The tuning of a peer without trials."""
    return {name: values[0] for name, values in choices(family, contender).items()}


def choices(family: str, contender: str) -> dict[str, tuple[Any, ...]]:
    """What the trials of a contender choose from; nothing for ours, whose experiment has chosen."""
    if contender == OURS:
        return {}
    found = CHOICES | (ELMO_CHOICES if family == "elmo" else {})
    found |= {"masking": (0.15,)} if family != "bert" else {}
    return found | ({"muon_rate": MUON_RATES} if contender.endswith(MUON) else {})


def trial(family: str, contender: str, number: int) -> dict[str, Any]:
    """The tuning of a trial; that of trial 0 is the default."""
    rng = random.Random(f"{contender} {number}")
    return {name: rng.choice(values) if number else values[0] for name, values in choices(family, contender).items()}


def best_tuning(record: dict, family: str, contender: str) -> dict[str, Any]:
    """The tuning of the best trial or run of a record, else the default."""
    known = [x for kind in ("trials", "runs") for x in record[kind] if x["contender"] == contender]
    found = min(known, key=lambda x: x["losses"][-1], default=None)
    return default_tuning(family, contender) if found is None else found["tuning"]


def race(s: Settings, record: dict, directory: Path) -> None:
    """Everything that the record lacks; writes it after each attempt."""
    contest = Race(s, directory)
    named = s.contenders or CONTENDERS[s.family]
    tuned = record if s.tuned is None else json.loads(s.tuned.read_text())
    trials = [
        (contender, 0, s.minutes, trial(s.family, contender, number))
        for contender in named
        for number in range(s.trials if contender != OURS else 0)
    ]

    def speed(contender: str, tuning: dict[str, Any]) -> Speed:
        found = contest.speed(contender, tuning, record)
        harness.write_json(s.json, record)
        return found

    def add(kind: str, wanted: list[tuple[str, int, float, dict[str, Any]]]) -> None:
        names = ("contender", "seed", "minutes", "tuning")
        trained = {of: [tuple(x[name] for name in names) for x in record[of]] for of in ("trials", "runs")}
        missing: list[Callable[[], Attempt]] = []
        for attempt in wanted:
            if attempt in trained[kind]:
                continue
            trained[kind].append(attempt)
            if attempt in trained["trials"] and kind == "runs":
                record["runs"].append(record["trials"][trained["trials"].index(attempt)])
            else:
                contender, _, _, tuning = attempt
                missing.append(functools.partial(contest.attempt, *attempt, speed(contender, tuning)))
        failures = []
        with ThreadPoolExecutor(s.jobs if s.gpu else 1) as pool:
            for ended in as_completed([pool.submit(train) for train in missing]):
                if failure := ended.exception():
                    failures.append(failure)
                else:
                    record[kind].append(ended.result())
                    harness.write_json(s.json, record)
        if failures:
            raise failures[0]

    if s.only_speeds:
        for contender in named:
            for tuning in (*(x[-1] for x in trials if x[0] == contender), best_tuning(tuned, s.family, contender)):
                speed(contender, tuning)
        return
    add("trials", trials)
    runs = []
    for seed, contender in itertools.product(range(s.seeds), named):
        tuning = best_tuning(tuned, s.family, contender)
        minutes = (s.minutes, *(s.shorter if contender == OURS else ()))
        runs += [(contender, seed, length, tuning) for length in minutes]
    add("runs", runs)


def seconds_to(loss: float, runs: list[Attempt]) -> float:
    """The seconds after which the first of these runs has the loss, linear between snapshots; infinite if none has."""
    found = [float("inf")]
    for x in runs:
        lowest = np.minimum.accumulate(x["losses"])
        if lowest[-1] <= loss:
            found.append(float(np.interp(-loss, -lowest, x["seconds"])))
    return min(found)


def summarize(record: dict) -> None:
    """Prints each contender's final loss, and the time of ours with its seed to that loss over its own time."""
    minutes = record["settings"]["minutes"]
    runs = [x for x in record["runs"] if x["contender"] == OURS or x["minutes"] == minutes]
    ours = [x for x in runs if x["contender"] == OURS]
    for contender in dict.fromkeys(x["contender"] for x in runs):
        full = [x for x in runs if x["contender"] == contender and x["minutes"] == minutes]
        losses, seconds = [x["losses"][-1] for x in full], np.mean([x["seconds"][-1] for x in full])
        before = np.mean([x["before"] for x in full])
        spread = f"{np.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
        line = f"{contender}: {spread} after {seconds:.0f} s, {before:.0f} s before the first step"
        if contender != OURS and ours:
            ratios = [
                seconds_to(x["losses"][-1], [y for y in ours if y["seed"] == x["seed"]]) / x["seconds"][-1]
                for x in full
            ]
            line += f"; ours is there in {np.mean(ratios):.2f} of the time ({min(ratios):.2f} to {max(ratios):.2f})"
        print(line)


def draw(records: list[dict], path: Path) -> None:
    """Draws held-out loss against minutes, a panel a record. The same records give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "prelm_jax"
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for record in records for name in CONTENDERS[record["settings"]["family"]]))
    others = iter(plt.get_cmap("Dark2").colors)
    colors = {name: "#1f6feb" if name == OURS else next(others) for name in names}
    figure, axes = plt.subplots(
        1, len(records), figsize=(4 * len(records) + 1, 3.2), layout="constrained", squeeze=False
    )
    for axis, record in zip(axes[0], records, strict=True):
        family, shown = record["settings"]["family"], set()
        for x in record["runs"]:
            name, minutes = x["contender"], np.array(x["seconds"]) / 60
            label = None if name in shown else "prelm_jax" if name == OURS else name
            shown.add(name)
            width = 1.8 if name == OURS else 1
            axis.plot(minutes, x["losses"], color=colors[name], linewidth=width, alpha=0.8, label=label)
            axis.plot(minutes[-1:], x["losses"][-1:], color=colors[name], marker="o", markersize=3)
            axis.axvspan(0, x["before"] / 60, 0, 0.02, color=colors[name], alpha=0.3)
        finals = [x["losses"][-1] for x in record["runs"]]
        firsts = [x["losses"][0] for x in record["runs"]]
        axis.set_ylim(min(finals) - 0.05 * (max(firsts) - min(finals)), max(firsts))
        axis.set_xlim(0)
        axis.set_title({"bert": "BERT", "gpt": "GPT-1", "elmo": "ELMo"}[family], fontsize=10)
        axis.set_xlabel("minutes from raw text", fontsize=8)
        axis.set_ylabel(f"held-out {UNITS[family]}", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")


def main(s: Settings) -> None:
    if s.draw:
        return draw([json.loads(path.read_text()) for path in s.draw], s.picture or Path("time_to_loss.svg"))
    if not s.gpu:
        harness.limit_threads(s.threads)
    fields = json.loads(json.dumps(dataclasses.asdict(s), default=str)) | {"json": None, "picture": None}
    record = {"machine": harness.machine(), "settings": fields, "speeds": [], "trials": [], "runs": []}
    harness.print_machine(record["machine"])
    if s.json is not None and s.json.exists():
        known = json.loads(s.json.read_text())
        record |= {name: known[name] for name in ("speeds", "trials", "runs", *(["machine"] if s.gpu else []))}
    with tempfile.TemporaryDirectory() as directory:
        race(s, record, Path(directory))
    if s.only_speeds:
        return None
    harness.write_json(s.json, record)
    summarize(record)
    if s.picture is not None:
        draw([record], s.picture)


if __name__ == "__main__":
    main(tyro.cli(Settings))
