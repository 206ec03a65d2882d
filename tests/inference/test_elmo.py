"""A pretrained ELMo: embed and score against bilm-tf's computation in plain NumPy and against published results."""

import copy
import dataclasses
import json

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_directories import ELMO_OPTIONS, ELMO_WORDS, elmo_weights, publish_elmo

from prelm_jax.cli.main import main
from prelm_jax.errors import InputError
from prelm_jax.formats import bilm
from prelm_jax.inference import elmo
from prelm_jax.inference.base import write_embeddings
from prelm_jax.inference.elmo import ELMoPretrained
from prelm_jax.tokenizers.words import WordVocabulary

CLOSE = {"rtol": 1e-5, "atol": 2e-6}
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


# The computation of bilm-tf from the published files, in float64, one word and one step at a time.


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
            positions = [np.einsum("wc,wcn->n", x[t : t + width], kernel) for t in range(50 - width + 1)]
            features.append(np.max(positions, 0) + weights[f"CNN/b_cnn_{i}"])
        y = np.concatenate(features)
        y = np.tanh(y) if cnn["activation"] == "tanh" else np.maximum(y, 0)
        for i in range(cnn["n_highway"]):
            names = (f"CNN_high_{i}/W_carry", f"CNN_high_{i}/b_carry")
            gate = sigmoid(y @ weights[names[0]] + weights[names[1]])
            new = np.maximum(y @ weights[f"CNN_high_{i}/W_transform"] + weights[f"CNN_high_{i}/b_transform"], 0)
            y = gate * new + (1 - gate) * y
        return y @ weights["CNN_proj/W_proj"] + weights["CNN_proj/b_proj"]

    def start(self):
        """The zero state of one row, for each direction and layer."""
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
            prefix = f"RNN_{number}/RNN/MultiRNNCell/Cell{i}/LSTMCell/"
            cell, hidden = state[number][i]
            outputs = []
            for word in layers[-1]:
                gates = np.concatenate([word, hidden]) @ self.weights[prefix + "W_0"] + self.weights[prefix + "B"]
                write, new, keep, show = np.split(gates, 4)
                cell = sigmoid(keep + 1) * cell + sigmoid(write) * np.tanh(new)
                cell = np.clip(cell, -lstm["cell_clip"], lstm["cell_clip"])
                hidden = (sigmoid(show) * np.tanh(cell)) @ self.weights[prefix + "W_P_0"]
                hidden = np.clip(hidden, -lstm["proj_clip"], lstm["proj_clip"])
                outputs.append(hidden)
            state[number][i] = (cell, hidden)
            skip = layers[-1] if i > 0 and lstm["use_skip_connections"] else 0
            layers.append(np.stack(outputs) + skip)
        return layers

    def embed(self, texts, rows=1, carried=False, start=None):
        """[layers + 1, words, 2 P] of each text; if `carried`, each from the final state of the text `rows` before."""
        states = [start or self.start()] * rows
        results = []
        for i, text in enumerate(texts):
            hidden, new = self.run(text.split(), states[i % rows])
            states[i % rows] = new if carried else states[i % rows]
            results.append(np.stack(hidden)[:, 1:-1])
        return results


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture(scope="module")
def reference():
    return Reference(ELMO_OPTIONS, elmo_weights())


def load(directory):
    return ELMoPretrained(bilm.read(directory))


@pytest.fixture(scope="module")
def model(elmo_directory):
    return load(elmo_directory)


def hidden_states(model, texts, **options):
    return [hidden for _, hidden in model.embed(texts, **options)]


def assert_close(found, expected):
    assert len(found) == len(expected)
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, **CLOSE, err_msg=str(i))


# Published results


def test_published_embeddings(real_data):
    """The top layer of 3 × 10 sentences, the state carried from batch to batch, as in AllenNLP's own tests."""
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


