"""The initial parameters of a run that continues a loaded model."""

import dataclasses

import jax
import numpy as np
import pytest
from model_directories import ELMO_WORDS, GPT_TOKENS, assert_params_equal

from prelm_jax.errors import InputError
from prelm_jax.formats import bilm, huggingface_bert, huggingface_gpt
from prelm_jax.formats.base import abstract_params
from prelm_jax.formats.transfer import initial_params, positions_note
from prelm_jax.tokenizers.bpe import BPE
from prelm_jax.tokenizers.wordpiece import WordPiece
from prelm_jax.tokenizers.words import WordVocabulary
from prelm_jax.training.parameters import path_name


@pytest.fixture(scope="module")
def bert(bert_directory):
    return huggingface_bert.read(bert_directory)


@pytest.fixture(scope="module")
def elmo(elmo_directory):
    return bilm.read(elmo_directory)


# BERT


def fresh(config):
    """Parameters that differ from each other and from the loaded ones."""
    return jax.tree.map(
        lambda leaf: 100.0 + np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape), abstract_params(config)
    )


def test_a_longer_vocabulary_keeps_its_new_rows_fresh(bert):
    old, new = bert.tokenizer.vocab_size, 150  # Past one multiple of 128.
    tokenizer = WordPiece([*bert.tokenizer.tokens, *(f"new{i}" for i in range(new - old))])
    config = dataclasses.replace(bert.config, vocab_size=new, hidden_dropout=0.0)
    loaded = dataclasses.replace(bert, missing=frozenset({"pooler/kernel", "next_sentence/bias"}))
    start = fresh(config)
    params = initial_params(loaded, huggingface_bert.FORMAT, config, jax.tree.map(jax.numpy.asarray, start), tokenizer)
    for (path, value), new_value, old_value in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(start), jax.tree.leaves(bert.params), strict=True
    ):
        name = path_name(path)
        if name in loaded.missing:
            np.testing.assert_array_equal(value, new_value)
        elif name in ("word_embeddings/embedding", "masked_lm_bias"):
            np.testing.assert_array_equal(value[:old], old_value[:old])
            np.testing.assert_array_equal(value[old:], new_value[old:])
        else:
            np.testing.assert_array_equal(value, old_value)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"hidden_size": 64}, "hidden_size is 32 in the model, but 64 in the run"),
        ({"num_layers": 3}, "num_layers is 2 in the model, but 3 in the run"),
        ({"num_heads": 2}, "num_heads is 4 in the model, but 2 in the run"),
        ({"type_vocab_size": 1}, "type_vocab_size is 2 in the model, but 1 in the run"),
    ],
)
def test_other_sizes_are_refused(changed, complaint, bert):
    config = dataclasses.replace(bert.config, **changed)
    with pytest.raises(InputError, match=complaint):
        initial_params(bert, huggingface_bert.FORMAT, config, {}, bert.tokenizer)


def test_another_vocabulary_is_refused(bert):
    tokens = list(bert.tokenizer.tokens)
    swapped = [*tokens[:10], tokens[11], tokens[10], *tokens[12:]]
    with pytest.raises(
        InputError, match=f"token 10 of the vocabulary is '{tokens[10]}' in the model, but '{tokens[11]}'"
    ):
        initial_params(bert, huggingface_bert.FORMAT, bert.config, {}, WordPiece(swapped))
    with pytest.raises(InputError, match="token 44 of the vocabulary is '##t' in the model, but nothing in the run"):
        initial_params(bert, huggingface_bert.FORMAT, bert.config, {}, WordPiece(tokens[:-1]))


def test_another_family_is_refused(bert, elmo):
    with pytest.raises(InputError, match=r"--init-from: .*bert.*elmo"):
        initial_params(bert, huggingface_bert.FORMAT, elmo.config, {}, bert.tokenizer)


# GPT


