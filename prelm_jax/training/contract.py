"""What the rooms promise each other: models, optimizers and batches, as the train loop and the command line see them.

Whatever fulfills `Model` can be trained: a pretraining model, or an encoder with a task head.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeAlias, TypeVar

import numpy as np
import optax
from jax import Array

if TYPE_CHECKING:
    from prelm_jax.corpus.store import Store
    from prelm_jax.tokenizers.base import Tokenizer

# Nested dicts of arrays, by module and parameter name; `training.parameters.path_name` writes a path as "a/b/c".
Params: TypeAlias = "dict[str, Array | Params]"
Batch = Mapping[str, Array]  # on the devices
HostBatch = Mapping[str, np.ndarray]  # as the batches build it
Sums = dict[str, tuple[Array, Array]]  # by name a sum and its weight; the mean is their quotient, taken once

# How a key of a batch is spread over hosts and devices.
#   rows:       the first axis is the rows of the global batch; a host builds its own, a device holds its own
#   replicated: the same on every host and device (ELMo's negatives, drawn once for the global batch)
#   shared:     the same on every host, each device holding a part of the first axis (ELMo's distinct words);
#               never cut into micro-batches
Layout = Literal["rows", "replicated", "shared"]


class Model(Protocol):
    """A pretraining model, or an encoder with a task head."""

    @property
    def coefficients(self) -> Mapping[str, float]:
        """The objective is the sum over losses of coefficient · sum / weight."""

    @property
    def replicated(self) -> tuple[str, ...]:
        """Regular expressions of the parameter paths that are never sharded."""

    @property
    def tables(self) -> tuple[str, ...]:
        """Regular expressions of the paths of tables of which a step reads few rows.

        They are sharded by rows whatever `--mesh.parameters` says, and never gathered: only the rows read travel.
        """

    @property
    def matrices(self) -> tuple[str, ...]:
        """Regular expressions of the paths of the layers' weight matrices; never embeddings, heads, norms or biases."""

    def rate(self, path: str) -> float:
        """Factor of the learning rate of the parameter at a path; with 0 it stays as it is, and has no moments."""

    def init_params(self, key: Array) -> Params:
        """Fresh fp32 parameters."""

    def init_carry(self, batch_size: int) -> Params:
        """The recurrent state before the first batch; {} unless the model is recurrent."""

    def loss(self, params: Params, carry: Params, batch: Batch, key: Array, train: bool) -> tuple[Sums, Sums, Params]:
        """(losses, metrics, new carry).

        `train` is static: with it there is dropout. `key` is always given; without `train` it only feeds models that
        sample inside their loss.
        """

    def weights(self, batch: Batch) -> dict[str, Array]:
        """The weight of each loss, from the batch alone, so that micro-batches are divided by the whole batch's."""

    def tokens(self, batch: Batch) -> Array:
        """int32 [2]: the tokens of a batch that are not padding, and all its positions."""

    def flops(self, batch: Batch) -> float:
        """Matmul FLOPs of one training step on a batch of these shapes."""

    def check(self, batch: HostBatch) -> None:
        """Raises InputError where a batch asks for rows that the model's tables lack."""


class Predictor(Model, Protocol):
    """A model whose predictions can be collected over an evaluation."""

    def predict(self, params: Params, carry: Params, batch: Batch) -> dict[str, Array]:
        """For each row of the batch, what it predicts: arrays whose first axis is the rows."""


class OptimizerConfig(Protocol):
    """A configuration that builds an optax transformation."""

    def schedule(self, step: Array | int) -> Array:
        """The learning rate of a step (counted from 0)."""

    def ending_at(self, step: int) -> Self:
        """The same optimizer with the schedule of a run that ends at this step."""

    def build(self, matrices: Sequence[str]) -> optax.GradientTransformation:
        """The transformation of gradients into updates; `matrices` as declared by the model."""

    def flops(self, params: Params, matrices: Sequence[str], devices: int) -> float:
        """Matmul FLOPs of an update on each of the devices that share its work, without the FLOPs of the model."""


class Batches(Protocol):
    """The batch of every step, a pure function of (seed, step). The step number is the whole state of the data."""

    batch_size: int

    @property
    def layout(self) -> Mapping[str, Layout]:
        """How each key is spread over hosts and devices."""

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The global batch of a step."""

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start to stop of the global batch of a step, built without the others."""


BatchesT = TypeVar("BatchesT", bound=Batches)


class EvaluationRows(Protocol):
    """A whole text as rows that score each of its targets once, whatever the seed, the batch size and the devices.

    `data.evaluation.EvaluationBatches` cuts them into batches.
    """

    num_rows: int
    num_steps: int  # Parts of a row, each read from the carry that the one before left: 1 for models without a carry.

    @property
    def layout(self) -> Mapping[str, Layout]:
        """How each key is spread over hosts and devices."""

    def rows(self, step: int, row_B: np.ndarray) -> dict[str, np.ndarray]:
        """Part `step` of the rows with these numbers. A row of zeros, in keys that hold rows, weighs nothing."""


class DataConfig(Protocol[BatchesT]):
    """A configuration that builds batches from a token store, and knows how to read a model's results on them."""

    @property
    def max_length(self) -> int:
        """Positions of a row (T)."""

    def build(self, store: "Store", tokenizer: "Tokenizer", batch_size: int, seed: int) -> BatchesT:
        """The batches of a run. Raises InputError for a store or tokenizer that does not fit."""

    def evaluated(self) -> "DataConfig[BatchesT]":
        """The config for held-out batches during a run, so that runs trained with other settings can be compared."""

    def evaluation(self, store: "Store", tokenizer: "Tokenizer") -> EvaluationRows:
        """All of a text, to evaluate on. Raises InputError for a store without targets."""

    def baselines(self, batches: BatchesT, evaluation: Iterable[HostBatch]) -> dict[str, dict[str, float]]:
        """Metric → baseline → value: trivial baselines on evaluation batches, fitted on the store of `batches`.

        `evaluation` is read once, and what is kept of it does not grow with its length.
        """

    def derived_metrics(self, name: str, value: float, store: "Store") -> dict[str, float]:
        """Metrics derived from the metric `name` of a model on a store, by name: perplexity, bits per byte."""

    def describe(self, batches: BatchesT) -> str:
        """What a step reads, as one line for people: how much of the text, and how full its rows are."""

    def show(self, batch: HostBatch, tokenizer: "Tokenizer") -> Iterator[str]:
        """The rows of a batch as text, a few lines each."""
