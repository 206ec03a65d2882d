"""Neighbors in context: those of a sense come first where the vectors know it, and never from the query's sentence."""

from pathlib import Path

import numpy as np
import pytest
import tiny_subjects

from prelm_jax.study.annotations import folder
from prelm_jax.study.base import Settings
from prelm_jax.study.neighbors import Occurrence, queries
from prelm_jax.study.tests import make_test


def conllu(sentences: list[str]) -> str:
    """Sentences of words with their tags, WORD/TAG, all of them under the first word."""
    blocks = []
    for text in sentences:
        words = [word.split("/") for word in text.split()]
        rows = [f"{i}\t{w}\t_\t{tag}\t_\t_\t{min(i - 1, 1)}\troot\t_\t_" for i, (w, tag) in enumerate(words, 1)]
        blocks.append("\n".join(rows) + "\n")
    return "\n".join(blocks) + "\n"


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "ud-en-ewt").mkdir()
    (tmp_path / "coarsewsd20").mkdir()
    text = conllu(
        [
            "The/DET left/ADJ bank/NOUN of/ADP the/DET river/NOUN",
            *["A/DET bank/NOUN lends/VERB money/NOUN"] * 2,  # One neighbor.
            "A/DET set/NOUN of/ADP money/NOUN",
            "They/PRON set/VERB the/DET river/NOUN",
        ]
    )
    for part in ("train", "dev", "test"):
        (tmp_path / "ud-en-ewt" / f"en-{part}.conllu").write_text(text)
    (tmp_path / "coarsewsd20" / "bank.test.tsv").write_text(
        "bank_bank\t1\ta bank with money\nbank_bank_(geography)\t4\tby the river a bank\n"
    )
    return tmp_path


def test_neighbors_follow_the_context(data):
    def embed(words):
        """The word, and whether there is a river in its sentence; all of them point in one direction."""
        river = np.full(4, 103.0 if "river" in words else 97.0)
        return np.stack([np.concatenate([tiny_subjects.word_vector(word.lower(), 12), river]) for word in words])[None]

    rows = list(make_test("neighbors", Settings(data)).measure(tiny_subjects.Embedding(embed, 1)))
    first = {row.item.split(" ⇒ ")[0]: row.item.split(" ⇒ ")[1] for row in reversed(rows)}
    assert first["a [bank] with money"] == "A [bank] lends money"
    assert first["by the river a [bank]"] == "The left [bank] of the river"
    assert first["A [set] of money"] != "A [set] of money"  # Its own sentence.
    assert {row.group for row in rows} == {"bank", "set"} and all(-1 <= row.value <= 1.0001 for row in rows)
    assert min(row.value for row in rows) < 0.9  # Vectors are centered.
    assert len(rows) == 3 * 4 and len({(row.group, row.item) for row in rows}) == len(rows)


def test_long_sentences_are_cut():
    words = [str(i) for i in range(30)]
    assert str(Occurrence(words, 20)) == "12 13 14 15 16 17 18 19 [20] 21 22 23 24 25 26 27 28"
    assert str(Occurrence(words, 0)).startswith("[0] 1 ")


@pytest.mark.slow
def test_the_published_data_has_the_senses(real_data):
    test = make_test("neighbors", Settings(real_data / "study"))
    asked = queries(test.trees["train"], test.senses)
    assert len(asked["bank"]) == 4 and all(len(asked[word]) >= 2 for word in ("set", "play", "right"))
    assert folder(real_data, "coarsewsd20").is_dir()
