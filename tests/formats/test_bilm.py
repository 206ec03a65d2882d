"""ELMo directories, and embed and score, against bilm-tf's computation in plain NumPy and against published results."""

import copy
import dataclasses
import json
import shutil

import h5py
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.cli.main import main
from prelm_jax.errors import InputError
from prelm_jax.formats.bilm import SOFTMAX, ELMoModel
from prelm_jax.formats.model import abstract_params, initial_params, load, save, write_embeddings
from prelm_jax.models.elmo import ELMoConfig
from prelm_jax.tokenizers.words import WordVocabulary
from prelm_jax.training.checkpoint import Checkpoints
from prelm_jax.training.parameters import path_name

CLOSE = {"rtol": 1e-5, "atol": 2e-6}
OPTIONS = {
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
SHAPES = {  # As bilm-tf's dump_weights writes them.
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
WORDS = ["<S>", "</S>", "<UNK>", "the", ",", "cat", "sat", "on", "mat", "猫"]
TEXTS = [
    "the cat sat on the mat .",
    "",
    "猫 sat , 🐈 too <UNK>",
    " \t ",
    "a",
    "x" * 200 + " and " + "é" * 100 + " " + "猫" * 17,  # Cut after 48 bytes, here and there within a character.
    "the <S> and the </S> are read as what they name",
    "the mat , " * 6,
]


# The computation of bilm-tf, from the published files, in float64: a word and a step at a time.


class Reference:
    def __init__(self, options, weights):
        self.options, self.weights = options, {name: value.astype(np.float64) for name, value in weights.items()}

    def encode(self, word):
        cnn, weights = self.options["char_cnn"], self.weights
        inner = {"<S>": [256], "</S>": [257]}.get(word, list(word.encode())[:48])
        ids = [258, *inner, 259] + [260] * (48 - len(inner))
        x = weights["char_embed"][ids]
        features = []
        for i, (width, _) in enumerate(cnn["filters"]):
            kernel = weights[f"CNN/W_cnn_{i}"][0]
            places = [np.einsum("wc,wcn->n", x[t : t + width], kernel) for t in range(50 - width + 1)]
            features.append(np.max(places, 0) + weights[f"CNN/b_cnn_{i}"])
        y = np.concatenate(features)
        y = np.tanh(y) if cnn["activation"] == "tanh" else np.maximum(y, 0)
        for i in range(cnn["n_highway"]):
            names = (f"CNN_high_{i}/W_carry", f"CNN_high_{i}/b_carry")
            gate = sigmoid(y @ weights[names[0]] + weights[names[1]])
            new = np.maximum(y @ weights[f"CNN_high_{i}/W_transform"] + weights[f"CNN_high_{i}/b_transform"], 0)
            y = gate * new + (1 - gate) * y
        return y @ weights["CNN_proj/W_proj"] + weights["CNN_proj/b_proj"]

    def start(self):
        """The state of one row: zeros for each direction and layer."""
        lstm = self.options["lstm"]
        zeros = (np.zeros(lstm["dim"]), np.zeros(lstm["projection_dim"]))
        return [[zeros] * lstm["n_layers"] for _ in range(2)]

    def run(self, words, state):
        """(layers + 1 hidden states [words + 2, 2 P], the next state) of a text."""
        x = np.stack([self.encode(word) for word in ["<S>", *words, "</S>"]])
        state = copy.deepcopy(state)
        both = [self.direction(0, x, state), [y[::-1] for y in self.direction(1, x[::-1], state)]]
        return [np.concatenate(pair, -1) for pair in zip(*both, strict=True)], state

    def direction(self, number, x, state):
        lstm, layers = self.options["lstm"], [x]
        for i in range(lstm["n_layers"]):
            place = f"RNN_{number}/RNN/MultiRNNCell/Cell{i}/LSTMCell/"
            cell, hidden = state[number][i]
            outputs = []
            for word in layers[-1]:
                gates = np.concatenate([word, hidden]) @ self.weights[place + "W_0"] + self.weights[place + "B"]
                write, new, keep, show = np.split(gates, 4)
                cell = sigmoid(keep + 1) * cell + sigmoid(write) * np.tanh(new)
                cell = np.clip(cell, -lstm["cell_clip"], lstm["cell_clip"])
                hidden = (sigmoid(show) * np.tanh(cell)) @ self.weights[place + "W_P_0"]
                hidden = np.clip(hidden, -lstm["proj_clip"], lstm["proj_clip"])
                outputs.append(hidden)
            state[number][i] = (cell, hidden)
            skip = layers[-1] if i > 0 and lstm["use_skip_connections"] else 0
            layers.append(np.stack(outputs) + skip)
        return layers

    def embed(self, texts, rows=1, carried=False, start=None):
        """[layers + 1, words, 2 P] of each text; if `carried`, from the state that the text `rows` before left."""
        states = [start or self.start()] * rows
        results = []
        for i, text in enumerate(texts):
            hidden, new = self.run(text.split(), states[i % rows])
            states[i % rows] = new if carried else states[i % rows]
            results.append(np.stack(hidden)[:, 1:-1])
        return results


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def randomized(seed=0):
    """Weights so large that both clips act."""
    rng = np.random.default_rng(seed)
    return {name: (0.3 * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def publish(directory, options, weights):
    directory.mkdir(exist_ok=True)
    (directory / "elmo_tiny_options.json").write_text(json.dumps(options))
    with h5py.File(directory / "elmo_tiny_weights.hdf5", "w") as file:
        for name, value in weights.items():
            file[name] = value
    return directory


@pytest.fixture(scope="module")
def reference():
    return Reference(OPTIONS, randomized())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A directory as the authors' models are found; do not change it."""
    return publish(tmp_path_factory.mktemp("published"), OPTIONS, randomized())


@pytest.fixture(scope="module")
def model(published):
    return load(published)


@pytest.fixture(scope="module")
def trained(model):
    """A model with a softmax, as a run leaves it."""
    params = jax.tree.map(np.asarray, abstract_zeros(dataclasses.replace(model.config, vocab_size=len(WORDS))))
    rng = np.random.default_rng(1)
    softmax = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params["softmax"])
    config = dataclasses.replace(model.config, vocab_size=len(WORDS))
    return ELMoModel(config, {**model.params, "softmax": softmax}, WordVocabulary(WORDS, tokenize=True))


def abstract_zeros(config):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(config))


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    record = {"model": {"model_type": "elmo", **dataclasses.asdict(trained.config)}}
    (directory / "run.json").write_text(json.dumps(record))
    trained.tokenizer.save(directory / "tokenizer")
    checkpoints = Checkpoints(directory / "checkpoints")
    checkpoints.save(3, {"params": jax.tree.map(jax.numpy.asarray, trained.params)})
    checkpoints.close()
    return directory


@pytest.fixture
def spoiled(published, tmp_path):
    """A directory to spoil."""
    return shutil.copytree(published, tmp_path / "spoiled")


def hidden_states(model, texts, **options):
    return [hidden for _, hidden in model.embed(texts, **options)]


def assert_close(found, expected):
    assert len(found) == len(expected)
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, **CLOSE, err_msg=str(i))


# Published results


def test_published_embeddings(real_data):
    """The top layer of 3 × 10 sentences, the state carried from batch to batch; AllenNLP's own tests have them too."""
    directory = real_data / "fixtures/allennlp-elmo"
    rows = json.loads((directory / "sentences.json").read_text())
    lines = [line for batch in zip(*rows, strict=True) for line in batch]
    assert len(lines) == 30
    found = hidden_states(load(directory), lines, state="carry", batch_size=3)
    for i, hidden in enumerate(found):
        with h5py.File(directory / f"lm_embeddings_{i % 3}.hdf5") as file:
            expected = np.concatenate(file[str(i // 3)][()], -1)
        np.testing.assert_allclose(hidden[2], expected, rtol=1e-5, atol=1e-6, err_msg=lines[i])


def test_published_token_encodings(real_data):
    directory = real_data / "fixtures/allennlp-elmo"
    words = (directory / "vocab_test.txt").read_text().split("\n")
    with h5py.File(directory / "elmo_token_embeddings.hdf5") as file:
        expected = file["embedding"][()]
    ((tokens, hidden),) = load(directory).embed([" ".join(words)])
    assert tokens == words
    np.testing.assert_allclose(hidden[0, :, :16], expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(hidden[0, :, :16], hidden[0, :, 16:])


def test_the_reference_gives_published_embeddings(real_data):
    directory = real_data / "fixtures/allennlp-elmo"
    weights = {}
    with h5py.File(directory / "lm_weights.hdf5") as file:
        file.visititems(lambda name, item: weights.update({name: item[()]}) if hasattr(item, "shape") else None)
    reference = Reference(json.loads((directory / "options.json").read_text()), weights)
    lines = json.loads((directory / "sentences.json").read_text())[1][:4]
    for i, hidden in enumerate(reference.embed(lines, carried=True)):
        with h5py.File(directory / "lm_embeddings_1.hdf5") as file:
            np.testing.assert_allclose(hidden[2], np.concatenate(file[str(i)][()], -1), rtol=1e-5, atol=2e-6)


# Reading and writing


def test_every_dataset_has_its_place(published, tmp_path):
    """Each value that was read is written again, under its name and in its shape, and so are the options."""
    save(load(published), tmp_path / "again", "")
    with h5py.File(tmp_path / "again" / "weights.hdf5") as file:
        found = {}
        file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
        assert set(found) == set(SHAPES)
        for name, value in randomized().items():
            assert found[name].dtype == np.float32
            assert found[name].chunks is None and not found[name].attrs
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert json.loads((tmp_path / "again" / "options.json").read_text()) == OPTIONS


def test_the_original_has_37_datasets_of_93_6_million_numbers():
    """From the table of allennlp.org: 93.6 M parameters, without the softmax."""
    from prelm_jax.formats.bilm import dataset_name

    leaves = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(abstract_params(ELMoConfig(9)))}
    published = {dataset_name(path): x.size for path, x in leaves.items() if path not in SOFTMAX}
    assert len(published) == 37
    assert sum(published.values()) == 93_600_848


def test_export_load_export_gives_the_same_bytes(trained, tmp_path):
    save(trained, tmp_path / "first", "# A model\n")
    save(load(tmp_path / "first"), tmp_path / "second", "# A model\n")
    files = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert files == ["README.md", "options.json", "tokenizer_config.json", "vocab.txt", "weights.hdf5"]
    assert files == sorted(file.name for file in (tmp_path / "second").iterdir())
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    assert (tmp_path / "first" / "vocab.txt").read_text().splitlines() == WORDS
    with h5py.File(tmp_path / "first" / "weights.hdf5") as file:
        assert h5py.h5g.get_objinfo(file.id, b"char_embed").mtime == 0, "a second later it would be other bytes"


def test_an_export_overwrites_an_export_and_nothing_else(model, published, tmp_path):
    save(model, tmp_path / "model", "# first\n")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    save(model, tmp_path / "model", "# second\n")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "model" / "README.md").read_text() == "# second\n"
    with pytest.raises(InputError, match="not empty, and not a model directory"):
        save(model, published, "")


def test_the_number_of_characters_may_be_that_of_the_training(spoiled):
    configure(spoiled, "char_cnn", n_characters=261)
    assert load(spoiled).config == load(spoiled).config
    assert load(spoiled).params["characters"]["embedding"].shape == (261, 4)


def configure(directory, group, **changed):
    file = directory / "elmo_tiny_options.json"
    options = json.loads(file.read_text())
    options[group].update(changed)
    file.write_text(json.dumps(options))


@pytest.mark.parametrize(
    ("group", "changed", "complaint"),
    [
        ("char_cnn", {"max_characters_per_token": 30}, "max_characters_per_token is 30; only 50 is supported"),
        ("char_cnn", {"n_characters": 6000}, "n_characters is 6000; only 262"),
        ("char_cnn", {"activation": "gelu"}, "char_cnn.activation is 'gelu'; relu and tanh are supported"),
        ("char_cnn", {"filters": 7}, "char_cnn.filters is 7, which is no value of it"),
        ("char_cnn", {"embedding": None}, "char_cnn.embedding.dim is missing"),
        ("lstm", {"cell_clip": None}, "lstm.cell_clip is missing"),
        ("lstm", {"dim": "many"}, "lstm.dim is 'many'"),
        ("lstm", {"use_skip_connections": None}, "lstm.use_skip_connections is missing"),
        ("lstm", {"n_layers": 3}, r"no dataset RNN_\d/RNN/MultiRNNCell/Cell2/LSTMCell/\w+ \["),
        ("lstm", {"dim": 24}, r"dataset RNN_\d\S+ is \[64\] of float32, but the options ask for \[96\] of float32"),
    ],
)
def test_options_that_will_not_do(group, changed, complaint, spoiled):
    configure(spoiled, group, **changed)
    with pytest.raises(InputError, match=complaint) as error:
        load(spoiled)
    assert "\n" not in str(error.value)


def test_a_model_without_characters_is_refused(spoiled):
    (spoiled / "elmo_tiny_options.json").write_text(json.dumps({"lstm": OPTIONS["lstm"]}))
    with pytest.raises(InputError, match="only models that read the characters of words are supported"):
        load(spoiled)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("CNN/W_cnn_1", None, r"weights.hdf5: no dataset CNN/W_cnn_1 \[1, 2, 4, 8\]; is this a whole ELMo?"),
        ("char_embed", np.zeros((262, 4), np.float32), r"char_embed is \[262, 4\] of float32, .* \[261, 4\]"),
        ("CNN_proj/b_proj", np.zeros(8, np.int32), r"CNN_proj/b_proj is \[8\] of int32"),
        ("CNN_proj/b_proj", "text", r"CNN_proj/b_proj is \[\] of object"),
    ],
)
def test_weights_that_will_not_do(name, value, complaint, spoiled):
    with h5py.File(spoiled / "elmo_tiny_weights.hdf5", "a") as file:
        del file[name]
        if value is not None:
            file[name] = value
    with pytest.raises(InputError, match=complaint) as error:
        load(spoiled)
    assert "\n" not in str(error.value)


def test_files_that_will_not_do(spoiled):
    weights = spoiled / "elmo_tiny_weights.hdf5"
    shutil.copy(weights, spoiled / "other_weights.hdf5")
    with pytest.raises(InputError, match=r"exactly one file \*weights.hdf5, but .* elmo_tiny_weights.hdf5, other_wei"):
        load(spoiled)
    (spoiled / "other_weights.hdf5").unlink()
    whole = weights.read_bytes()
    for content in (b"", b"no HDF5", whole[:3000]):
        weights.write_bytes(content)
        with pytest.raises(InputError, match=r"elmo_tiny_weights.hdf5: cannot be read as HDF5"):
            load(spoiled)
    weights.unlink()
    with pytest.raises(InputError, match=r"exactly one file \*weights.hdf5, but here is none"):
        load(spoiled)
    shutil.copy(spoiled / "elmo_tiny_options.json", spoiled / "options.json")
    with pytest.raises(InputError, match=r"exactly one file \*options.json, but here is elmo_tiny_options.json, opt"):
        load(spoiled)


# Hidden states


@pytest.mark.parametrize(("activation", "skip"), [("relu", True), ("tanh", False)])
def test_layers_equal_the_reference(activation, skip, tmp_path):
    options = copy.deepcopy(OPTIONS)
    options["char_cnn"]["activation"] = activation
    options["lstm"]["use_skip_connections"] = skip
    reference = Reference(options, randomized())
    found = hidden_states(load(publish(tmp_path, options, randomized())), TEXTS)
    expected = reference.embed(TEXTS)
    assert_close(found, expected)
    states = [state for text in TEXTS for rows in reference.run(text.split(), reference.start())[1] for state in rows]
    assert any((np.abs(cell) == 0.75).any() for cell, _ in states), "the clip of the cell is not seen to act"
    assert any((np.abs(hidden) == 0.5).any() for _, hidden in states), "nor that of the output"


def test_layer_0_is_the_encoding_twice(model, reference):
    ((_, hidden),) = model.embed(["the cat"])
    assert hidden.shape == (3, 2, 16)
    np.testing.assert_allclose(hidden[0, 1], np.tile(reference.encode("cat"), 2), **CLOSE)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_state_is_carried_row_by_row(rows, model, reference):
    """Blank lines are read too; the last batch of three has two rows."""
    found = hidden_states(model, TEXTS, state="carry", batch_size=rows)
    assert_close(found, reference.embed(TEXTS, rows, carried=True))


def test_a_warm_state_is_that_after_an_empty_text(model, reference):
    _, warm = reference.run([], reference.start())
    assert_close(hidden_states(model, TEXTS, state="warm"), reference.embed(TEXTS, start=warm))
    after_blank = hidden_states(model, ["", TEXTS[0]], state="carry")[1]
    np.testing.assert_allclose(hidden_states(model, TEXTS[:1], state="warm")[0], after_blank, **CLOSE)


@pytest.mark.parametrize("state", ["zero", "warm"])
def test_a_text_gives_the_same_bits_in_any_company(state, model):
    many = [*TEXTS, *(" ".join(f"w{i}" for i in range(n)) for n in range(60))] * 3
    together = hidden_states(model, many, state=state)
    backwards = hidden_states(model, many[::-1], state=state)[::-1]
    for i, (a, b) in enumerate(zip(together, backwards, strict=True)):
        np.testing.assert_array_equal(a, b, err_msg=many[i])
    for i in (0, 2, 5, len(TEXTS) + 40):
        np.testing.assert_array_equal(hidden_states(model, [many[i]], state=state)[0], together[i])


def test_a_line_of_ten_thousand_words(model):
    words = [f"w{i % 700}" for i in range(10_000)]
    (tokens, hidden), (_, head), (_, tail) = model.embed([" ".join(words), " ".join(words[:9]), " ".join(words[-9:])])
    assert tokens == words
    assert hidden.shape == (3, 10_000, 16)
    np.testing.assert_allclose(hidden[:, :9, :8], head[..., :8], **CLOSE)
    np.testing.assert_allclose(hidden[:, -9:, 8:], tail[..., 8:], **CLOSE)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=4))
