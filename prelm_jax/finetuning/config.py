"""FineTuning: everything that defines the training of a task on a pretrained encoder."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from prelm_jax.bounds import (
    Bounds,
    Fraction,
    FractionBelow1,
    Length,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Seed,
    Size,
)
from prelm_jax.data.examples import Columns, Kind
from prelm_jax.data.frames import WIDTHS
from prelm_jax.data.rows import Row
from prelm_jax.data.tasks import balanced
from prelm_jax.errors import InputError
from prelm_jax.training.loop import LoopConfig
from prelm_jax.validation import check


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """A task. The same FineTuning on the same mesh, devices and versions gives the same model, bit for bit."""

    name: str  # Name of the task in reports, and in the default of --workdir.
    head: Any
    optimizer: Any
    batch_size: Size  # Examples of the global batch, over all devices and micro-batches; of tags and spans, windows.
    epochs: PositiveFloat  # How often each training example is read.
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")]
    train: str | None = None  # File of labeled examples to train on: a path, a glob or tfds:NAME (docs/finetuning.md).
    dev: str | None = None  # File of labeled examples to evaluate on during training, and to choose between seeds.
    # Model directory, work directory or hub:OWNER/NAME whose encoder and tokenizer to start from.
    init_from: str | None = None
    scratch: bool = False  # Take only sizes and tokenizer, not the parameters: shows what pretraining is worth.
    columns: Columns = dataclasses.field(default_factory=Columns)
    # Weight of each label in the training loss: balanced, so that rare labels count as much as frequent ones, or
    # LABEL=WEIGHT for some; the others weigh 1. For tasks with one label each, and for tags without a CRF.
    class_weights: tuple[str, ...] = ()
    metric: str | None = None  # Metric of the dev file by which the median seed is chosen; unset: the task's first.
    positive: str | None = None  # Label whose precision and recall the metric `f1` is about.
    warmup: FractionBelow1 = 0.1  # Fraction of the steps in which the learning rate rises.
    # Train all parameters, or only the head; then the encoder has neither dropout nor gradients.
    tune: Literal["all", "head"] = "all"
    layer_decay: Fraction = 1.0  # Learning rate of each layer as a fraction of the layer's above; 1: all equal.
    reinitialize_layers: NotNegative = 0  # Number of top layers to initialize afresh, with BERT's pooler.
    lm_coefficient: NotNegativeFloat = 0.0  # Weight of the language-model loss, for GPT-1.
    # Longest row in tokens, at most the model's number of positions; unset: that number, at most 512.
    max_length: Annotated[Length, Bounds(8, WIDTHS[-1])] | None = None
    stride: Positive | None = None  # Tokens between starts of windows; unset: 128 in passages, half a row in sentences.
    symmetric: bool = False  # The two texts of a pair have no order: GPT-1 reads both orders and adds the results.
    seed: Seed = 0  # Decides initial values, batches and dropout.
    precision: Literal["float32", "bfloat16"] = "float32"  # Of activations; parameters and moments stay float32.
    accumulate: Size = 1  # Number of micro-batches that a batch is cut into, to save memory.

    def __post_init__(self):
        check(self)

    @property
    def kind(self) -> Kind:
        """What a label of the task is."""
        return self.head.kind

    def weights_by_label(self, names: Sequence[str], rows: Sequence[Row]) -> np.ndarray | None:
        """The weight of each label by number, float32; None without --class-weights. `rows`: the training rows.

        Raises InputError for malformed weights, for unknown labels, and for tasks whose labels have no weights.
        """
        given = self.class_weights
        if not given:
            return None
        if self.kind not in ("label", "tags") or getattr(self.head, "crf", False):
            raise InputError(f"--class-weights {' '.join(given)}: only for one label each, and for tags without a CRF")
        if given == ("balanced",):
            return balanced(rows, len(names))
        weight_N = np.ones(len(names), np.float32)
        for item in given:
            name, _, number = item.rpartition("=")
            if name not in names:
                known = ", ".join(names)
                raise InputError(
                    f"--class-weights {item}: give balanced alone, or LABEL=WEIGHT with a label of {known}"
                )
            if not re.fullmatch(r"\d+\.?\d*|\.\d+", number, re.ASCII) or not 0 < float(number) < 1e6:
                raise InputError(f"--class-weights {item}: a weight must be a number above 0")
            weight_N[names.index(name)] = float(number)
        return weight_N

    def scheduled(self, rows: int) -> "FineTuning":
        """The task with its epochs converted to steps, for a number of training rows; evaluated at least once an epoch.

        `loop.steps` may stop it earlier, on the same schedule. Raises InputError for a schedule given in steps.
        """
        optimizer, loop = self.optimizer, self.loop
        if optimizer.learning_rate == 0:
            raise InputError("--optimizer.learning-rate 0: nothing would be learned")
        for option, found, given, instead in (
            ("warmup-steps", optimizer.warmup_steps, 0, "--warmup"),
            ("decay-steps", optimizer.decay_steps, 1, "--epochs"),
        ):
            if found != given:
                raise InputError(f"--optimizer.{option} {found}: give {instead}, from which the steps follow")
        if (steps := max(1, round(self.epochs * rows / self.batch_size))) >= 2**31:
            raise InputError(f"--epochs {self.epochs:g}: {steps:,} steps are too many, choose less than 2^31")
        optimizer = dataclasses.replace(optimizer, warmup_steps=int(self.warmup * steps), decay_steps=steps)
        evaluate_every = min(loop.evaluate_every, -(-rows // self.batch_size))
        loop = dataclasses.replace(loop, steps=min(loop.steps, steps), evaluate_every=evaluate_every)
        return dataclasses.replace(self, optimizer=optimizer, loop=loop)
