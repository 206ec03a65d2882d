"""GPT directories to and from transformers, and embed, score and generate against plain computations with it."""

import dataclasses
import json
import math
import shutil
import tarfile

import jax
import numpy as np
import pytest
import torch
import transformers
from model_directories import assert_params_equal, change, configure, randomize
from safetensors.numpy import load_file

from prelm_jax.errors import InputError
from prelm_jax.formats.huggingface_gpt import GPTModel, restrict, tensor_name
from prelm_jax.formats.model import abstract_params, initial_params, load, save
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.tokenizers.bpe import BPE
from prelm_jax.training.parameters import path_name

TOLERANCE = 2e-5
LETTERS = "abcdefghijklmnopqrstuvwxy.,"  # No z.
MERGES = ["t h", "th e</w>", "c a", "ca t</w>", "s a", "sa t</w>", "o n</w>", "m a", "ma t</w>"]
TOKENS = ["<unk>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), *(merge.replace(" ", "") for merge in MERGES)]
TEXTS = ["the cat sat on the mat.", "", "on", "a b", " \t ", "Cat, " * 9, "the mat sat zing"]
SIZES = {"vocab_size": len(TOKENS), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}


def save_vocabulary(directory):
    """As transformers 4 left it beside a model."""
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))


@pytest.fixture(scope="module")
def ids_of(tmp_path_factory):
    """Ids of a text by transformers' own tokenizer."""
    directory = tmp_path_factory.mktemp("vocabulary")
    save_vocabulary(directory)
    tokenizer = transformers.OpenAIGPTTokenizer.from_pretrained(directory)
    return lambda text: tokenizer.encode(text)


@pytest.fixture(scope="module")
def reference():
    """transformers' OpenAIGPTLMHeadModel; do not change it."""
    return randomize(transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**SIZES)))


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory):
    directory = tmp_path_factory.mktemp("reference")
    reference.save_pretrained(directory)
    save_vocabulary(directory)
    return load(directory)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "model"
    save(model, directory, "# A model\n")
    return directory


@pytest.fixture
def copy(exported, tmp_path):
    """A directory to spoil."""
    return shutil.copytree(exported, tmp_path / "copy")


# Reading


def test_the_table_of_names_is_that_of_transformers():
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(GPTConfig(9)))]
    names = [tensor_name(path) for path in paths]
    with torch.device("meta"):
        theirs = transformers.OpenAIGPTModel(transformers.OpenAIGPTConfig(vocab_size=9)).state_dict()
    assert set(names) == set(theirs)
    assert len(names) == len(theirs) + 4 * 12  # Query, key and value are one there.
    assert len(theirs) == 2 + 12 * 12


CLASSES = [
    "OpenAIGPTModel",
    "OpenAIGPTLMHeadModel",
    "OpenAIGPTDoubleHeadsModel",
    "OpenAIGPTForSequenceClassification",
]