def test_any_text_has_its_words(model, texts):
    results = list(model.embed(texts, state="carry", batch_size=2))
    assert [tokens for tokens, _ in results] == [text.split() for text in texts]
    for tokens, hidden in results:
        assert hidden.shape == (3, len(tokens), 16)
        assert np.isfinite(hidden).all()


def test_raw_text_is_split(model):
    ((tokens, hidden),) = model.embed(["Don't sit, 猫猫!"], tokenize=True)
    assert tokens == ["Don", "'", "t", "sit", ",", "猫", "猫", "!"]
    np.testing.assert_array_equal(hidden, hidden_states(model, ["Don ' t sit , 猫 猫 !"])[0])


def test_a_word_is_encoded_once(model, monkeypatch):
    from prelm_jax.formats import bilm as bilm_elmo

    encoded = []

    def characters(words):
        encoded.extend(words)
        return spell(words)

    spell = bilm_elmo.characters
    monkeypatch.setattr(bilm_elmo, "characters", characters)
    lines = [" ".join(f"w{i % 600}" for i in range(n, n + 14)) for n in range(400)]
    list(model.embed(lines))
    assert len(encoded) == len(set(encoded)) == 413 + 2


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"state": "cold"}, "state is 'cold'; choose zero, warm or carry"),
        ({"state": "carry", "batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 3}, "batch_size is 3; it is a number from 1 on, for the state carry alone"),
    ],
)
def test_options_of_embed_that_will_not_do(options, complaint, model, tmp_path):
    with pytest.raises(InputError, match=complaint):
        write_embeddings(model, ["a"], tmp_path / "output.hdf5", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(published, model, tmp_path):
    (tmp_path / "lines.txt").write_text("the cat\n\nDon't sit .\n")
    arguments = [str(tmp_path / "lines.txt"), str(tmp_path / "output.hdf5")]
    main(["embed", str(published), *arguments, "--tokenize", "--state", "carry", "--batch-size", "2"])
    expected = list(model.embed(["the cat", "", "Don't sit ."], tokenize=True, state="carry", batch_size=2))
    with h5py.File(tmp_path / "output.hdf5") as file:
        assert set(file) == {"0", "1", "2"}
        for i, (tokens, hidden) in enumerate(expected):
            assert json.loads(file[str(i)].attrs["tokens"]) == tokens
            np.testing.assert_array_equal(file[str(i)], hidden)
        assert file["1"].shape == (3, 0, 16)


# Work directories: the softmax


def test_a_work_directory_has_the_softmax(workdir, trained, tmp_path):
    loaded = load(workdir)
    assert type(loaded) is ELMoModel
    assert loaded.config == trained.config
    assert loaded.missing == frozenset()
    assert loaded.tokenizer.tokens == WORDS
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(trained.params), strict=True):
        np.testing.assert_array_equal(a, b)
    save(loaded, tmp_path / "model", "")
    exported = load(tmp_path / "model")
    assert exported.missing == SOFTMAX
    assert exported.tokenizer.tokens == WORDS
    np.testing.assert_array_equal(*(hidden_states(m, TEXTS[:1])[0] for m in (loaded, exported)))


