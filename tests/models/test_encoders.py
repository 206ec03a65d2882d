"""Encoders without pretraining heads: parameter trees, exported programs, and the embeddings that ELECTRA shares."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax import export
from model_directories import randomize

from prelm_jax.formats.base import abstract_params
from prelm_jax.models.bert import BertConfig, BertEmbeddings, BertEncoder, MaskedLMHead
from prelm_jax.models.elmo import DIRECTIONS, ELMoConfig
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.training.parameters import matches, path_name

SIZES = {"vocab_size": 37, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 16}
CONFIGS = {
    "bert": BertConfig(**SIZES, intermediate_size=48),
    "gpt": GPTConfig(**SIZES),
    "elmo": ELMoConfig(37, 4, ((1, 4), (2, 8), (7, 12)), num_highways=2, projection_size=8, hidden_size=16),
}
HEADS = {"bert": ("pooler/", "masked_lm_", "next_sentence/"), "gpt": (), "elmo": ("softmax/",)}
TOLERANCE = 2e-5


def make_batch(family, rows, length, words=6, characters=12):
    """Random tokens, the last of every row but the first being padding."""
    rng = np.random.default_rng(rows)
    segments = np.ones((rows, length), np.int32)
    segments[1:, -1] = 0
    if family == "elmo":
        spelled = rng.integers(0, 256, (words, characters), np.int32)
        spelled[:, 0], spelled[:, -2:] = 258, (259, 260)
        return {
            "characters": spelled,
            "words": rng.integers(0, words, (rows, length), np.int32),
            "segments": segments,
        }
    batch = {
        "tokens": rng.integers(0, 37, (rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segments": segments,
    }
    return batch | ({"token_types": rng.integers(0, 2, (rows, length), np.int32)} if family == "bert" else {})


@partial(jax.jit, static_argnums=0)
def hidden_states(config, params, batch):
    with jax.default_matmul_precision("highest"):
        return config.encoder().apply({"params": params}, batch, method="hidden_states")


def paths(tree):
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.fixture(scope="module", params=CONFIGS)
def family(request):
    """(name, configuration, random parameters)."""
    config, rng = CONFIGS[request.param], np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), abstract_params(config)
    )
    return request.param, config, params


def test_an_encoder_runs_on_a_tree_without_heads(family):
    name, config, params = family
    encoder_only = {key: value for key, value in params.items() if not f"{key}/".startswith(HEADS[name])}
    assert (len(encoder_only) < len(params)) == bool(HEADS[name])
    batch = make_batch(name, 3, 5)
    states = hidden_states(config, encoder_only, batch)
    width = 2 * config.projection_size if name == "elmo" else config.hidden_size
    assert [state.shape for state in states] == [(3, 5, width)] * (config.num_layers + 1)
    jax.tree.map(np.testing.assert_array_equal, states, hidden_states(config, params, batch))
    created = jax.eval_shape(lambda: config.encoder().init(jax.random.key(0), batch, method="hidden_states"))
    assert jax.tree.map(jnp.shape, created["params"]) == jax.tree.map(jnp.shape, encoder_only)


def test_elmo_repeats_the_word_and_reads_both_directions():
    config, rng = CONFIGS["elmo"], np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), abstract_params(config))
    batch, variables, encoder = make_batch("elmo", 3, 5), {"params": params}, config.encoder()
    first, *rest = hidden_states(config, params, batch)

    @jax.jit
    def read(variables, batch):
        words = encoder.apply(variables, batch["characters"], method="encode")[batch["words"]]
        carry = config.build().init_carry(3)
        return words, encoder.apply(variables, words, np.array([5, 4, 4]), carry, method="apply_layers")[0]

    with jax.default_matmul_precision("highest"):
        words, outputs = read(variables, batch)
    real = batch["segments"] != 0
    np.testing.assert_allclose(first[real], np.concatenate([words, words], -1)[real], atol=TOLERANCE, rtol=0)
    for layer, state in enumerate(rest):
        expected = np.concatenate([outputs[d][layer] for d in DIRECTIONS], -1)
        np.testing.assert_allclose(state, expected, atol=TOLERANCE, rtol=0)
    assert all((np.asarray(state)[~real] == 0).all() for state in (first, *rest))


def test_an_exported_encoder_takes_any_shape(family):
    """Rows, length and, in ELMo, distinct words and their length are symbolic; the last is bounded.

    A word's padding stops at 50 characters, so its length c is symbolic only up to 50 minus the widest filter. On a TPU
    the attention kernel needs a static length: there, a symbolic one takes the plain code path.
    """
    name, config, params = family
    b, t, u, c = export.symbolic_shape("b, t, u, c", constraints=["c <= 43"] if name == "elmo" else [])
    shapes = {key: (b, t) for key in make_batch(name, 2, 3)} | ({"characters": (u, c)} if name == "elmo" else {})
    symbolic = {key: jax.ShapeDtypeStruct(shape, jnp.int32) for key, shape in shapes.items()}
    plain = jax.jit(lambda params, batch: hidden_states(config, params, batch))
    exported = export.export(plain)(params, symbolic)
    for sizes in ((2, 7), (5, 16, 9, 20)):
        batch = make_batch(name, *sizes)
        found, expected = exported.call(params, batch), plain(params, batch)
        for a, e in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, e, atol=TOLERANCE, rtol=0)


# Which parameters an optimizer and a mesh treat in a special way.

ATTENTION = [f"attention/{name}/kernel" for name in ("key", "output", "query", "value")]
FEED_FORWARD = ["intermediate/kernel", "output/kernel"]
MATRICES = {
    "bert": [f"encoder/layer_{i}/{name}" for i in range(2) for name in ATTENTION + FEED_FORWARD],
    "gpt": [f"decoder/layer_{i}/{name}" for i in range(2) for name in ATTENTION + FEED_FORWARD],
    "elmo": [
        *(f"{d}/layer_{i}/{name}" for d in DIRECTIONS for i in range(2) for name in ("kernel", "projection/kernel")),
        *(f"encoder/highway_{i}/{name}/kernel" for i in range(2) for name in ("carry", "transform")),
        "encoder/projection/kernel",
    ],
}
REPLICATED = {
    "bert": [],
    "gpt": [],
    "elmo": [
        "characters/embedding",
        *(f"encoder/convolution_{i}/{name}" for i in range(3) for name in ("bias", "kernel")),
    ],
}


@pytest.mark.parametrize(("attribute", "expected"), [("matrices", MATRICES), ("replicated", REPLICATED)])
def test_declared_paths(family, attribute, expected):
    name, config, params = family
    rules = getattr(config.build(), attribute)
    assert rules == getattr(config.encoder(), attribute)
    for rule in rules:
        assert any(re.search(rule, path) for path in paths(params)), rule
    matched = [path for path in paths(params) if any(re.search(rule, path) for rule in rules)]
    assert matched == sorted(expected[name])
    if attribute == "matrices":
        assert {
            leaf.ndim for path, leaf in zip(paths(params), jax.tree.leaves(params), strict=True) if path in matched
        } == {2}


def test_tables_of_which_a_step_reads_few_rows(family):
    """ELMo's softmax. A tied table is no such table: the softmax reads all of it."""
    name, config, params = family
    matched = [path for path in paths(params) if matches(config.build().tables, path)]
    assert matched == (["softmax/embedding"] if name == "elmo" else [])


