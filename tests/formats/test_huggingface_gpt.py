"""GPT directories to and from transformers, and from the authors' format."""

import dataclasses
import json
import shutil
import tarfile

import jax
import numpy as np
import pytest
import torch
import transformers
from model_directories import (
    GPT_SIZES,
    GPT_TOKENS,
    LETTERS,
    assert_params_equal,
    change,
    configure,
    randomize,
    save_gpt_vocabulary,
)
from safetensors.numpy import load_file

from prelm_jax.errors import InputError
from prelm_jax.formats.base import abstract_params, save
from prelm_jax.formats.huggingface_gpt import FORMAT, LAYOUT, read
from prelm_jax.inference.gpt import GPTPretrained
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.training.parameters import path_name


@pytest.fixture(scope="module")
def model(gpt_directory):
    return read(gpt_directory)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "model"
    save(model, FORMAT, directory, "# A model\n")
    return directory


@pytest.fixture
def copy(exported, tmp_path):
    """A directory to spoil."""
    return shutil.copytree(exported, tmp_path / "copy")


# Reading


def test_tensor_names_match_transformers():
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(GPTConfig(9)))]
    names = [LAYOUT.tensor_name(path) for path in paths]
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
def test_every_class_of_transformers_is_read(architecture, gpt_reference, model, tmp_path):
    other = getattr(transformers, architecture)(transformers.OpenAIGPTConfig(**GPT_SIZES))
    getattr(other, "transformer", other).load_state_dict(gpt_reference.transformer.state_dict())
    other.save_pretrained(tmp_path)
    save_gpt_vocabulary(tmp_path)
    loaded = read(tmp_path)
    assert dataclasses.asdict(loaded.config) == dataclasses.asdict(model.config)
    assert loaded.missing == frozenset()
    assert_params_equal(loaded.params, model.params)


def test_old_files_are_read(model, copy):
    # Old files hold attention masks, and a config with keys of its own.
    masks = {f"transformer.h.{i}.attn.bias": np.tri(24, dtype=np.float32)[None, None] for i in range(2)}
    words = load_file(copy / "model.safetensors")["transformer.tokens_embed.weight"]
    change(copy, **masks, **{"lm_head.weight": words})
    configure(copy, n_ctx=24, n_special=0, predict_special_tokens=True)
    assert_params_equal(read(copy).params, model.params)


def write_original(directory, state, files=3):
    """Writes a state dict in the authors' format, in the order of the variables in their train.py."""
    save_gpt_vocabulary(directory)
    arrays = [state["positions_embed.weight"], state["tokens_embed.weight"]]
    for layer in range(2):
        for module in ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2"):
            weight = state[f"h.{layer}.{module}.weight"]
            arrays += [weight[None] if weight.ndim == 2 else weight, state[f"h.{layer}.{module}.bias"]]
    arrays = [array.numpy() for array in arrays]
    (directory / "params_shapes.json").write_text(json.dumps([array.shape for array in arrays]))
    for i, part in enumerate(np.array_split(np.concatenate([array.ravel() for array in arrays]), files)):
        np.save(directory / f"params_{i}.npy", part)


def test_the_authors_format_is_read(gpt_reference, model, tmp_path):
    write_original(tmp_path, gpt_reference.transformer.state_dict(), files=11)  # "params_10" sorts before "params_2".
    with pytest.raises(InputError, match=r"not a multiple of 64.*config.json.*n_head"):
        read(tmp_path)
    (tmp_path / "config.json").write_text('{"n_head": 4}')
    loaded = read(tmp_path)
    assert loaded.config == model.config
    assert_params_equal(loaded.params, model.params)


def test_the_authors_heads_are_64_wide(tmp_path, gpt_ids_of):
    config = transformers.OpenAIGPTConfig(vocab_size=len(GPT_TOKENS), n_embd=128, n_layer=2, n_head=2, n_positions=8)
    reference = randomize(transformers.OpenAIGPTModel(config))
    write_original(tmp_path, reference.state_dict())
    ((_, hidden),) = GPTPretrained(read(tmp_path)).embed(["the cat sat"])
    expected = reference(input_ids=torch.tensor([gpt_ids_of("the cat sat")])).last_hidden_state[0].detach()
    np.testing.assert_allclose(hidden[-1], expected, atol=2e-5, rtol=0)
    for damaged in ((tmp_path / "params_2.npy").read_bytes()[:200], b"", b"PK\3\4"):
        (tmp_path / "params_2.npy").write_bytes(damaged)
        with pytest.raises(InputError, match=r"params_\*.npy cannot be read as arrays"):
            read(tmp_path)
    (tmp_path / "params_2.npy").unlink()
    with pytest.raises(InputError, match=r"\d+ numbers in 2 files params_\*.npy, .*params_shapes.json.* \d+"):
        read(tmp_path)
    (tmp_path / "params_shapes.json").write_text("[[1, 2]]")
    with pytest.raises(InputError, match=r"params_shapes.json: 1 arrays; .* 2,.* 12"):
        read(tmp_path)


