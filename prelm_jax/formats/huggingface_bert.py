"""BERT in Hugging Face's format.

Written: the state dict of transformers' `BertForPreTraining`, fp32, without the decoder, which is tied to the word
embeddings. Read: any BERT, with or without heads, prefix and legacy names.
"""

from pathlib import Path

from prelm_jax.formats import huggingface
from prelm_jax.formats.base import LoadedModel
from prelm_jax.models.bert import BertConfig
from prelm_jax.storage import read_json
from prelm_jax.tokenizers.base import Tokenizer

LAYOUT = huggingface.Layout(
    config_class=BertConfig,
    settings={
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
    },
    fixed={"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False},
    written={"architectures": ["BertForPreTraining"], "hidden_act": "gelu"},
    modules={
        "word_embeddings": "bert.embeddings.word_embeddings",
        "position_embeddings": "bert.embeddings.position_embeddings",
        "token_type_embeddings": "bert.embeddings.token_type_embeddings",
        "embeddings_layer_norm": "bert.embeddings.LayerNorm",
        "pooler": "bert.pooler.dense",
        "masked_lm_transform": "cls.predictions.transform.dense",
        "masked_lm_layer_norm": "cls.predictions.transform.LayerNorm",
        "": "cls.predictions",  # The masked LM bias is in no module of ours.
        "next_sentence": "cls.seq_relationship",
    },
    layers=("encoder/layer_", "bert.encoder.layer."),
    layer_modules={
        "attention/query": "attention.self.query",
        "attention/key": "attention.self.key",
        "attention/value": "attention.self.value",
        "attention/output": "attention.output.dense",
        "attention/layer_norm": "attention.output.LayerNorm",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
        "layer_norm": "output.LayerNorm",
    },
    vocabulary_tables=frozenset({"word_embeddings/embedding", "masked_lm_bias"}),
    optional=("pooler/", "masked_lm_", "next_sentence/"),
    transposed=True,
)


def read(directory: Path, lowercase: bool = True) -> LoadedModel[BertConfig, Tokenizer]:
    """The model in a directory. `lowercase`: whether a vocab.txt without settings lower-cases."""
    tensors = huggingface.open_tensors(directory, _current_name)
    bias, copy = "cls.predictions.bias", "cls.predictions.decoder.bias"
    if bias not in tensors and copy in tensors:
        tensors[bias] = tensors[copy]  # Some writers keep only this copy.
    words = "bert.embeddings.word_embeddings.weight"
    huggingface.require_tied(tensors, "cls.predictions.decoder.weight", words, directory)
    return LAYOUT.read(directory, read_json(directory / "config.json"), tensors, lowercase)


def _current_name(name: str) -> str:
    """The current name of a tensor in an older file: gamma and beta, and models saved without their heads."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


FORMAT = LAYOUT.format(read, "fill-mask", "The [MASK] is returned.")
