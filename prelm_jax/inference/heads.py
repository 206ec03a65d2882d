"""A fine-tuned model in use: classify, tag, answer and choose, each example the same in any company."""

import collections
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar, cast

import jax
import numpy as np
from jax import Array

from prelm_jax.data.examples import Example, Kind
from prelm_jax.data.frames import WIDTHS, Frame
from prelm_jax.data.framing import frame_examples
from prelm_jax.data.rows import Row, Text
from prelm_jax.errors import InputError
from prelm_jax.formats.base import LoadedTask, ModelConfig
from prelm_jax.inference.base import Embeddings, Pretrained, Sample, Scores, SentenceScore
from prelm_jax.inference.batching import Program, Query
from prelm_jax.inference.compiling import compiled
from prelm_jax.inference.decoding import Outputs, Prediction, decode
from prelm_jax.models import heads
from prelm_jax.models.task import TaskModelConfig
from prelm_jax.progress import Progress
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.tokenizers.characters import MAX_CHARACTERS, PAD
from prelm_jax.training.contract import Batch, Params

# What the kinds of predictions are asked for by.
METHODS: dict[Kind, str] = {
    "label": "classify",
    "labels": "classify",
    "number": "classify",
    "choice": "choose",
    "tags": "tag",
    "spans": "answer",
}


Input = TypeVar("Input")