@pytest.mark.parametrize("architecture", CLASSES)
def test_directories_of_transformers_load(architecture, reference, model, tmp_path):
    other = getattr(transformers, architecture)(transformers.OpenAIGPTConfig(**SIZES))
    getattr(other, "transformer", other).load_state_dict(reference.transformer.state_dict())
    other.save_pretrained(tmp_path)
    save_vocabulary(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is GPTModel
    assert dataclasses.asdict(loaded.config) == dataclasses.asdict(model.config)
    assert loaded.missing == frozenset()
    assert_params_equal(loaded.params, model.params)


def test_old_files_load(model, copy):
    # Files of long ago hold the masks of attention, and a configuration with words of its own.
    masks = {f"transformer.h.{i}.attn.bias": np.tri(24, dtype=np.float32)[None, None] for i in range(2)}
    words = load_file(copy / "model.safetensors")["transformer.tokens_embed.weight"]
    change(copy, **masks, **{"lm_head.weight": words})
    configure(copy, n_ctx=24, n_special=0, predict_special_tokens=True)
    assert_params_equal(load(copy).params, model.params)


def original(directory, state, pieces=3):
    """Writes a state dict in the authors' format, in an order of our own reading of their train.py."""
    save_vocabulary(directory)
    arrays = [state["positions_embed.weight"], state["tokens_embed.weight"]]
    for layer in range(2):
        for module in ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2"):
            weight = state[f"h.{layer}.{module}.weight"]
            arrays += [weight[None] if weight.ndim == 2 else weight, state[f"h.{layer}.{module}.bias"]]
    arrays = [array.numpy() for array in arrays]
    (directory / "params_shapes.json").write_text(json.dumps([array.shape for array in arrays]))
    for i, piece in enumerate(np.array_split(np.concatenate([array.ravel() for array in arrays]), pieces)):
        np.save(directory / f"params_{i}.npy", piece)


def test_the_authors_format_loads(reference, model, tmp_path):
    original(tmp_path, reference.transformer.state_dict(), pieces=11)  # "params_10" sorts before "params_2".
    with pytest.raises(InputError, match="the number of heads is not in this format"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"n_head": 4}')
    loaded = load(tmp_path)
    assert loaded.config == model.config
    assert_params_equal(loaded.params, model.params)


def test_the_authors_heads_are_64_wide(tmp_path, ids_of):
    config = transformers.OpenAIGPTConfig(vocab_size=len(TOKENS), n_embd=128, n_layer=2, n_head=2, n_positions=8)
    reference = randomize(transformers.OpenAIGPTModel(config))
    original(tmp_path, reference.state_dict())
    ((_, hidden),) = load(tmp_path).embed(["the cat sat"])
    expected = reference(input_ids=torch.tensor([ids_of("the cat sat")])).last_hidden_state[0].detach()
    np.testing.assert_allclose(hidden[-1], expected, atol=TOLERANCE, rtol=0)
    (tmp_path / "params_2.npy").write_bytes((tmp_path / "params_2.npy").read_bytes()[:200])
    with pytest.raises(InputError, match=r"params_\*.npy cannot be read as arrays"):
        load(tmp_path)
    (tmp_path / "params_2.npy").unlink()
    with pytest.raises(InputError, match=r"\d+ numbers in 2 files params_\*.npy, but the shapes in .* ask for \d+"):
        load(tmp_path)
    (tmp_path / "params_shapes.json").write_text("[[1, 2]]")
    with pytest.raises(InputError, match="1 arrays; a GPT has 2 and 12 a layer"):
        load(tmp_path)


def test_a_published_toy_in_the_authors_format_loads(real_data, tmp_path):
    with tarfile.open(real_data / "fixtures/allennlp-openai-transformer/transformer_small.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    directory = tmp_path / "model"
    letters = {token: i for i, token in enumerate(["<unk>", *LETTERS[:24], *(f"{c}</w>" for c in LETTERS[:24])])}
    (directory / "vocab.json").write_text(json.dumps(letters))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    (directory / "config.json").write_text('{"n_head": 2}')  # As its users' configuration says.
    loaded = load(directory)
    values = np.concatenate([np.load(directory / f"params_{i}.npy") for i in range(2)])
    np.testing.assert_array_equal(loaded.params["position_embeddings"]["embedding"], values[:500].reshape(50, 10))
    np.testing.assert_array_equal(loaded.params["token_embeddings"]["embedding"][:50], values[500:1000].reshape(50, 10))
    ((_, hidden),) = loaded.embed(["the cat sat"])
    assert hidden.shape == (3, 9, 10)
    assert np.isfinite(hidden).all()
    np.testing.assert_array_equal(loaded.params["decoder"]["layer_1"]["layer_norm"]["bias"], values[-10:])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"afn": "gelu_new"}, "afn is 'gelu_new'; only 'gelu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"vocab_size": 7}, "the tokenizer has 64 entries, but vocab_size in config.json is 7"),
        ({"vocab_size": 65}, r"tokens_embed.weight is \[64, 32\], but config.json asks for \[65, 32\]"),
        ({"n_positions": 25}, r"positions_embed.weight is \[24, 32\]"),
        ({"n_layer": 3}, r"no tensor h.2.attn.c_attn.\w+ \[.*96\]"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported: bert, openai-gpt"),
    ],
)
def test_what_this_gpt_does_not_do_is_refused(settings, complaint, copy):
    configure(copy, **settings)
    with pytest.raises(InputError, match=complaint):
        load(copy)


def test_an_untied_head_is_refused(copy):
    change(copy, **{"lm_head.weight": np.zeros((len(TOKENS), 32), np.float32)})
    with pytest.raises(InputError, match=r"lm_head.weight differs from tokens_embed.weight"):
        load(copy)


# Writing


