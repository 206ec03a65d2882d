"""BERT in Hugging Face's format: a directory with config.json, model.safetensors and the tokenizer's files.

Written: the state dict of transformers' `BertForPreTraining`, fp32, without the decoder, which is tied to the word
embeddings. Read: any BERT, with or without heads, prefix and legacy names. Pickles are not read.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prelm_jax.errors import InputError
from prelm_jax.formats import huggingface
from prelm_jax.formats.model import Model, Params, abstract_params
from prelm_jax.inference import batching
from prelm_jax.models.bert import Bert, BertConfig
from prelm_jax.models.cross_entropy import cross_entropy
from prelm_jax.storage import read_json
from prelm_jax.training.parameters import path_name

# Every module that holds parameters, ours and theirs; those of a layer apart.
MODULES = {
    "word_embeddings": "bert.embeddings.word_embeddings",
    "position_embeddings": "bert.embeddings.position_embeddings",
    "token_type_embeddings": "bert.embeddings.token_type_embeddings",
    "embeddings_layer_norm": "bert.embeddings.LayerNorm",
    "pooler": "bert.pooler.dense",
    "masked_lm_transform": "cls.predictions.transform.dense",
    "masked_lm_layer_norm": "cls.predictions.transform.LayerNorm",
    "next_sentence": "cls.seq_relationship",
}
LAYER_MODULES = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "attention/layer_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "layer_norm": "output.LayerNorm",
}
LEAVES = {"embedding": "weight", "kernel": "weight", "scale": "weight", "bias": "bias"}

VOCABULARY_TABLES = frozenset({"word_embeddings/embedding", "masked_lm_bias"})

# The heads, without which a directory is still a BERT.
HEADS = ("pooler/", "masked_lm_", "next_sentence/")

# The fields of BertConfig and the keys of config.json.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_range",
}
# What a config.json may say otherwise, but this BERT does not do.
FIXED = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}


def tensor_name(path: str) -> str:
    """The name in the state dict of `BertForPreTraining` of the parameter at a path of ours."""
    if path == "masked_lm_bias":
        return "cls.predictions.bias"
    module, _, leaf = path.rpartition("/")
    if module.startswith("encoder/layer_"):
        layer, _, module = module.removeprefix("encoder/layer_").partition("/")
        return f"bert.encoder.layer.{layer}.{LAYER_MODULES[module]}.{LEAVES[leaf]}"
    return f"{MODULES[module]}.{LEAVES[leaf]}"


def _published_name(name: str) -> str:
    """The name of today for one of an older file: gamma and beta, and models saved without their heads."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


def _read_config(source: Path) -> BertConfig:
    settings = read_json(source)
    huggingface.require(settings, FIXED, source)
    if "vocab_size" not in settings:
        raise InputError(f"{source}: no vocab_size")
    # Files of other writers leave out keys; the defaults of BertConfig are those of the format.
    return BertConfig(**{field: settings[key] for field, key in FIELDS.items() if key in settings})


def read_params(directory: Path, config: BertConfig) -> tuple[Params, frozenset[str]]:
    """The parameters in a directory, fp32, and the paths of those that it lacks, which are zeros."""
    tensors = huggingface.open_tensors(directory, _published_name)
    missing = set()

    def parameter(path: tuple, abstract: jax.ShapeDtypeStruct) -> Array:
        ours, shape = path_name(path), abstract.shape
        name = tensor_name(ours)
        if name == "cls.predictions.bias" and name not in tensors:
            name = "cls.predictions.decoder.bias"  # Some writers keep only this copy.
        if name not in tensors and ours.startswith(HEADS):
            missing.add(ours)
            return jnp.zeros(shape)
        if ours in VOCABULARY_TABLES:
            shape = (config.vocab_size, *shape[1:])
        if ours.endswith("/kernel"):
            shape = shape[::-1]  # Theirs are [out, in].
        if name not in tensors:
            raise InputError(f"{directory}: no tensor {name} {list(shape)}; is this a whole BERT?")
        tensor = tensors[name]()
        if tensor.shape != shape:
            raise InputError(
                f"{directory}: tensor {name} is {list(tensor.shape)}, but config.json asks for {list(shape)}"
            )
        tensor = tensor.astype(np.float32)
        if ours.endswith("/kernel"):
            tensor = tensor.T
        if ours in VOCABULARY_TABLES:
            tensor = np.pad(tensor, [(0, abstract.shape[0] - len(tensor))] + [(0, 0)] * (tensor.ndim - 1))
        return jnp.asarray(tensor)

    params = jax.tree_util.tree_map_with_path(parameter, abstract_params(config))
    decoder = tensors.get("cls.predictions.decoder.weight")
    words = tensors["bert.embeddings.word_embeddings.weight"]
    if decoder is not None and not np.array_equal(decoder(), words()):
        raise InputError(
            f"{directory}: cls.predictions.decoder.weight differs from the word embeddings; only models that tie "
            "the two are supported"
        )
    return params, frozenset(missing)


