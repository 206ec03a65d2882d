"""Senses by the nearest mean, thresholds and cosines in context, against plain loops."""

from collections import Counter

import numpy as np
import pytest
import tiny_subjects
from hypothesis import given
from hypothesis import strategies as st
from tiny_subjects import lines

from prelm_jax.study import annotations, senses
from prelm_jax.study.base import Settings
from prelm_jax.study.tests import make_test


@pytest.fixture
def data(tmp_path):
    """Two nouns of CoarseWSD-20, with two and three senses of unequal frequency."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "coarsewsd20"
    folder.mkdir()
    for noun, frequencies in (("bank", (3, 7)), ("bass", (6, 2, 4))):
        for split, copies in (("train", 2), ("test", 1)):
            text = ""
            for sense, frequency in enumerate(frequencies):
                for _ in range(copies * frequency):
                    words = [f"w{rng.integers(4) + 3 * sense}" for _ in range(rng.integers(3, 7))]
                    position = int(rng.integers(len(words)))
                    words[position] = noun
                    text += f"{noun}_{sense}\t{position}\t{' '.join(words)}\n"
            (folder / f"{noun}.{split}.tsv").write_text(text)
    return tmp_path


def vector(subject, sentence: annotations.Sentence) -> np.ndarray:
    """That of the noun in layer 1."""
    return next(iter(subject.embed([sentence.words])))[1, sentence.spans[0].begin]


def test_nearest_mean(data, monkeypatch):
    """Against a loop over the senses of each noun."""
    monkeypatch.setattr(senses, "COARSE_DEV", 0)
    subject = tiny_subjects.contextual()
    rows = list(make_test("coarsewsd", Settings(data)).measure(subject))
    folder = data / "coarsewsd20"
    for noun in ("bank", "bass"):
        train, test = (
            [(sentence.spans[0].sense, vector(subject, sentence)) for sentence in annotations.read_coarse_senses(path)]
            for path in (folder / f"{noun}.train.tsv", folder / f"{noun}.test.tsv")
        )
        means = {name: np.mean([v for sense, v in train if sense == name], 0) for name, _ in train}
        right = []
        for sense, v in test:
            cosine = {name: m @ v / np.linalg.norm(m) / np.linalg.norm(v) for name, m in means.items()}
            right.append(max(cosine, key=lambda name: cosine[name]) == sense)
        found = [row.value for row in rows if (row.group, row.layer, row.kind) == (noun, 1, "")]
        assert sorted(found) == sorted(right) and 0.5 < np.mean(right) < 1
    majority = {row.group: [] for row in rows}
    for row in rows:
        if row.kind == "majority":
            majority[row.group].append(row.value)
    assert {noun: np.mean(values) for noun, values in majority.items()} == {"bank": 0.7, "bass": 0.5}
    assert len({(row.item, row.kind, row.layer) for row in rows}) == len(rows)


def text(sentence: annotations.Sentence) -> str:
    return " ".join(sentence.words)


def test_parts_of_coarse_senses(data, monkeypatch):
    """The dev part is not in the means, of which each sense has a few sentences at most."""
    monkeypatch.setattr(senses, "COARSE_TRAIN", 5)
    monkeypatch.setattr(senses, "COARSE_TEST", 9)
    parts = senses._coarse_senses(data / "coarsewsd20")
    assert (len(parts["dev"]), len(parts["test"])) == (6 + 8, 9 + 9)
    files = [data / "coarsewsd20" / f"{noun}.train.tsv" for noun in ("bank", "bass")]
    every = [sentence for path in files for sentence in annotations.read_coarse_senses(path)]
    assert not Counter(map(text, [*parts["train"], *parts["dev"]])) - Counter(map(text, every))
    sizes, dev, train = (Counter(s.spans[0].sense for s in part) for part in (every, parts["dev"], parts["train"]))
    assert train == {sense: min(5, sizes[sense] - dev[sense]) for sense in sizes}
    found = lines(make_test("coarsewsd", Settings(data)).measure(tiny_subjects.contextual()))
    assert len(found["dev", 1]) == 14 and len(found["", 1]) == len(found["majority", None]) == 18


def test_without_context_the_most_frequent_sense_is_taken(data):
    found = lines(make_test("coarsewsd", Settings(data)).measure(tiny_subjects.contextual()))
    assert found["", 0] == found["majority", None] != found["", 1]
    found = lines(make_test("coarsewsd", Settings(data)).measure(tiny_subjects.static()))
    assert found["", 0] == found["majority", None]


def wf(word: str, lemma: str, key: str) -> str:
    return f"<wf cmd=done pos=NN lemma={lemma} wnsn=1 lexsn={key}>{word}</wf>\n"


def test_semcor(tmp_path, monkeypatch):
    """Words with two senses in brown1 count; a compound is the mean of its words."""
    monkeypatch.setattr(senses, "SEMCOR_DEV", 0)
    (tmp_path / "semcor").mkdir()
    bank = [wf("bank", "bank", f"1:1{i}:00::") for i in range(2)]
    other, ice = wf("tree", "tree", "1:20:00::"), wf("ice_cream", "ice_cream", "1:13:00::")
    train = [["river", bank[0]], ["money", bank[1]], ["money", bank[1]], [other, "x"], [ice, "x"], [ice[:-1] + "", "y"]]
    test = [["money", bank[1]], ["river", bank[0]], ["x", other], ["y", ice]]
    for name, sentences in (("brown1", train), ("brown2", test)):
        text = ""
        for sentence in sentences:
            words = (each if "<" in each else f"<wf cmd=ignore pos=NN>{each}</wf>\n" for each in sentence)
            text += "<s snum=1>\n" + "".join(word if word.endswith("\n") else word + "\n" for word in words) + "</s>\n"
        (tmp_path / "semcor" / f"{name}.sgml").write_text(text)
    rows = list(make_test("semcor", Settings(tmp_path)).measure(tiny_subjects.contextual()))
    assert {row.group for row in rows} == {"bank.n"}
    found = lines(rows)
    assert found["", 1] == [1, 1] and sorted(found["majority", None]) == sorted(found["", 0]) == [0, 1]


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=12))
def test_best_threshold(examples):
    """Against trying each value."""
    values, positive = np.array([v / 4 for v, _ in examples]), np.array([p for _, p in examples])

    def right(threshold: float) -> int:
        return int(((values >= threshold) == positive).sum())

    found = senses.best_threshold(values, positive)
    assert right(found) == max(right(threshold) for threshold in [*values, np.inf])


@pytest.fixture
def wic(tmp_path):
    """Same sense: the same word before the target."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 60), ("dev", 30), ("test", 40)):
        folder = tmp_path / "wic" / split
        folder.mkdir(parents=True)
        data, gold = "", ""
        for _ in range(number):
            first, second = rng.integers(5, size=2)
            data += f"word\tN\t1-1\tw{first} word .\tw{second} word .\n"
            gold += "T\n" if first == second else "F\n"
        (folder / f"{split}.data.txt").write_text(data)
        (folder / f"{split}.gold.txt").write_text(gold)
    return tmp_path