# Embeddings of another width (ELECTRA)

ELECTRA = BertConfig(**SIZES, intermediate_size=48, embedding_size=24)


def electra_name(path):
    """The name of a parameter in transformers' ElectraForMaskedLM."""
    for ours, theirs in (
        ("encoder/layer_", "electra.encoder.layer."),
        ("embeddings_projection", "electra.embeddings_project"),
        ("embeddings_layer_norm", "electra.embeddings.LayerNorm"),
        ("masked_lm_transform", "generator_predictions.dense"),
        ("masked_lm_layer_norm", "generator_predictions.LayerNorm"),
        ("masked_lm_bias", "generator_lm_head.bias"),
        ("attention/layer_norm", "attention.output.LayerNorm"),
        ("attention/output", "attention.output.dense"),
        ("layer_norm", "output.LayerNorm"),
        ("intermediate", "intermediate.dense"),
    ):
        path = path.replace(ours, theirs)
    path = re.sub(r"attention/(query|key|value)", r"attention.self.\1", path)
    path = re.sub(r"^(electra.encoder.layer.\d+)/output/", r"\1/output.dense/", path)
    path = re.sub(r"^(\w+_embeddings)/embedding", r"electra.embeddings.\1.weight", path)
    return path.replace("/kernel", ".weight").replace("/scale", ".weight").replace("/", ".")


