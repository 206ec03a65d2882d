"""GPT-1 in Hugging Face's format: a directory with config.json, model.safetensors and the tokenizer's files.

Written: the state dict of transformers' `OpenAIGPTLMHeadModel`, fp32, without the head, which is tied to the token
embeddings (a file with the head instead of the embeddings loads into two of the four classes with random embeddings).
Read: any GPT of transformers', with or without heads and prefix; and the authors' own format, `params_0.npy`, … and
`params_shapes.json` (openai/finetune-transformer-lm). Pickles are not read.
"""

import dataclasses
import math
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
from prelm_jax.formats.model import ORIGINAL_GPT, Model, Params, abstract_params
from prelm_jax.inference import batching
from prelm_jax.models.cross_entropy import cross_entropy
from prelm_jax.models.gpt import GPT, GPTConfig
from prelm_jax.models.layers import MASKED
from prelm_jax.storage import read_json
from prelm_jax.training.parameters import path_name

# Every module that holds parameters, ours and theirs (without the prefix "transformer."); those of a layer apart.
MODULES = {"token_embeddings": "tokens_embed", "position_embeddings": "positions_embed"}
LAYER_MODULES = {
    "attention/query": "attn.c_attn",
    "attention/key": "attn.c_attn",
    "attention/value": "attn.c_attn",
    "attention/output": "attn.c_proj",
    "attention/layer_norm": "ln_1",
    "intermediate": "mlp.c_fc",
    "output": "mlp.c_proj",
    "layer_norm": "ln_2",
}
LEAVES = {"embedding": "weight", "kernel": "weight", "scale": "weight", "bias": "bias"}
# Theirs is one tensor, thirds of whose last axis are ours, in this order. Kernels are [in, out], here as there.
FUSED = ("query", "key", "value")

VOCABULARY_TABLES = frozenset({"token_embeddings/embedding"})

# The fields of GPTConfig and the keys of config.json.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "embedding_dropout": "embd_pdrop",
    "hidden_dropout": "resid_pdrop",
    "attention_dropout": "attn_pdrop",
    "layer_norm_eps": "layer_norm_epsilon",
    "initializer_range": "initializer_range",
}
# What a config.json may say otherwise, but this GPT does not do. Their "gelu" is the tanh form.
FIXED = {"afn": "gelu", "tie_word_embeddings": True}

# The arrays of the authors' format after the first two, positions and tokens: these for each layer.
ORIGINAL_LAYER = (
    "attn.c_attn.weight",
    "attn.c_attn.bias",
    "attn.c_proj.weight",
    "attn.c_proj.bias",
    "ln_1.weight",
    "ln_1.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
)
ORIGINAL_HEAD_SIZE = 64


def tensor_name(path: str) -> str:
    """The name in the state dict of `OpenAIGPTModel` of the tensor that holds the parameter at a path of ours."""
    module, _, leaf = path.rpartition("/")
    if module.startswith("decoder/layer_"):
        layer, _, module = module.removeprefix("decoder/layer_").partition("/")
        return f"h.{layer}.{LAYER_MODULES[module]}.{LEAVES[leaf]}"
    return f"{MODULES[module]}.{LEAVES[leaf]}"


def _third(path: str) -> int | None:
    """Which third of its tensor a parameter is; None: it is a tensor of its own."""
    name = path.split("/")[-2]
    return FUSED.index(name) if name in FUSED else None


