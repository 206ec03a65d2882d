"""Model directories to read and to spoil, fixtures of tiny models with random parameters, and comparisons."""

import dataclasses
import json
import re

import h5py
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from prelm_jax.formats import bilm, huggingface_bert, huggingface_gpt
from prelm_jax.formats.base import LoadedModel, abstract_params
from prelm_jax.models.heads import Choice, Label, Span, Tags
from prelm_jax.tokenizers.words import WordVocabulary
from prelm_jax.training.parameters import path_name

NORM_WEIGHT = re.compile(r"(LayerNorm|ln_\d)\.weight$")

# BERT and GPT, of transformers.

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,!?", "the", "cat", "sat"]
VOCABULARY += ["on", "mat", "un", "##s", "##able", "##ing", "##t"]
BERT_SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}

LETTERS = "abcdefghijklmnopqrstuvwxy.,"  # No z.
MERGES = ["t h", "th e</w>", "c a", "ca t</w>", "s a", "sa t</w>", "o n</w>", "m a", "ma t</w>"]
GPT_TOKENS = [
    "<unk>",
    *LETTERS,
    *(f"{letter}</w>" for letter in LETTERS),
    *(merge.replace(" ", "") for merge in MERGES),
]
GPT_SIZES = {"vocab_size": len(GPT_TOKENS), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}

# ELMo, as bilm-tf's dump_weights writes it.

ELMO_OPTIONS = {
    "lstm": {
        "dim": 16,
        "projection_dim": 8,
        "n_layers": 2,
        "cell_clip": 0.75,
        "proj_clip": 0.5,
        "use_skip_connections": True,
    },
    "char_cnn": {
        "embedding": {"dim": 4},
        "filters": [[1, 4], [2, 8], [3, 8]],
        "activation": "relu",
        "n_highway": 2,
        "n_characters": 262,
        "max_characters_per_token": 50,
    },
}
ELMO_SHAPES = {
    "char_embed": (261, 4),
    "CNN/W_cnn_0": (1, 1, 4, 4),
    "CNN/b_cnn_0": (4,),
    "CNN/W_cnn_1": (1, 2, 4, 8),
    "CNN/b_cnn_1": (8,),
    "CNN/W_cnn_2": (1, 3, 4, 8),
    "CNN/b_cnn_2": (8,),
    "CNN_high_0/W_carry": (20, 20),
    "CNN_high_0/W_transform": (20, 20),
    "CNN_high_0/b_carry": (20,),
    "CNN_high_0/b_transform": (20,),
    "CNN_high_1/W_carry": (20, 20),
    "CNN_high_1/W_transform": (20, 20),
    "CNN_high_1/b_carry": (20,),
    "CNN_high_1/b_transform": (20,),
    "CNN_proj/W_proj": (20, 8),
    "CNN_proj/b_proj": (8,),
    "RNN_0/RNN/MultiRNNCell/Cell0/LSTMCell/W_0": (16, 64),
    "RNN_0/RNN/MultiRNNCell/Cell0/LSTMCell/B": (64,),
    "RNN_0/RNN/MultiRNNCell/Cell0/LSTMCell/W_P_0": (16, 8),
    "RNN_0/RNN/MultiRNNCell/Cell1/LSTMCell/W_0": (16, 64),
    "RNN_0/RNN/MultiRNNCell/Cell1/LSTMCell/B": (64,),
    "RNN_0/RNN/MultiRNNCell/Cell1/LSTMCell/W_P_0": (16, 8),
    "RNN_1/RNN/MultiRNNCell/Cell0/LSTMCell/W_0": (16, 64),
    "RNN_1/RNN/MultiRNNCell/Cell0/LSTMCell/B": (64,),
    "RNN_1/RNN/MultiRNNCell/Cell0/LSTMCell/W_P_0": (16, 8),
    "RNN_1/RNN/MultiRNNCell/Cell1/LSTMCell/W_0": (16, 64),
    "RNN_1/RNN/MultiRNNCell/Cell1/LSTMCell/B": (64,),
    "RNN_1/RNN/MultiRNNCell/Cell1/LSTMCell/W_P_0": (16, 8),
}
ELMO_WORDS = ["<S>", "</S>", "<UNK>", "the", ",", "cat", "sat", "on", "mat", "猫"]


