"""Chinese words in the ids of a store: which tokens continue a word."""

import lzma
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.corpus.sentences import split
from prelm_jax.corpus.store import Store
from prelm_jax.data import segmentation
from prelm_jax.data.segmentation import continuations
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.wordpiece import WordPiece

rjieba = pytest.importorskip("rjieba")

TOKENS = ["[UNK]", "。", "love", "##ly", "、", *"我们来到北京清华大学自然语言处理中国人民"]


def store_of(documents: list[list[list[str]]], tokens=TOKENS) -> Store:
    return Store.from_documents([[[tokens.index(t) for t in s] for s in document] for document in documents])


def test_by_hand():
    """Words end at sentence boundaries, at unknown characters and at anything that is not an ideograph."""
    first = [["我", "们", "来", "到", "北", "京", "清", "华", "大", "学", "。"], ["自", "然"]]
    second, third = [["语", "言", "[UNK]"]], [["中", "国", "love", "##ly", "人"], ["民"]]
    store = store_of([first, second, third])
    expected = [0, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0]
    found = continuations(store, TOKENS)
    assert found.dtype == bool and found.astype(int).tolist() == expected


sentence = st.lists(st.sampled_from(TOKENS), min_size=1, max_size=9)


@settings(deadline=None)
@given(
    documents=st.lists(st.lists(sentence, min_size=1, max_size=4), min_size=1, max_size=4), at_once=st.integers(1, 9)
)
def test_sentences_are_cut_separately(documents, at_once):
    """For any number of tokens at once, as if each sequence of ideographs were cut alone."""
    expected = []
    for tokens in (sentence for document in documents for sentence in document):
        text = "".join(token if token in TOKENS[5:] else "\n" for token in tokens)
        for word in rjieba.cut(text):
            expected += [False] + [True] * (len(word) - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "TOKENS_AT_ONCE", at_once)
        parts = list(segmentation._parts(store_of(documents), TOKENS, rjieba.cut))
    assert np.concatenate(parts).tolist() == expected


def test_results_are_cached_by_store_and_vocabulary(monkeypatch, tmp_path):
    monkeypatch.setenv("PRELM_CACHE", str(tmp_path))
    store = store_of([[["北", "京"]]])
    first = continuations(store, TOKENS).tolist()
    assert continuations(store, [*TOKENS[:-4], *TOKENS[-1:-5:-1]]).tolist() == first
    assert len(list((tmp_path / "continuations").glob("[!.]*"))) == 2 * 2  # With its checksum.

    def fail(*arguments):
        raise AssertionError("cut again")

    monkeypatch.setattr(rjieba, "cut", fail)
    assert continuations(store, TOKENS).tolist() == first == [False, True]
    with pytest.raises(AssertionError):
        continuations(store_of([[["清", "华"]]]), TOKENS)
    assert len(list((tmp_path / "continuations").glob("[!.]*"))) == 2 * 2, "an incomplete file was kept"


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rjieba", None)
    with pytest.raises(InputError, match=r'pip install "prelm_jax\[chinese\]"'):
        continuations(store_of([[["北"]]]), TOKENS)


def test_words_of_real_text(real_data):
    """As many as jieba finds in the text itself, but for the few characters outside of the vocabulary."""
    tokenizer = WordPiece.from_vocab(real_data / "vocab/bert-base-chinese-vocab.txt")
    with lzma.open(real_data / "pretrain/zhwiki.txt.xz", "rt", encoding="utf-8") as file:
        sentences = split(file.read(100_000), "library")
    store = Store.from_documents([tokenizer.encode_batch(sentences)])
    assert sum(len(token) > 1 for token in tokenizer.decode(store.ids).split()) < 0.1 * store.num_tokens
    words = [word for text in sentences for word in rjieba.cut(text) if "一" <= word[0] <= "鿿"]
    expected = sum(map(len, words)) - len(words)
    assert abs(continuations(store, tokenizer.tokens).sum() - expected) < 0.01 * expected