def test_score_equals_the_reference(workdir, trained, reference):
    texts = [*TEXTS[:5], "the cat,sat"]  # Its tokenizer splits at punctuation.
    found = load(workdir).score(texts)
    table, bias = trained.params["softmax"]["embedding"][: len(WORDS)], trained.params["softmax"]["bias"][: len(WORDS)]
    ids = {word: i for i, word in enumerate(WORDS)}
    for words, (total, count) in zip(trained.tokenizer.split_batch(texts), found, strict=True):
        assert count == len(words)
        last, _ = reference.run(words, reference.start())
        expected = 0
        for i, word in enumerate(words, 1):
            for hidden in (last[-1][i - 1, :8], last[-1][i + 1, 8:]):
                logits = hidden @ table.T + bias
                expected += (logits[ids.get(word, 2)] - np.log(np.exp(logits).sum())) / 2
        assert abs(total - expected) < 1e-5 * max(1, count)


def test_a_published_model_cannot_score(model):
    with pytest.raises(InputError, match="a published ELMo has no softmax"):
        model.score(["the cat"])


# Going on from a model


def going_on(model, words):
    config = dataclasses.replace(model.config, vocab_size=len(words), dropout=0.5)
    fresh = jax.tree.map(lambda x: 9.0 + jax.numpy.zeros(x.shape), abstract_params(config))
    return initial_params(model, config, fresh, WordVocabulary(words))


