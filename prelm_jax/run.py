"""Run: everything that defines an experiment, and its record as JSON."""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal, Protocol, TypeVar, cast

import tyro

from prelm_jax import __version__
from prelm_jax.bounds import FractionBelow1, NotNegative, OutOfBounds, Positive, Seed, Size
from prelm_jax.corpus.readers import Errors
from prelm_jax.errors import InputError
from prelm_jax.training.contract import OptimizerConfig
from prelm_jax.training.loop import LoopConfig, TrainingConfig
from prelm_jax.validation import check, read

RECORD_FORMAT = 3
READABLE_FORMATS = (2, 3)  # Format 2 knows no extensions; a field that it lacks has its default.

# The fields that say how the text is found. The text itself, and the vocabulary, are compared by fingerprint.
SOURCES = ("corpus", "validation", "deduplicate", "errors", "tokenizer")

Config = TypeVar("Config")
Statistic = int | float | list[int] | str


@dataclasses.dataclass(frozen=True)
class Run:
    """An experiment. The same Run on the same mesh, devices and library versions gives the same model, bit for bit."""

    corpus: tuple[str, ...]  # Text to train on: files, globs, python-docs or tfds:NAME (see docs/corpora.md).
    tokenizer: Any
    model: Any
    data: Any
    optimizer: Any
    batch_size: Size  # Rows of the global batch, over all devices and micro-batches.
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")]
    # Fraction of the documents kept for evaluation, chosen by a hash of their text; 0: train on all, evaluate nothing.
    held_out: FractionBelow1 = 0.01
    validation: tuple[str, ...] = ()  # Text to evaluate on instead of held-out documents; sources as those of --corpus.
    deduplicate: bool = False  # Drop exact duplicates of documents.
    errors: Errors = "strict"  # Bytes that are not UTF-8: strict refuses the file, replace reads them as U+FFFD.
    seed: Seed = 0  # Decides initial values, batches, masks and dropout.
    # Of activations (on a CPU, of matrix products); parameters and optimizer state stay float32.
    precision: Literal["float32", "bfloat16"] = "float32"
    accumulate: Size = 1  # Number of micro-batches that a batch is cut into, to save memory.
    # Model directory, work directory or hub:OWNER/NAME whose parameters to start from (continued pretraining).
    init_from: str | None = None

    def __post_init__(self):
        check(self)

    @property
    def split(self) -> float:
        """The fraction of the corpus that is held out: none of it where there is a validation text."""
        return 0.0 if self.validation else self.held_out


class Training(TrainingConfig, Protocol):
    """The fields of any experiment, pretraining or fine-tuning, that decide how a model is trained."""

    @property
    def batch_size(self) -> int: ...


TrainingT = TypeVar("TrainingT", bound=Training)


