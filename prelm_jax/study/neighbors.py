"""The nearest occurrences of a word in context, for people to read: does `bank` by a river stay near rivers?

The queries are occurrences of ambiguous words, two of each sense or part of speech at most, their neighbors words of
the sentences of a treebank. Vectors of the top layer are centered, because in many models all point in one direction.
A row is `QUERY ⇒ NEIGHBOR`, both with the word in brackets; its value is the cosine.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prelm_jax.study import annotations, treebank
from prelm_jax.study.annotations import Tree, crop, read_coarse_senses
from prelm_jax.study.base import Make
from prelm_jax.study.records import Row
from prelm_jax.study.subjects import Subject
from prelm_jax.study.treebank import TreebankTest
from prelm_jax.study.vectors import unit

VERSION = 2  # Raise it when the same data and subject would give other rows.
NEAREST = 3
OF_EACH = 2  # Occurrences of each sense.
CONTEXT = 8  # Words on each side that are shown.
SENSES = {"bank": ("bank_bank", "bank_bank_(geography)")}  # As CoarseWSD-20 has them.
TAGS = {"set": ("NOUN", "VERB"), "play": ("NOUN", "VERB"), "right": ("NOUN", "ADV")}  # As the treebank has them.


class Occurrence(NamedTuple):
    """A word of a sentence."""

    sentence: Sequence[str]
    position: int

    def __str__(self) -> str:
        words, at = crop(self.sentence, self.position, self.position + 1, CONTEXT)
        words[at] = f"[{words[at]}]"
        return " ".join(words)


def queries(trees: Sequence[Tree], senses: Path) -> dict[str, list[Occurrence]]:
    """The occurrences by word, those of one sense or part of speech together."""
    found: dict[str, list[Occurrence]] = {}
    for word, wanted in SENSES.items():
        sentences = read_coarse_senses(annotations.matching(senses, f"{word}.test.tsv*")[0])
        for sense in wanted:
            of_sense = (x for x in sentences if x.spans[0].sense == sense)
            found.setdefault(word, []).extend(
                Occurrence(x.words, x.spans[0].begin) for x, _ in zip(of_sense, range(OF_EACH), strict=False)
            )
    for word, tags in TAGS.items():
        for tag in tags:
            of_tag = (
                Occurrence(tree.words, position)
                for tree in trees
                for position, (form, other) in enumerate(zip(tree.words, tree.tags, strict=True))
                if form.lower() == word and other == tag
            )
            found.setdefault(word, []).extend(x for x, _ in zip(of_tag, range(OF_EACH), strict=False))
    return found


class Neighbors(TreebankTest):
    """The test `neighbors`; `senses`: the directory of CoarseWSD-20."""

    name, metric = "neighbors", "mean"
    settings: Mapping[str, object] = {"version": VERSION}

    def __init__(self, directory: Path, senses: Path):
        super().__init__(directory)
        self.senses = senses
        self.files = [*self.files, *annotations.matching(senses, "bank.test*")]

    def measure(self, subject: Subject) -> Iterator[Row]:
        """The nearest words in other sentences, one of a sentence at most."""
        pool = [tree.words for tree in self.trees["train"]]
        states = self.states(subject)["train"]
        vectors_ND = states.vectors_LWD[-1].astype(np.float32)
        mean_D = vectors_ND.mean(0)
        pool_ND = unit(vectors_ND - mean_D)
        found_queries = queries(self.trees["train"], self.senses)
        asked = [(word, each) for word, occurrences in found_queries.items() for each in occurrences]
        for (word, query), states_LTD in zip(asked, subject.embed([x.sentence for _, x in asked]), strict=True):
            cosine_N = pool_ND @ unit(states_LTD[-1, query.position] - mean_D)
            seen = {tuple(query.sentence)}
            for index in np.argsort(-cosine_N, kind="stable"):
                sentence = int(np.searchsorted(states.offsets, index, side="right")) - 1
                if tuple(pool[sentence]) in seen:
                    continue
                seen.add(tuple(pool[sentence]))
                neighbor = Occurrence(pool[sentence], int(index - states.offsets[sentence]))
                yield Row(f"{query} ⇒ {neighbor}", word, float(cosine_N[index]))
                if len(seen) > NEAREST:
                    break


TESTS: Mapping[str, Make] = {
    "neighbors": lambda settings, _: Neighbors(
        treebank.folder(settings), annotations.folder(settings.data, "coarsewsd20")
    ),
}
