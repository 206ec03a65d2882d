"""A tiny random BERT of transformers', with a vocabulary, and the directory that it saves."""

import pytest
import transformers
from model_directories import randomize

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,!?", "the", "cat", "sat"]
VOCABULARY += ["on", "mat", "un", "##s", "##able", "##ing", "##t"]
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}


@pytest.fixture(scope="session")
def reference():
    """transformers' BertForPreTraining; do not change it."""
    return randomize(transformers.BertForPreTraining(transformers.BertConfig(**SIZES)))


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    """The path of a vocab.txt."""
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token in VOCABULARY))
    return path


@pytest.fixture(scope="session")
def save_reference(vocabulary):
    """A function that saves a model of transformers' and its tokenizer, as their users do."""

    def save(model, directory, **options):
        model.save_pretrained(directory, **options)
        transformers.BertTokenizer(vocab=str(vocabulary), model_max_length=24).save_pretrained(directory)
        return directory

    return save


@pytest.fixture(scope="session")
def reference_directory(reference, save_reference, tmp_path_factory):
    """The directory of the reference; do not change it."""
    return save_reference(reference, tmp_path_factory.mktemp("reference"))
