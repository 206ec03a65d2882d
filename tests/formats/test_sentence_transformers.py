"""Directories of sentence-transformers, old and new: their vectors against plain computations with torch."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from model_directories import contents
from safetensors.torch import save_file

from prelm_jax.errors import InputError
from prelm_jax.formats.sentence_transformers import read_vectors, write_vectors
from prelm_jax.inference.pooling import Pooling
from prelm_jax.loading import load

TOLERANCE = 5e-6  # Of what is computed in float64.
TEXTS = ["the cat sat on the mat.", "unable cats", "a", "cat! " * 9, "a " * 30]
OLD, NEW = "sentence_transformers.models.{}", "sentence_transformers.base.modules.{}"
MODES = {  # Our name: the new form's, the old form's.
    "cls": ("cls", "cls_token"),
    "max": ("max", "max_tokens"),
    "mean": ("mean", "mean_tokens"),
    "mean-sqrt": ("mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
    "weighted-mean": ("weightedmean", "weightedmean_tokens"),
    "last": ("lasttoken", "lasttoken"),
}
BOTH = pytest.mark.parametrize("form", ["old", "new"])


def write_json(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def publish(bert_directory, tmp_path):
    """`publish(modes, form, ...)` is a directory as versions before or since 5.4 save it."""

    def publish(modes=("mean",), form="old", modules=(), pooling=(), encoder=(), prompts=None):
        directory = shutil.copytree(bert_directory, tmp_path / "model")
        names = ["Transformer", "Pooling", *(module["name"] for module in modules)]
        entries = []
        for i, name in enumerate(names):
            kind = OLD.format(name) if form == "old" else NEW.format(f"{name.lower()}.{name}")
            entries.append({"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": kind})
        write_json(directory / "modules.json", entries)
        if form == "old":
            config = {"word_embedding_dimension": 32}
            config |= {f"pooling_mode_{old}": mode in modes for mode, (_, old) in MODES.items()}
            settings = {"max_seq_length": 12, "do_lower_case": False}
        else:
            chosen = [MODES[mode][0] for mode in modes]
            config = {"embedding_dimension": 32, "pooling_mode": chosen[0] if len(chosen) == 1 else chosen}
            settings = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
            limit = json.loads((directory / "tokenizer_config.json").read_text()) | {"model_max_length": 12}
            write_json(directory / "tokenizer_config.json", limit)
        write_json(directory / "1_Pooling/config.json", config | dict(pooling))
        write_json(directory / "sentence_bert_config.json", settings | dict(encoder))
        for i, module in enumerate(modules, 2):
            if module["name"] == "Dense":
                folder = directory / f"{i}_Dense"
                write_json(folder / "config.json", module["config"])
                save_file(module["tensors"], folder / "model.safetensors")
        if prompts is not None:
            write_json(directory / "config_sentence_transformers.json", prompts)
        return directory

    return publish


def states_of(bert_reference, bert_directory, text):
    """The last hidden states [tokens, 32] of a text of at most 12 tokens, as transformers computes them in float64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_directory)
    ids = tokenizer(text, truncation=True, max_length=12)["input_ids"]
    with torch.no_grad():
        return copy.deepcopy(bert_reference.bert).double()(input_ids=torch.tensor([ids])).last_hidden_state[0]


def pool(mode, states, skipped=0):
    """The definition, token by token."""
    kept = [(i + 1, state) for i, state in enumerate(states) if i >= skipped]
    total = sum(state for _, state in kept)
    return {
        "cls": lambda: kept[0][1],
        "max": lambda: torch.stack([state for _, state in kept]).max(0).values,
        "mean": lambda: total / len(kept),
        "mean-sqrt": lambda: total / len(kept) ** 0.5,
        "weighted-mean": lambda: sum(n * state for n, state in kept) / sum(n for n, _ in kept),
        "last": lambda: kept[-1][1],
    }[mode]()


