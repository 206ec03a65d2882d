"""Nearest neighbors of a word in context: table 4 of Peters et al. (2018), for your ELMo and your text.

    python examples/neighbors.py MODEL --word set --sentences "Return a new set." "The flag is set."

For each sentence, prints the sentences of the corpus in which the word's vector (top layer) has the highest cosine
similarity to its vector in that sentence.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import tyro

import prelm_jax
from prelm_jax.corpus.documents import Corpus
from prelm_jax.corpus.sentences import split


def vectors(model, texts: list[str], word: str) -> Iterator[tuple[str, np.ndarray]]:
    """Each text that contains the word, case-insensitively, and the word's vector in it, scaled to length 1."""
    for text, (words, states) in zip(texts, model.embed(texts, tokenize=True), strict=True):
        lowered = [w.lower() for w in words]
        if word in lowered:
            vector = states[-1][lowered.index(word)]
            yield text, vector / np.linalg.norm(vector)


def main(
    model: tyro.conf.Positional[str],
    word: str,
    sentences: tuple[str, ...],
    corpus: tuple[str, ...] = ("python-docs",),
    uses: int = 500,
    show: int = 3,
) -> None:
    """Find sentences of a corpus that use a word as given sentences do.

    Args:
        model: Model directory or work directory of an ELMo.
        word: Word to compare, in lower case.
        sentences: Sentences that contain the word.
        corpus: Sources of text to search.
        uses: Number of sentences of the corpus to search.
        show: Number of neighbors to print for each sentence.
    """
    loaded = prelm_jax.load(model)
    documents = Corpus(corpus).documents()
    texts = (text for document in documents for text in split(document.text, document.sentences, document.language))
    found = itertools.islice((" ".join(text.split()) for text in texts if word in text.lower().split()), uses)
    others, table = zip(*vectors(loaded, list(found), word), strict=True)
    for sentence, vector in vectors(loaded, list(sentences), word):
        print(f"\n{sentence}")
        cosines = np.stack(table) @ vector
        for i in np.argsort(-cosines)[:show]:
            print(f"  {cosines[i]:.2f}  {others[i]}")


if __name__ == "__main__":
    tyro.cli(main)