@pytest.mark.parametrize("architecture", CLASSES)
def test_every_class_of_transformers_loads_an_export(architecture, reference, exported):
    cls = getattr(transformers, architecture)
    again, report = cls.from_pretrained(exported, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    own_heads = {"multiple_choice_head.summary.weight", "multiple_choice_head.summary.bias", "score.weight"}
    assert set(report["missing_keys"]) <= own_heads
    assert again.dtype == torch.float32
    state = getattr(again, "transformer", again).state_dict()
    for name, value in reference.transformer.state_dict().items():
        assert torch.equal(state[name], value), name
    if hasattr(again, "lm_head"):
        assert torch.equal(again.lm_head.weight, reference.transformer.tokens_embed.weight)


def test_an_export_classifies_batches(exported):
    classifier = transformers.OpenAIGPTForSequenceClassification.from_pretrained(exported)
    assert classifier(input_ids=torch.tensor([[3, 4, 0], [5, 6, 7]])).logits.shape == (2, 2)


def test_a_config_is_written_as_transformers_understands_it(reference, exported):
    settings = json.loads((exported / "config.json").read_text())
    assert settings.pop("dtype") == "float32"
    theirs = reference.config.to_dict() | {"architectures": ["OpenAIGPTLMHeadModel"], "pad_token_id": 0}
    assert settings.items() <= theirs.items()
    assert settings["afn"] == "gelu"
    assert transformers.OpenAIGPTConfig(**settings).to_dict() == theirs | {"dtype": None}


def test_export_load_export_gives_the_same_bytes(exported, tmp_path):
    save(load(exported), tmp_path, "# A model\n")
    files = sorted(file.name for file in exported.iterdir())
    tokenizer = ["merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert files == sorted(["README.md", "config.json", "model.safetensors", *tokenizer])
    assert files == sorted(file.name for file in tmp_path.iterdir())
    for name in files:
        assert (exported / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_the_file_is_that_of_transformers(reference, exported, tmp_path):
    reference.save_pretrained(tmp_path)
    theirs, ours = load_file(tmp_path / "model.safetensors"), load_file(exported / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


# Going on from a model


def test_going_on_with_a_longer_vocabulary(model):
    old, new = len(TOKENS), 150  # Past one multiple of 128.
    config = dataclasses.replace(model.config, vocab_size=new, embedding_dropout=0.0)
    fresh = jax.tree.map(lambda leaf: jax.numpy.full(leaf.shape, 9.0), abstract_params(config))
    tokenizer = BPE([*TOKENS, *(f"new{i}" for i in range(new - old))], model.tokenizer.merges)
    params = initial_params(model, config, fresh, tokenizer)
    table = params.pop("token_embeddings")["embedding"]
    loaded = dict(model.params)
    np.testing.assert_array_equal(table[:old], loaded.pop("token_embeddings")["embedding"][:old])
    np.testing.assert_array_equal(table[old:], 9.0)
    assert_params_equal(params, loaded)


# Using


def test_embed_equals_transformers(model, reference, ids_of):
    results = list(model.embed(TEXTS))
    assert len(results) == len(TEXTS)
    for text, (tokens, hidden) in zip(TEXTS, results, strict=True):
        assert hidden.dtype == np.float32
        ids = ids_of(text)
        assert tokens == [TOKENS[i] for i in ids]
        if not ids:
            assert hidden.shape == (3, 0, 32)
            continue
        states = reference.transformer(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        np.testing.assert_allclose(hidden, torch.cat(states).detach(), atol=TOLERANCE, rtol=0)


def test_score_equals_transformers(model, reference, ids_of):
    found = model.score(TEXTS)
    assert len(found) == len(TEXTS)
    for text, (total, count) in zip(TEXTS, found, strict=True):
        ids = ids_of(text)
        assert count == max(0, len(ids) - 1)
        if count == 0:
            assert total == 0
            continue
        logits = reference(input_ids=torch.tensor([ids])).logits[0].detach().double()
        expected = sum(logits[i].log_softmax(-1)[ids[i + 1]].item() for i in range(count))
        assert abs(total - expected) < TOLERANCE * count


def test_long_texts_are_refused_or_cut(model):
    texts = ["a", "a " * 24, "a " * 25]
    with pytest.raises(InputError, match="line 3 has 25 tokens, but the model takes 24"):
        list(model.embed(texts))
    (_, (whole, states), (cut, cut_states)) = model.embed(texts, truncate=True)
    assert cut == whole
    np.testing.assert_array_equal(states, cut_states)
    with pytest.raises(InputError, match="line 3 has 25 tokens"):
        model.score(texts)


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
    """One of transformers' whose greedy texts are not one word again and again, and the same as ours."""
    theirs = randomize(transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**SIZES)))
    with torch.no_grad():
        theirs.transformer.h[-1].ln_2.bias.zero_()
        theirs.transformer.positions_embed.weight.mul_(3)
        for block in theirs.transformer.h:
            block.attn.c_attn.weight.mul_(3)
    directory = tmp_path_factory.mktemp("talkative")
    theirs.save_pretrained(directory)
    save_vocabulary(directory)
    return theirs, load(directory)


def greedy(reference, ids, count):
    """The likeliest token after the last 24, again and again, all computed afresh each time."""
    ids = list(ids)
    for _ in range(count):
        ids.append(reference(input_ids=torch.tensor([ids[-24:]])).logits[0, -1].argmax().item())
    return ids


@pytest.mark.parametrize(
    "prompt", ["the", "the cat sat on", "a " * 17, "b " * 24, "c , " * 20], ids=["1", "4", "17", "24", "40"]
)
def test_greedy_generation_equals_transformers_without_a_cache(prompt, talkative, ids_of):
    """Token for token, through the window of 24 and past it."""
    reference, model = talkative
    expected = greedy(reference, ids_of(prompt), 40)
    assert len(set(expected[-40:])) > 4
    assert model.generate(prompt, 40, temperature=0) == model.tokenizer.decode(expected)


def test_a_token_costs_the_same_wherever_it_stands(model, monkeypatch):
    """As long as the window is not full, each token after the prompt is one row of one token through the model."""
    from prelm_jax.formats import huggingface_gpt

    shapes, compute = [], huggingface_gpt._next_logits

    def count(gpt, params, cache, tokens, length):
        shapes.append(tokens.shape)
        return compute(gpt, params, cache, tokens, length)

    monkeypatch.setattr(huggingface_gpt, "_next_logits", count)
    model.generate("the cat", 30)
    assert shapes == [(1, 16), *[(1, 1)] * 22, *[(1, 24)] * 7]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, 1.0), (0.7, None, 1.0), (1.0, 5, 1.0), (1.0, None, 0.6), (1.5, 10, 0.8), (0.2, 1, 1.0), (1, 3, 1e-9)],
)
def test_the_restriction_is_that_of_transformers(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32) * 2
    warpers = [transformers.TemperatureLogitsWarper(float(temperature))]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = torch.tensor(logits)[None]
    for warper in warpers:
        expected = warper(None, expected)
    found = jax.nn.softmax(restrict(logits, temperature, top_k or 50, top_p))
    np.testing.assert_allclose(found, expected[0].softmax(-1), atol=1e-6)


