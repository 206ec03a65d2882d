"""TensorFlow checkpoints: the table, the variables, the checksum, and BERT as its authors published it."""

import json
import shutil
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from model_directories import BERT_SIZES, VOCABULARY, assert_params_equal
from tensorflow_checkpoint import (
    MAGIC,
    block,
    checksummed,
    crc32c,
    entry,
    header,
    index,
    masked,
    original_name,
    original_variables,
    table,
    varint,
    write,
)

from prelm_jax.cli.main import main
from prelm_jax.errors import InputError
from prelm_jax.formats import tensorflow
from prelm_jax.formats.huggingface_bert import read
from prelm_jax.formats.tensorflow import masked_crc32c, open_checkpoint
from prelm_jax.loading import load

SLOTS = ("adam_m", "adam_v")
CONFIG = {"hidden_act": "gelu", "directionality": "bidi", "pooler_type": "first_token_transform", **BERT_SIZES}


def arrays(model) -> dict[str, np.ndarray]:
    """The state of a model of transformers."""
    return {name: value.numpy() for name, value in model.state_dict().items()}


def publish(directory, variables, config=CONFIG, vocabulary=VOCABULARY, **options):
    """A directory as the authors published theirs."""
    directory.mkdir(exist_ok=True)
    (directory / "bert_config.json").write_text(json.dumps(config))
    (directory / "vocab.txt").write_text("\n".join(vocabulary))
    write(directory / "bert_model.ckpt", variables, **options)
    return directory


@pytest.fixture(scope="module")
def variables(bert_reference):
    return original_variables(arrays(bert_reference))


@pytest.fixture(scope="module")
def published(variables, tmp_path_factory):
    """A directory like a published one's; do not change it."""
    return publish(tmp_path_factory.mktemp("published"), variables)


# BERT


def test_a_checkpoint_is_the_model_that_transformers_saved(variables, bert_directory, tmp_path):
    slots = {f"{name}/{slot}": np.ones_like(value) for name, value in variables.items() for slot in SLOTS}
    steps = {"global_step": np.array(900_000)}
    publish(tmp_path, variables | slots | steps, num_shards=3, per_block=5)
    found, expected = read(tmp_path), read(bert_directory)
    assert found.config == expected.config
    assert found.tokenizer.tokens == expected.tokenizer.tokens
    assert found.missing == frozenset()
    assert_params_equal(found.params, expected.params)