def test_a_longer_vocabulary_of_gpt_keeps_its_new_rows_fresh(gpt_directory):
    model = huggingface_gpt.read(gpt_directory)
    old, new = len(GPT_TOKENS), 150  # Past one multiple of 128.
    config = dataclasses.replace(model.config, vocab_size=new, embedding_dropout=0.0)
    fresh = jax.tree.map(lambda leaf: jax.numpy.full(leaf.shape, 9.0), abstract_params(config))
    tokenizer = BPE([*GPT_TOKENS, *(f"new{i}" for i in range(new - old))], model.tokenizer.merges)
    params = initial_params(model, huggingface_gpt.FORMAT, config, fresh, tokenizer)
    table = params.pop("token_embeddings")["embedding"]
    loaded = dict(model.params)
    np.testing.assert_array_equal(table[:old], loaded.pop("token_embeddings")["embedding"][:old])
    np.testing.assert_array_equal(table[old:], 9.0)
    assert_params_equal(params, loaded)


@pytest.mark.parametrize("family", ["bert", "gpt"])
@pytest.mark.parametrize(
    ("positions", "note"),
    [(48, "has 24 positions; positions 24 to 47 start fresh"), (10, "24 positions, the first 10 are taken")],
)
def test_more_or_fewer_positions(family, positions, note, request):
    """The first ones are copied; all else is as in the model."""
    format = {"bert": huggingface_bert, "gpt": huggingface_gpt}[family]
    model = format.read(request.getfixturevalue(f"{family}_directory"))
    config = dataclasses.replace(model.config, max_position_embeddings=positions)
    new = jax.tree.map(lambda leaf: jax.numpy.full(leaf.shape, 9.0), abstract_params(config))
    params = initial_params(model, format.FORMAT, config, new, model.tokenizer)
    loaded = dict(model.params)
    table, old = params.pop("position_embeddings")["embedding"], loaded.pop("position_embeddings")["embedding"]
    assert table.shape == (positions, 32)
    np.testing.assert_array_equal(table[:24], old[:positions])
    np.testing.assert_array_equal(table[24:], 9.0)
    assert_params_equal(params, loaded, but=format.FORMAT.vocabulary_tables)  # Padded with fresh rows.
    assert note in (positions_note(model.config, config) or "")
    assert positions_note(model.config, model.config) is None


# ELMo


def continued(model, words):
    config = dataclasses.replace(model.config, vocab_size=len(words), dropout=0.5)
    fresh = jax.tree.map(lambda x: 9.0 + jax.numpy.zeros(x.shape), abstract_params(config))
    return initial_params(model, bilm.FORMAT, config, fresh, WordVocabulary(words))


def test_a_published_elmo_continues_with_a_fresh_softmax(elmo):
    params = continued(elmo, ["<S>", "</S>", "<UNK>", *(f"new{i}" for i in range(200))])
    assert params["softmax"]["embedding"].shape == (256, 8)
    for leaf in jax.tree.leaves(params.pop("softmax")):
        np.testing.assert_array_equal(leaf, 9.0)
    expected = {name: value for name, value in elmo.params.items() if name != "softmax"}
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_words_keep_their_softmax_rows_at_any_position(elmo_with_softmax):
    params = continued(elmo_with_softmax, ["</S>", "<S>", "<UNK>", "dog", "cat", "the", "bird"])
    for name in ("embedding", "bias"):
        new, old = np.asarray(params["softmax"][name]), np.asarray(elmo_with_softmax.params["softmax"][name])
        np.testing.assert_array_equal(new[[0, 1, 2, 4, 5]], old[[1, 0, 2, 5, 3]])
        np.testing.assert_array_equal(new[[3, 6]], 9.0)
        np.testing.assert_array_equal(new[7:], 9.0)


def test_another_clip_of_elmo_is_refused(elmo):
    config = dataclasses.replace(elmo.config, cell_clip=3.0)
    with pytest.raises(InputError, match=r"cell_clip is 0.75 in the model, but 3.0 in the run"):
        initial_params(elmo, bilm.FORMAT, config, {}, WordVocabulary(ELMO_WORDS))
