"""BERT directories to and from transformers, and embed, fill and score against plain computations with it."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from model_directories import assert_params_equal, change, configure
from safetensors.numpy import load_file

from prelm_jax.errors import InputError
from prelm_jax.formats.huggingface_bert import tensor_name
from prelm_jax.formats.model import abstract_params, load, save
from prelm_jax.inference import batching
from prelm_jax.models.bert import BertConfig
from prelm_jax.training.parameters import path_name

TOLERANCE = 2e-5
TEXTS = ["the cat sat on the mat.", "", "unable cats", "a", " \t ", "cat! " * 9, "the mat sat, zing?"]


@pytest.fixture(scope="module")
def model(reference_directory):
    return load(reference_directory)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "model"
    save(model, directory, "# A model\n")
    return directory


@pytest.fixture(scope="module")
def tokenizer(exported):
    return transformers.AutoTokenizer.from_pretrained(exported)


@pytest.fixture
def copy(reference_directory, tmp_path):
    """A directory to spoil."""
    return shutil.copytree(reference_directory, tmp_path / "copy")


def logits(reference, ids, positions=slice(None)):
    return reference(input_ids=torch.tensor([ids])).prediction_logits.detach().numpy()[0, positions]


# Reading


def test_the_table_of_names_is_that_of_transformers(reference):
    names = [
        tensor_name(path_name(path)) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(BertConfig(9)))
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
def test_directories_of_transformers_load(architecture, reference, model, save_reference, tmp_path):
    other = getattr(transformers, architecture)(reference.config)
    target = other if hasattr(other, "bert") else None
    state = reference.state_dict()
    if target is None:
        state = {name.removeprefix("bert."): value for name, value in state.items()}
    other.load_state_dict({name: value for name, value in state.items() if name in other.state_dict()})
    loaded = load(save_reference(other, tmp_path))
    assert loaded.config == model.config
    expected = {path for path in paths(model) if path.startswith(HEADS[architecture])}
    assert loaded.missing == expected
    assert_params_equal(loaded.params, model.params, expected)


def paths(model):
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(model.params)]


def test_old_files_load(model, copy):
    words = load_file(copy / "model.safetensors")["bert.embeddings.word_embeddings.weight"]

    def rename(name):
        name = name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
        name = name.replace("LayerNorm.bias", "LayerNorm.beta")
        return name.replace("predictions.bias", "predictions.decoder.bias")

    extra = {"embeddings.position_ids": np.arange(24)[None], "cls.predictions.decoder.weight": words}
    change(copy, rename, **extra)
    loaded = load(copy)
    assert loaded.missing == frozenset()
    assert_params_equal(loaded.params, model.params)


def test_sharded_files_load(reference, model, save_reference, tmp_path):
    save_reference(reference, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_params_equal(load(tmp_path).params, model.params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cast(dtype, reference, save_reference, tmp_path):
    half = transformers.BertForPreTraining(reference.config)
    half.load_state_dict(reference.state_dict())
    loaded = load(save_reference(half.to(dtype), tmp_path))
    half = half.float().state_dict()["bert.pooler.dense.weight"].numpy()
    np.testing.assert_array_equal(loaded.params["pooler"]["kernel"], half.T)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded.params))


def test_a_vocabulary_larger_than_the_tokenizer_loads(copy):
    # Some directories pad their tables; the entries past the tokenizer's have no name.
    tensors = load_file(copy / "model.safetensors")
    grown = {
        name: np.concatenate([tensors[name], np.full_like(tensors[name][:3], value)])
        for name, value in (("bert.embeddings.word_embeddings.weight", 0), ("cls.predictions.bias", 5))
    }
    change(copy, **grown)
    size = len(grown["cls.predictions.bias"])
    configure(copy, vocab_size=size)
    loaded = load(copy)
    assert loaded.config.vocab_size == size
    filled = loaded.fill("the [MASK]", top_k=10**6)[0]
    assert len(filled) == loaded.tokenizer.vocab_size
    assert sum(probability for _, probability in filled) < 0.999


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; only 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"vocab_size": 7}, "the tokenizer has 45 entries, but vocab_size in config.json is 7"),
        ({"vocab_size": 46}, r"cls.predictions.bias is \[45\], but config.json asks for \[46\]"),
        ({"intermediate_size": 64}, r"intermediate.dense.\w+ is .*48.*, but config.json asks for .*64"),
        ({"num_hidden_layers": 3}, r"no tensor bert.encoder.layer.2.attention.\S+ \["),
        ({"model_type": "roberta"}, "model_type is 'roberta'; supported: bert"),
    ],
)
def test_what_this_bert_does_not_do_is_refused(settings, complaint, copy):
    configure(copy, **settings)
    with pytest.raises(InputError, match=complaint):
        load(copy)


def test_a_file_without_an_encoder_tensor_is_refused(copy):
    name = "bert.encoder.layer.1.output.dense.weight"
    change(copy, lambda other: None if other == name else other)
    with pytest.raises(InputError, match=rf"no tensor {name} \[32, 48\]"):
        load(copy)


def test_an_untied_decoder_is_refused(copy):
    change(copy, **{"cls.predictions.decoder.weight": np.zeros((45, 32), np.float32)})
    with pytest.raises(InputError, match="differs from the word embeddings"):
        load(copy)


def test_pickles_and_damaged_files_are_refused(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model.safetensors: cannot be read as safetensors"):
        load(copy)
    file.unlink()
    with pytest.raises(InputError, match=r"no model.safetensors"):
        load(copy)
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"pytorch_model.bin is a pickle.*save_pretrained"):
        load(copy)


# Writing


def test_transformers_computes_the_same_from_an_export(reference, exported):
    again, report = transformers.BertForPreTraining.from_pretrained(exported, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.dtype == torch.float32
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in reference.state_dict().items())
    ids = [2, 10, 20, 4, 3]
    np.testing.assert_array_equal(logits(again.eval(), ids), logits(reference, ids))


def test_a_config_is_written_as_transformers_understands_it(reference, exported):
    settings = json.loads((exported / "config.json").read_text())
    assert settings.pop("dtype") == "float32"
    theirs = reference.config.to_dict() | {"architectures": ["BertForPreTraining"]}
    assert settings.items() <= theirs.items()
    theirs = transformers.BertConfig().to_dict() | theirs
    assert transformers.BertConfig(**settings).to_dict() == theirs | {"dtype": None}


def test_export_load_export_gives_the_same_bytes(exported, tmp_path):
    save(load(exported), tmp_path, "# A model\n")
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


def test_what_a_model_lacks_is_not_written(copy, tmp_path):
    change(copy, lambda name: None if name.startswith("cls.") else name)
    loaded = load(copy)
    save(loaded, tmp_path / "again", "")
    again = load(tmp_path / "again")
    assert again.missing == loaded.missing != frozenset()


def test_the_tokenizer_of_an_export_gives_the_same_ids(model, tokenizer):
    assert tokenizer(TEXTS, add_special_tokens=False)["input_ids"] == model.tokenizer.encode_batch(TEXTS)
    assert tokenizer.model_max_length == 24
    special = model.tokenizer.special_ids
    assert tokenizer("a")["input_ids"] == [special["[CLS]"], model.tokenizer.tokens.index("a"), special["[SEP]"]]


# Using


def test_embed_equals_transformers(model, reference, tokenizer):
    results = list(model.embed(TEXTS))
    assert len(results) == len(TEXTS)
    for text, (tokens, hidden) in zip(TEXTS, results, strict=True):
        assert hidden.dtype == np.float32
        if not text.strip():
            assert tokens == []
            assert hidden.shape == (3, 0, 32)
            continue
        ids = tokenizer(text)["input_ids"]
        assert tokens == tokenizer.convert_ids_to_tokens(ids)
        states = reference.bert(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        np.testing.assert_allclose(hidden, torch.cat(states).detach(), atol=TOLERANCE, rtol=0)


def test_embed_does_not_depend_on_the_company(model, monkeypatch):
    monkeypatch.setattr(batching, "TOKENS_PER_WINDOW", 30)
    many = list(model.embed(TEXTS * 3))
    assert len(many) == 3 * len(TEXTS)
    for i, text in enumerate(TEXTS * 3):
        ((tokens, hidden),) = model.embed([text])
        assert many[i][0] == tokens
        np.testing.assert_allclose(many[i][1], hidden, atol=1e-6, rtol=0)


def test_embed_runs_full_batches(model, monkeypatch):
    monkeypatch.setattr(batching, "TOKENS_PER_BATCH", 48)  # Rows: 3 of 16, 2 of 24.
    few, many = list(model.embed(TEXTS)), list(model.embed(TEXTS * 4))
    for i, (tokens, hidden) in enumerate(many):
        assert tokens == few[i % len(TEXTS)][0]
        np.testing.assert_allclose(hidden, few[i % len(TEXTS)][1], atol=1e-6, rtol=0)


def test_long_texts_are_refused_or_cut(model):
    texts = ["a", "a " * 22, "a " * 23]
    with pytest.raises(InputError, match="line 3 has 23 tokens, but the model takes 22"):
        list(model.embed(texts))
    (_, (whole, states), (cut, cut_states)) = model.embed(texts, truncate=True)
    assert cut == whole
    np.testing.assert_array_equal(states, cut_states)
    with pytest.raises(InputError, match="line 3 has 23 tokens"):
        model.score(texts)
    with pytest.raises(InputError, match="23 tokens, but the model takes 22"):
        model.fill("a " * 22 + "[MASK]")


@pytest.mark.parametrize("text", ["The [MASK] sat on the mat.", "[MASK] cat[MASK]", "[MASK]"])
def test_fill_equals_the_pipeline_of_transformers(text, model, exported, tokenizer):
    pipeline = transformers.pipeline("fill-mask", model=str(exported), tokenizer=tokenizer, device="cpu", top_k=7)
    expected = pipeline(text)
    expected = expected if isinstance(expected[0], list) else [expected]
    found = model.fill(text, top_k=7)
    assert len(found) == len(expected) == text.count("[MASK]")
    for ours, theirs in zip(found, expected, strict=True):
        assert [token for token, _ in ours] == [model.tokenizer.tokens[candidate["token"]] for candidate in theirs]
        np.testing.assert_allclose([p for _, p in ours], [candidate["score"] for candidate in theirs], atol=1e-5)


def test_fill_needs_a_mask(model):
    with pytest.raises(InputError, match=r"no \"\[MASK\]\" in the text"):
        model.fill("the cat")


def test_score_equals_transformers(model, reference, tokenizer):
    found = model.score(TEXTS)
    assert len(found) == len(TEXTS)
    for text, (total, count) in zip(TEXTS, found, strict=True):
        ids = tokenizer(text)["input_ids"]
        expected = 0.0
        for position in range(1, len(ids) - 1):
            masked = [*ids[:position], tokenizer.mask_token_id, *ids[position + 1 :]]
            row = torch.tensor(logits(reference, masked, position), dtype=torch.float64)
            expected += row.log_softmax(-1)[ids[position]].item()
        assert count == len(ids) - 2
        assert abs(total - expected) < TOLERANCE * max(1, count)


def test_without_a_masked_lm_head_only_embed_works(copy, model):
    change(copy, lambda name: None if name.startswith("cls.") else name)
    loaded = load(copy)
    for use in (lambda: loaded.fill("[MASK]"), lambda: loaded.score(["a"])):
        with pytest.raises(InputError, match=r"no masked LM head \(cls.predictions"):
            use()
    ((_, ours),), ((_, theirs),) = loaded.embed(["the cat"]), model.embed(["the cat"])
    np.testing.assert_array_equal(ours, theirs)