def assert_vectors(found, expected):
    assert all(vector.dtype == np.float32 for vector in found)
    vectors_ND, expected_ND = np.stack(found), torch.stack(expected).numpy()
    lengths_N1 = np.linalg.norm(expected_ND, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors_ND, expected_ND, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(vectors_ND / lengths_N1, expected_ND / lengths_N1, atol=2e-6, rtol=0)


@BOTH
@pytest.mark.parametrize("modes", [("cls",), tuple(MODES)], ids="+".join)
def test_poolings(modes, form, publish, bert_reference, bert_directory):
    model = load(publish(modes, form))
    assert model.pooling.width(32) == 32 * len(modes)
    states = [states_of(bert_reference, bert_directory, text) for text in TEXTS]
    expected = [torch.cat([pool(mode, each) for mode in modes]) for each in states]
    assert_vectors(list(model.vectors(TEXTS, truncate=True)), expected)


def test_without_modules_it_is_the_mean(bert_reference, bert_directory):
    """As in sentence-transformers; a text has the same bits in any company."""
    model = load(bert_directory)
    (alone,) = model.vectors(["unable cats"])
    expected = pool("mean", states_of(bert_reference, bert_directory, "unable cats"))
    np.testing.assert_allclose(alone, expected, atol=TOLERANCE, rtol=0)
    _, among, _ = model.vectors(["a", "unable cats", "the cat"])
    np.testing.assert_array_equal(among, alone)


ACTIVATIONS = {
    "linear.Identity": lambda x: x,
    "activation.Tanh": torch.tanh,
    "activation.ReLU": torch.relu,
    "activation.GELU": torch.nn.functional.gelu,
    "activation.Sigmoid": torch.sigmoid,
}


@BOTH
def test_modules_after_the_pooling(form, publish, bert_reference, bert_directory):
    """Dense with each activation, some with a residual path: a projection if sizes differ, else the identity."""
    generator = torch.Generator().manual_seed(1)

    def dense(width, size, activation, residual=False):
        tensors = {"linear.weight": torch.randn(size, width, generator=generator) * 0.3}
        if not residual:
            tensors["linear.bias"] = torch.randn(size, generator=generator)
        elif width != size:
            tensors["residual.weight"] = torch.randn(size, width, generator=generator)
        config = {"in_features": width, "out_features": size, "bias": not residual, "use_residual": residual}
        config["activation_function"] = f"torch.nn.modules.{activation}"
        return {"name": "Dense", "config": config, "tensors": tensors}

    first = [dense(32, 20, "activation.GELU"), {"name": "Normalize"}, dense(20, 8, "activation.ReLU", residual=True)]
    last = [dense(8, 8, "activation.Tanh", residual=True), dense(8, 8, "activation.Sigmoid")]
    layers = [*first, *last, dense(8, 8, "linear.Identity")]
    model = load(publish(form=form, modules=layers))
    assert model.pooling.width(32) == 8
    expected = []
    for text in TEXTS:
        x = pool("mean", states_of(bert_reference, bert_directory, text))
        for layer in layers:
            if layer["name"] == "Normalize":
                x = x / x.norm()
                continue
            w = {name: tensor.double() for name, tensor in layer["tensors"].items()}
            activation = ACTIVATIONS[layer["config"]["activation_function"].removeprefix("torch.nn.modules.")]
            y = activation(w["linear.weight"] @ x + w.get("linear.bias", 0))
            residual = w["residual.weight"] @ x if "residual.weight" in w else x
            x = y + residual if layer["config"]["use_residual"] else y
        expected.append(x)
    assert_vectors(list(model.vectors(TEXTS, truncate=True)), expected)


@BOTH
def test_the_longest_text(form, publish):
    model = load(publish(form=form))
    assert model.vector_room == 10
    with pytest.raises(InputError, match="line 2 has 11 tokens, but the model takes 10"):
        list(model.vectors(["a " * 10, "a " * 11]))
    whole, cut = model.vectors(["a " * 10, "a " * 11], truncate=True)
    np.testing.assert_array_equal(whole, cut)
    with pytest.raises(InputError, match="line 3 is blank"):
        list(model.vectors(["a", "cat", " "]))


@BOTH
def test_prompts(form, publish, bert_reference, bert_directory):
    prompts = {"prompts": {"query": "the cat ", "document": ""}, "default_prompt_name": "query"}
    directory = publish(tuple(MODES), form, pooling={"include_prompt": False}, prompts=prompts)
    model = load(directory)
    states = states_of(bert_reference, bert_directory, "the cat sat on")
    whole = torch.cat([pool(mode, states) for mode in MODES])
    for prompt in (None, "query"):
        expected = torch.cat([pool(mode, states, skipped=3) for mode in MODES])
        assert_vectors(list(model.vectors(["sat on"], prompt=prompt)), [expected])
    assert_vectors(list(model.vectors(["the cat sat on"], prompt="document")), [whole])
    with pytest.raises(InputError, match=r"'passage'.*query, document"):
        list(model.vectors(["a"], prompt="passage"))
    spoil(directory, "1_Pooling/config.json", include_prompt=True)
    assert_vectors(list(load(directory).vectors(["sat on"])), [whole])
    for each in (model, load(directory)):
        with pytest.raises(InputError, match="line 2 is blank"):
            list(each.vectors(["sat on", " "]))


def test_lower_case(publish):
    directory = publish(encoder={"do_lower_case": True})
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    write_json(
        directory / "tokenizer_config.json", settings | {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}
    )
    upper, lower = load(directory).vectors(["THE Cat", "the cat"])
    np.testing.assert_array_equal(upper, lower)


def test_the_encoder_in_a_folder_of_its_own(publish):
    """As the first versions saved it."""
    directory = publish()
    (before,) = load(directory).vectors(["a cat"])
    (directory / "0_BERT").mkdir()
    for name in contents(directory):
        if name != "modules.json":
            (directory / name).rename(directory / "0_BERT" / name)
    modules = json.loads((directory / "modules.json").read_text())
    write_json(directory / "modules.json", [modules[0] | {"path": "0_BERT"}, *modules[1:]])
    model = load(directory)
    assert model.vector_room == 10
    np.testing.assert_array_equal(next(model.vectors(["a cat"])), before)


def test_other_layers_and_modes(publish, bert_reference, bert_directory):
    model = load(publish())
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_directory)
    reference = copy.deepcopy(bert_reference.bert).double()
    found = reference(**tokenizer("the cat", return_tensors="pt"), output_hidden_states=True).hidden_states
    first, second = (states[0].detach() for states in found[1:])
    both = torch.cat([torch.cat([first, second], 1).mean(0), torch.cat([first, second], 1).max(0).values])
    assert_vectors(list(model.vectors(["the cat"], pooling=Pooling(("mean", "max"), (-2, -1)))), [both])