def test_sampling_follows_the_distribution(model, reference, ids_of):
    draws = [model.generate("the cat", 1, top_k=3, seed=seed).removeprefix("the cat") for seed in range(300)]
    probabilities = reference(input_ids=torch.tensor([ids_of("the cat")])).logits[0, -1].softmax(-1)
    top = probabilities.topk(3)
    expected = (top.values / top.values.sum()).tolist()
    texts = [model.tokenizer.decode([*ids_of("the cat"), index]).removeprefix("the cat") for index in top.indices]
    for text, probability in zip(texts, expected, strict=True):
        deviation = math.sqrt(probability * (1 - probability) / 300)
        assert abs(draws.count(text) / 300 - probability) < 4 * deviation
    assert set(draws) <= set(texts)


def test_a_seed_is_a_text(model):
    texts = [model.generate("the", 20, temperature=1.3, top_p=0.95, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith(model.generate("the", 10, temperature=1.3, top_p=0.95, seed=0))
    assert model.generate("the cat", 0) == "the cat"


def test_entries_without_a_name_are_never_drawn(copy, monkeypatch):
    words = load_file(copy / "model.safetensors")["transformer.tokens_embed.weight"]
    change(copy, **{"transformer.tokens_embed.weight": np.concatenate([words, 100 * words])})
    configure(copy, vocab_size=2 * len(TOKENS))
    monkeypatch.setattr(BPE, "decode", lambda self, ids: ids)
    ids = load(copy).generate("the", 30, temperature=5.0)
    assert len(ids) == 31 and max(ids) < len(TOKENS)


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
def test_generation_from_nothing_or_out_of_range_is_refused(prompt, options, complaint, model):
    with pytest.raises(InputError, match=complaint):
        model.generate(prompt, **options)