@partial(jax.jit, static_argnums=0)
def _hidden_states(bert: Bert, params: Params, tokens_BT: Array, segments_BT: Array) -> Array:
    """[B, T, L + 1, D]. In full fp32, which TPUs and GPUs by default give up for speed."""
    with jax.default_matmul_precision("highest"):
        return jnp.stack(_encode(bert, params, tokens_BT, segments_BT), 2)


@partial(jax.jit, static_argnums=0)
def _masked_lm_logits(bert: Bert, params: Params, tokens_BT: Array, segments_BT: Array, positions_BM: Array) -> Array:
    """[B, M, padded vocabulary] at some positions."""
    with jax.default_matmul_precision("highest"):
        last_BTD = _encode(bert, params, tokens_BT, segments_BT)[-1]
        masked_BMD = jnp.take_along_axis(last_BTD, positions_BM[..., None], 1)
        return bert.apply({"params": params}, masked_BMD, method="masked_lm_logits")


_cross_entropy = jax.jit(cross_entropy)


def _encode(bert: Bert, params: Params, tokens_BT: Array, segments_BT: Array) -> tuple[Array, ...]:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    batch = {"tokens": tokens_BT, "token_types": jnp.zeros_like(tokens_BT)}
    batch |= {"positions": positions_BT, "segments": segments_BT}
    return bert.config.encoder().apply({"params": params}, batch, method="hidden_states")


