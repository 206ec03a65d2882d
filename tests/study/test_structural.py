"""The structural probe: trees by hand, spanning trees and correlations of scipy, and states that hold their tree."""

import numpy as np
import pytest
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.stats import spearmanr
from tiny_subjects import Embedding, lines

from prelm_jax.study import structural
from prelm_jax.study.annotations import Tree
from prelm_jax.study.base import Settings
from prelm_jax.study.tests import make_test
from prelm_jax.study.treebank import TREEBANK, read_treebank

# "She , they say , left ." with say as the root.
WORDS = ["She", ",", "they", "say", ",", "left", "."]
TAGS = ["PRON", "PUNCT", "PRON", "VERB", "PUNCT", "VERB", "PUNCT"]
SENTENCE = Tree(WORDS, TAGS, [5, 3, 3, -1, 3, 3, 3], ["x"] * 7, [{}] * 7)


def test_uuas_by_hand():
    """Of She-left, they-say, left-say the tree below has the last two."""
    points = {"She": 0.0, "they": 1.0, "say": 2.0, "left": 3.5, ",": 0.1, ".": 2.2}
    x = np.array([points[word] for word in WORDS])
    # Without punctuation the chain She - they - say - left.
    found = structural.edges_found(SENTENCE, np.abs(x[:, None] - x[None]))
    assert found == {(0, 5): False, (2, 3): True, (5, 3): True}


def test_gold_distances_find_all_edges():
    assert all(structural.edges_found(SENTENCE, SENTENCE.distances()).values())
    assert structural.distance_correlation(SENTENCE.distances(), SENTENCE.distances()) == pytest.approx(1)


def test_punctuation_alone_has_no_edges():
    assert structural.edges_found(Tree(["."], ["PUNCT"], [-1], ["root"], [{}]), np.zeros((1, 1))) == {}


@pytest.mark.parametrize("seed", range(5))
def test_spanning_tree_is_that_of_scipy(seed):
    rng = np.random.default_rng(seed)
    distances = rng.uniform(1, 2, (12, 12))
    distances = distances + distances.T
    np.fill_diagonal(distances, 0)
    expected = {(min(a, b), max(a, b)) for a, b in zip(*minimum_spanning_tree(distances).nonzero(), strict=True)}
    assert structural.spanning_tree(distances) == expected


def test_spanning_tree_of_equal_distances():
    assert structural.spanning_tree(np.ones((4, 4))) == {(0, 1), (0, 2), (0, 3)}


def test_correlation_is_that_of_scipy():
    rng = np.random.default_rng(0)
    gold, found = rng.integers(0, 5, (9, 9)), rng.normal(size=(9, 9))
    expected = np.mean([spearmanr(a, b).statistic for a, b in zip(gold, found, strict=True)])
    assert structural.distance_correlation(gold, found) == pytest.approx(expected)
    assert structural.distance_correlation(gold, np.ones((9, 9))) == 0


def test_squared_distances():
    rng = np.random.default_rng(0)
    states, matrix = rng.normal(size=(2, 5, 6)).astype(np.float32), rng.normal(size=(6, 3)).astype(np.float32)
    found = structural.squared_distances(matrix, states)
    for b, i, j in np.ndindex(2, 5, 5):
        assert found[b, i, j] == pytest.approx(
            ((states[b, i] - states[b, j]) @ matrix) @ ((states[b, i] - states[b, j]) @ matrix), abs=1e-3
        )


def test_batches():
    """Padded to a multiple of ten, shorter sentences first, and rows of length 0 at the end."""
    sentences = [(np.full((length, 2), length), np.full((length, length), length)) for length in (12, 3, *[5] * 19)]
    first, second = structural.make_batches(sentences)
    assert first.states_BTD.shape == (20, 10, 2) and second.distances_BTT.shape == (20, 20, 20)
    assert first.lengths_B.tolist() == [3, *[5] * 19] and second.lengths_B.tolist() == [12, *[0] * 19]
    assert second.states_BTD[0].sum() == 12 * 12 * 2 and first.distances_BTT[0].sum() == 27


def write_trees(folder, seed=0):
    """Sentences of 5 to 9 words; the name of a word is its path to the root, and so are its states."""
    rng = np.random.default_rng(seed)
    for split, number in (("train", 120), ("dev", 20), ("test", 20)):
        text = []
        for _ in range(number):
            length = int(rng.integers(5, 10))
            order, paths, heads = rng.permutation(length), {}, {}
            paths[order[0]], heads[order[0]] = str(order[0]), 0
            for i in range(1, length):
                head = order[rng.integers(i)]
                heads[order[i]], paths[order[i]] = head + 1, f"{paths[head]}-{order[i]}"
            text += [f"{i + 1}\t{paths[i]}\t_\tX\t_\t_\t{heads[i]}\tdep\t_\t_" for i in range(length)] + [""]
        (folder / f"tiny-{split}.conllu").write_text("\n".join(text) + "\n")


def tree_states(words):
    """Layer 0: noise that depends on the word; layer 1: a one for each word on the path to the root, mixed."""
    mixing = np.linalg.qr(np.random.default_rng(0).normal(size=(10, 10)))[0]
    own = np.zeros((len(words), 10))
    for row, word in zip(own, words, strict=True):
        row[list(map(int, word.split("-")))] = 1
    noise = np.random.default_rng(len(words)).normal(size=own.shape)
    return np.stack([noise, own @ mixing])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    (data / TREEBANK).mkdir()
    write_trees(data / TREEBANK)
    return data


@pytest.fixture(scope="module")
def rows(data):
    subject = Embedding(tree_states, 2)
    return {name: list(make_test(name, Settings(data)).measure(subject)) for name in ("uuas", "dspr")}


def test_states_that_hold_the_tree(rows):
    """A linear map recovers the trees of layer 1 and not those of layer 0; the chain of the words is no tree either."""
    edges, correlations = (
        {line: np.mean(values) for line, values in lines(rows[name]).items()} for name in ("uuas", "dspr")
    )
    assert edges["", 1] > 0.9 and edges["dev", 1] > 0.9 and correlations["", 1] > 0.9
    assert edges["", 0] < 0.5 and edges["linear", None] < 0.5 and correlations["", 0] < 0.5


def test_items(rows):
    for each in rows.values():
        assert len({(row.item, row.kind, row.layer) for row in each}) == len(each)
    assert {row.group for row in rows["dspr"]} == set("56789")
    assert {row.group for row in rows["uuas"]} == {str(i) for i in range(20)}


def test_linear_order(data, rows):
    """Against counting words whose head is a neighbor."""
    trees = read_treebank(data / TREEBANK)["test"]
    edges = [abs(word - head) == 1 for tree in trees for word, head in enumerate(tree.heads) if head >= 0]
    assert np.mean(lines(rows["uuas"])["linear", None]) == np.mean(edges)