class TaskPretrained(Pretrained[TaskModelConfig, Tokenizer]):
    """An encoder with the head of a task. `pretrained` is the encoder without it, and embeds and scores.

    labels: the names of classes or tags, in the order of a prediction's `probabilities`. kind: of these predictions.
    """

    def __init__(
        self,
        loaded: LoadedTask[Tokenizer],
        pretrained: Pretrained[ModelConfig, Tokenizer],
        frame: Callable[[Tokenizer, int, bool], Frame],
    ):
        super().__init__(loaded)
        if loaded.tokenizer is None:
            raise InputError("the model has no vocabulary (vocab.txt), which says how texts are split into words")
        self.pretrained, self.labels, self._head = pretrained, loaded.labels, loaded.config.head
        self.scoring = pretrained.scoring
        self._programs: dict[int, Program[Row, Outputs]] = {}
        self._reads_two = isinstance(self._head, heads.Label) and self._head.pair
        self.frame = frame(loaded.tokenizer, loaded.max_length or WIDTHS[-1], self._reads_two)

    @property
    def kind(self) -> Kind:
        """The kind of the labels that the head predicts."""
        return self._head.kind

    def embed(self, texts: Collection[str], truncate: bool = False) -> Embeddings:
        """The hidden states of the fine-tuned encoder; see `Pretrained`."""
        return self.pretrained.embed(texts, truncate)

    def score(self, texts: Collection[str]) -> Scores:
        """The probability of texts, where the directory still has the pretraining heads; see `Pretrained`."""
        return self.pretrained.score(texts)

    def score_sentences(self, texts: Collection[str]) -> Iterator[SentenceScore]:
        """Sentences to compare, where the directory still has the pretraining heads; see `Pretrained`."""
        return self.pretrained.score_sentences(texts)

    def embed_words(self, sentences: Iterable[Sequence[str]]) -> Iterator[np.ndarray]:
        """The hidden states of words in the fine-tuned encoder; see `Pretrained`."""
        return self.pretrained.embed_words(sentences)

    def sample(self, texts: Sequence[str], count: int) -> list[Sample]:
        """What the encoder does with some texts; see `Pretrained`."""
        return self.pretrained.sample(texts, count)

    def classify(self, texts: Sequence[str | tuple[str, str]]) -> list[Prediction]:
        """The label, the labels or the number of each text or pair of texts; what is too long is cut.

        model.classify(["A fine film.", "A waste of time."])[0].label  # "positive"
        """
        return self._of("classify", [(_parts(text),) for text in self._listed("classify", texts)])

    def tag(self, sentences: Sequence[str | Sequence[str]]) -> list[Prediction]:
        """A tag for each word of each sentence, of any length. A string is split at white space.

        model.tag(["John lives in Rome"])[0].label  # ("B-PER", "O", "O", "B-LOC")
        """
        words = [each.split() if isinstance(each, str) else each for each in self._listed("tag", sentences)]
        return self._of("tag", [((tuple(each),),) for each in words])

    def answer(self, questions: Sequence[tuple[str, str]], null_threshold: float = 0.0) -> list[Prediction]:
        """The answer to each (question, passage), of any length; see `decoding.decode` for `null_threshold`.

        model.answer([("Who wrote it?", "It was written by Mary.")])[0].label.texts  # ("Mary",)
        """
        return self._of("answer", [(_parts(pair),) for pair in self._listed("answer", questions)], null_threshold)

    def choose(self, choices: Sequence[tuple[str, Sequence[str]]]) -> list[Prediction]:
        """The number, from 0, of the option that best goes with each text.

        model.choose([("He ate the apple.", ["It was good.", "It was closed."])])[0].label  # 0
        """
        for number, each in enumerate(self._listed("choose", choices)):
            if len(_parts(each)) != 2 or not isinstance(each[1], list | tuple):
                raise InputError(f"example {number} is not (text, [option, …])")
        return self._of("choose", [tuple((text, option) for option in options) for text, options in choices])

    def _listed(self, method: str, inputs: Sequence[Input]) -> Sequence[Input]:
        """The inputs of a method. Raises InputError for a text alone, which would be read letter by letter."""
        self.require(method)
        if isinstance(inputs, str):
            raise InputError(f"{method} takes a list, not a text alone: give [text]")
        return inputs

    def _of(self, method: str, sequences: Iterable[tuple], null_threshold: float = 0.0) -> list[Prediction]:
        examples = [Example(str(number), each) for number, each in enumerate(sequences)]
        return self.predict(examples, null_threshold)[0]

    def require(self, method: str) -> None:
        """Raises InputError if predictions of the model's kind are not asked for by this method."""
        if METHODS[self.kind] != method:
            raise InputError(f"the model predicts {self.kind}, which {method} does not: {METHODS[self.kind]} does")

    def predict(
        self,
        examples: Sequence[Example],
        null_threshold: float = 0.0,
        stride: int | None = None,
        progress: str | None = None,
    ) -> tuple[list[Prediction], int]:
        """The predictions for examples of the model's kind, and how many of these were cut.

        stride: tokens from a window of a long passage or sentence to the next (see `frame_examples`). progress: what to
        call the work in a line of progress; None: say nothing.
        """
        rows, num_cut = self._rows(examples, stride)
        return decode(self.kind, examples, rows, self._outputs(rows, progress), self.labels, null_threshold), num_cut

    def query(self, example: Example, null_threshold: float = 0.0) -> Query[Row, Outputs, tuple[Prediction, bool]]:
        """The prediction for an example, and whether it was cut; see `predict`."""
        rows, num_cut = self._rows([example], None)

        def finish(found: Sequence[Outputs]) -> tuple[Prediction, bool]:
            return decode(self.kind, [example], rows, found, self.labels, null_threshold)[0], bool(num_cut)

        return Query(self.program(len(rows[0].texts)), rows, finish)

    def program(self, num_texts: int) -> Program[Row, Outputs]:
        """The outputs of the model for rows with this many texts each."""
        if num_texts not in self._programs:
            self._programs[num_texts] = Program(
                "predict",
                self.params,
                partial(self._compute, num_texts),
                lambda row: self.frame.fitting_width([row], num_texts),
                self.frame.widths,
                partial(self._canary, num_texts),
                texts=num_texts,
            )
        return self._programs[num_texts]

    @property
    def main_program(self) -> Program[Row, Outputs]:
        """The program of all examples, or of choices between two options."""
        reads_two = isinstance(self._head, heads.Choice) or (self._reads_two and self.frame.pairs != "together")
        return self.program(2 if reads_two else 1)

    def _compute(self, num_texts: int, params: Params, examples: Sequence[Row], rows: int, width: int) -> list[Outputs]:
        filled = [*examples, *[examples[-1]] * (rows - len(examples))]
        found = _predict(self.config, params, self._batch(filled, num_texts, width))
        values = {name: np.asarray(x) for name, x in found.items()}
        return [{name: x[i] for name, x in values.items()} for i in range(len(examples))]

    def _canary(self, num_texts: int, width: int, rng: np.random.Generator) -> Row:
        ids = rng.integers(self.tokenizer.vocab_size, size=width).astype(np.int32)
        read = np.arange(width if self.kind == "tags" else 1, dtype=np.int32)
        return Row(0, (Text(ids, width, read),) * num_texts)

    def _rows(self, examples: Sequence[Example], stride: int | None) -> tuple[list[Row], int]:
        """The rows of examples, and how many examples were cut."""
        self._check(examples)
        unlabelled = [Example(example.id, example.sequences) for example in examples]
        rows, num_cut = frame_examples(self.frame, unlabelled, self.kind, self.labels, stride)
        for row in rows:
            if not row.length:
                name = examples[row.example].id
                raise InputError(f"example {name} is a text without tokens, of which the model reads nothing: drop it")
        return rows, num_cut

    def _check(self, examples: Sequence[Example]) -> None:
        for example in examples:
            first = example.sequences[0] if example.sequences else ()
            if not first:
                raise InputError(f"example {example.id} has no texts")
            if len(first) > 2:
                raise InputError(f"example {example.id} has {len(first)} texts: give one, or a pair")
            if self.kind == "spans" and len(first) == 1:
                raise InputError(f"example {example.id} has 1 text: give (question, passage)")
            parts = [part for sequence in example.sequences for part in sequence]
            for text in itertools.chain(*parts) if self.kind == "tags" else parts:
                if not isinstance(text, str):
                    raise InputError(f"example {example.id} has {text!r:.60}, which is not text")
            apart = isinstance(self._head, heads.Label) and self.frame.pairs != "together"
            if apart and (len(first) == 2) != self._reads_two:
                read = "pairs of texts" if self._reads_two else "single texts"
                raise InputError(f"example {example.id} has {len(first)} texts, but the model was trained on {read}")

    def _outputs(self, rows: Sequence[Row], progress: str | None) -> list[Outputs]:
        """What the model gives for each row, computed in a shape that depends on the row alone."""
        together: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
        for number, row in enumerate(rows):
            together[len(row.texts), self.frame.fitting_width([row], len(row.texts))].append(number)
        outputs: dict[int, Outputs] = {}
        with Progress(progress, len(rows), "rows") as shown:
            for (num_texts, width), numbers in sorted(together.items()):
                batch_size = self.program(num_texts).full_rows(width)
                for start in range(0, len(numbers), batch_size):
                    some = numbers[start : start + batch_size]
                    compute = self.program(num_texts).compute
                    found = compute(self.params, [rows[number] for number in some], batch_size, width)
                    outputs.update(zip(some, found, strict=True))
                    shown.advance(len(some))
        return [outputs[number] for number in range(len(rows))]

    def _batch(self, rows: Sequence[Row], num_texts: int, width: int) -> dict[str, np.ndarray]:
        num_read = width if self.kind == "tags" else 1
        batch = self.frame.batch([[row] for row in rows], slice(None), width, num_texts, num_read)
        if "characters" in batch:  # Of as many words, and as long ones, as there may be in a batch of this shape.
            words, columns = batch["characters"].shape
            most = -(-len(rows) * num_texts * width // 128) * 128
            padding = ((0, most - words), (0, MAX_CHARACTERS - columns))
            batch["characters"] = np.pad(batch["characters"], padding, constant_values=PAD)
        return batch


def _parts(given: object) -> tuple:
    """The texts of an example, which may be one text."""
    return tuple(given) if isinstance(given, list | tuple) else (given,)


@compiled(static=(0,))
def _predict(config: TaskModelConfig, params: Params, batch: Batch) -> dict[str, Array]:
    with jax.default_matmul_precision("highest"):
        return cast("dict[str, Array]", config.build().predict(params, {}, batch))
