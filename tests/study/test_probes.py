"""Linear probes, on treebanks and hidden states whose answers are known."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_subjects
from tiny_subjects import Embedding, word_vector

from prelm_jax.errors import InputError
from prelm_jax.study import probes
from prelm_jax.study.annotations import Tree
from prelm_jax.study.base import Settings
from prelm_jax.study.probes import SentenceProbe, ShiftProbe, WordProbe
from prelm_jax.study.tests import make_test
from prelm_jax.study.treebank import SENTENCES, TREEBANK, read_treebank
from prelm_jax.study.vectors import States, embed

pytest.importorskip("sklearn")

TAGS = ("NOUN", "VERB", "ADJ", "X")
WORDS = [f"w{i}" for i in range(30)]
# The tag of a word that is its own in three of four cases; otherwise any.
OWN = {word: TAGS[i % 3] for i, word in enumerate(WORDS)}


def write_treebank(folder: Path, seed: int = 0) -> Path:
    """Chains of words with random tags."""
    rng = np.random.default_rng(seed)
    for split, number in (("train", 150), ("dev", 40), ("test", 80)):
        lines = []
        for _ in range(number):
            for i in range(rng.integers(5, 12)):
                word = WORDS[rng.integers(len(WORDS))]
                tag = OWN[word] if rng.random() < 0.75 else TAGS[rng.integers(4)]
                lines.append(f"{i + 1}\t{word}\t_\t{tag}\t_\t_\t{i}\t{'dep' if i else 'root'}\t_\t_")
            lines.append("")
        (folder / f"tiny-{split}.conllu").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def treebank(tmp_path):
    folder = tmp_path / TREEBANK
    folder.mkdir()
    return write_treebank(folder)


def subject_of_tags(treebank: Path) -> Embedding:
    """Layer 0 knows the word, layer 1 the tags of the treebank, layer 2 nothing."""
    trees = [tree for part in read_treebank(treebank).values() for tree in part]
    tags_of = {" ".join(tree.words): [TAGS.index(tag) for tag in tree.tags] for tree in trees}
    rng = np.random.default_rng(1)

    def states(words):
        own = np.stack([word_vector(word) for word in words])
        tags = np.eye(16)[tags_of[" ".join(words)]] + 0.1 * rng.normal(size=own.shape)
        return np.stack([own, tags, rng.normal(size=own.shape)])

    return Embedding(states, 3)


def test_upos(treebank):
    test = WordProbe("upos", treebank)
    rows = list(test.measure(subject_of_tags(treebank)))
    lines = tiny_subjects.lines(rows)
    number = sum(len(tree.words) for tree in read_treebank(treebank)["test"])
    assert all(len(lines[kind, layer]) == number for kind in ("", "control") for layer in range(3))
    means = {line: np.mean(values) for line, values in lines.items()}
    # Three of four words have their own tag, and a fourth of the others by chance; three standard errors.
    expected, tolerance = 0.75 + 0.25 / 4, 3 * np.sqrt(0.81 * 0.19 / number)
    assert means["majority", None] == pytest.approx(expected, abs=tolerance)
    assert means["", 0] == pytest.approx(means["majority", None], abs=0.05)
    assert means["", 1] == means["dev", 1] == 1
    assert means["", 2] < 0.45  # The most frequent tag has 31 %.
    # Labels by heart: easy where each word has a vector of its own, impossible where it is noise.
    assert means["control", 0] > 0.8 and means["control", 2] < 0.5
    assert means["control", 1] < 0.6  # The tags say little of the word.
    assert len({(row.item, row.kind, row.layer) for row in rows}) == len(rows)
    assert {row.group for row in rows if not row.kind} == {str(i) for i in range(80)}


def test_majority_is_that_of_each_word(treebank):
    """Against counting by hand, on the parts that the probe reads."""
    parts = read_treebank(treebank)
    count = Counter((word, tag) for tree in parts["train"] for word, tag in zip(tree.words, tree.tags, strict=True))
    right = []
    for tree in parts["test"]:
        for word, tag in zip(tree.words, tree.tags, strict=True):
            best = max(count[word, each] for each in TAGS)
            right.append(count[word, tag] == best)
    rows = WordProbe("upos", treebank).measure(subject_of_tags(treebank))
    found = [row.value for row in rows if row.kind == "majority"]
    assert np.mean(found) == pytest.approx(np.mean(right), abs=0.01)  # Words with two most frequent tags.


def test_control_labels():
    types = [f"type{i}" for i in range(4000)]
    labels = np.array(["a"] * 70 + ["b"] * 20 + ["c"] * 10)
    drawn = probes.control_labels([*types, *types[::-1]], labels)
    assert drawn == probes.control_labels(types, labels)
    shares = [Counter(drawn.values())[label] / 4000 for label in "abc"]
    np.testing.assert_allclose(shares, [0.7, 0.2, 0.1], atol=0.03)


def test_one_label_is_an_error(tmp_path):
    for split in SENTENCES:
        (tmp_path / f"x-{split}.conllu").write_text("1\tw\t_\tX\t_\t_\t0\troot\t_\t_\n\n")
    with pytest.raises(InputError, match="upos needs two labels"):
        list(WordProbe("upos", tmp_path).measure(tiny_subjects.static()))


def test_treebank_without_a_part(tmp_path):
    (tmp_path / "x-train.conllu").write_text("1\tw\t_\tX\t_\t_\t0\troot\t_\t_\n\n")
    with pytest.raises(InputError, match=r"dev\.conllu"):
        read_treebank(tmp_path)


def tree(*words: tuple[str, str, int, str, str]) -> Tree:
    """Of (word, tag, head from 1, relation, features)."""
    form, tags, heads, relations, features = zip(*words, strict=True)
    parsed = [dict(each.split("=") for each in text.split("|") if each) for text in features]
    return Tree(list(form), list(tags), [head - 1 for head in heads], list(relations), parsed)


CATS = tree(
    ("Old", "ADJ", 2, "amod", ""),
    ("cats", "NOUN", 3, "nsubj", "Number=Plur"),
    ("chased", "VERB", 0, "root", "VerbForm=Fin|Number=Plur|Tense=Past"),
    ("a", "DET", 5, "det", ""),
    ("mouse", "NOUN", 3, "obj", "Number=Sing"),
    ("sleeping", "VERB", 5, "acl", "VerbForm=Ger"),
    (".", "PUNCT", 3, "punct", ""),
)


def test_labels():
    labels = {name: label(CATS) for name, label in probes.SENTENCE_LABELS.items()}
    assert labels == {
        "length": "0",
        "depth": "2",
        "tense": "Past",
        "subject-number": "Plur",
        "object-number": "Sing",
    }
    assert probes.WORD_LABELS["verb-number"](CATS) == [None, None, "Plur", None, None, None, None]
    assert probes.WORD_LABELS["deprel"](CATS)[:3] == ["amod", "nsubj", "root"]
    noun = CATS._replace(tags=["ADJ", "NOUN", "NOUN", *CATS.tags[3:]])
    assert probes.SENTENCE_LABELS["tense"](noun) is None and probes.SENTENCE_LABELS["subject-number"](noun) is None
    two = CATS._replace(relations=["nsubj", "nsubj", *CATS.relations[2:]], heads=[2, *CATS.heads[1:]])
    assert probes.SENTENCE_LABELS["subject-number"](two) == "Plur"  # An adjective is no second noun.


@pytest.mark.parametrize(("length", "label"), [(5, 0), (8, 0), (9, 1), (12, 1), (13, 2), (20, 3), (21, 4), (26, 5)])
def test_lengths_are_those_of_senteval(length, label):
    words = [("w", "X", i, "dep", "") for i in range(length)]
    assert probes.SENTENCE_LABELS["length"](tree(*words)) == str(label)


def test_sentences_of_other_lengths_are_left_out():
    trees = [tree(*(("w", "X", i, "dep", "") for i in range(length))) for length in (4, 5, 28, 29)]
    examples = probes.sentence_examples(trees, "aaaa")
    assert examples.rows.tolist() == [1, 2] and examples.items == ["1", "2"]


def test_length_is_read_from_means(treebank):
    """A subject whose words know the length of their sentence, in layer 1."""

    def states(words):
        own = np.stack([word_vector(word) for word in words])
        return np.stack([own, 0.1 * own + np.eye(16)[min(15, len(words))]])

    lines = tiny_subjects.lines(SentenceProbe("length", treebank).measure(Embedding(states, 2)))
    assert np.mean(lines["", 1]) == 1 > np.mean(lines["", 0])
    assert ("control", 0) not in lines
    train, test = (read_treebank(treebank)[split] for split in ("train", "test"))
    common = Counter(len(tree.words) > 8 for tree in train).most_common(1)[0][0]
    assert np.mean(lines["majority", None]) == np.mean([(len(tree.words) > 8) == common for tree in test])


def test_shifts(treebank):
    """Half of the sentences have two neighbors exchanged, the label says which."""
    trees = read_treebank(treebank)["train"]
    examples = ShiftProbe("bigram-shift", treebank).examples("train")
    sentences = probes.shifted(trees)
    assert Counter(examples.labels.tolist())["shifted"] == pytest.approx(75, abs=25)
    for row, label in zip(examples.rows, examples.labels, strict=True):
        different = [i for i, (a, b) in enumerate(zip(trees[row].words, sentences[row], strict=True)) if a != b]
        assert sorted(trees[row].words) == sorted(sentences[row])
        if label == "kept":
            assert not different
        elif different:  # Two neighbors may be the same word.
            assert different[1:] == [different[0] + 1]


def test_shift_is_read_from_the_shifted_sentences(treebank):
    """A subject whose words know whether their sentence is in the treebank."""
    known = {" ".join(tree.words) for part in read_treebank(treebank).values() for tree in part}
    subject = Embedding(lambda words: np.full((1, len(words), 2), float(" ".join(words) in known)), 1)
    lines = tiny_subjects.lines(ShiftProbe("bigram-shift", treebank).measure(subject))
    assert np.mean(lines["", 0]) > 0.95  # Not 1: neighbors may be the same word.


def test_means_of_sentences():
    sentences = [["a", "b", "c"], ["b"], ["c", "a"]]
    states = embed(tiny_subjects.static(), sentences)
    expected = [np.mean([word_vector(word) for word in words], 0) for words in sentences]
    np.testing.assert_allclose(states.means(0, np.array([2, 0])), [expected[2], expected[0]], atol=2e-3)
    np.testing.assert_allclose(states.layer(0, np.array([3])), [word_vector("b")], atol=2e-3)
    assert isinstance(states, States) and states.vectors_LWD.dtype == np.float16


def test_embeddings_are_shared_between_tests(treebank):
    """By tests of one subject; another one is embedded again."""
    asked = []

    def states(words):
        asked.append(words)
        return np.stack([word_vector(word) for word in words])[None]

    subject = Embedding(states, 1)
    for name in ("upos", "length"):
        list(make_test(name, Settings(treebank.parent)).measure(subject))
    assert len(asked) == 270
    list(make_test("upos", Settings(treebank.parent)).measure(Embedding(states, 1, "another")))
    assert len(asked) == 540


def test_same_rows_each_time(treebank):
    subject = tiny_subjects.contextual()
    first, second = (list(WordProbe("upos", treebank).measure(subject)) for _ in range(2))
    assert first == second
