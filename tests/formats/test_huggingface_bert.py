"""BERT directories to and from transformers."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from model_directories import assert_params_equal, change, configure, grow_vocabulary
from safetensors.numpy import load_file

from prelm_jax.errors import InputError
from prelm_jax.formats.base import abstract_params, save
from prelm_jax.formats.huggingface_bert import FORMAT, LAYOUT, read
from prelm_jax.models.bert import BertConfig
from prelm_jax.training.parameters import path_name


@pytest.fixture(scope="module")
def model(bert_directory):
    return read(bert_directory)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "model"
    save(model, FORMAT, directory, "# A model\n")
    return directory


@pytest.fixture
def copy(bert_directory, tmp_path):
    """A directory to spoil."""
    return shutil.copytree(bert_directory, tmp_path / "copy")


# Reading


def test_tensor_names_match_transformers(bert_reference):
    names = [
        LAYOUT.tensor_name(path_name(path))
        for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(BertConfig(9)))
    ]
    assert len(names) == len(set(names)) == 14 + 16 * 12
    config = transformers.BertConfig(vocab_size=9)
    with torch.device("meta"):
        theirs = transformers.BertForPreTraining(config).state_dict()
    assert set(theirs) - set(names) == {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert set(names) <= set(theirs)


HEADS = {
    "BertForPreTraining": (),
    "BertForMaskedLM": ("pooler", "next_sentence"),
    "BertModel": ("masked_lm_", "next_sentence"),
}


@pytest.mark.parametrize("architecture", HEADS)
def test_every_class_of_transformers_is_read(architecture, bert_reference, model, save_bert, tmp_path):
    other = getattr(transformers, architecture)(bert_reference.config)
    target = other if hasattr(other, "bert") else None
    state = bert_reference.state_dict()
    if target is None:
        state = {name.removeprefix("bert."): value for name, value in state.items()}
    other.load_state_dict({name: value for name, value in state.items() if name in other.state_dict()})
    loaded = read(save_bert(other, tmp_path))
    assert loaded.config == model.config
    expected = {path for path in paths(model) if path.startswith(HEADS[architecture])}
    assert loaded.missing == expected
    assert_params_equal(loaded.params, model.params, expected)


def paths(model):
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(model.params)]


def test_old_files_are_read(model, copy):
    words = load_file(copy / "model.safetensors")["bert.embeddings.word_embeddings.weight"]

    def rename(name):
        name = name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
        name = name.replace("LayerNorm.bias", "LayerNorm.beta")
        return name.replace("predictions.bias", "predictions.decoder.bias")

    extra = {"embeddings.position_ids": np.arange(24)[None], "cls.predictions.decoder.weight": words}
    change(copy, rename, **extra)
    loaded = read(copy)
    assert loaded.missing == frozenset()
    assert_params_equal(loaded.params, model.params)


def test_sharded_files_are_read(bert_reference, model, save_bert, tmp_path):
    save_bert(bert_reference, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_params_equal(read(tmp_path).params, model.params)


@pytest.mark.parametrize(
    ("weight_map", "complaint"),
    [
        ([], r"weight_map is \[\]: must be an object"),
        (None, "weight_map is null"),
        ({"a": 1}, "weight_map.a is 1: must be UTF-8 text"),
        ({"a": "../secret/s.safetensors"}, r"weight_map.a is \S+: must be the name of a .safetensors file"),
        ({"a": "/secret/s.safetensors"}, "weight_map.a is"),
        ({"a": r"..\s.safetensors"}, "weight_map.a is"),
        ({"a": "s\0.safetensors"}, "weight_map.a is"),
        ({"a": "pytorch_model.bin"}, "weight_map.a is"),
        ({"a": "lost.safetensors"}, "lost.safetensors: cannot be read"),
    ],
)
def test_an_index_holds_names_of_files(weight_map, complaint, copy):
    """Files elsewhere are not read."""
    (copy.parent / "secret").mkdir()
    shutil.move(copy / "model.safetensors", copy.parent / "secret" / "s.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(InputError, match=f"model.safetensors.index.json: {complaint}|{copy}/{complaint}"):
        read(copy)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (np.array([1, np.nan], np.float32), "has 1 values that are NaN or infinite"),
        (np.array([-np.inf, np.inf], np.float16), "has 2 values"),
        (np.array([1e300, 0], np.float64), "has 1 values"),
        (np.zeros(2, np.int8), "is of int8; quantized"),
    ],
)
def test_weights_are_finite(value, complaint, copy):
    name = "cls.seq_relationship.bias"
    change(copy, **{name: value})
    with pytest.raises(InputError, match=f"tensor {name} {complaint}"):
        read(copy)


def test_types_that_numpy_lacks_are_named(copy):
    file = copy / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in tensors if name.endswith("seq_relationship.bias"))
    safetensors.torch.save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"model.safetensors: .*seq_relationship.bias .* quantized models"):
        read(copy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cast_to_fp32(dtype, bert_reference, save_bert, tmp_path):
    half = transformers.BertForPreTraining(bert_reference.config)
    half.load_state_dict(bert_reference.state_dict())
    loaded = read(save_bert(half.to(dtype), tmp_path))
    half = half.float().state_dict()["bert.pooler.dense.weight"].numpy()
    np.testing.assert_array_equal(loaded.params["pooler"]["kernel"], half.T)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded.params))


def test_a_vocabulary_larger_than_the_tokenizer_is_read(copy):
    grow_vocabulary(copy)
    assert read(copy).config.vocab_size == 48


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; only 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"vocab_size": 7}, "config.json: vocab_size is 7, but the tokenizer has 45 tokens"),
        ({"vocab_size": 46}, r"cls.predictions.bias is \[45\], but config.json asks for \[46\]"),
        ({"intermediate_size": 64}, r"intermediate.dense.\w+ is .*48.*, but config.json asks for .*64"),
        ({"num_hidden_layers": 3}, "config.json: num_hidden_layers is 3, but 2 layers"),
        ({"num_hidden_layers": 1}, "config.json: num_hidden_layers is 1, but 2 layers"),
        ({"num_hidden_layers": -1}, "config.json: num_hidden_layers is -1: must be at least 1"),
        ({"num_hidden_layers": 10**9}, "config.json: num_hidden_layers is 1000000000: must be at most"),
        ({"num_hidden_layers": "2"}, 'config.json: num_hidden_layers is "2": must be an integer'),
        ({"num_attention_heads": 5}, "config.json: num_attention_heads is 5: must divide the hidden size, 32"),
        ({"num_attention_heads": 0}, "config.json: num_attention_heads is 0: must be at least 1"),
        ({"hidden_size": 0}, "config.json: hidden_size is 0: must be at least 1"),
        ({"hidden_size": True}, "config.json: hidden_size is true: must be an integer"),
        ({"layer_norm_eps": "a"}, 'config.json: layer_norm_eps is "a": must be a finite number'),
        ({"layer_norm_eps": float("nan")}, "config.json: layer_norm_eps is NaN"),
        ({"hidden_dropout_prob": 1}, "config.json: hidden_dropout_prob is 1: must be below 1"),
        ({"vocab_size": None}, "config.json: no vocab_size"),
    ],
)
def test_unsupported_settings_are_refused(settings, complaint, copy):
    configure(copy, **settings)
    with pytest.raises(InputError, match=complaint):
        read(copy)


def test_a_file_without_an_encoder_tensor_is_refused(copy):
    name = "bert.encoder.layer.1.output.dense.weight"
    change(copy, lambda other: None if other == name else other)
    with pytest.raises(InputError, match=rf"no tensor {name} \[32, 48\]"):
        read(copy)


def test_an_untied_decoder_is_refused(copy):
    change(copy, **{"cls.predictions.decoder.weight": np.zeros((45, 32), np.float32)})
    with pytest.raises(InputError, match=r"cls.predictions.decoder.weight differs from bert\.embeddings\.word_embe"):
        read(copy)


def test_pickles_and_damaged_files_are_refused(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model.safetensors: cannot be read as safetensors"):
        read(copy)
    file.unlink()
    with pytest.raises(InputError, match=r"no model.safetensors"):
        read(copy)
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"pytorch_model.bin is a pickle.*save_pretrained"):
        read(copy)


# Writing


def test_transformers_computes_the_same_from_an_export(bert_reference, exported):
    again, report = transformers.BertForPreTraining.from_pretrained(exported, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.dtype == torch.float32
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in bert_reference.state_dict().items())
    ids = [2, 10, 20, 4, 3]
    ours, theirs = (model(input_ids=torch.tensor([ids])).prediction_logits for model in (again.eval(), bert_reference))
    assert torch.equal(ours, theirs)


def test_config_json_matches_transformers(bert_reference, exported):
    settings = json.loads((exported / "config.json").read_text())
    assert settings.pop("dtype") == "float32"
    theirs = bert_reference.config.to_dict() | {"architectures": ["BertForPreTraining"]}
    assert settings.items() <= theirs.items()
    theirs = transformers.BertConfig().to_dict() | theirs
    assert transformers.BertConfig(**settings).to_dict() == theirs | {"dtype": None}


def test_export_load_export_gives_the_same_bytes(exported, tmp_path):
    save(read(exported), FORMAT, tmp_path, "# A model\n")
    files = sorted(file.name for file in exported.iterdir())
    assert files == [
        "README.md",
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    assert files == sorted(file.name for file in tmp_path.iterdir())
    for name in files:
        assert (exported / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_missing_parameters_are_not_written(copy, tmp_path):
    change(copy, lambda name: None if name.startswith("cls.") else name)
    loaded = read(copy)
    save(loaded, FORMAT, tmp_path / "again", "")
    again = read(tmp_path / "again")
    assert again.missing == loaded.missing != frozenset()


def test_a_size_that_the_format_lacks_is_refused(model, tmp_path):
    config = dataclasses.replace(model.config, embedding_size=16)
    with pytest.raises(InputError, match="embedding_size 16"):
        save(dataclasses.replace(model, config=config), FORMAT, tmp_path / "model", "")
    assert list(tmp_path.iterdir()) == []


def test_exported_tokenizer_gives_the_same_ids(model, exported):
    texts = ["the cat sat on the mat.", "", "unable cats", "a", " \t ", "cat! " * 9, "the mat sat, zing?"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == model.tokenizer.encode_batch(texts)
    assert tokenizer.model_max_length == 24
    special = model.tokenizer.special_ids
    assert tokenizer("a")["input_ids"] == [special["[CLS]"], model.tokenizer.tokens.index("a"), special["[SEP]"]]


def test_the_usage_on_the_card_runs(exported, capsys):
    code = FORMAT.usage.format(name=exported).removeprefix("```python\n").removesuffix("```")
    exec(code.replace('pipeline("', 'answer = pipeline("'), names := {})
    assert len(names["answer"]) == 5
