"""A pretrained model in use: what every family offers, and embeddings as a file.

Compiled functions compute products in full fp32 ("highest"); TPUs and GPUs by default trade precision for speed.
"""

import abc
import dataclasses
import inspect
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple

import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.formats.base import Config, LoadedModel, Vocabulary
from prelm_jax.formats.hdf5 import hdf5_file
from prelm_jax.progress import Progress
from prelm_jax.storage import output_file

Embedding = tuple[list[str], np.ndarray]  # The tokens of a text, and its hidden states [L + 1, tokens, D].
Embeddings = Iterator[Embedding]
Scores = Iterator[tuple[float, int]]  # Of each text the natural-log probability, and the number of its tokens.


SENTENCE_END = "."  # After it a sentence is scored whose first token nothing else predicts.


class SentenceScore(NamedTuple):
    """How probable a sentence is, to be compared with that of a sentence that differs from it by little."""

    total: float  # Sum of the natural-log probabilities of its tokens, in both directions if there are two.
    tokens: int
    unknown: int  # Tokens outside of the vocabulary, which is why two sentences may be the same to a model.
    directions: Mapping[str, float] = {}  # The sum of each direction, if there are two.


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a model does with a text: what it was given, what the text has there, and what the model says instead."""

    given: str
    expected: str
    result: str


class Pretrained(abc.ABC, Generic[Config, Vocabulary]):
    """A loaded model, and what it can do with text.

    Texts are read a part at a time, and results are computed as they are asked for: memory does not grow with them.
    """

    scoring: str  # What `score_sentences` adds up, in a few words.

    def __init__(self, loaded: LoadedModel[Config, Vocabulary]):
        self.loaded = loaded
        self.config, self.params = loaded.config, loaded.params
        self.tokenizer, self.missing = loaded.tokenizer, loaded.missing

    @abc.abstractmethod
    def embed(self, texts: Collection[str], truncate: bool = False) -> Embeddings:
        """For each text, in order, its tokens and hidden states, f32 [L + 1, tokens, D]; a blank text has no tokens.

        truncate: cut a text that is too long, instead of raising InputError. A family may have more options.
        """

    @abc.abstractmethod
    def score(self, texts: Collection[str]) -> Scores:
        """For each text, in order, the sum of the natural-log probabilities of its tokens, and their number."""

    @abc.abstractmethod
    def score_sentences(self, texts: Collection[str]) -> Iterator[SentenceScore]:
        """For each text, in order, the score by which its family compares sentences (minimal pairs).

        Every token is scored, including the first. A text's score does not depend on the other texts, bit for bit.
        """

    @abc.abstractmethod
    def embed_words(self, sentences: Iterable[Sequence[str]]) -> Iterator[np.ndarray]:
        """For each sentence, a sequence of words, their hidden states, f32 [L + 1, words, D].

        A word's vector is the mean of its subwords'. A sentence that is too long is read in parts, cut between words.

            next(load("bert-mini").embed_words([["The", "list", "is", "returned", "."]])).shape  # (5, 5, 256)
        """

    @abc.abstractmethod
    def sample(self, texts: Sequence[str], count: int) -> list[Sample]:
        """The model's output for the first `count` texts, for people to read; the same at each call.

        Skips texts that are too short or too long.
        """


def write_embeddings(
    model: Pretrained[Config, Vocabulary], lines: Collection[str], path: str | os.PathLike, **options: object
) -> None:
    """Embeds lines into an HDF5 file, which appears once it is complete. `options` go to the model's `embed`.

    Raises InputError if `path` is a directory, a device or a pipe.

    Dataset "i" (from "0") is line i: f32 [L + 1, tokens, D]. Its attribute `tokens` is the JSON list of its tokens.
    """
    embed: Callable[..., Embeddings] = model.embed
    for name in options:
        if name not in inspect.signature(embed).parameters:
            raise InputError(f"--{name.replace('_', '-')}: {model.config.model_type} has no such option; leave it out")
    with (
        output_file(path) as unfinished,
        hdf5_file(unfinished) as file,
        Progress("embed", len(lines), "lines") as progress,
    ):
        for i, (tokens, hidden) in enumerate(embed(lines, **options)):
            dataset = file.create_dataset(str(i), data=hidden)
            dataset.attrs["tokens"] = json.dumps(tokens, ensure_ascii=False)
            progress.advance(1)


def write_vectors(vectors: Iterator[np.ndarray], count: int, path: str | os.PathLike) -> None:
    """Writes the vectors of `count` lines into an HDF5 file, which appears when it is complete.

    Raises InputError if `path` is a directory, a device or a pipe. Dataset "vectors" is f32 [count, D].
    """
    with (
        output_file(path) as unfinished,
        hdf5_file(unfinished) as file,
        Progress("embed", count, "lines") as progress,
    ):
        for i, vector in enumerate(vectors):
            if i == 0:
                file.create_dataset("vectors", (count, len(vector)), np.float32)
            file["vectors"][i] = vector
            progress.advance(1)