@dataclasses.dataclass(frozen=True, eq=False)
class BertModel(Model):
    """A BERT with what one does with it: `embed`, `fill`, `score`; each text is one segment, [CLS] text [SEP]."""

    config: BertConfig

    config_class: ClassVar[type] = BertConfig
    vocabulary_tables: ClassVar[frozenset[str]] = VOCABULARY_TABLES
    free_fields: ClassVar[frozenset[str]] = frozenset(
        {"vocab_size", "hidden_dropout", "attention_dropout", "initializer_range"}
    )

    @classmethod
    def read(cls, directory: Path) -> Self:
        config = _read_config(directory / "config.json")
        tokenizer = huggingface.load_tokenizer(directory, config.vocab_size)
        params, missing = read_params(directory, config)
        return cls(config, params, tokenizer, missing)

    def write(self, directory: Path) -> None:
        tensors = {}
        for path, value in jax.tree_util.tree_leaves_with_path(self.params):
            ours, tensor = path_name(path), np.asarray(value, np.float32)
            if ours in self.missing:
                continue
            if ours in self.vocabulary_tables:
                tensor = tensor[: self.config.vocab_size]
            if ours.endswith("/kernel"):
                tensor = tensor.T
            tensors[tensor_name(ours)] = np.ascontiguousarray(tensor)
        settings = {key: getattr(self.config, field) for field, key in FIELDS.items()}
        settings |= {"model_type": "bert", "architectures": ["BertForPreTraining"], "hidden_act": "gelu"}
        settings |= {"dtype": "float32", "pad_token_id": self.tokenizer.special_ids["[PAD]"]}
        huggingface.write(directory, tensors, settings)
        self.tokenizer.save(directory, model_max_length=self.config.max_position_embeddings)

    def _encode(self, texts: Sequence[str], truncate: bool = False) -> list[list[int]]:
        """The ids of each text with [CLS] and [SEP]; none for a blank one."""
        special = self.tokenizer.special_ids
        encoded = batching.encode(self.tokenizer, texts, self.config.max_position_embeddings - 2, truncate)
        return [[special["[CLS]"], *ids, special["[SEP]"]] if ids else [] for ids in encoded]

    def embed(self, texts: Sequence[str], truncate: bool = False) -> Iterator[tuple[list[str], np.ndarray]]:
        """For each text, in order, its tokens with [CLS] and [SEP] and its hidden states, f32 [L + 1, tokens, D].

        A blank text has no tokens. One that is too long is an InputError naming its line, or cut if `truncate`.
        """
        c = self.config
        states = partial(_hidden_states, c.build(), self.params)
        for ids, states_TLD in batching.in_order(self._encode(texts, truncate), states, c.max_position_embeddings):
            if states_TLD is None:
                states_TLD = np.zeros((0, c.num_layers + 1, c.hidden_size), np.float32)
            yield [self.tokenizer.tokens[id_] for id_ in ids], states_TLD.swapaxes(0, 1)

    def _require_masked_lm(self) -> None:
        lacking = sorted(path for path in self.missing if path.startswith("masked_lm_"))
        if lacking:
            raise InputError(f"this model has no masked LM head ({tensor_name(lacking[0])} is missing)")

    def fill(self, text: str, top_k: int = 5) -> list[list[tuple[str, float]]]:
        """For each "[MASK]" in a text the `top_k` most probable (token, probability)."""
        self._require_masked_lm()
        special = self.tokenizer.special_ids
        pieces = self.tokenizer.encode_batch(text.split("[MASK]"))
        if len(pieces) == 1:
            raise InputError('no "[MASK]" in the text')
        ids, positions = [special["[CLS]"], *pieces[0]], []
        for piece in pieces[1:]:
            positions.append(len(ids))
            ids += [special["[MASK]"], *piece]
        ids.append(special["[SEP]"])
        longest = self.config.max_position_embeddings
        if len(ids) > longest:
            raise InputError(f"the text has {len(ids) - 2} tokens, but the model takes {longest - 2}")
        inputs = batching.batch([ids], 1, batching.padded_length(len(ids), longest))
        logits_BMV = _masked_lm_logits(self.config.build(), self.params, *inputs, np.array([positions]))
        probabilities_MV = jax.nn.softmax(logits_BMV[0])[:, : self.tokenizer.vocab_size]
        values_MK, ids_MK = jax.lax.top_k(probabilities_MV, min(top_k, self.tokenizer.vocab_size))
        return [
            [(self.tokenizer.tokens[i], float(value)) for i, value in zip(ids_K, values_K, strict=True)]
            for ids_K, values_K in zip(np.asarray(ids_MK), np.asarray(values_MK), strict=True)
        ]

    def score(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """For each text its pseudo-log-likelihood (Salazar et al. 2020) in nats and its number of tokens.

        Every token is masked in turn and its natural-log probability summed; [CLS] and [SEP] are not counted.
        """
        self._require_masked_lm()
        encoded = self._encode(texts)
        mask = self.tokenizer.special_ids["[MASK]"]
        examples = (
            ((i, position, ids[position]), [*ids[:position], mask, *ids[position + 1 :]])
            for i, ids in enumerate(encoded)
            for position in range(1, len(ids) - 1)
        )
        sums = [0.0] * len(encoded)
        for tags, *inputs in batching.batches(examples, self.config.max_position_embeddings):
            positions_B1, targets_B1 = np.zeros((2, len(inputs[0]), 1), np.int32)
            lines, positions_B1[: len(tags), 0], targets_B1[: len(tags), 0] = zip(*tags, strict=True)
            logits_B1V = _masked_lm_logits(self.config.build(), self.params, *inputs, positions_B1)
            nll_B1, _ = _cross_entropy(logits_B1V, targets_B1)
            for i, nll in zip(lines, np.asarray(nll_B1)[:, 0], strict=False):
                sums[i] -= float(nll)
        return [(total, max(0, len(ids) - 2)) for total, ids in zip(sums, encoded, strict=True)]