def test_going_on_from_a_published_model_begins_with_a_fresh_softmax(model):
    params = going_on(model, ["<S>", "</S>", "<UNK>", *(f"new{i}" for i in range(200))])
    assert params["softmax"]["embedding"].shape == (256, 8)
    for leaf in jax.tree.leaves(params.pop("softmax")):
        np.testing.assert_array_equal(leaf, 9.0)
    expected = {name: value for name, value in model.params.items() if name != "softmax"}
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_going_on_from_a_run_words_keep_their_rows_wherever_they_stand(workdir):
    loaded = load(workdir)
    params = going_on(loaded, ["</S>", "<S>", "<UNK>", "dog", "cat", "the", "bird"])
    for name in ("embedding", "bias"):
        new, old = np.asarray(params["softmax"][name]), np.asarray(loaded.params["softmax"][name])
        np.testing.assert_array_equal(new[[0, 1, 2, 4, 5]], old[[1, 0, 2, 5, 3]])
        np.testing.assert_array_equal(new[[3, 6]], 9.0)
        np.testing.assert_array_equal(new[7:], 9.0)


def test_going_on_with_other_sizes_is_refused(model):
    config = dataclasses.replace(model.config, cell_clip=3.0)
    with pytest.raises(InputError, match=r"cell_clip is 0.75 in the model, but 3.0 in the run"):
        initial_params(model, config, {}, WordVocabulary(WORDS))
