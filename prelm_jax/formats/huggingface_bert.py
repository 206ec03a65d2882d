"""BERT in Hugging Face's format, and in that of its authors.

Written: the state dict of transformers' `BertForPreTraining`, fp32, without the decoder, which is tied to the word
embeddings. Read: any BERT, with or without heads, prefix and legacy names; and the authors' TensorFlow checkpoints with
bert_config.json and vocab.txt (google-research/bert), without the variables of the optimizer.
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.formats import huggingface
from prelm_jax.formats.base import ORIGINAL_BERT, LoadedModel, foreign_weights
from prelm_jax.formats.tensorflow import open_checkpoint
from prelm_jax.models import heads
from prelm_jax.models.bert import BertConfig
from prelm_jax.storage import read_json
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.tokenizers.saved import read_vocab
from prelm_jax.tokenizers.wordpiece import has_capitals

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
    architectures={
        "BertForSequenceClassification": huggingface.Architecture(heads.Label(), "classifier", "classifier_dropout"),
        "BertForMultipleChoice": huggingface.Architecture(heads.Choice(), "classifier", "classifier_dropout"),
        "BertForTokenClassification": huggingface.Architecture(heads.Tags(), "classifier", "classifier_dropout"),
        "BertForQuestionAnswering": huggingface.Architecture(heads.Span(), "qa_outputs"),
    },
    bare_architecture="BertModel",
)


# Names in the authors' checkpoints -> names in state dicts: regular expressions and replacements, one after the other.
ORIGINAL_NAMES = {
    "/": ".",
    r"\.layer_": ".layer.",
    r"\.(kernel|output_weights)$": ".weight",
    r"_embeddings$": "_embeddings.weight",
    r"\.output_bias$": ".bias",
}


def read(directory: Path, lowercase: bool = True) -> LoadedModel[BertConfig, Tokenizer]:
    """The model in a directory of either format. `lowercase`: whether a vocab.txt without settings lower-cases."""
    settings_file = "config.json" if (directory / "config.json").is_file() else ORIGINAL_BERT
    checkpoints = sorted(directory.glob("*.index"))
    if any(directory.glob("model.safetensors*")) or (settings_file != ORIGINAL_BERT and not checkpoints):
        tensors = huggingface.open_tensors(directory, _current_name)
    elif len(checkpoints) == 1:
        variables = open_checkpoint(checkpoints[0])
        tensors = dict(_original_tensor(name, variable) for name, variable in variables.items())
        # The authors' programs are told by a flag.
        lowercase = lowercase and not has_capitals(read_vocab(directory / "vocab.txt"))
    else:
        found = ", ".join(file.name for file in checkpoints) or "none"
        complaint = f"{settings_file} needs exactly one checkpoint (NAME.index) beside it, but here is {found}"
        raise InputError(f"{directory}: {complaint}{'' if checkpoints else foreign_weights(directory)}")
    bias, copy = "cls.predictions.bias", "cls.predictions.decoder.bias"
    if bias not in tensors and copy in tensors:
        tensors[bias] = tensors[copy]  # Some writers keep only this copy.
    words = "bert.embeddings.word_embeddings.weight"
    huggingface.require_tied(tensors, "cls.predictions.decoder.weight", words, directory)
    return LAYOUT.read(directory, read_json(directory / settings_file), tensors, settings_file, lowercase)


def _current_name(name: str) -> str:
    """The current name of a tensor in an older file: gamma and beta, and models saved without their heads."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


def _original_tensor(name: str, read: Callable[[], np.ndarray]) -> tuple[str, Callable[[], np.ndarray]]:
    """The name in a state dict of a variable in an original checkpoint, and its values. Kernels are [in, out] there."""
    tensor = name
    for pattern, replacement in ORIGINAL_NAMES.items():
        tensor = re.sub(pattern, replacement, tensor)
    return _current_name(tensor), (lambda: read().T) if name.endswith("/kernel") else read


FORMAT = LAYOUT.format(read, "fill-mask", "The [MASK] is returned.")