def test_the_commands_take_a_checkpoint(published, bert_directory, capsys):
    printed = []
    for directory in (published, bert_directory):
        main(["fill", str(directory), "the cat [MASK] on the mat"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


def test_heads_may_be_missing(variables, tmp_path):
    publish(tmp_path, {name: value for name, value in variables.items() if not name.startswith("cls/")})
    assert {path.partition("/")[0] for path in read(tmp_path).missing} == {
        "masked_lm_bias",
        "masked_lm_layer_norm",
        "masked_lm_transform",
        "next_sentence",
    }


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_precisions_are_cast_to_fp32(dtype, variables, tmp_path):
    cast = {name: value.astype(dtype) for name, value in variables.items()}
    params = read(publish(tmp_path, cast)).params
    kernel = cast["bert/encoder/layer_1/intermediate/dense/kernel"]
    np.testing.assert_array_equal(params["encoder"]["layer_1"]["intermediate"]["kernel"], kernel.astype(np.float32))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


def test_a_vocabulary_with_capital_letters_is_not_lower_cased(variables, tmp_path):
    cased = ["The" if token == "the" else token for token in VOCABULARY]
    marked = ["<T>" if token == "the" else token for token in VOCABULARY]
    assert not read(publish(tmp_path / "cased", variables, vocabulary=cased)).tokenizer.lowercase
    assert read(publish(tmp_path / "uncased", variables, vocabulary=marked)).tokenizer.lowercase


def test_config_json_may_stand_beside_the_checkpoint(published, tmp_path):
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "bert_config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "bert"}))
    (tmp_path / "bert_config.json").unlink()
    assert_params_equal(load(tmp_path).params, read(published).params)


@pytest.mark.parametrize(
    ("change", "complaints"),
    [
        (lambda d: (d / "bert_model.ckpt.index").unlink(), ["bert_config.json", "NAME.index", "none"]),
        (lambda d: (d / "b.index").write_bytes(b""), ["b.index, bert_model.ckpt.index"]),
        (lambda d: (d / "vocab.txt").unlink(), ["vocab.txt"]),
        (lambda d: (d / "bert_config.json").unlink(), ["bert_model.ckpt.index", "bert_config.json"]),
        (lambda d: (d / "bert_config.json").write_text(json.dumps(CONFIG | {"hidden_size": 36})), ["bert_config.json"]),
        (
            lambda d: (d / "bert_config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 3})),
            ["num_hidden_layers"],
        ),
    ],
)
def test_incomplete_directories_are_refused(change, complaints, published, tmp_path):
    change(shutil.copytree(published, tmp_path / "copy"))
    message = refusal(lambda: load(tmp_path / "copy"))
    assert all(complaint in message for complaint in [str(tmp_path / "copy"), *complaints])


@pytest.mark.parametrize("name", ["bert_model.ckpt", "bert_model.ckpt.index", "vocab.txt"])
def test_a_path_inside_the_directory_is_refused_with_the_directory(name, published):
    assert refusal(lambda: load(published / name)).endswith(f"give {published}")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("pytorch_model.bin", "save_pretrained"),
        ("pytorch_model.bin.index.json", "save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "save_pretrained"),
        ("tf_model.h5", "from_tf=True"),
        ("flax_model.msgpack", "from_flax=True"),
        ("flax_model-00001-of-00002.msgpack", "from_flax=True"),
        ("model.ckpt-90.index", "bert_config.json"),
    ],
)
@pytest.mark.parametrize("settings_file", ["config.json", "bert_config.json", "notes.json"])
def test_foreign_weights_are_refused_with_a_remedy(name, remedy, settings_file, tmp_path):
    (tmp_path / settings_file).write_text(json.dumps(CONFIG | {"model_type": "bert"}))
    (tmp_path / name).write_bytes(b"")
    message = refusal(lambda: load(tmp_path))
    assert name in message
    assert remedy in message or (name.endswith(".index") and settings_file != "notes.json")


def refusal(action) -> str:
    with pytest.raises(InputError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_published_checkpoint(real_data):
    """Keras-BERT's. Its data file holds all variables in the order of their names, end to end; the last is an int64."""
    directory = real_data / "fixtures/keras-bert-toy-checkpoint"
    sizes = {key: value for key, value in json.loads((directory / "bert_config.json").read_text()).items()}
    reference = transformers.BertForPreTraining(transformers.BertConfig(**sizes)).eval()
    shapes = {name: array.shape for name, array in original_variables(arrays(reference)).items()}
    size = {name + slot: np.prod(shape) for name, shape in shapes.items() for slot in ("", "/m", "/v")}
    numbers = np.fromfile(directory / "bert_model.ckpt.data-00000-of-00001", "<f4")
    *parts, step = np.split(numbers, np.cumsum([size[name] for name in sorted(size)]))
    assert step.size == 2
    variables = dict(zip(sorted(size), parts, strict=True))
    state = {}
    for name in arrays(reference):
        if (original := original_name(name)) in shapes:
            array = variables[original].reshape(shapes[original])
            state[name] = torch.tensor(array.T if original.endswith("/kernel") else array)
    reference.load_state_dict(state, strict=False)
    model = load(directory)
    (table,) = (value for name, value in state.items() if "word_embeddings" in name)
    np.testing.assert_array_equal(model.params["word_embeddings"]["embedding"][: len(table)], table)
    for text in ("all work and no play", "makes jack a dull boy"):
        ((_, hidden),) = model.embed([text])
        ids = [[2, *model.tokenizer.encode_batch([text])[0], 3]]
        with torch.no_grad():
            theirs = reference.bert(torch.tensor(ids), output_hidden_states=True).hidden_states
        np.testing.assert_allclose(hidden, np.concatenate(theirs), atol=2e-6)


# The checksum


def test_crc32c_of_rfc_3720():
    assert tensorflow.crc32c(b"123456789") == 0xE3069283
    assert tensorflow.crc32c(bytes(32)) == 0x8A9136AA
    assert tensorflow.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert tensorflow.crc32c(bytes(range(32))) == 0x46DD794E
    assert tensorflow.crc32c(b"") == 0


@given(st.binary(max_size=200))
def test_crc32c_equals_its_definition(data):
    assert tensorflow.crc32c(data) == crc32c(data)


def test_crc32c_of_more_than_a_block(monkeypatch):
    data = np.random.default_rng(0).bytes(1100)
    expected = [crc32c(data[:length]) for length in range(1090, 1100)]
    assert [tensorflow.crc32c(data[:length]) for length in range(1090, 1100)] == expected
    monkeypatch.setattr(tensorflow, "BLOCK_LEVEL", 4)
    assert [tensorflow.crc32c(data[:length]) for length in range(1090, 1100)] == expected


# Damage

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a/bias": np.array(7.0, np.float32),
    "b": np.arange(40, dtype=np.float32),
}


def contents(directory):
    """All arrays of the checkpoint in a directory."""
    return {name: read() for name, read in open_checkpoint(directory / "x.index").items()}


def test_every_variable_is_read(tmp_path):
    steps = {"steps": np.array(3)}
    write(tmp_path / "x", ARRAYS | steps, num_shards=2, per_block=2)
    found = open_checkpoint(tmp_path / "x.index")
    assert set(found) == {*ARRAYS, "steps"}
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name](), array, strict=True)
    assert "x.data-00001-of-00002: variable steps: type number 9" in refusal(found["steps"])