def _read_config(directory: Path) -> GPTConfig:
    """From config.json, and where there is none (the authors' format), from the shapes of the arrays."""
    source = directory / "config.json"
    settings = read_json(source) if source.is_file() else {}
    huggingface.require(settings, FIXED, source)
    if (directory / ORIGINAL_GPT).is_file():
        (positions, width), (vocabulary, _), *layers = _original_shapes(directory)
        known = {"n_positions": positions, "n_embd": width, "vocab_size": vocabulary}
        known |= {"n_layer": len(layers) // len(ORIGINAL_LAYER), "n_head": width // ORIGINAL_HEAD_SIZE}
        if width % ORIGINAL_HEAD_SIZE and "n_head" not in settings:
            raise InputError(
                f"{directory}: the number of heads is not in this format, and {width} is not a multiple of "
                f'{ORIGINAL_HEAD_SIZE}, the size of GPT-1\'s; add a config.json with {{"n_head": …}}'
            )
        settings = known | settings
    if "vocab_size" not in settings:
        raise InputError(f"{source}: no vocab_size")
    # Files of other writers leave out keys; the defaults of GPTConfig are those of the format.
    return GPTConfig(**{field: settings[key] for field, key in FIELDS.items() if key in settings})


def _original_shapes(directory: Path) -> list[list[int]]:
    source = directory / ORIGINAL_GPT
    shapes = read_json(source, list)
    if len(shapes) < 2 or len(shapes) % len(ORIGINAL_LAYER) != 2:
        raise InputError(f"{source}: {len(shapes)} arrays; a GPT has 2 and {len(ORIGINAL_LAYER)} a layer")
    # Kernels are those of convolutions of width 1: [1, in, out].
    return [shape[1:] if len(shape) == 3 else shape for shape in shapes]


def _original_tensors(directory: Path) -> huggingface.Tensors:
    """All arrays lie one after the other in one vector, cut into files without regard to them."""
    shapes = _original_shapes(directory)
    layers = range(len(shapes) // len(ORIGINAL_LAYER))
    names = ["positions_embed.weight", "tokens_embed.weight"]
    names += [f"h.{layer}.{name}" for layer in layers for name in ORIGINAL_LAYER]
    files = sorted(directory.glob("params_*.npy"), key=lambda file: int(file.stem.removeprefix("params_")))
    try:
        values = np.concatenate([np.load(file, allow_pickle=False) for file in files] or [np.zeros(0)])
    except (OSError, ValueError) as error:
        raise InputError(f"{directory}: params_*.npy cannot be read as arrays ({error})") from error
    sizes = [math.prod(shape) for shape in shapes]
    if values.size != sum(sizes):
        raise InputError(
            f"{directory}: {values.size} numbers in {len(files)} files params_*.npy, but the shapes in "
            f"{ORIGINAL_GPT} ask for {sum(sizes)}"
        )
    pieces = np.split(values, np.cumsum(sizes)[:-1])
    arrays = (piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True))
    return {name: partial(np.asarray, array) for name, array in zip(names, arrays, strict=True)}


def read_params(directory: Path, config: GPTConfig) -> Params:
    """The parameters in a directory, fp32."""
    if (directory / ORIGINAL_GPT).is_file():
        tensors = _original_tensors(directory)
    else:
        tensors = huggingface.open_tensors(directory, lambda name: name.removeprefix("transformer."))
        tokens, head = "tokens_embed.weight", "lm_head.weight"
        if tokens not in tensors and head in tensors:
            tensors[tokens] = tensors[head]  # OpenAIGPTDoubleHeadsModel keeps only this copy.
        elif head in tensors and not np.array_equal(tensors[head](), tensors[tokens]()):
            raise InputError(f"{directory}: {head} differs from {tokens}; only models that tie the two are supported")

    def parameter(path: tuple, abstract: jax.ShapeDtypeStruct) -> Array:
        ours, shape = path_name(path), abstract.shape
        name, third = tensor_name(ours), _third(ours)
        if ours in VOCABULARY_TABLES:
            shape = (config.vocab_size, *shape[1:])
        if third is not None:
            shape = (*shape[:-1], len(FUSED) * shape[-1])
        if name not in tensors:
            raise InputError(f"{directory}: no tensor {name} {list(shape)}; is this a whole GPT?")
        tensor = tensors[name]()
        if tensor.shape != shape:
            raise InputError(
                f"{directory}: tensor {name} is {list(tensor.shape)}, but config.json asks for {list(shape)}"
            )
        tensor = tensor.astype(np.float32)
        if third is not None:
            tensor = np.split(tensor, len(FUSED), axis=-1)[third]
        if ours in VOCABULARY_TABLES:
            tensor = np.pad(tensor, [(0, abstract.shape[0] - len(tensor)), (0, 0)])
        return jnp.asarray(tensor)

    return jax.tree_util.tree_map_with_path(parameter, abstract_params(config))


@partial(jax.jit, static_argnums=0)
def _hidden_states(gpt: GPT, params: Params, tokens_BT: Array, segments_BT: Array) -> Array:
    """[B, T, L + 1, D]. In full fp32, which TPUs and GPUs by default give up for speed."""
    with jax.default_matmul_precision("highest"):
        return jnp.stack(_decode(gpt, params, tokens_BT, segments_BT), 2)


@partial(jax.jit, static_argnums=0)
def _next_nll(gpt: GPT, params: Params, tokens_BT: Array, segments_BT: Array) -> Array:
    """[B, T]: the negative log-likelihood of the token after each; that after the last means nothing."""
    with jax.default_matmul_precision("highest"):
        last_BTD = _decode(gpt, params, tokens_BT, segments_BT)[-1]

        def row(arguments: tuple[Array, Array]) -> Array:
            last_TD, targets_T = arguments
            return cross_entropy(gpt.apply({"params": params}, last_TD[None], method="logits")[0], targets_T)[0]

        # A row at a time: the logits of all would be by far the largest array here.
        return jax.lax.map(row, (last_BTD, jnp.roll(tokens_BT, -1, axis=1)))


def _decode(gpt: GPT, params: Params, tokens_BT: Array, segments_BT: Array) -> tuple[Array, ...]:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    batch = {"tokens": tokens_BT, "positions": positions_BT, "segments": segments_BT}
    return gpt.config.encoder().apply({"params": params}, batch, method="hidden_states")


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _next_logits(gpt: GPT, params: Params, cache: Params, tokens_1T: Array, length: Array) -> tuple[Array, Params]:
    with jax.default_matmul_precision("highest"):
        variables = {"params": params, "cache": cache}
        logits_1V, changed = gpt.apply(variables, tokens_1T, length, method="next_logits", mutable=["cache"])
        return logits_1V[0], changed["cache"]


@jax.jit
def restrict(logits_V: Array, temperature: Array, top_k: Array, top_p: Array) -> Array:
    """Logits divided by the temperature, and -1e9 for all but the `top_k` highest and, of these, the nucleus: the
    fewest, likeliest first, whose probabilities reach `top_p` (Holtzman et al. 2020)."""
    logits_V = (logits_V - logits_V.max()) / temperature
    sorted_V = -jnp.sort(-logits_V)
    sorted_V = jnp.where(jnp.arange(len(sorted_V)) < top_k, sorted_V, MASKED)
    probabilities_V = jax.nn.softmax(sorted_V)
    kept_V = (jnp.cumsum(probabilities_V) - probabilities_V < top_p).at[0].set(True)
    lowest = jnp.where(kept_V, sorted_V, jnp.inf).min()
    return jnp.where(logits_V >= lowest, logits_V, MASKED)


@dataclasses.dataclass(frozen=True, eq=False)
class GPTModel(Model):
    """A GPT with what one does with it: `embed`, `score`, `generate`; a text is its tokens and nothing else."""

    config: GPTConfig

    config_class: ClassVar[type] = GPTConfig
    vocabulary_tables: ClassVar[frozenset[str]] = VOCABULARY_TABLES
    free_fields: ClassVar[frozenset[str]] = frozenset(
        {"vocab_size", "embedding_dropout", "hidden_dropout", "attention_dropout", "initializer_range"}
    )

    @classmethod
    def read(cls, directory: Path) -> Self:
        config = _read_config(directory)
        tokenizer = huggingface.load_tokenizer(directory, config.vocab_size)
        return cls(config, read_params(directory, config), tokenizer)

    def write(self, directory: Path) -> None:
        parts = {}
        for path, value in jax.tree_util.tree_leaves_with_path(self.params):
            ours, tensor = path_name(path), np.asarray(value, np.float32)
            if ours in self.vocabulary_tables:
                tensor = tensor[: self.config.vocab_size]
            parts.setdefault(f"transformer.{tensor_name(ours)}", {})[_third(ours)] = tensor
        tensors = {
            name: np.concatenate([thirds[i] for i in sorted(thirds)], axis=-1) if len(thirds) > 1 else thirds[None]
            for name, thirds in parts.items()
        }
        settings = {key: getattr(self.config, field) for field, key in FIELDS.items()} | FIXED
        settings |= {"model_type": "openai-gpt", "architectures": ["OpenAIGPTLMHeadModel"]}
        # Without one, transformers classifies no batch. GPT-1 has none of its own: the unknown token is rarely last.
        settings["pad_token_id"] = self.tokenizer.special_ids.get("<pad>", self.tokenizer.unknown_id or 0)
        huggingface.write(directory, tensors, settings)
        self.tokenizer.save(directory, model_max_length=self.config.max_position_embeddings)

    def embed(self, texts: Sequence[str], truncate: bool = False) -> Iterator[tuple[list[str], np.ndarray]]:
        """For each text, in order, its tokens and its hidden states, f32 [L + 1, tokens, D].

        A blank text has no tokens. One that is too long is an InputError naming its line, or cut if `truncate`.
        """
        c = self.config
        encoded = batching.encode(self.tokenizer, texts, c.max_position_embeddings, truncate)
        states = partial(_hidden_states, c.build(), self.params)
        for ids, states_TLD in batching.in_order(encoded, states, c.max_position_embeddings):
            if states_TLD is None:
                states_TLD = np.zeros((0, c.num_layers + 1, c.hidden_size), np.float32)
            yield [self.tokenizer.tokens[id_] for id_ in ids], states_TLD.swapaxes(0, 1)

    def score(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """For each text the sum of the natural-log probabilities of its tokens from the second on, and their number.

        The first has nothing before it from which to predict it. A text that is too long is an InputError.
        """
        longest = self.config.max_position_embeddings
        encoded = batching.encode(self.tokenizer, texts, longest)
        nll = partial(_next_nll, self.config.build(), self.params)
        return [
            (0.0, 0) if nll_T is None else (-float(nll_T[:-1].sum(dtype=np.float64)), len(ids) - 1)
            for ids, nll_T in batching.in_order(encoded, nll, longest)
        ]

    def generate(
        self,
        prompt: str,
        max_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """A prompt and `max_tokens` tokens after it, as the tokenizer writes them.

        Each is drawn from what `restrict` leaves of the distribution over the vocabulary; `temperature` 0: the
        likeliest. Same seed, same text. InputError for a blank prompt and for settings out of range.
        """
        for name, value, allowed in (
            ("max_tokens", max_tokens, max_tokens >= 0),
            ("temperature", temperature, temperature >= 0),
            ("top_k", top_k, top_k is None or top_k >= 1),
            ("top_p", top_p, 0 < top_p <= 1),
        ):
            if not allowed:
                raise InputError(f"{name} {value} is out of range")
        (ids,) = self.tokenizer.encode_batch([prompt])
        if not ids:
            raise InputError("the prompt is blank; GPT has no token to begin with: give it a word")
        key = jax.random.key(seed)

        def choose(logits_V: Array) -> int:
            if temperature == 0:
                return int(logits_V.argmax())
            restricted_V = restrict(logits_V, temperature, top_k or len(logits_V), top_p)
            return int(jax.random.categorical(jax.random.fold_in(key, len(ids)), restricted_V))

        for logits_V in self._continue(ids, max_tokens):
            ids.append(choose(logits_V[: self.tokenizer.vocab_size]))
        return self.tokenizer.decode(ids)

    def _continue(self, ids: list[int], count: int) -> Iterator[Array]:
        """`count` times the logits [padded vocabulary] of what comes after `ids`, to which one is appended each time.

        Keys and values of earlier tokens are kept as long as all fit into the model. After that the last
        `max_position_embeddings` tokens are computed afresh for each: every one of them has another position.
        """
        gpt, window = self.config.build(), self.config.max_position_embeddings
        for i in range(count):
            if i > 0 and len(ids) <= window:
                new = np.array([ids[-1:]], np.int32)
            else:
                cache, recent = gpt.init_cache(1), ids[-window:]
                new = np.zeros((1, batching.padded_length(len(recent), window)), np.int32)
                new[0, -len(recent) :] = recent
            logits_V, cache = _next_logits(gpt, self.params, cache, new, min(len(ids), window))
            yield logits_V