def test_the_reference_equals_published_embeddings(real_data):
    directory = real_data / "fixtures/allennlp-elmo"
    weights = {}
    with h5py.File(directory / "lm_weights.hdf5") as file:
        file.visititems(lambda name, item: weights.update({name: item[()]}) if hasattr(item, "shape") else None)
    reference = Reference(json.loads((directory / "options.json").read_text()), weights)
    lines = json.loads((directory / "sentences.json").read_text())[1][:4]
    for i, hidden in enumerate(reference.embed(lines, carried=True)):
        with h5py.File(directory / "lm_embeddings_1.hdf5") as file:
            np.testing.assert_allclose(hidden[2], np.concatenate(file[str(i)][()], -1), rtol=1e-5, atol=2e-6)


# Hidden states


@pytest.mark.parametrize(("activation", "skip"), [("relu", True), ("tanh", False)])
def test_layers_equal_the_reference(activation, skip, tmp_path):
    options = copy.deepcopy(ELMO_OPTIONS)
    options["char_cnn"]["activation"] = activation
    options["lstm"]["use_skip_connections"] = skip
    reference = Reference(options, elmo_weights())
    found = hidden_states(load(publish_elmo(tmp_path, options, elmo_weights())), TEXTS)
    expected = reference.embed(TEXTS)
    assert_close(found, expected)
    states = [state for text in TEXTS for rows in reference.run(text.split(), reference.start())[1] for state in rows]
    assert any((np.abs(cell) == 0.75).any() for cell, _ in states), "the clip of the cell is not seen to act"
    assert any((np.abs(hidden) == 0.5).any() for _, hidden in states), "nor that of the output"


def test_layer_0_is_the_token_encoding_twice(model, reference):
    ((_, hidden),) = model.embed(["the cat"])
    assert hidden.shape == (3, 2, 16)
    np.testing.assert_allclose(hidden[0, 1], np.tile(reference.encode("cat"), 2), **CLOSE)


@pytest.mark.parametrize("rows", [1, 3])
def test_carry_continues_row_by_row(rows, model, reference):
    """Blank lines are read too; the last batch of three has two rows."""
    found = hidden_states(model, TEXTS, state="carry", batch_size=rows)
    assert_close(found, reference.embed(TEXTS, rows, carried=True))


def test_warm_starts_from_the_state_after_an_empty_text(model, reference):
    _, warm = reference.run([], reference.start())
    assert_close(hidden_states(model, TEXTS, state="warm"), reference.embed(TEXTS, start=warm))
    after_blank = hidden_states(model, ["", TEXTS[0]], state="carry")[1]
    np.testing.assert_allclose(hidden_states(model, TEXTS[:1], state="warm")[0], after_blank, **CLOSE)


@pytest.mark.parametrize("state", ["zero", "warm"])
def test_a_text_gives_the_same_bits_with_any_other_texts(state, model):
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
def test_tokens_are_the_words_of_any_text(model, texts):
    results = list(model.embed(texts, state="carry", batch_size=2))
    assert [tokens for tokens, _ in results] == [text.split() for text in texts]
    for tokens, hidden in results:
        assert hidden.shape == (3, len(tokens), 16)
        assert np.isfinite(hidden).all()


def test_tokenize_splits_at_punctuation(model):
    ((tokens, hidden),) = model.embed(["Don't sit, 猫猫!"], tokenize=True)
    assert tokens == ["Don", "'", "t", "sit", ",", "猫", "猫", "!"]
    np.testing.assert_array_equal(hidden, hidden_states(model, ["Don ' t sit , 猫 猫 !"])[0])