@given(st.data())
@settings(max_examples=150)
def test_damage_is_named_or_changes_nothing(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("checkpoint")
    write(directory / "x", ARRAYS, num_shards=2, per_block=2)
    file = data.draw(st.sampled_from(sorted(directory.iterdir())))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "append", "insert", "delete", "zero"])):
        case "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del content[at:]
        case "append":
            content += data.draw(st.binary(min_size=1, max_size=60))
        case "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        case "delete":
            del content[at : at + data.draw(st.integers(1, 9))]
        case "zero":
            content[at : at + 16] = bytes(len(content[at : at + 16]))
    file.write_bytes(content)
    try:
        found = contents(directory)
    except InputError as error:
        assert str(file.parent) in str(error) and "\n" not in str(error)
    else:
        assert set(found) == set(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(found[name], array, strict=True)


NUMBERS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 4, 24, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]))


@given(NUMBERS, st.lists(NUMBERS, max_size=40), NUMBERS, NUMBERS, NUMBERS, st.binary(max_size=12), NUMBERS)
@settings(max_examples=150)
def test_forged_entries_are_refused_without_allocation(
    tmp_path_factory, dtype, shape, shard, offset, size, more, num_shards
):
    """Under valid checksums, whatever the numbers say."""
    directory = tmp_path_factory.mktemp("checkpoint")
    (directory / "x.data-00000-of-00001").write_bytes(bytes(24))
    forged = entry(dtype, tuple(shape), shard, offset, size, masked(bytes(24)), more)
    (directory / "x.index").write_bytes(index({b"": header(num_shards), b"a": forged}))
    masked_crc32c(bytes(1000))  # Makes the tables.
    tracemalloc.start()
    try:
        for array in contents(directory).values():
            assert array.tobytes() == bytes(24)
    except InputError as error:
        assert "\n" not in str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1 << 20


def forged(dtype=1, shape=(2, 3), offset=0, size=24, data=bytes(24)) -> bytes:
    """An index of one variable, under valid checksums."""
    return index({b"": header(1), b"a": entry(dtype, shape, 0, offset, size, masked(data))})


VALID = {b"": header(1), b"a": entry(1, (2, 3), 0, 0, 24, masked(bytes(24)))}
ITEMS = sorted(VALID.items())
FORGED = {
    "empty": (b"", "no footer"),
    "text": (b"A text.\n" * 99, "no footer"),
    "no header": (index({b"a": VALID[b"a"]}), "no header"),
    "big-endian": (index(VALID | {b"": header(1, endianness=1)}), "big-endian"),
    "compressed": (table([block(ITEMS, compression=1)], [b"z"]), "compressed"),
    "keys out of order": (table([block(ITEMS[::-1])], [b"z"]), "out of order"),
    "the same block twice": (table([block(ITEMS), block(ITEMS)], [b"y", b"z"]), "out of order"),
    "no such shard": (index(VALID | {b"": header(2)}), "x.data-00000-of-00002"),
    "partitioned": (index(VALID | {b"a": VALID[b"a"] + b"\x3a\x00"}), "variable a: partitioned"),
    "a flipped bit of a name": (index(VALID).replace(b"a\x08\x01", b"c\x08\x01"), "checksum of the block at byte 0"),
    "a block that is too long": (b"\0" * 2 + (varint(2**64 - 1) * 2).ljust(38, b"\0") + MAGIC, "too short"),
    "a key that is too long": (table([checksummed(b"\x03\x01\x00a" + bytes(8))], [b"z"]), "longer than"),
    "too large": (forged(shape=(2**40,), size=2**42), "too short"),
    "past the end": (forged(offset=4), "too short"),
    "far past the end": (forged(offset=2**63), "too short"),
    "another size": (forged(shape=(2, 4)), "24 bytes"),
    "nothing": (forged(shape=(0, 2**63), size=0, data=b""), "0 bytes"),
    "too many dimensions": (forged(shape=(*(1,) * 40, 6)), "24 bytes"),
    "many restarts": (table([checksummed(block(ITEMS)[:-9] + b"\xff" * 4)], [b"z"]), "too short"),
    "a message that is too short": (index(VALID | {b"a": b"\x12\x7f"}), "too short"),
    "other messages": (index(VALID | {b"a": b"\x0b"}), "another form"),
    "text for a number": (index(VALID | {b"a": b"\x0a\x01a"}), "another form"),
    "number for a message": (index(VALID | {b"a": b"\x10\x01"}), "another form"),
    "endless number": (index(VALID | {b"a": b"\x08" + b"\xff" * 10}), "64 bits"),
}


@pytest.mark.parametrize(("content", "complaint"), FORGED.values(), ids=FORGED)
def test_forged_indexes_are_refused_without_allocation(content, complaint, tmp_path):
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(24))
    (tmp_path / "x.index").write_bytes(index(VALID))
    assert contents(tmp_path)["a"].tolist() == [[0, 0, 0], [0, 0, 0]]
    (tmp_path / "x.index").write_bytes(content)
    tracemalloc.start()
    try:
        assert complaint in refusal(lambda: contents(tmp_path))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_long_keys_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorflow, "MAX_KEY_BYTES", 1000)
    keys = {b"a" * length: VALID[b"a"] for length in range(1, 60)}
    (tmp_path / "x.index").write_bytes(index(VALID | keys))
    assert "too long" in refusal(lambda: contents(tmp_path))
