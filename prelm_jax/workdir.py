"""WorkDir: the only reader and writer of a work directory.

run.json          the record of the run (run.RunRecord)
tokenizer/        as its published format has it
samples.jsonl     one object a line: `step`, and in `samples` the inference.base.Sample of a few texts
report.html       the page of the run (report/dashboard.py)
metrics.jsonl     one object a line: `step`, and metrics by name; the trivial baselines as `baseline/METRIC/NAME`
checkpoints/      one directory a step
profile/          traces, if asked for
lock, lease/      who writes here (lock.py)
"""

import contextlib
import dataclasses
import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax

from prelm_jax import lock
from prelm_jax.errors import InputError
from prelm_jax.inference.base import Sample
from prelm_jax.run import READABLE_FORMATS, RunRecord, Training
from prelm_jax.storage import copy_files, fetched, reachable, read_json, read_lines, write_file
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.tokenizers.load import load as load_tokenizer
from prelm_jax.training.checkpoint import Checkpoints, Step, restore_params
from prelm_jax.training.contract import Params
from prelm_jax.training.metrics import MetricsWriter, read_metrics, stream_metrics
from prelm_jax.validation import read

BASELINE = "baseline"


class WorkDir:
    """A work directory, on this machine or in a bucket (gs://…); it need not exist yet."""

    def __init__(self, path: str | os.PathLike):
        self.path = reachable(path)
        self._check_hold: lock.Check = lambda: None

    @contextlib.contextmanager
    def hold(self, take_over: bool = False) -> Iterator[None]:
        """Keeps other runs out of the directory; process 0 does. InputError if one is in progress here (lock.held).

        Inside of the block a save raises Preempted if another process has taken over.
        """
        if jax.process_index() != 0:
            yield
            return
        with lock.held(self.path, take_over) as self._check_hold:
            yield

    def exists(self) -> bool:
        """Whether a run has claimed the directory."""
        return self._record_path.is_file()

    def read_record(self) -> RunRecord:
        """The record in run.json. Raises InputError if there is none, or if it has another format."""
        if not self.exists():
            raise InputError(
                f"{self.path} is not the work directory of a run: it has no run.json. Give the --workdir of a "
                "pretrain, or --test FILE to evaluate a fine-tuned model"
            )
        path = self._record_path
        fields = read_json(path)
        if (format := fields.get("format", 1)) not in READABLE_FORMATS:
            newer = isinstance(format, int) and format > max(READABLE_FORMATS)
            writer = "a newer" if newer else "an earlier"
            raise InputError(f"{path} was written by {writer} version of prelm_jax: use that version to read it")
        return read(RunRecord, fields | {"source": str(path)}, path)

    def check(self, record: RunRecord, run: Training, extending: bool = False) -> None:
        """Raises InputError where the directory is another run's, naming what differs, or holds unknown checkpoints.

        extending: `run` has the optimizer of a new segment, which may differ.
        """
        checkpoints = self.path / "checkpoints"
        if not self.exists() and checkpoints.is_dir() and any(checkpoints.iterdir()):
            raise InputError(f"{self.path} has checkpoints but no run.json to say whose: choose another --workdir")
        if self.exists() and (differences := self.read_record().differences(record, run, extending)):
            schedule = all(name.startswith("optimizer.") and "optimizer.name" not in name for name in differences)
            remedy = "choose another --workdir" + (", or train on with --extend-to N" if schedule else "")
            raise InputError(f"{self.path} holds another run: {', '.join(differences)}; {remedy}")

    def claim(self, record: RunRecord, tokenizer: Tokenizer) -> None:
        """Records that the directory belongs to this run, with its tokenizer and latest settings. Process 0 writes."""
        if jax.process_index() != 0:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as written:
            tokenizer.save(written)
            copy_files(Path(written), self.path / "tokenizer")
        write_file(self._record_path, record.to_json().encode())

    def read_tokenizer(self) -> Tokenizer:
        """The tokenizer of the run; InputError where its files were changed."""
        with fetched(self.path / "tokenizer") as directory:
            tokenizer = load_tokenizer(directory)
        if self.read_record().identity.get("tokenizer_fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
            raise InputError(
                f"{self.path / 'tokenizer'} is damaged or not the tokenizer of this run: restore its files, or repeat "
                "the prelm pretrain that wrote them"
            )
        return tokenizer

    def read_metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl, oldest first; torn and foreign ones are left out."""
        return read_metrics(self.path / "metrics.jsonl")

    def stream_metrics(self) -> Iterator[dict[str, float]]:
        """These lines one by one, and those that later ones replace: for a long file."""
        return stream_metrics(self.path / "metrics.jsonl")

    def read_baselines(self) -> dict[str, dict[str, float]] | None:
        """metric -> trivial baseline -> value, as of the last start that computed them; None before that."""
        found: dict[str, dict[str, float]] = {}
        for line in self.stream_metrics():
            add_baselines(found, line)
        return found or None

    def read_samples(self) -> dict[int, list[Sample]]:
        """The samples by step, oldest first; what is not such a line is left out."""
        found = {}
        for line in read_lines(self._samples_path) if self._samples_path.is_file() else ():
            with contextlib.suppress(ValueError, TypeError, KeyError, InputError):
                fields = json.loads(line)
                found[read(int, fields["step"], "step")] = read(list[Sample], fields["samples"], "samples")
        return dict(sorted(found.items()))

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Adds the samples of a step; those of later steps are dropped, because the training will write them again."""
        kept = {at: earlier for at, earlier in self.read_samples().items() if at < step} | {step: samples}
        lines = [{"step": at, "samples": list(map(dataclasses.asdict, some))} for at, some in kept.items()]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_file(self._samples_path, text.encode())

    def tokens_per_second(self) -> float:
        """The median speed of the training; NaN before anything was measured."""
        name = "perf/tokens_per_second"
        return statistics.median([line[name] for line in self.read_metrics() if name in line] or [math.nan])

    def write_metrics(self, resume_at: int, tensorboard: bool = False) -> MetricsWriter:
        """The writer of metrics.jsonl; lines of steps after `resume_at` are dropped."""
        return MetricsWriter(self.path / "metrics.jsonl", resume_at, tensorboard)

    def open_checkpoints(self, keep: int | None = None) -> Checkpoints:
        """The checkpoints; `keep`: how many of the newest to keep, None: only read."""
        return Checkpoints(self.path / "checkpoints", keep, before_write=self._check_hold)

    def words_seen(self, step: int) -> int | None:
        """The words of the corpus that were trained on up to a checkpoint, by its tokens per word; None if unknown."""
        known = self.read_record().statistics
        words, tokens = (known.get(name, [0])[0] for name in ("words", "tokens"))
        with contextlib.closing(self.open_checkpoints()) as checkpoints:
            tokens_seen = checkpoints.tokens_seen(step)
        if not (tokens_seen and isinstance(words, int) and isinstance(tokens, int) and tokens):
            return None
        return round(tokens_seen * words / tokens)

    def best_step(self) -> Step:
        """ "best" where a checkpoint was evaluated, else "newest"."""
        with contextlib.closing(self.open_checkpoints()) as checkpoints:
            return "newest" if checkpoints.best_step is None else "best"

    def read_params(self, abstract_params: Params, step: Step) -> tuple[int, Params]:
        """(step, parameters) of a checkpoint, on the first device; InputError where there is none."""
        return restore_params(self.path / "checkpoints", abstract_params, step)

    @property
    def _samples_path(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def _record_path(self) -> Path:
        return self.path / "run.json"


def add_baselines(found: dict[str, dict[str, float]], line: Mapping[str, float]) -> None:
    """Adds the baselines in a line of metrics: metric -> trivial baseline -> value."""
    for name, value in line.items():
        kind, _, rest = name.partition("/")
        metric, separator, baseline = rest.partition("/")
        if kind == BASELINE and separator:
            found.setdefault(metric, {})[baseline] = value


def baseline_metrics(baselines: dict[str, dict[str, float]]) -> dict[str, float]:
    """The baselines as metrics: {"baseline/masked_lm_loss/unigram": 6.2, …}."""
    return {f"{BASELINE}/{metric}/{name}": x for metric, values in baselines.items() for name, x in values.items()}