def check_batch_size(run: Training, devices: int) -> None:
    """Raises InputError where micro-batches and devices do not divide the batch."""
    if run.batch_size % (run.accumulate * devices):
        raise InputError(
            f"--batch-size {run.batch_size} cannot be divided into {run.accumulate} micro-batches (--accumulate) "
            f"on {devices} devices: choose a multiple of {run.accumulate * devices}"
        )


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a training: its first step, and the optimizer whose schedule holds from there on.

    An extension also has the step that it trains up to, and the command that asked for it.
    """

    from_step: NotNegative
    optimizer: dict[str, object]  # `name` of its class, and its fields
    to_step: Positive | None = None
    command: list[str] | None = None

    def config(self, cls: type[Config], source: str) -> Config:
        """The optimizer, whose class is known; `source` names the record in errors."""
        fields = {name: value for name, value in self.optimizer.items() if name != "name"}
        return read(cls, fields, f"{source}: segments")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What run.json holds.

    `identity`: the fields that decide the bits, with the fingerprints of the texts and the tokenizer. `segments`: the
    parts of the training, oldest first. `sources`: where the text was found. `loop`: what may differ between resumes.
    `statistics`: numbers of the training and the held-out text by name; earlier versions wrote them as text.
    """

    model_type: str
    identity: dict[str, Any]
    segments: list[Segment]
    sources: dict[str, object]
    loop: dict[str, object]
    command: list[str]
    statistics: dict[str, list[Statistic]] = dataclasses.field(default_factory=dict)
    version: str = __version__
    format: int = RECORD_FORMAT
    source: str = dataclasses.field(default="run.json", compare=False)  # The path of the file; not in the file.

    def check_together(self) -> None:
        """The first segment begins at step 0; an extension trains past its first step, where the one before ends."""
        steps = [(segment.from_step, segment.to_step or math.inf) for segment in self.segments]
        extensions = self.segments[1:]
        if [first for first, _ in steps[:1]] != [0] or any(each.to_step is None for each in extensions):
            raise OutOfBounds(("segments",), steps, "must begin at step 0, and extensions must end")
        if sorted({first for first, _ in steps}) != [first for first, _ in steps] or any(a >= b for a, b in steps):
            raise OutOfBounds(("segments",), steps, "must follow each other")

    @classmethod
    def from_run(
        cls, run: Run, corpus_fingerprint: str, tokenizer_fingerprint: str, validation_fingerprint: str | None = None
    ) -> "RunRecord":
        """The record of a run whose vocabulary size is known."""
        facts = {
            "held_out": run.split,
            "corpus_fingerprint": corpus_fingerprint,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "validation_fingerprint": validation_fingerprint,
        }
        return cls.of(run, run.model.model_type, SOURCES, facts)

    @classmethod
    def of(cls, run: Training, model_type: str, sources: Sequence[str], facts: Mapping[str, object]) -> "RunRecord":
        """The record of an experiment, a dataclass; `sources`: fields that say where data is found.

        facts: what decides the bits besides the other fields; a fact replaces a field of its name.
        """
        fields = {field.name: getattr(run, field.name) for field in dataclasses.fields(cast(Any, run))}
        found = {name: fields.pop(name) for name in sources}
        loop, optimizer = fields.pop("loop"), fields.pop("optimizer")
        record = cls(model_type, fields | {**facts}, [Segment(0, with_name(optimizer))], found, loop, sys.argv[1:])
        return read(cls, json.loads(record.to_json()), "run.json")

    @property
    def is_task(self) -> bool:
        """Whether it is the record of a fine-tuning, whose identity has a head."""
        return "head" in self.identity

    def to_json(self) -> str:
        """The text of run.json."""
        fields = {name: value for name, value in vars(self).items() if name != "source"}
        return json.dumps(fields, indent=1, ensure_ascii=False, default=dataclasses.asdict) + "\n"

    def differences(self, other: "RunRecord", run: Training, extending: bool = False) -> list[str]:
        """What decides the bits and differs, as "model.num_layers (2 there, 3 here)".

        Here is `other`, the record of `run`. A field that is missing there was added to its class later, and has its
        default. An extension may change the optimizer, but not its class.
        """
        there, here = (
            record.identity | {"model_type": record.model_type, "optimizer": record.segments[0].optimizer}
            for record in (self, other)
        )
        there, here = flatten(_completed(there, here, run)), flatten(here)
        return [
            f"{name} ({_shown(there.get(name))} there, {_shown(here.get(name))} here)"
            for name in sorted(there | here)
            if there.get(name) != here.get(name)
            and not (extending and name.startswith("optimizer.") and name != "optimizer.name")
        ]

    def resuming(self, earlier: "RunRecord") -> "RunRecord":
        """This record with the segments of an earlier one of the same run."""
        return dataclasses.replace(self, segments=earlier.segments, source=earlier.source)

    def extended(self, earlier: "RunRecord", step: int, to_step: int, optimizer: OptimizerConfig) -> "RunRecord":
        """This record with the segments of an earlier one of the same run, and one more from `step` to `to_step`.

        If the last segment is that one already, nothing is added: the same command resumes an extension.
        """
        segment = Segment(step, with_name(optimizer.ending_at(to_step)), to_step, self.command)
        last, segments = earlier.segments[-1], earlier.segments
        if (last.to_step, last.optimizer) != (to_step, segment.optimizer):
            if not step:
                raise InputError(f"--extend-to {to_step}: the run has no checkpoint yet to train on from")
            if to_step <= step:
                raise InputError(f"--extend-to {to_step}: the run is at step {step} already; give a later step")
            segments = [*(each for each in segments if each.from_step < step), segment]
        return dataclasses.replace(self, segments=segments, command=earlier.command, source=earlier.source)

    def parts(self, run: TrainingT) -> list[TrainingT]:
        """The run of each segment: with its optimizer, up to the step at which the next one begins."""
        if len(self.segments) == 1:
            return [run]

        def part(segment: Segment, end: int) -> TrainingT:
            loop = dataclasses.replace(run.loop, steps=end)
            return dataclasses.replace(
                cast(Any, run), optimizer=segment.config(type(run.optimizer), self.source), loop=loop
            )

        ends = [*(segment.from_step for segment in self.segments[1:]), self.segments[-1].to_step or run.loop.steps]
        return list(map(part, self.segments, ends))

    def run(self, model: type, data: type) -> Run:
        """The run as far as evaluating needs it: without tokenizer (the work directory has it) and optimizer.

        Raises InputError for the record of a fine-tuning.
        """
        if self.is_task:
            raise InputError(
                f"{self.source} is that of a seed of a fine-tuning: give the directory above "
                f"({PurePath(self.source).parent.parent}), or evaluate it with --test FILE"
            )
        fields = {**self.identity, **self.sources, "loop": self.loop, "tokenizer": None, "optimizer": None}
        fields |= {"model": self.model(model), "data": read(data, fields.get("data"), f"{self.source}: identity.data")}
        known = {field.name: fields[field.name] for field in dataclasses.fields(Run) if field.name in fields}
        return read(Run, known, self.source)

    def model(self, cls: type[Config]) -> Config:
        """The config of the model."""
        return read(cls, self.identity.get("model"), f"{self.source}: identity.model")


def _shown(value: object) -> object:
    """A value for messages: the beginning of a fingerprint."""
    return f"{value[:8]}…" if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def with_name(optimizer: Any) -> dict[str, object]:
    """The fields of an optimizer as JSON has them, and the `name` of its class."""
    return {"name": type(optimizer).__name__, **json.loads(json.dumps(dataclasses.asdict(optimizer)))}


def _completed(there: dict[str, Any], here: dict[str, Any], config: Any) -> dict[str, Any]:
    """`there` with the defaults of what it lacks and `here` has, both of them the JSON of configs like `config`."""
    found = dict(there)
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if name in here and name not in there and default is not dataclasses.MISSING:
            found[name] = json.loads(json.dumps(default, default=dataclasses.asdict))
        elif dataclasses.is_dataclass(value) and isinstance(there.get(name), dict) and isinstance(here.get(name), dict):
            found[name] = _completed(there[name], here[name], value)
    return found


def flatten(value: object, name: str = "") -> dict[str, object]:
    """The leaves of nested objects by dotted names: {"a": {"b": 1}} is {"a.b": 1}."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, x in value.items() for k, v in flatten(x, f"{name}.{key}" if name else key).items()}
