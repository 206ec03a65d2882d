"""A pretrained GPT: embed, score and generate against plain computations with transformers."""

import math
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from model_directories import GPT_SIZES, GPT_TOKENS, change, configure, randomize, save_gpt_vocabulary
from safetensors.numpy import load_file

from prelm_jax.errors import InputError
from prelm_jax.formats import huggingface_gpt
from prelm_jax.inference import gpt
from prelm_jax.inference.gpt import GPTPretrained, restrict
from prelm_jax.tokenizers.bpe import BPE

TOLERANCE = 2e-5
TEXTS = ["the cat sat on the mat.", "", "on", "a b", " \t ", "Cat, " * 9, "the mat sat zing"]


def load(directory):
    return GPTPretrained(huggingface_gpt.read(directory))


@pytest.fixture(scope="module")
def model(gpt_directory):
    return load(gpt_directory)


@pytest.fixture
def copy(gpt_directory, tmp_path):
    """A directory to spoil."""
    return shutil.copytree(gpt_directory, tmp_path / "copy")


def test_embed_equals_transformers(model, gpt_reference, gpt_ids_of):
    results = list(model.embed(TEXTS))
    assert len(results) == len(TEXTS)
    for text, (tokens, hidden) in zip(TEXTS, results, strict=True):
        assert hidden.dtype == np.float32
        ids = gpt_ids_of(text)
        assert tokens == [GPT_TOKENS[i] for i in ids]
        if not ids:
            assert hidden.shape == (3, 0, 32)
            continue
        states = gpt_reference.transformer(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        np.testing.assert_allclose(hidden, torch.cat(states).detach(), atol=TOLERANCE, rtol=0)


def test_score_equals_transformers(model, gpt_reference, gpt_ids_of):
    found = list(model.score(TEXTS))
    assert len(found) == len(TEXTS)
    for text, (total, count) in zip(TEXTS, found, strict=True):
        ids = gpt_ids_of(text)
        assert count == max(0, len(ids) - 1)
        if count == 0:
            assert total == 0
            continue
        logits = gpt_reference(input_ids=torch.tensor([ids])).logits[0].detach().double()
        expected = sum(logits[i].log_softmax(-1)[ids[i + 1]].item() for i in range(count))
        assert abs(total - expected) < TOLERANCE * count


def test_score_sentences_begins_after_a_sentence_end(model, gpt_reference, gpt_ids_of):
    found = list(model.score_sentences(TEXTS))
    for text, score in zip(TEXTS, found, strict=True):
        before, ids = gpt_ids_of("."), gpt_ids_of(text)
        logits = gpt_reference(input_ids=torch.tensor([[*before, *ids]])).logits[0].detach().double()
        expected = sum(logits[i].log_softmax(-1)[id].item() for i, id in enumerate(ids))
        assert score.tokens == len(ids) and score.unknown == sum(GPT_TOKENS[id] == "<unk>" for id in ids)
        assert abs(score.total - expected) < TOLERANCE * max(1, len(ids))
    assert found[-1].unknown > 0
    assert [score.tokens for score in model.score_sentences(["a " * 23])] == [23]
    with pytest.raises(InputError, match="line 1 has 24 tokens, but the model takes 23"):
        next(model.score_sentences(["a " * 24]))


def test_score_sentences_gives_the_same_bits_in_any_company(model):
    alone = [next(model.score_sentences([text])) for text in TEXTS]
    assert list(model.score_sentences(TEXTS * 30)) == alone * 30
    assert list(model.score_sentences(["a b"] * 7 + TEXTS))[7:] == alone


def test_embed_words_are_the_means_of_their_pieces(model):
    words = ["the", "dog,", "sat"]
    ((tokens, states),) = model.embed([" ".join(words)])
    assert tokens == ["the</w>", "d", "o", "g</w>", ",</w>", "sat</w>"]
    (found,) = model.embed_words([words])
    expected = np.stack([states[:, 0], states[:, 1:5].mean(1), states[:, 5]], 1)
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_long_texts_are_refused_or_cut(model):
    texts = ["a", "a " * 24, "a " * 25]
    with pytest.raises(InputError, match="line 3 has 25 tokens, but the model takes 24"):
        list(model.embed(texts))
    (_, (whole, states), (cut, cut_states)) = model.embed(texts, truncate=True)
    assert cut == whole
    np.testing.assert_array_equal(states, cut_states)
    with pytest.raises(InputError, match="line 3 has 25 tokens"):
        next(model.score(texts))


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
    """A random GPT of transformers whose greedy texts vary, and the same model as ours."""
    theirs = randomize(transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**GPT_SIZES)))
    with torch.no_grad():
        theirs.transformer.h[-1].ln_2.bias.zero_()
        theirs.transformer.positions_embed.weight.mul_(3)
        for block in theirs.transformer.h:
            block.attn.c_attn.weight.mul_(3)
    directory = tmp_path_factory.mktemp("talkative")
    theirs.save_pretrained(directory)
    save_gpt_vocabulary(directory)
    return theirs, load(directory)