def spoil(directory, file, **changes):
    content = json.loads((directory / file).read_text())
    write_json(directory / file, content | changes)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("1_Pooling/config.json", {"word_embedding_dimension": 31}, "31"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "median"),
        ("1_Pooling/config.json", {"pooling_mode": []}, "pooling_mode"),
        ("1_Pooling/config.json", {"include_prompt": 3}, "include_prompt"),
        ("sentence_bert_config.json", {"max_seq_length": -1}, "max_seq_length"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "fill-mask"),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "'q'"),
        ("config_sentence_transformers.json", {"prompts": 3}, "prompts"),
        ("2_Dense/config.json", {"in_features": 31}, "31"),
        ("2_Dense/config.json", {"out_features": 5}, "linear.weight"),
        ("2_Dense/config.json", {"activation_function": "evil.Tanh"}, "evil.Tanh"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Mish"}, "Mish"),
        ("2_Dense/config.json", {"use_residual": True}, "residual.weight"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name"),
    ],
)
def test_what_cannot_be_read(file, changes, words, publish):
    config = {"in_features": 32, "out_features": 4}
    tensors = {"linear.weight": torch.ones(4, 32), "linear.bias": torch.ones(4)}
    dense = {"name": "Dense", "config": config, "tensors": tensors}
    directory = publish(modules=[dense], prompts={"prompts": {}})
    read_vectors(directory, 32)
    spoil(directory, file, **changes)
    with pytest.raises(InputError) as refused:
        read_vectors(directory, 32)
    assert file.partition("/")[0] in str(refused.value) and words in str(refused.value)


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ([], "modules.json"),
        ([{"type": "Transformer"}], "a Pooling"),
        ([{"path": "a", "type": OLD.format("Pooling")}, {"type": OLD.format("Transformer")}], "Transformer"),
        ([None, {"path": "../1_Pooling", "type": OLD.format("Pooling")}], "../1_Pooling"),
        ([None, {"path": "/1_Pooling", "type": OLD.format("Pooling")}], "/1_Pooling"),
        ([None, {"path": "1_Pooling", "type": "mine.Pooling"}], "mine.Pooling"),
        ([None, None, {"path": "2", "type": OLD.format("LSTM")}], "LSTM"),
        ([None, None, {"path": "2_Dense", "type": OLD.format("Dense")}], "2_Dense"),
        ([{"path": 3, "type": "a"}], "path"),
        ({}, "modules.json"),
    ],
)
def test_modules_that_cannot_be_read(modules, words, publish):
    directory = publish()
    known = json.loads((directory / "modules.json").read_text())
    if isinstance(modules, list):
        modules = [known[i] if module is None else module for i, module in enumerate(modules)]
    write_json(directory / "modules.json", modules)
    shutil.copytree(directory / "1_Pooling", directory.parent / "1_Pooling")
    with pytest.raises(InputError) as refused:
        read_vectors(directory, 32)
    assert words in str(refused.value) and ("modules.json" in str(refused.value) or words == "2_Dense")


def test_a_pickle_is_never_read(publish):
    tensors = {"linear.weight": torch.ones(4, 32), "linear.bias": torch.ones(4)}
    dense = {"name": "Dense", "config": {"in_features": 32, "out_features": 4}, "tensors": tensors}
    directory = publish(modules=[dense])
    (directory / "2_Dense/model.safetensors").unlink()
    torch.save(tensors, directory / "2_Dense/pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle"):
        load(directory)


@pytest.fixture
def library():
    return pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")


def test_the_library_opens_what_is_written(library, bert_directory, tmp_path):
    directory = shutil.copytree(bert_directory, tmp_path / "model")
    model = load(directory)
    write_vectors(model.loaded, directory)
    theirs = library.SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    assert theirs.max_seq_length == 24 and theirs.get_embedding_dimension() == 32
    ours = np.stack(list(model.vectors(TEXTS, truncate=True)))
    np.testing.assert_allclose(ours, theirs.encode(TEXTS), atol=2e-6, rtol=0)


def test_against_the_library(library, publish):
    generator = torch.Generator().manual_seed(1)
    tensors = {"linear.weight": torch.randn(8, 64, generator=generator), "linear.bias": torch.zeros(8)}
    dense = {"name": "Dense", "config": {"in_features": 64, "out_features": 8}, "tensors": tensors}
    directory = publish(("mean", "last"), modules=[dense, {"name": "Normalize"}])
    theirs = library.SentenceTransformer(str(directory), device="cpu", local_files_only=True).encode(TEXTS)
    np.testing.assert_allclose(np.stack(list(load(directory).vectors(TEXTS, truncate=True))), theirs, atol=2e-6, rtol=0)
