"""A pretrained BERT: embed, fill and score against plain computations with transformers."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
import transformers
from model_directories import change, grow_vocabulary

from prelm_jax.errors import InputError
from prelm_jax.formats import huggingface_bert
from prelm_jax.inference import batching
from prelm_jax.inference.bert import BertPretrained
from prelm_jax.tokenizers.bpe import BPE

TOLERANCE = 2e-5
TEXTS = ["the cat sat on the mat.", "", "unable cats", "a", " \t ", "cat! " * 9, "the mat sat, zing?"]


def load(directory):
    return BertPretrained(huggingface_bert.read(directory))


@pytest.fixture(scope="module")
def model(bert_directory):
    return load(bert_directory)


@pytest.fixture(scope="module")
def tokenizer(bert_directory):
    return transformers.AutoTokenizer.from_pretrained(bert_directory)


@pytest.fixture
def copy(bert_directory, tmp_path):
    """A directory to spoil."""
    return shutil.copytree(bert_directory, tmp_path / "copy")


def logits(bert_reference, ids, positions=slice(None)):
    return bert_reference(input_ids=torch.tensor([ids])).prediction_logits.detach().numpy()[0, positions]


def test_embed_equals_transformers(model, bert_reference, tokenizer):
    results = list(model.embed(TEXTS))
    assert len(results) == len(TEXTS)
    for text, (tokens, hidden) in zip(TEXTS, results, strict=True):
        assert hidden.dtype == np.float32
        if not text.strip():
            assert tokens == []
            assert hidden.shape == (3, 0, 32)
            continue
        ids = tokenizer(text)["input_ids"]
        assert tokens == tokenizer.convert_ids_to_tokens(ids)
        states = bert_reference.bert(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        np.testing.assert_allclose(hidden, torch.cat(states).detach(), atol=TOLERANCE, rtol=0)


def test_embed_does_not_depend_on_other_texts(model, monkeypatch):
    monkeypatch.setattr(batching, "TOKENS_PER_WINDOW", 30)
    many = list(model.embed(TEXTS * 3))
    assert len(many) == 3 * len(TEXTS)
    for i, text in enumerate(TEXTS * 3):
        ((tokens, hidden),) = model.embed([text])
        assert many[i][0] == tokens
        np.testing.assert_allclose(many[i][1], hidden, atol=1e-6, rtol=0)


def test_embed_runs_full_batches(model, monkeypatch):
    monkeypatch.setattr(batching, "CPU_TOKENS_PER_BATCH", 48)  # Rows: 4 of 8, 2 of 16 and 24.
    few, many = list(model.embed(TEXTS)), list(model.embed(TEXTS * 4))
    for i, (tokens, hidden) in enumerate(many):
        assert tokens == few[i % len(TEXTS)][0]
        np.testing.assert_allclose(hidden, few[i % len(TEXTS)][1], atol=1e-6, rtol=0)


def test_long_texts_are_refused_or_cut(model):
    texts = ["a", "a " * 22, "a " * 23]
    with pytest.raises(InputError, match="line 3 has 23 tokens, but the model takes 22"):
        list(model.embed(texts))
    (_, (whole, states), (cut, cut_states)) = model.embed(texts, truncate=True)
    assert cut == whole
    np.testing.assert_array_equal(states, cut_states)
    with pytest.raises(InputError, match="line 3 has 23 tokens"):
        next(model.score(texts))
    with pytest.raises(InputError, match="23 tokens, but the model takes 22"):
        model.fill("a " * 22 + "[MASK]")


@pytest.mark.parametrize("text", ["The [MASK] sat on the mat.", "[MASK] cat[MASK]", "[MASK]"])
def test_fill_equals_transformers(text, model, bert_directory, tokenizer):
    pipeline = transformers.pipeline("fill-mask", model=str(bert_directory), tokenizer=tokenizer, device="cpu", top_k=7)
    expected = pipeline(text)
    expected = expected if isinstance(expected[0], list) else [expected]
    found = model.fill(text, top_k=7)
    assert len(found) == len(expected) == text.count("[MASK]")
    for ours, theirs in zip(found, expected, strict=True):
        assert [token for token, _ in ours] == [model.tokenizer.tokens[candidate["token"]] for candidate in theirs]
        np.testing.assert_allclose([p for _, p in ours], [candidate["score"] for candidate in theirs], atol=1e-5)


def test_fill_needs_a_mask(model):
    with pytest.raises(InputError, match=r"no \"\[MASK\]\" in the text"):
        model.fill("the cat")


def test_fill_gives_no_ids_past_the_tokenizer(copy):
    grow_vocabulary(copy)
    model = load(copy)
    (filled,) = model.fill("the [MASK]", top_k=10**6)
    assert len(filled) == model.tokenizer.vocab_size == 45
    assert sum(probability for _, probability in filled) < 0.999


def test_score_equals_transformers(model, bert_reference, tokenizer):
    found = list(model.score(TEXTS))
    assert len(found) == len(TEXTS)
    for text, (total, count) in zip(TEXTS, found, strict=True):
        ids = tokenizer(text)["input_ids"]
        expected = 0.0
        for position in range(1, len(ids) - 1):
            masked = [*ids[:position], tokenizer.mask_token_id, *ids[position + 1 :]]
            row = torch.tensor(logits(bert_reference, masked, position), dtype=torch.float64)
            expected += row.log_softmax(-1)[ids[position]].item()
        assert count == len(ids) - 2
        assert abs(total - expected) < TOLERANCE * max(1, count)


def test_score_sentences_masks_the_rest_of_a_word(model, bert_reference, tokenizer):
    texts = [*TEXTS, "unables sating, unable"]  # un ##able ##s
    expected, differ = [], 0
    for text in texts:
        encoded = tokenizer(text)
        ids, words = encoded["input_ids"], encoded.word_ids()
        expected.append(0.0)
        for position in range(1, len(ids) - 1):
            rest = [i for i in range(position, len(ids)) if words[i] == words[position]]
            masked = [tokenizer.mask_token_id if i in rest else id for i, id in enumerate(ids)]
            row = torch.tensor(logits(bert_reference, masked, position), dtype=torch.float64)
            expected[-1] += row.log_softmax(-1)[ids[position]].item()
            differ += len(rest) > 1
    assert differ == 7
    found = list(model.score_sentences(texts))
    for score, total in zip(found, expected, strict=True):
        assert abs(score.total - total) < TOLERANCE * max(1, score.tokens)
    assert [score.tokens for score in found] == [len(tokenizer(text)["input_ids"]) - 2 for text in texts]
    assert [score.unknown for score in model.score_sentences(["the Ω cat", "ω β", "cat"])] == [1, 2, 0]


def test_score_sentences_gives_the_same_bits_in_any_company(model, monkeypatch):
    alone = [next(model.score_sentences([text])) for text in TEXTS]
    assert list(model.score_sentences(TEXTS * 30)) == alone * 30
    assert list(model.score_sentences(["a cat"] * 7 + TEXTS))[7:] == alone


def mean_of_pieces(states_LTD, words, pieces_of, first):
    """[L, words, D]."""
    parts, begin = [], first
    for word in words:
        end = begin + len(pieces_of(word))
        parts.append(states_LTD[:, begin:end].mean(1))
        begin = end
    return np.stack(parts, 1)


def test_embed_words_equals_transformers(model, bert_reference, tokenizer):
    sentences = [["The", "unables", "cat-mat", "sat"], [], ["​", "a"], ["cat"]]
    found = list(model.embed_words(sentences))
    assert [states.shape for states in found] == [(3, len(words), 32) for words in sentences]
    for words, ours in ((sentences[0], found[0]), (sentences[3], found[3])):
        ids = torch.tensor([tokenizer(" ".join(words))["input_ids"]])
        theirs = np.concatenate(
            [x.detach().numpy() for x in bert_reference.bert(ids, output_hidden_states=True).hidden_states]
        )
        expected = mean_of_pieces(theirs, words, tokenizer.tokenize, 1)
        np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)
    (unknown,) = model.embed_words([["Ω", "a"]])  # A word without any piece is read as an unknown one.
    np.testing.assert_allclose(found[2], unknown, atol=1e-6, rtol=0)


def test_embed_words_reads_a_long_sentence_in_parts(model):
    words = ["the", "unable"] * 9  # 27 pieces, room for 22.
    (whole,) = model.embed_words([words])
    first, second = model.embed_words([words[:15], words[15:]])  # 22 pieces.
    np.testing.assert_allclose(whole, np.concatenate([first, second], 1), atol=1e-6, rtol=0)
    ((long,), (cut,)) = ([*model.embed_words([["a" * n]])] for n in (30, 22))
    np.testing.assert_allclose(long, cut, atol=1e-6, rtol=0)


def test_without_a_masked_lm_head_only_embed_works(copy, model):
    change(copy, lambda name: None if name.startswith("cls.") else name)
    loaded = load(copy)
    for use in (lambda: loaded.fill("[MASK]"), lambda: list(loaded.score(["a"]))):
        with pytest.raises(InputError, match=r"masked_lm_"):
            use()
    ((_, ours),), ((_, theirs),) = loaded.embed(["the cat"]), model.embed(["the cat"])
    np.testing.assert_array_equal(ours, theirs)


def test_a_vocabulary_without_the_special_tokens_is_refused(model):
    with pytest.raises(InputError, match=r"\[CLS\].*\[SEP\].*\[MASK\]"):
        BertPretrained(dataclasses.replace(model.loaded, tokenizer=BPE(["<unk>", "a</w>"], [])))