def randomize(model):
    """Sets every parameter to random values, biases and norms too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = NORM_WEIGHT.search(name) is not None
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + norm)
    return model.eval()


@pytest.fixture(scope="session")
def bert_reference():
    """transformers' BertForPreTraining; do not change it."""
    return randomize(transformers.BertForPreTraining(transformers.BertConfig(**BERT_SIZES)))


@pytest.fixture(scope="session")
def save_bert(tmp_path_factory):
    """A function that saves a model of transformers and its tokenizer."""

    vocabulary = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    vocabulary.write_text("".join(f"{token}\n" for token in VOCABULARY))

    def save(model, directory, **options):
        model.save_pretrained(directory, **options)
        transformers.BertTokenizer(vocab=str(vocabulary), model_max_length=24).save_pretrained(directory)
        return directory

    return save


@pytest.fixture(scope="session")
def bert_directory(bert_reference, save_bert, tmp_path_factory):
    """The directory of the reference; do not change it."""
    return save_bert(bert_reference, tmp_path_factory.mktemp("reference"))


def save_gpt_vocabulary(directory):
    """The two files that transformers 4 saves with a model."""
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(GPT_TOKENS)}))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))


@pytest.fixture(scope="session")
def gpt_reference():
    """transformers' OpenAIGPTLMHeadModel; do not change it."""
    return randomize(transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**GPT_SIZES)))


@pytest.fixture(scope="session")
def gpt_directory(gpt_reference, tmp_path_factory):
    """The directory of the reference; do not change it."""
    directory = tmp_path_factory.mktemp("gpt")
    gpt_reference.save_pretrained(directory)
    save_gpt_vocabulary(directory)
    return directory


@pytest.fixture(scope="session")
def gpt_ids_of(tmp_path_factory):
    """Ids of a text by transformers' own tokenizer."""
    directory = tmp_path_factory.mktemp("vocabulary")
    save_gpt_vocabulary(directory)
    tokenizer = transformers.OpenAIGPTTokenizer.from_pretrained(directory)
    return lambda text: tokenizer.encode(text)


# Models with the heads of tasks, of transformers.

NAMES = ("contradiction", "entailment", "neutral")
MAPS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
CASES = {  # name: (class of transformers, its settings, our head)
    "label": ("BertForSequenceClassification", MAPS, Label(num_labels=3)),
    "labels": (
        "BertForSequenceClassification",
        {**MAPS, "problem_type": "multi_label_classification"},
        Label(num_labels=3, kind="labels"),
    ),
    "number": (
        "BertForSequenceClassification",
        {"num_labels": 1, "problem_type": "regression", "classifier_dropout": 0.3},
        Label(num_labels=1, kind="number", dropout=0.3),
    ),
    "choice": ("BertForMultipleChoice", {}, Choice()),
    "tags": ("BertForTokenClassification", {**MAPS, "hidden_dropout_prob": 0.2}, Tags(num_tags=3, dropout=0.2)),
    "spans": ("BertForQuestionAnswering", {}, Span()),
    "gpt-label": ("OpenAIGPTForSequenceClassification", MAPS, Label(num_labels=3, bias=False)),
    "gpt-number": (
        "OpenAIGPTForSequenceClassification",
        {"num_labels": 1, "problem_type": "regression"},
        Label(num_labels=1, kind="number", bias=False),
    ),
    "gpt-choice": ("OpenAIGPTDoubleHeadsModel", {"summary_first_dropout": 0.4}, Choice(dropout=0.4)),
}
SPECIAL = ("_start_", "_delimiter_", "_classify_", "<pad>")


