"""Readers of annotated text and word pairs."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelm_jax.errors import InputError
from prelm_jax.study import annotations
from prelm_jax.study.annotations import Span, Tree


def conllu(*rows: tuple[str, str, str, int, str]) -> str:
    """A sentence of (form, tag, features, head, relation)."""
    lines = (
        f"{i}\t{form}\t_\t{tag}\t_\t{features}\t{head}\t{relation}\t_\t_"
        for i, (form, tag, features, head, relation) in enumerate(rows, 1)
    )
    return "# text\n" + "\n".join(lines) + "\n\n"


CAT = conllu(
    ("The", "DET", "_", 2, "det"),
    ("cats", "NOUN", "Number=Plur", 3, "nsubj:pass"),
    ("sleep", "VERB", "Mood=Ind|Tense=Pres", 0, "root"),
    (".", "PUNCT", "_", 3, "punct"),
)


def test_trees(write):
    (tree,) = annotations.read_trees(Path(write("a.conllu", CAT)))
    assert tree.words == ["The", "cats", "sleep", "."] and tree.tags[1] == "NOUN"
    assert tree.heads == [1, 2, -1, 2] and tree.root == 2
    assert tree.relations == ["det", "nsubj", "root", "punct"]
    assert tree.features[2] == {"Mood": "Ind", "Tense": "Pres"} and tree.features[0] == {}
    assert tree.distances().tolist() == [[0, 1, 2, 3], [1, 0, 1, 2], [2, 1, 0, 1], [3, 2, 1, 0]]


@given(st.lists(st.integers(0, 1000), min_size=0, max_size=14), st.randoms())
def test_distances_are_shortest_paths(draws, random):
    """Against the algorithm of Floyd and Warshall, on random trees with their words in random order."""
    number = len(draws) + 1
    order = list(range(number))
    random.shuffle(order)
    heads = [-1] * number
    for i, draw in enumerate(draws, 1):
        heads[order[i]] = order[draw % i]
    paths = np.full((number, number), 1000)
    np.fill_diagonal(paths, 0)
    for word, head in enumerate(heads):
        if head >= 0:
            paths[word, head] = paths[head, word] = 1
    for k in range(number):
        paths = np.minimum(paths, paths[:, k : k + 1] + paths[k : k + 1])
    tree = Tree([""] * number, [""] * number, heads, [""] * number, [{}] * number)
    np.testing.assert_array_equal(tree.distances(), paths)


@pytest.mark.parametrize(
    ("heads", "named"),
    [((2, 1, 0), "circle"), ((0, 4, 1), "head"), ((0, 0, 1), "2 roots"), ((2, 3, 1), "circle"), ((0, "_", 1), "head")],
)
def test_no_tree(write, heads, named):
    path = write("a.conllu", CAT + conllu(*(("w", "X", "_", head, "dep") for head in heads)))
    with pytest.raises(InputError, match=named) as error:
        annotations.read_trees(Path(path))
    assert f"{path}:8" in str(error.value)


def test_missing_column(write):
    path = write("a.conllu", CAT + "1\tword\t_\n\n")
    with pytest.raises(InputError, match=f"{path}:7.*3 columns"):
        annotations.read_trees(Path(path))


SEMCOR = """<contextfile concordance=brown>
<s snum=1>
<wf cmd=ignore pos=DT>The</wf>
<wf cmd=done rdf=group pos=NNP lemma=group wnsn=1 lexsn=1:03:00:: pn=group>Fulton_County</wf>
<wf cmd=done pos=NN lemma=primary_election wnsn=2;1 lexsn=1:04:00::;1:04:01::>primary_elections</wf>
<wf cmd=done pos=JJ lemma=overall wnsn=2 lexsn=5:00:00:gross:00>over-all</wf>
<wf cmd=done pos=RB ot=notag>in</wf>
<wf cmd=done pos=VB lemma=say wnsn=0 lexsn=2:32:00::>said</wf>
<punc>.</punc>
</s>
<s snum=2>
<wf cmd=done pos=JJ lemma=new wnsn=1 lexsn=3:00:00::>New</wf>
<punc>_</punc>
</s>
"""


def test_semcor(write):
    first, second = annotations.read_semcor(Path(write("brown1.sgml", SEMCOR)))
    assert first.words == ["The", "Fulton", "County", "primary", "elections", "over-all", "in", "said", "."]
    assert first.spans == (Span(3, 5, "primary_election.n", "1:04:00::"), Span(5, 6, "overall.a", "5:00:00:gross:00"))
    assert second.words == ["New", "_"] and second.spans == (Span(0, 1, "new.a", "3:00:00::"),)
    with pytest.raises(InputError, match=r"text\.txt"):
        annotations.read_semcor(Path(write("text.txt", "no markup\n")))


def test_coarse_senses(write):
    path = Path(write("bank.train.tsv", "bank_river\t2\tby the bank .\n"))
    (sentence,) = annotations.read_coarse_senses(path)
    assert sentence == (["by", "the", "bank", "."], (Span(2, 3, "bank", "bank_river"),))
    for line, named in (("bank_river\t4\tby the bank .\n", "4 is not"), ("bank_river\tby the bank\n", "2 columns")):
        path = Path(write("bank.train.tsv", line))
        with pytest.raises(InputError, match=f"{path}:1.*{named}"):
            annotations.read_coarse_senses(path)


def test_wic(tmp_path):
    folder = tmp_path / "dev"
    folder.mkdir()
    (folder / "dev.data.txt").write_text("groom\tV\t0-1\tGroom the dogs .\tSheila groomed the horse .\n")
    (folder / "dev.gold.txt").write_text("T\n")
    (pair,) = annotations.read_wic(tmp_path, "dev")
    assert pair.first == (["Groom", "the", "dogs", "."], 0) and pair.second[1] == 1
    assert (pair.target, pair.gold) == ("groom", "T")
    (folder / "dev.gold.txt").write_text("")
    with pytest.raises(InputError, match=r"dev\.gold\.txt has 0 lines"):
        annotations.read_wic(tmp_path, "dev")
    (folder / "dev.data.txt").write_text("groom\tV\t0\tGroom the dogs .\tSheila groomed the horse .\n")
    with pytest.raises(InputError, match=r"dev\.data\.txt:1"):
        annotations.read_wic(tmp_path, "dev")


def test_scws(write):
    line = "1\tBrazil\tn\tnut\tn\tin <b> Brazil </b> the\ta <b> Brazil nut </b>\t1.5\t1.0\n"
    (pair,) = annotations.read_scws(Path(write("ratings.tsv", line)))
    assert pair.first == (["in", "Brazil", "the"], 1) and pair.second == (["a", "Brazil", "nut"], 1)
    assert (pair.target, float(pair.gold)) == ("Brazil nut", 1.5)
    with pytest.raises(InputError, match=r"ratings\.tsv:1.*<b>"):
        annotations.read_scws(Path(write("ratings.tsv", line.replace("<b> Brazil </b>", "Brazil"))))


def test_word_pairs(write):
    path = Path(write("pairs.tsv", "word1\tword2\tSimLex\nold\tnew\t1.58\n\ntiger\tcat\t7\textra\n"))
    assert annotations.read_word_pairs(path) == [("old", "new", 1.58), ("tiger", "cat", 7.0)]
    for text, named in (
        ("a\tb\t1\nc\td\n", ":2 has 2 columns"),
        ("a\tb\t1\nc\td\tx\n", ":2.*x"),
        ("a\tb\t1\n", "1 pair"),
    ):
        path = Path(write("pairs.tsv", text))
        with pytest.raises(InputError, match=f"{path}.*{named}" if named[0] != ":" else f"{path}{named}"):
            annotations.read_word_pairs(path)


def test_analogies(write):
    path = Path(write("questions.txt", ": capitals\nAthens Greece Oslo Norway\n: family\nboy girl son daughter\n"))
    capitals, family = annotations.read_analogies(path)
    assert capitals == ("capitals", ("Athens", "Greece", "Oslo", "Norway")) and family[0] == "family"
    path = Path(write("questions.txt", ": capitals\nAthens Greece Oslo\n"))
    with pytest.raises(InputError, match=f"{path}:2 has 3 words"):
        annotations.read_analogies(path)


def test_crop():
    words = list("abcdefgh")
    assert annotations.crop(words, 4, 5, 2) == (["c", "d", "e", "f", "g"], 2)
    assert annotations.crop(words, 0, 2, 1) == (["a", "b", "c"], 0)
    assert annotations.crop(words, 7, 8, 100) == (words, 7)


def test_folder(tmp_path):
    (tmp_path / "tasks" / "wic").mkdir(parents=True)
    (tmp_path / "study" / "scws").mkdir(parents=True)
    assert annotations.folder(tmp_path, "wic") == tmp_path / "tasks" / "wic"
    assert annotations.folder(tmp_path / "study", "wic") == tmp_path / "study/../tasks/wic".replace("study/../", "")
    assert annotations.folder(tmp_path / "study", "scws") == tmp_path / "study" / "scws"
    with pytest.raises(InputError, match="semcor"):
        annotations.folder(tmp_path, "semcor")


def test_fingerprint_is_of_the_content(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    a.write_text("1"), b.write_text("1"), c.write_text("2")
    assert annotations.fingerprint([a]) == annotations.fingerprint([b]) != annotations.fingerprint([c])


@pytest.mark.slow
def test_real_files(real_data):
    """The sizes that their READMEs state."""
    treebank = real_data / "tasks" / "ud-en-ewt"
    trees = annotations.read_trees(treebank / "en_ewt-ud-dev.conllu")
    assert (len(trees), sum(len(tree.words) for tree in trees)) == (2001, 25147)
    assert len(annotations.read_semcor(real_data / "study" / "semcor" / "brown2.sgml.xz")) == 8956
    assert [len(annotations.read_wic(real_data / "tasks" / "wic", split)) for split in ("dev", "test")] == [638, 1400]
    assert len(annotations.read_scws(real_data / "study" / "scws" / "ratings.tsv.xz")) == 1335
    assert len(annotations.read_word_pairs(real_data / "study" / "wordsim" / "EN-SIMLEX-999.txt")) == 999
    assert len(annotations.read_analogies(real_data / "study" / "analogies" / "questions-words.txt")) == 19544
    for path in annotations.matching(real_data / "study" / "coarsewsd20", "*.tsv.xz"):
        for sentence in annotations.read_coarse_senses(path):
            assert sentence.words[sentence.spans[0].begin].startswith(sentence.spans[0].lemma[:3])