def test_a_published_model_in_the_authors_format_is_read(real_data, tmp_path):
    with tarfile.open(real_data / "fixtures/allennlp-openai-transformer/transformer_small.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    directory = tmp_path / "model"
    letters = {token: i for i, token in enumerate(["<unk>", *LETTERS[:24], *(f"{c}</w>" for c in LETTERS[:24])])}
    (directory / "vocab.json").write_text(json.dumps(letters))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    (directory / "config.json").write_text('{"n_head": 2}')  # From the configuration of its users.
    loaded = read(directory)
    values = np.concatenate([np.load(directory / f"params_{i}.npy") for i in range(2)])
    np.testing.assert_array_equal(loaded.params["position_embeddings"]["embedding"], values[:500].reshape(50, 10))
    np.testing.assert_array_equal(loaded.params["token_embeddings"]["embedding"][:50], values[500:1000].reshape(50, 10))
    ((_, hidden),) = GPTPretrained(loaded).embed(["the cat sat"])
    assert hidden.shape == (3, 9, 10)
    assert np.isfinite(hidden).all()
    np.testing.assert_array_equal(loaded.params["decoder"]["layer_1"]["layer_norm"]["bias"], values[-10:])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"afn": "gelu_new"}, "afn is 'gelu_new'; only 'gelu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"vocab_size": 7}, "config.json: vocab_size is 7, but the tokenizer has 64 tokens"),
        ({"vocab_size": 65}, r"tokens_embed.weight is \[64, 32\], but config.json asks for \[65, 32\]"),
        ({"n_positions": 25}, r"positions_embed.weight is \[24, 32\]"),
        ({"n_layer": 3}, "config.json: n_layer is 3, but 2 layers"),
        ({"n_head": 5}, "config.json: n_head is 5: must divide the hidden size, 32"),
        ({"embd_pdrop": None}, "config.json: embd_pdrop is null: must be a finite number"),
    ],
)
def test_unsupported_settings_are_refused(settings, complaint, copy):
    configure(copy, **settings)
    with pytest.raises(InputError, match=complaint):
        read(copy)


def test_an_untied_head_is_refused(copy):
    change(copy, **{"lm_head.weight": np.zeros((len(GPT_TOKENS), 32), np.float32)})
    with pytest.raises(InputError, match=r"lm_head.weight differs from tokens_embed.weight"):
        read(copy)


# Writing


@pytest.mark.parametrize("architecture", CLASSES)
def test_every_class_of_transformers_loads_an_export(architecture, gpt_reference, exported):
    cls = getattr(transformers, architecture)
    again, report = cls.from_pretrained(exported, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    own_heads = {"multiple_choice_head.summary.weight", "multiple_choice_head.summary.bias", "score.weight"}
    assert set(report["missing_keys"]) <= own_heads
    assert again.dtype == torch.float32
    state = getattr(again, "transformer", again).state_dict()
    for name, value in gpt_reference.transformer.state_dict().items():
        assert torch.equal(state[name], value), name
    if hasattr(again, "lm_head"):
        assert torch.equal(again.lm_head.weight, gpt_reference.transformer.tokens_embed.weight)


def test_an_export_classifies_batches(exported):
    classifier = transformers.OpenAIGPTForSequenceClassification.from_pretrained(exported)
    assert classifier(input_ids=torch.tensor([[3, 4, 0], [5, 6, 7]])).logits.shape == (2, 2)


def test_config_json_matches_transformers(gpt_reference, exported):
    settings = json.loads((exported / "config.json").read_text())
    assert settings.pop("dtype") == "float32"
    theirs = gpt_reference.config.to_dict() | {"architectures": ["OpenAIGPTLMHeadModel"], "pad_token_id": 0}
    assert settings.items() <= theirs.items()
    assert settings["afn"] == "gelu"
    assert transformers.OpenAIGPTConfig(**settings).to_dict() == theirs | {"dtype": None}


def test_export_load_export_gives_the_same_bytes(exported, tmp_path):
    save(read(exported), FORMAT, tmp_path, "# A model\n")
    files = sorted(file.name for file in exported.iterdir())
    tokenizer = ["merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert files == sorted(["README.md", "config.json", "model.safetensors", *tokenizer])
    assert files == sorted(file.name for file in tmp_path.iterdir())
    for name in files:
        assert (exported / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_tensors_equal_those_of_transformers(gpt_reference, exported, tmp_path):
    gpt_reference.save_pretrained(tmp_path)
    theirs, ours = load_file(tmp_path / "model.safetensors"), load_file(exported / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_an_export_is_padded_and_scored_as_by_babylm(model, exported):
    """Its pipeline reads offsets, pads with the tokenizer's token, and scores the tokens after the first."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    assert tokenizer.pad_token_id == theirs.config.pad_token_id == 0 and tokenizer.is_fast
    texts = ["the cat sat on the mat.", "on the mat"]
    encoded = [tokenizer(text, return_offsets_mapping=True) for text in texts]
    assert [each["offset_mapping"][-1][1] for each in encoded] == list(map(len, texts))
    rows = [torch.tensor(each["input_ids"]) for each in encoded]
    padded, mask = (
        torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=tokenizer.pad_token_id)
        for each in (rows, [torch.ones_like(row) for row in rows])
    )
    logits = theirs(input_ids=padded, attention_mask=mask).logits.detach().log_softmax(-1)
    for (total, _), row, text in zip(GPTPretrained(model).score(texts), rows, logits, strict=True):
        expected = sum(text[i, id].item() for i, id in enumerate(row[1:]))
        assert abs(total - expected) < 1e-4
