"""Where a word is used as it is in a sentence: the paper's table 4 (Peters et al. 2018) for an ELMo and a text.

    python examples/neighbours.py MODEL --word set --sentences "Return a new set." "The flag is set."

For each sentence, the sentences of the corpus in which the word's vector (the top layer's) is nearest to its vector
here, by the cosine of the angle.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import tyro

import prelm_jax
from prelm_jax.corpus.documents import Corpus
from prelm_jax.corpus.sentences import split


def vectors(model, texts: list[str], word: str) -> Iterator[tuple[str, np.ndarray]]:
    """Each text that holds the word, and the word's vector in it, of length 1; capitals do not matter."""
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
    """`uses`: how many sentences of the corpus are looked at; `show`: how many of them are printed for each."""
    loaded = prelm_jax.load(model)
    documents = Corpus(corpus).documents()
    texts = (text for document in documents for text in split(document.text, document.sentences))
    found = itertools.islice((" ".join(text.split()) for text in texts if word in text.lower().split()), uses)
    others, table = zip(*vectors(loaded, list(found), word), strict=True)
    for sentence, vector in vectors(loaded, list(sentences), word):
        print(f"\n{sentence}")
        cosines = np.stack(table) @ vector
        for i in np.argsort(-cosines)[:show]:
            print(f"  {cosines[i]:.2f}  {others[i]}")


if __name__ == "__main__":
    tyro.cli(main)
