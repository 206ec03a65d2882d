"""Model directories and work directories as pretrained models."""

import dataclasses

import jax
import numpy as np
import pytest

from prelm_jax.errors import InputError
from prelm_jax.formats import huggingface_bert
from prelm_jax.formats.base import LoadedModel, save
from prelm_jax.inference.bert import BertPretrained
from prelm_jax.inference.elmo import ELMoPretrained
from prelm_jax.loading import load
from prelm_jax.models.elmo import ELMoConfig
from prelm_jax.run import RunRecord, Segment
from prelm_jax.tokenizers.wordpiece import WordPiece
from prelm_jax.tokenizers.words import WordVocabulary
from prelm_jax.training.checkpoint import Checkpoints

ELMO = ELMoConfig(
    vocab_size=4, character_embedding_size=4, filters=((1, 4),), num_highways=1, projection_size=4, hidden_size=8
)


SEGMENTS = [Segment(0, {"name": "AdamW"})]


def assert_equal(found, config, params, tokenizer):
    assert found.config == config
    assert found.tokenizer.tokens == tokenizer.tokens
    assert found.missing == frozenset()
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


def write_run(workdir, config, tokenizer, *checkpoints):
    record = RunRecord(config.model_type, {"model": dataclasses.asdict(config)}, SEGMENTS, {}, {}, [])
    (workdir / "run.json").write_text(record.to_json())
    tokenizer.save(workdir / "tokenizer")
    saved = Checkpoints(workdir / "checkpoints", keep=len(checkpoints))
    for step, params in enumerate(checkpoints, 1):
        saved.save(step, {"params": params})
    saved.close()


@pytest.fixture
def bert(tiny_bert):
    config = dataclasses.replace(tiny_bert, vocab_size=5)
    tokenizer = WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return LoadedModel(config, jax.jit(config.build().init_params)(jax.random.key(0)), tokenizer)


def test_a_model_directory(bert, tmp_path):
    save(bert, huggingface_bert.FORMAT, tmp_path, "")
    loaded = load(tmp_path)
    assert type(loaded) is BertPretrained
    assert_equal(loaded, bert.config, loaded.params, bert.tokenizer)
    jax.tree.map(np.testing.assert_array_equal, loaded.params["encoder"], bert.params["encoder"])


def test_the_newest_checkpoint_of_a_work_directory(bert, tmp_path):
    write_run(tmp_path, bert.config, bert.tokenizer, jax.tree.map(lambda x: x * 0, bert.params), bert.params)
    loaded = load(tmp_path)
    assert type(loaded) is BertPretrained
    assert_equal(loaded, bert.config, bert.params, bert.tokenizer)


def test_a_work_directory_of_elmo_has_the_softmax(tmp_path):
    params = jax.jit(ELMO.build().init_params)(jax.random.key(0))
    tokenizer = WordVocabulary(["<S>", "</S>", "<UNK>", "the"])
    write_run(tmp_path, ELMO, tokenizer, params)
    loaded = load(tmp_path)
    assert type(loaded) is ELMoPretrained
    assert_equal(loaded, ELMO, params, tokenizer)
    ((_, count),) = loaded.score(["the cat"])
    assert count == 2


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "neither a model directory"),
        ({"config.json": "{"}, "config.json is not JSON: "),
        ({"config.json": "[]"}, "config.json is not a JSON object"),
        ({"config.json": "{}"}, "config.json: model_type is None; supported: bert"),
        ({"config.json": '{"model_type": "gpt2"}'}, "config.json: model_type is 'gpt2'; supported: bert, openai-gpt"),
        ({"run.json": RunRecord("bert", {"model": {"depth": 1}}, SEGMENTS, {}, {}, []).to_json()}, "run.json: .*depth"),
        (
            {"run.json": RunRecord("bert", {"model": {"vocab_size": 9}}, SEGMENTS, {}, {}, []).to_json()},
            "no checkpoint",
        ),
    ],
)
def test_other_directories_are_refused(files, complaint, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=complaint) as error:
        load(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