def greedy(gpt_reference, ids, count):
    """Appends the most probable token after the last 24 tokens, `count` times, without a cache."""
    ids = list(ids)
    for _ in range(count):
        ids.append(gpt_reference(input_ids=torch.tensor([ids[-24:]])).logits[0, -1].argmax().item())
    return ids


@pytest.mark.parametrize(
    "prompt", ["the", "the cat sat on", "a " * 17, "b " * 24, "c , " * 20], ids=["1", "4", "17", "24", "40"]
)
def test_greedy_generation_equals_transformers_without_a_cache(prompt, talkative, gpt_ids_of):
    """Token for token, through the window of 24 and past it."""
    gpt_reference, model = talkative
    expected = greedy(gpt_reference, gpt_ids_of(prompt), 40)
    assert len(set(expected[-40:])) > 4
    assert model.generate(prompt, 40, temperature=0) == model.tokenizer.decode(expected)


def test_a_token_costs_one_row_at_any_position(model, monkeypatch):
    """Until the window is full, each token after the prompt is computed as one row of one token."""
    shapes, compute = [], gpt._next_logits

    def count(config, params, cache, tokens, length):
        shapes.append(tokens.shape)
        return compute(config, params, cache, tokens, length)

    monkeypatch.setattr(gpt, "_next_logits", count)
    model.generate("the cat", 30)
    assert shapes == [(1, 8), *[(1, 1)] * 22, *[(1, 24)] * 7]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, 1.0), (0.7, None, 1.0), (1.0, 5, 1.0), (1.0, None, 0.6), (1.5, 10, 0.8), (0.2, 1, 1.0), (1, 3, 1e-9)],
)
def test_restrict_equals_transformers(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32) * 2
    warpers = [transformers.TemperatureLogitsWarper(float(temperature))]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = torch.tensor(logits)[None]
    for warper in warpers:
        expected = warper(None, expected)
    found = jax.nn.softmax(restrict(logits, temperature, top_k or 50, top_p))
    np.testing.assert_allclose(found, expected[0].softmax(-1), atol=1e-6)


def test_sampling_follows_the_distribution(model, gpt_reference, gpt_ids_of):
    draws = [model.generate("the cat", 1, top_k=3, seed=seed).removeprefix("the cat") for seed in range(300)]
    probabilities = gpt_reference(input_ids=torch.tensor([gpt_ids_of("the cat")])).logits[0, -1].softmax(-1)
    top = probabilities.topk(3)
    expected = (top.values / top.values.sum()).tolist()
    texts = [model.tokenizer.decode([*gpt_ids_of("the cat"), index]).removeprefix("the cat") for index in top.indices]
    for text, probability in zip(texts, expected, strict=True):
        deviation = math.sqrt(probability * (1 - probability) / 300)
        assert abs(draws.count(text) / 300 - probability) < 4 * deviation
    assert set(draws) <= set(texts)


def test_the_same_seed_gives_the_same_text(model):
    texts = [model.generate("the", 20, temperature=1.3, top_p=0.95, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith(model.generate("the", 10, temperature=1.3, top_p=0.95, seed=0))
    assert model.generate("the cat", 0) == "the cat"


def test_ids_past_the_tokenizer_are_never_drawn(copy, monkeypatch):
    words = load_file(copy / "model.safetensors")["transformer.tokens_embed.weight"]
    change(copy, **{"transformer.tokens_embed.weight": np.concatenate([words, 100 * words])})
    configure(copy, vocab_size=2 * len(GPT_TOKENS))
    monkeypatch.setattr(BPE, "decode", lambda self, ids: ids)
    ids = load(copy).generate("the", 30, temperature=5.0)
    assert len(ids) == 31 and max(ids) < len(GPT_TOKENS)


@pytest.mark.parametrize(
    ("prompt", "options", "complaint"),
    [
        (" ", {}, "the prompt is blank"),
        ("a", {"temperature": -1}, "temperature -1 is out of range"),
        ("a", {"top_k": 0}, "top_k 0 is out of range"),
        ("a", {"top_p": 0}, "top_p 0 is out of range"),
        ("a", {"top_p": 1.5}, "top_p 1.5 is out of range"),
        ("a", {"max_tokens": -1}, "max_tokens -1 is out of range"),
    ],
)
def test_generate_refuses_a_blank_prompt_and_options_out_of_range(prompt, options, complaint, model):
    with pytest.raises(InputError, match=complaint):
        model.generate(prompt, **options)
