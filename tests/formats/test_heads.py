"""Directories with the heads of tasks: to and from transformers' classes, and in files of their own."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from model_directories import (
    CASES,
    ELMO_OPTIONS,
    GPT_TOKENS,
    NAMES,
    assert_params_equal,
    change,
    configure,
    contents,
    elmo_weights,
    format_of,
    publish_elmo,
    read_task_of,
)
from safetensors.numpy import load_file

from prelm_jax.errors import InputError
from prelm_jax.formats import bilm, huggingface_bert, huggingface_gpt
from prelm_jax.formats.base import abstract_params, save
from prelm_jax.formats.heads import join, split
from prelm_jax.models.heads import Choice, Label, Span, Tags
from prelm_jax.models.task import TaskModelConfig
from prelm_jax.tokenizers.words import WordVocabulary
from prelm_jax.training.parameters import path_name

# Each is parsed by the same code; the others are for `make test-slow`.
FAST = ("label", "spans", "gpt-choice")
FAST_CASES = [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in CASES]

# Reading what transformers wrote


@pytest.mark.parametrize("case", CASES)
def test_every_class_with_a_head_is_read_and_written_back(case, published, tmp_path):
    _, directory = published(case)
    task = read_task_of(case, directory)
    assert task.config.head == CASES[case][2]
    assert (
        format_of(case).head_class(task.config.head)
        == json.loads((directory / "config.json").read_text())["architectures"][0]
    )
    assert task.labels == (NAMES if CASES[case][1].get("id2label") else ())
    assert (task.max_length, task.missing) == (24, frozenset())
    save(task, format_of(case), tmp_path / "again", "# A model\n")
    theirs, ours = load_file(directory / "model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    if case == "gpt-choice":  # transformers keeps the copy of the table that is in the head.
        theirs["transformer.tokens_embed.weight"] = theirs.pop("lm_head.weight")
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(tensor, ours[name], err_msg=name)
    again = read_task_of(case, tmp_path / "again")
    assert (again.config, again.labels, again.max_length) == (task.config, task.labels, task.max_length)
    save(again, format_of(case), tmp_path / "third", "# A model\n")
    assert contents(tmp_path / "again") == contents(tmp_path / "third")


@pytest.mark.parametrize("case", FAST_CASES)
def test_transformers_loads_what_is_written_without_a_complaint(case, published, tmp_path):
    reference, directory = published(case)
    save(
        dataclasses.replace(read_task_of(case, directory), max_length=16), format_of(case), tmp_path / "model", "# A\n"
    )
    loaded, info = type(reference).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, x), y in zip(reference.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    settings = CASES[case][1]
    assert loaded.config.problem_type == settings.get("problem_type", loaded.config.problem_type)
    if "id2label" in settings:
        assert loaded.config.id2label == settings["id2label"] and loaded.config.label2id == settings["label2id"]
    if case in ("label", "gpt-label"):
        assert loaded.config.problem_type == "single_label_classification"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.model_max_length == 16


@pytest.fixture
def copy(published, tmp_path):
    """A directory of a BERT for three labels, to spoil."""
    return shutil.copytree(published("label")[1], tmp_path / "copy")


def test_settings_that_are_missing_are_those_of_transformers(copy):
    settings = json.loads((copy / "config.json").read_text())
    for name in ("id2label", "label2id", "problem_type"):
        settings.pop(name, None)
    (copy / "config.json").write_text(json.dumps(settings))
    task = huggingface_bert.FORMAT.read_task(copy, True)
    assert (task.config.head.kind, task.labels) == ("label", ("LABEL_0", "LABEL_1", "LABEL_2"))
    configure(copy, label2id={"a": 1, "b": 2, "c": 0})
    assert huggingface_bert.FORMAT.read_task(copy, True).labels == ("c", "a", "b")
    change(copy, **{"classifier.weight": np.ones((1, 32), np.float32), "classifier.bias": np.ones(1, np.float32)})
    assert huggingface_bert.FORMAT.read_task(copy, True).config.head.kind == "number"


def test_old_files_with_heads_are_read(copy, published):
    expected = huggingface_bert.FORMAT.read_task(copy, True)
    change(
        copy,
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    )
    assert_params_equal(huggingface_bert.FORMAT.read_task(copy, True).params, expected.params)
    shutil.rmtree(copy)
    shutil.copytree(published("gpt-choice")[1], copy)
    expected = huggingface_gpt.FORMAT.read_task(copy, True)
    change(copy, lambda name: name.replace("multiple_choice_head.summary", "multiple_choice_head.linear"))
    assert_params_equal(huggingface_gpt.FORMAT.read_task(copy, True).params, expected.params)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "config.json.*id2label.* 2 .* 3"),
        ({"id2label": {"0": "a", "1": "b", "3": "c"}}, "config.json.*id2label"),
        ({"id2label": ["a", "b", "c"]}, "config.json.*id2label"),
        ({"id2label": {"0": "a", "1": "b", "2": 3}}, "config.json.*id2label.*2"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "config.json.*'a'"),
        ({"problem_type": "ranking"}, "config.json.*problem_type.*'ranking'"),
        ({"problem_type": "regression"}, "config.json.*problem_type.* 3 "),
        ({"classifier_dropout": 2}, "config.json.*dropout"),
    ],
)
def test_settings_that_contradict_the_head_are_refused(settings, complaint, copy):
    configure(copy, **settings)
    with pytest.raises(InputError, match=complaint):
        huggingface_bert.FORMAT.read_task(copy, True)


@pytest.mark.parametrize(
    "lost", ["classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"]
)
def test_a_head_that_was_never_trained_is_refused(lost, copy):
    change(copy, lambda name: None if name == lost else name)
    with pytest.raises(InputError, match=rf"{lost}.*never trained"):
        huggingface_bert.FORMAT.read_task(copy, True)


def test_a_directory_without_a_head_has_no_task(bert_directory, gpt_directory, elmo_directory):
    assert huggingface_bert.FORMAT.read_task(bert_directory, True) is None
    assert huggingface_gpt.FORMAT.read_task(gpt_directory, True) is None
    assert bilm.FORMAT.read_task(elmo_directory, True) is None


# Heads in a file of their own


def with_head(encoder, head, labels=()):
    """An encoder with a head of random parameters."""
    config = TaskModelConfig(encoder.config, head)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract_params(config)["head"])
    by_path = {path_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(params)}
    return join(config, encoder, by_path, labels, 20)


OWN = {
    "crf": ("bert", Tags(num_tags=3, crf=True), NAMES),
    "lstm": ("bert", Label(num_labels=3, mix=True, lstm_size=5, lstm_layers=2), NAMES),
    "gpt-tags": ("gpt", Tags(num_tags=3), NAMES),
    "gpt-two-orders": ("gpt", Label(num_labels=1, kind="number", bias=False, pair=True), ()),
    "elmo": ("elmo", Tags(num_tags=3, crf=True, mix=True, lstm_size=6, dropout=0.5), NAMES),
    "elmo-spans": ("elmo", Span(lstm_size=6), ()),
}
READERS = {"bert": huggingface_bert.FORMAT, "gpt": huggingface_gpt.FORMAT, "elmo": bilm.FORMAT}


@pytest.fixture
def own(bert_directory, gpt_directory, tmp_path_factory):
    """`own(name)` is (the format, a task whose head no class of transformers has)."""

    def make(name):
        family, head, labels = OWN[name]
        elmo = publish_elmo(tmp_path_factory.mktemp("elmo"), ELMO_OPTIONS, elmo_weights())
        directory = {"bert": bert_directory, "gpt": gpt_directory, "elmo": elmo}[family]
        encoder = READERS[family].read(directory, True)
        if family == "elmo":
            encoder = dataclasses.replace(encoder, tokenizer=WordVocabulary(["<S>", "</S>", "<UNK>"], tokenize=True))
        return READERS[family], with_head(encoder, head, labels)

    return make


@pytest.mark.parametrize("name", OWN)
def test_other_heads_are_kept_bit_for_bit(name, own, tmp_path):
    format, task = own(name)
    assert format.head_class(task.config.head) is None, "a card names no class"
    save(task, format, tmp_path / "model", "# A model\n")
    again = format.read_task(tmp_path / "model", True)
    assert (again.config, again.labels, again.max_length) == (task.config, task.labels, 20)
    assert_params_equal(again.params, task.params)
    save(again, format, tmp_path / "model", "# A model\n")
    assert_params_equal(format.read_task(tmp_path / "model", True).params, task.params)
    encoder = format.read(tmp_path / "model", True)  # Others read the encoder.
    assert encoder.config == dataclasses.replace(
        task.config.encoder, **({"vocab_size": 3} if name[:4] == "elmo" else {})
    )


def test_torch_loads_an_lstm_of_a_head(own, tmp_path):
    format, task = own("lstm")
    save(task, format, tmp_path / "model", "# A model\n")
    tensors = load_file(tmp_path / "model/head.safetensors")
    states = {name.removeprefix("lstm."): torch.tensor(x) for name, x in tensors.items() if name.startswith("lstm.")}
    theirs = torch.nn.LSTM(32, 5, num_layers=2, bidirectional=True, batch_first=True)
    theirs.load_state_dict(states)
    module = task.config.build().bind({"params": task.params})
    x_RTD = np.random.default_rng(1).normal(size=(2, 7, 32)).astype(np.float32)
    plain = dataclasses.replace(task.config.head, mix=False)
    bound = type(module.head)(plain, True).bind({"params": task.params["head"]})
    ours = bound.states([jnp.asarray(x_RTD)], jnp.ones((2, 7), bool), False)
    np.testing.assert_allclose(ours, theirs(torch.tensor(x_RTD))[0].detach(), atol=2e-6)


def test_a_saved_model_without_a_head_has_no_head_of_an_earlier_one(own, tmp_path):
    format, task = own("crf")
    save(task, format, tmp_path / "model", "# A model\n")
    encoder, _ = split(task)
    save(encoder, format, tmp_path / "model", "# A model\n")
    assert format.read_task(tmp_path / "model", True) is None


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({}, "describes no head"),
        ({"head": '{"class": "Parser"}', "labels": "[]", "max_length": "20"}, "describes no head"),
        ({"head": '{"class": "Tags", "num_tags": 3}', "labels": '["a"]', "max_length": "20"}, " 1 .* 3 "),
        ({"head": '{"class": "Tags", "num_tags": 4}', "labels": '["a","b","c","d"]', "max_length": "20"}, "classifier"),
        ({"head": '{"class": "Tags", "num_tags": 3, "crf": 1}', "labels": "[]", "max_length": "20"}, "crf is 1"),
        ({"head": '{"class": "Tags"}', "labels": "[]", "max_length": "0"}, "max_length is 0"),
    ],
)
def test_a_damaged_file_of_a_head_is_refused(metadata, complaint, own, tmp_path):
    from safetensors.numpy import save_file

    format, task = own("gpt-tags")
    save(task, format, tmp_path / "model", "# A model\n")
    file = tmp_path / "model/head.safetensors"
    save_file(load_file(file), file, metadata)
    with pytest.raises(InputError, match=rf"head.safetensors.*{complaint}"):
        format.read_task(tmp_path / "model", True)
    file.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"head.safetensors.*cannot be read"):
        format.read_task(tmp_path / "model", True)


# Parity with transformers


def inputs_of(case, head):
    """A batch as `models/task.py` has it, and the inputs of transformers for the same examples."""
    rng = np.random.default_rng(0)
    texts, length = (3 if isinstance(head, Choice) else 1), 12
    shape = (4, texts, length)
    lengths = np.full(shape[:2], length) if case == "spans" else rng.integers(5, length + 1, shape[:2])
    real = np.arange(length) < lengths[..., None]
    tokens = np.where(real, rng.integers(5, 45, shape), len(GPT_TOKENS) + 3 if "gpt" in case else 0)
    types = (real & (np.arange(length) > 3)).astype(int)
    read = (lengths - 1 if "gpt" in case else np.zeros_like(lengths))[..., None]
    labels = {
        "label": rng.integers(0, 3, 4),
        "labels": rng.integers(0, 2, (4, 3)).astype(np.float32),
        "number": rng.normal(size=4).astype(np.float32),
        "choice": rng.integers(0, 3, 4),
        "spans": rng.integers(0, length, (4, 2)),
        "tags": rng.integers(0, 3, (4, length)),
    }[case.removeprefix("gpt-")]
    weights = np.ones(4, np.float32)
    if case == "tags":
        read = np.where(np.arange(length) < (lengths[..., None] - 1) // 2, 1 + 2 * np.arange(length), -1)
        weights = (read[:, 0] >= 0).astype(np.float32)
    integers = {
        "tokens": tokens,
        "token_types": types,
        "positions": np.broadcast_to(np.arange(length), shape),
        "segments": real,
        "read_positions": read,
    }
    batch = {name: x.astype(np.int32) for name, x in integers.items()} | {"label_weights": weights}
    batch["labels"] = labels if labels.dtype == np.float32 else labels.astype(np.int32)
    if case != "tags":  # The only label of its row.
        batch |= {name: batch[name][:, None] for name in ("labels", "label_weights")}

    def theirs(x):
        return torch.tensor(x if texts > 1 else x[:, 0])

    inputs = {"input_ids": theirs(tokens)}
    if "gpt" not in case:  # Of choices, GPT takes no mask; padding comes after all that it reads.
        inputs |= {"attention_mask": theirs(real.astype(int)), "token_type_ids": theirs(types)}
    if case == "tags":
        aligned = np.full((4, length), -100)
        for row, (positions, found) in enumerate(zip(read[:, 0], labels, strict=True)):
            aligned[row, positions[positions >= 0]] = found[positions >= 0]
        inputs["labels"] = torch.tensor(aligned)
    elif case == "spans":
        inputs |= {"start_positions": torch.tensor(labels[:, 0]), "end_positions": torch.tensor(labels[:, 1])}
    elif case == "gpt-choice":
        inputs |= {"mc_token_ids": torch.tensor(read[..., 0]), "mc_labels": torch.tensor(labels)}
    else:
        inputs["labels"] = torch.tensor(labels)
    return batch, inputs


def scores_of(case, outputs, batch):
    """The logits of transformers where ours are."""
    if case == "spans":
        return torch.stack([outputs.start_logits, outputs.end_logits], -1)
    if case == "tags":
        index = torch.tensor(batch["read_positions"][:, 0].clip(0))[..., None].expand(-1, -1, 3)
        return outputs.logits.gather(1, index.long())
    return outputs.mc_logits if case == "gpt-choice" else outputs.logits


SAME_ENCODER = ("labels", "number", "gpt-number")  # As another case: only the gradients of their losses are their own.


@pytest.mark.parametrize("case", FAST_CASES)
def test_scores_loss_and_gradients_are_those_of_transformers(case, published, tmp_path):
    reference, directory = published(case)
    task = read_task_of(case, directory)
    batch, inputs = inputs_of(case, task.config.head)
    module = task.config.build()

    @jax.jit
    def compute(params):
        def objective(params):
            if case in SAME_ENCODER:
                params = {**jax.lax.stop_gradient(params), "head": params["head"]}
            losses, _, _ = module.loss(params, {}, batch, jax.random.key(0), train=False)
            total, weight = losses["label_loss"]
            return total / weight

        return module.predict(params, {}, batch)["scores"], jax.value_and_grad(objective)(params)

    scores, (loss, gradients) = compute(task.params)
    theirs = copy_module(reference)
    outputs = theirs(**inputs)
    expected = scores_of(case, outputs, batch).detach().numpy()
    real = batch["read_positions"][:, 0] >= 0 if case == "tags" else slice(None)
    np.testing.assert_allclose(scores[real], expected[real], atol=2e-5, rtol=0)
    their_loss = outputs.mc_loss if case == "gpt-choice" else outputs.loss
    assert float(loss) == pytest.approx(their_loss.item(), abs=2e-5)
    their_loss.backward()
    # The gradients as a model, so that they are read by the names that parameters have.
    for parameter in theirs.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    shutil.copytree(directory, tmp_path / "gradients")
    theirs.save_pretrained(tmp_path / "gradients")
    for (path, ours), expected in zip(
        jax.tree_util.tree_leaves_with_path(gradients),
        jax.tree.leaves(read_task_of(case, tmp_path / "gradients").params),
        strict=True,
    ):
        if case not in SAME_ENCODER or path_name(path).startswith("head/"):
            np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=0, err_msg=path_name(path))


def copy_module(module):
    """A copy with gradients of its own."""
    copied = type(module)(module.config)
    copied.load_state_dict(module.state_dict())
    return copied.eval()