def test_narrow_embeddings_equal_transformers():
    """Hidden states and masked LM logits, against ElectraForMaskedLM."""
    theirs = transformers.ElectraForMaskedLM(
        transformers.ElectraConfig(
            vocab_size=37,
            embedding_size=24,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=16,
        )
    ).eval()
    state = randomize(theirs).state_dict()

    def value(path, leaf):
        tensor = state[electra_name(path_name(path))].numpy()
        tensor = tensor.T if path_name(path).endswith("kernel") else tensor
        return np.pad(tensor, [(0, want - have) for want, have in zip(leaf.shape, tensor.shape, strict=True)])

    shapes = abstract_params(ELECTRA)
    assert shapes["embeddings_projection"]["kernel"].shape == (24, 32)
    assert shapes["masked_lm_transform"]["kernel"].shape == (32, 24)
    shapes = {key: tree for key, tree in shapes.items() if key not in ("pooler", "next_sentence")}
    params = jax.tree_util.tree_map_with_path(value, shapes)
    batch = make_batch("bert", 3, 9)
    with torch.no_grad():
        output = theirs(
            input_ids=torch.tensor(batch["tokens"]),
            token_type_ids=torch.tensor(batch["token_types"]),
            attention_mask=torch.tensor(batch["segments"]),
            output_hidden_states=True,
        )
    states, real = hidden_states(ELECTRA, params, batch), batch["segments"] != 0
    for found, expected in zip(states, output.hidden_states, strict=True):
        np.testing.assert_allclose(found[real], expected.numpy()[real], atol=TOLERANCE, rtol=0)
    with jax.default_matmul_precision("highest"):
        head = jax.jit(partial(ELECTRA.build().apply, method="masked_lm_logits"))
        logits = head({"params": params}, states[-1])
    np.testing.assert_allclose(logits[real][:, :37], output.logits.numpy()[real], atol=TOLERANCE, rtol=0)


def test_narrow_embeddings_count_in_the_operations():
    """ELECTRA's: a projection for every token, smaller products in the head; V in the vocabulary as it is."""
    batch = {"tokens": np.zeros((2, 8)), "masked_positions": np.zeros((2, 3))}
    plain, narrow = (config.build().flops(batch) for config in (CONFIGS["bert"], ELECTRA))
    head = 2 * 32 * 32 + 2 * 32 * 37 - (2 * 32 * 24 + 2 * 24 * 37)
    assert narrow - plain == 3 * (16 * 2 * 24 * 32 - 6 * head)


class Pair(nn.Module):
    """Two encoders over the same embeddings, and the head of one."""

    small: BertConfig
    large: BertConfig

    def setup(self):
        self.embeddings = BertEmbeddings(self.large)
        self.generator = BertEncoder(self.small, shared_embeddings=self.embeddings)
        self.discriminator = BertEncoder(self.large, shared_embeddings=self.embeddings)
        self.head = MaskedLMHead(self.small)

    def __call__(self, batch, train=False):
        hidden = self.generator.hidden_states(batch, train)[-1]
        return self.head(hidden, self.embeddings.word_embeddings.table), self.discriminator.hidden_states(batch, train)


def test_two_encoders_share_their_embeddings():
    sizes = SIZES | {"hidden_size": 16}
    pair, batch = Pair(BertConfig(**sizes, intermediate_size=24, embedding_size=24), ELECTRA), make_batch("bert", 2, 5)
    params = jax.jit(pair.init)(jax.random.key(0), batch)["params"]
    tables = [path for path in paths(params) if "word_embeddings" in path]
    assert tables == ["embeddings/word_embeddings/embedding"]
    assert params["generator"]["embeddings_projection"]["kernel"].shape == (24, 16)
    assert params["discriminator"]["embeddings_projection"]["kernel"].shape == (24, 32)
    matrices = [path for path in paths(params) if any(re.search(rule, path) for rule in BertEncoder.matrices)]
    assert len(matrices) == 2 * len(MATRICES["bert"])
    logits, states = jax.jit(pair.apply)({"params": params}, batch)
    assert logits.shape == (2, 5, 128)
    alone = hidden_states(ELECTRA, params["embeddings"] | params["discriminator"], batch)
    for found, expected in zip(states, alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    # In training the two draw dropout masks of their own.
    keys = {"dropout": jax.random.key(0)}
    train = jax.jit(lambda params: pair.apply({"params": params}, batch, True, rngs=keys)[1][0])
    dropped = [train(params) for _ in range(2)]
    np.testing.assert_array_equal(*dropped)
    assert (np.asarray(dropped[0]) != np.asarray(states[0])).any()