def test_wic(wic):
    rows = list(make_test("wic", Settings(wic)).measure(tiny_subjects.contextual()))
    found = lines(rows)
    gold = (wic / "wic" / "test" / "test.gold.txt").read_text().split()
    assert np.mean(found["majority", None]) == np.mean([label == "F" for label in gold])
    assert np.mean(found["", 1]) == np.mean(found["dev", 1]) == 1
    assert np.mean(found["", 0]) == np.mean(found["majority", None])  # All cosines are 1.
    assert {row.group for row in rows} == {"word"}


def test_scws(tmp_path):
    (tmp_path / "scws").mkdir()
    text = "1\tcat\tn\tdog\tn\ta <b> cat </b> b\tc <b> dog </b> d e\t6.5\t6\n"
    text += "2\tbank\tn\tBank\tn\triver <b> bank </b>\t<b> Bank </b> of\t1.0\t1\n"
    (tmp_path / "scws" / "ratings.tsv").write_text(text)
    subject = tiny_subjects.contextual()
    rows = list(make_test("scws", Settings(tmp_path)).measure(subject))
    assert [(row.item, row.kind, row.gold) for row in rows if row.layer == 1] == [
        ("0", "", 6.5),
        ("0", "different", 6.5),
        ("1", "", 1.0),
    ]
    first, second = subject.embed([["a", "cat", "b"], ["c", "dog", "d", "e"]])
    cosine = first[1, 1] @ second[1, 1] / np.linalg.norm(first[1, 1]) / np.linalg.norm(second[1, 1])
    assert next(row.value for row in rows if row.layer == 1) == pytest.approx(cosine, abs=1e-4)


def test_contexts_are_cropped(tmp_path, monkeypatch):
    monkeypatch.setattr(senses, "CONTEXT", 1)
    sentence = annotations.Sentence(list("abcde"), (annotations.Span(2, 3, "c", "1"),))
    assert senses._cropped(sentence) == (["b", "c", "d"], (annotations.Span(1, 2, "c", "1"),))