@pytest.fixture(scope="session")
def published(save_bert, tmp_path_factory):
    """`published(case)` is (transformers' model with random parameters, its directory); do not change them."""
    made = {}

    def get(case):
        if case not in made:
            architecture, settings, _ = CASES[case]
            directory = tmp_path_factory.mktemp(case)
            if architecture.startswith("Bert"):
                config = transformers.BertConfig(**BERT_SIZES, **settings)
                model = randomize(getattr(transformers, architecture)(config))
                save_bert(model, directory)
            else:
                sizes = {**GPT_SIZES, "vocab_size": len(GPT_TOKENS) + len(SPECIAL)}
                config = transformers.OpenAIGPTConfig(**sizes, pad_token_id=len(GPT_TOKENS) + 3, **settings)
                model = randomize(getattr(transformers, architecture)(config))
                model.save_pretrained(directory)
                save_gpt_vocabulary(directory)
            made[case] = model, directory
        return made[case]

    return get


def format_of(case):
    return huggingface_gpt.FORMAT if case.startswith("gpt") else huggingface_bert.FORMAT


def read_task_of(case, directory):
    return format_of(case).read_task(directory, True)


def elmo_weights(seed=0):
    """Random weights, large enough for both clips to act."""
    rng = np.random.default_rng(seed)
    return {name: (0.3 * rng.normal(size=shape)).astype(np.float32) for name, shape in ELMO_SHAPES.items()}


def publish_elmo(directory, options, weights):
    directory.mkdir(exist_ok=True)
    (directory / "elmo_tiny_options.json").write_text(json.dumps(options))
    with h5py.File(directory / "elmo_tiny_weights.hdf5", "w") as file:
        for name, value in weights.items():
            file[name] = value
    return directory


@pytest.fixture(scope="session")
def elmo_directory(tmp_path_factory):
    """A directory like a published ELMo's; do not change it."""
    return publish_elmo(tmp_path_factory.mktemp("elmo"), ELMO_OPTIONS, elmo_weights())


@pytest.fixture(scope="session")
def elmo_with_softmax(elmo_directory):
    """The model of that directory with a random softmax over ELMO_WORDS, as after pretraining."""
    published = bilm.read(elmo_directory)
    config = dataclasses.replace(published.config, vocab_size=len(ELMO_WORDS))
    rng = np.random.default_rng(1)
    softmax = {
        name: rng.normal(size=abstract.shape).astype(np.float32)
        for name, abstract in sorted(abstract_params(config)["softmax"].items())
    }
    return LoadedModel(config, {**published.params, "softmax": softmax}, WordVocabulary(ELMO_WORDS, tokenize=True))


def change(directory, rename=lambda name: name, **replaced):
    """Rewrites model.safetensors: names renamed (None drops a tensor), values replaced or added."""
    file = directory / "model.safetensors"
    tensors = {rename(name): value for name, value in load_file(file).items()} | replaced
    save_file({name: value for name, value in tensors.items() if name is not None}, file)


def configure(directory, **settings):
    """Replaces or adds settings in config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def assert_params_equal(found, expected, but=frozenset()):
    """Bit for bit, except at the paths `but`."""
    for (path, value), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        if path_name(path) not in but:
            np.testing.assert_array_equal(value, other, err_msg=path_name(path))


def contents(directory):
    """The bytes of the files in a directory, by name."""
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def grow_vocabulary(directory):
    """Pads the tables of a BERT by three rows, for ids that no token has."""
    tensors = load_file(directory / "model.safetensors")
    words, bias = tensors["bert.embeddings.word_embeddings.weight"], tensors["cls.predictions.bias"]
    grown = {
        "bert.embeddings.word_embeddings.weight": np.concatenate([words, np.zeros_like(words[:3])]),
        "cls.predictions.bias": np.concatenate([bias, np.full_like(bias[:3], 5)]),
    }
    change(directory, **grown)
    configure(directory, vocab_size=len(bias) + 3)
