"""Run: everything that defines an experiment, and its record as JSON."""

import dataclasses
import json
import sys
from typing import Annotated, Any, Literal, TypeVar

import tyro

from prelm_jax import __version__
from prelm_jax.bounds import Fraction, Seed, Size, check, read
from prelm_jax.corpus.readers import Errors
from prelm_jax.errors import InputError
from prelm_jax.training.loop import LoopConfig

RECORD_FORMAT = 2

# The fields that say how the text is found. The text itself, and the vocabulary, are compared by fingerprint.
SOURCES = ("corpus", "deduplicate", "errors", "tokenizer")

Config = TypeVar("Config")


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
    held_out: Fraction = 0.01  # Fraction of the documents kept for evaluation, chosen by a hash of their text.
    deduplicate: bool = False  # Drop exact duplicates of documents.
    errors: Errors = "strict"  # Bytes that are not UTF-8: strict refuses the file, replace reads them as U+FFFD.
    seed: Seed = 0  # Decides initial values, batches, masks and dropout.
    precision: Literal["float32", "bfloat16"] = "float32"  # Of activations; parameters and moments stay float32.
    accumulate: Size = 1  # Micro-batches a batch is cut into, one after the other, to save memory.
    # Model directory or work directory whose parameters to start from (continued pretraining).
    init_from: str | None = None

    def __post_init__(self):
        check(self)

    def check_batch_size(self, devices: int) -> None:
        """Raises InputError where micro-batches and devices do not divide the batch."""
        if self.batch_size % (self.accumulate * devices):
            raise InputError(
                f"--batch-size {self.batch_size} cannot be divided into {self.accumulate} micro-batches (--accumulate) "
                f"on {devices} devices: choose a multiple of {self.accumulate * devices}"
            )


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What run.json holds.

    `identity`: the fields that decide the bits, with the fingerprints of corpus and tokenizer. `segments`: for each
    part of the training its first step and its optimizer. `sources`: where the text was found. `loop`: what may differ
    between resumes.
    """

    model_type: str
    identity: dict[str, Any]
    segments: list[dict[str, object]]
    sources: dict[str, object]
    loop: dict[str, object]
    command: list[str]
    version: str = __version__
    format: int = RECORD_FORMAT

    @classmethod
    def from_run(cls, run: Run, corpus_fingerprint: str, tokenizer_fingerprint: str) -> "RunRecord":
        """The record of a run whose vocabulary size is known."""
        fields = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
        sources = {name: fields.pop(name) for name in SOURCES}
        loop, optimizer = fields.pop("loop"), fields.pop("optimizer")
        identity = fields | {"corpus_fingerprint": corpus_fingerprint, "tokenizer_fingerprint": tokenizer_fingerprint}
        segment: dict[str, object] = {
            "from_step": 0,
            "optimizer": {"name": type(optimizer).__name__, **dataclasses.asdict(optimizer)},
        }
        record = cls(run.model.model_type, identity, [segment], sources, loop, sys.argv[1:])
        return cls(**json.loads(record.to_json()))

    def to_json(self) -> str:
        """The text of run.json."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps(fields, indent=1, ensure_ascii=False, default=dataclasses.asdict) + "\n"

    def differences(self, other: "RunRecord") -> list[str]:
        """What decides the bits and differs, as "model.num_layers (2 there, 3 here)"; here is `other`."""
        there, here = (
            _flatten(record.identity | {"model_type": record.model_type, "optimizer": record.segments[0]["optimizer"]})
            for record in (self, other)
        )
        return [
            f"{name} ({there.get(name)} there, {here.get(name)} here)"
            for name in sorted(there | here)
            if there.get(name) != here.get(name)
        ]

    def run(self, model: type, data: type) -> Run:
        """The run as far as evaluating needs it: without tokenizer (the work directory has it) and optimizer."""
        fields = {**self.identity, **self.sources, "loop": self.loop, "tokenizer": None, "optimizer": None}
        fields |= {"model": self.model(model), "data": read(data, fields.get("data"), "run.json: identity.data")}
        known = {field.name: fields[field.name] for field in dataclasses.fields(Run) if field.name in fields}
        return read(Run, known, "run.json")

    def model(self, cls: type[Config]) -> Config:
        """The config of the model."""
        return read(cls, self.identity.get("model"), "run.json: identity.model")


def _flatten(value: object, name: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, x in value.items() for k, v in _flatten(x, f"{name}.{key}" if name else key).items()}