def test_a_word_is_encoded_once(model, monkeypatch):
    encoded = []

    def characters(words):
        encoded.extend(words)
        return spell(words)

    spell = elmo.characters
    monkeypatch.setattr(elmo, "characters", characters)
    lines = [" ".join(f"w{i % 600}" for i in range(n, n + 14)) for n in range(400)]
    list(model.embed(lines))
    assert len(encoded) == len(set(encoded)) == 413 + 2


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"state": "cold"}, "state is 'cold'; choose zero, warm or carry"),
        ({"state": "carry", "batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 3}, "batch_size is 3; .* carry"),
    ],
)
def test_embed_refuses_invalid_options(options, complaint, model, tmp_path):
    with pytest.raises(InputError, match=complaint):
        write_embeddings(model, ["a"], tmp_path / "output.hdf5", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(elmo_directory, model, tmp_path):
    (tmp_path / "lines.txt").write_text("the cat\n\nDon't sit .\n")
    arguments = [str(tmp_path / "lines.txt"), str(tmp_path / "output.hdf5")]
    main(["embed", str(elmo_directory), *arguments, "--tokenize", "--state", "carry", "--batch-size", "2"])
    expected = list(model.embed(["the cat", "", "Don't sit ."], tokenize=True, state="carry", batch_size=2))
    with h5py.File(tmp_path / "output.hdf5") as file:
        assert set(file) == {"0", "1", "2"}
        for i, (tokens, hidden) in enumerate(expected):
            assert json.loads(file[str(i)].attrs["tokens"]) == tokens
            np.testing.assert_array_equal(file[str(i)], hidden)
        assert file["1"].shape == (3, 0, 16)


# Scores


def test_score_equals_the_reference(elmo_with_softmax, reference):
    texts = [*TEXTS[:5], "the cat,sat"]  # Its tokenizer splits at punctuation.
    model = ELMoPretrained(elmo_with_softmax)
    found = model.score(texts)
    table, bias = (model.params["softmax"][name][: len(ELMO_WORDS)] for name in ("embedding", "bias"))
    ids = {word: i for i, word in enumerate(ELMO_WORDS)}
    for words, (total, count) in zip(model.tokenizer.split_batch(texts), found, strict=True):
        assert count == len(words)
        last, _ = reference.run(words, reference.start())
        expected = 0
        for i, word in enumerate(words, 1):
            for hidden in (last[-1][i - 1, :8], last[-1][i + 1, 8:]):
                logits = hidden @ table.T + bias
                expected += (logits[ids.get(word, 2)] - np.log(np.exp(logits).sum())) / 2
        assert abs(total - expected) < 1e-5 * max(1, count)


def test_a_lower_cased_model_reads_lower_case(elmo_with_softmax):
    tokenizer = WordVocabulary(elmo_with_softmax.tokenizer.tokens, lowercase=True)
    model = ELMoPretrained(dataclasses.replace(elmo_with_softmax, tokenizer=tokenizer))
    cased = ELMoPretrained(elmo_with_softmax)
    assert [*model.score(["The CAT"])] == [*model.score(["the cat"])] == [*cased.score(["the cat"])]
    assert [*cased.score(["The CAT"])] != [*cased.score(["the cat"])]
    (words, upper), (_, lower) = model.embed(["The CAT", "the cat"])
    assert words == ["the", "cat"]
    np.testing.assert_array_equal(upper, lower)


def test_score_sentences_adds_both_directions(elmo_with_softmax):
    model = ELMoPretrained(elmo_with_softmax)
    texts = ["the cat", "", "the dog, on a mat"]
    for score, (mean, count) in zip(model.score_sentences(texts), model.score(texts), strict=True):
        assert score.total == 2 * mean and score.tokens == count
        assert sum(score.directions.values()) == pytest.approx(score.total, abs=1e-12)
    assert [score.unknown for score in model.score_sentences(texts)] == [0, 0, 2]
    alone = [next(model.score_sentences([text])) for text in texts]
    assert list(model.score_sentences(["on on"] * 5 + texts * 30))[5:] == alone * 30


def test_embed_words_takes_words_as_they_are(model):
    sentences = [["don't", "sit", "."], [], ["cat"]]
    found = list(model.embed_words(sentences))
    assert [states.shape for states in found] == [(3, 3, 16), (3, 0, 16), (3, 1, 16)]
    ((_, expected), *_) = model.embed(["don't sit ."])
    np.testing.assert_array_equal(found[0], expected)


def test_a_published_model_cannot_score(model):
    with pytest.raises(InputError, match="a published ELMo has no softmax"):
        next(model.score(["the cat"]))
