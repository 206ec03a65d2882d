"""A Run and its record: what decides the bits, what may differ, and the way through JSON and back."""

import dataclasses
import json

import pytest
import tiny

from prelm_jax.data.masking import MaskingConfig
from prelm_jax.errors import InputError
from prelm_jax.families import find_family
from prelm_jax.run import Run, RunRecord
from prelm_jax.training.sharding import MeshConfig
from prelm_jax.validation import read


def record(run: Run, corpus: str = "c", tokenizer: str = "t") -> RunRecord:
    return RunRecord.from_run(run, corpus, tokenizer)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_run_comes_back_from_json(family):
    """All but tokenizer and optimizer, which have other homes: the work directory, and the segments."""
    run = dataclasses.replace(tiny.FAMILIES[family](), accumulate=2, seed=5, precision="bfloat16")
    run = tiny.with_loop(run, keep_at_steps=(3, 7), mesh=MeshConfig(devices=2, parameters="fsdp"))
    written = read(RunRecord, json.loads(record(run).to_json()), "run.json")
    row = find_family(family, "here")
    assert written.run(row.model, row.data) == dataclasses.replace(run, tokenizer=None, optimizer=None)


def test_nested_configs_come_back_as_such():
    data = dataclasses.replace(tiny.bert().data, masking=MaskingConfig(whole_word=True))
    assert read(type(data), json.loads(json.dumps(dataclasses.asdict(data))), "x") == data


def test_the_first_segment_holds_the_optimizer():
    (segment,) = record(tiny.bert()).segments
    assert segment.from_step == 0 and segment.to_step is None
    assert segment.optimizer["name"] == "AdamW" and segment.optimizer["decay_steps"] == 100


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed (0 there, 1 here)"),
        ({"batch_size": 16}, "batch_size (8 there, 16 here)"),
        ({"model": dataclasses.replace(tiny.bert().model, num_layers=2)}, "model.num_layers (1 there, 2 here)"),
        ({"optimizer": dataclasses.replace(tiny.bert().optimizer, b1=0.5)}, "optimizer.b1 (0.9 there, 0.5 here)"),
        ({"optimizer": tiny.elmo().optimizer}, "optimizer.name (AdamW there, Adagrad here)"),
    ],
)
def test_what_decides_the_bits_is_named(changes, named):
    changed = dataclasses.replace(tiny.bert(), **changes)
    assert named in record(tiny.bert()).differences(record(changed), changed)


def test_other_text_or_vocabulary_is_named_by_fingerprint():
    assert record(tiny.bert()).differences(record(tiny.bert(), corpus="d", tokenizer="u"), tiny.bert()) == [
        "corpus_fingerprint (c there, d here)",
        "tokenizer_fingerprint (t there, u here)",
    ]
    (found,) = record(tiny.bert(), "ab" * 32).differences(record(tiny.bert(), "cd" * 32), tiny.bert())
    assert found == "corpus_fingerprint (abababab… there, cdcdcdcd… here)"


def test_fields_that_are_younger_than_a_record():
    """A record without them is one of their defaults: it is read, and compared, as if it had them."""
    run = dataclasses.replace(tiny.bert(), data=dataclasses.replace(tiny.bert().data, masking=MaskingConfig()))
    old = json.loads(record(run).to_json()) | {"format": 2}
    del old["sources"]["validation"], old["identity"]["validation_fingerprint"], old["identity"]["accumulate"]
    del old["identity"]["data"]["masking"]["random"], old["segments"][0]["optimizer"]["decay"]
    old["segments"] = [{"from_step": 0, "optimizer": old["segments"][0]["optimizer"]}]
    del old["loop"]["tensorboard"], old["identity"]["model"]["initializer_range"]
    there = read(RunRecord, old, "run.json")
    assert there.differences(record(run), run) == []
    assert there.run(type(run.model), type(run.data)) == dataclasses.replace(run, tokenizer=None, optimizer=None)
    changed = dataclasses.replace(
        run, accumulate=2, data=dataclasses.replace(run.data, masking=MaskingConfig(0.2, random=0))
    )
    assert there.differences(record(changed), changed) == [
        "accumulate (1 there, 2 here)",
        "data.masking.probability (0.15 there, 0.2 here)",
        "data.masking.random (0.1 there, 0 here)",
    ]


@pytest.mark.parametrize(
    "segments",
    [
        [],
        [{"from_step": 3, "optimizer": {}}],
        [{"from_step": 0, "optimizer": {}}, {"from_step": 5, "optimizer": {}}],
        [{"from_step": 0, "optimizer": {}}, {"from_step": 5, "optimizer": {}, "to_step": 5}],
        [{"from_step": 0, "optimizer": {}}] + 2 * [{"from_step": 5, "optimizer": {}, "to_step": 9}],
        [{"from_step": 0, "optimizer": 3}],
        [3],
        3,
    ],
)
def test_segments_that_no_run_has(segments):
    fields = json.loads(record(tiny.bert()).to_json()) | {"segments": segments}
    with pytest.raises(InputError, match=r"run\.json: segments"):
        read(RunRecord, fields, "run.json")


def test_a_validation_text_replaces_the_fraction_held_out():
    run = dataclasses.replace(tiny.bert(), validation=("v.txt",), held_out=0.5)
    assert run.split == 0 and record(run).identity["held_out"] == 0


def test_what_may_differ_between_resumes():
    """The loop, and where text and vocabulary were found."""
    run = tiny.with_loop(tiny.bert(), steps=99, save_every=1, mesh=MeshConfig(devices=4), keep_at_words=(5,))
    run = dataclasses.replace(run, corpus=("elsewhere.txt",), errors="replace", tokenizer=tiny.gpt().tokenizer)
    assert record(tiny.bert()).differences(record(run), run) == []


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("accumulate", -1)])
def test_sizes_below_one_are_refused(name, value):
    with pytest.raises(InputError, match=f"^{name} is {value}"):
        dataclasses.replace(tiny.bert(), **{name: value})


@pytest.mark.parametrize("name", ["steps", "save_every", "keep", "evaluate_every", "evaluate_batches", "log_every"])
def test_loop_settings_below_one_are_refused(name):
    with pytest.raises(InputError, match=f"^loop.{name} is 0"):
        tiny.with_loop(tiny.bert(), **{name: 0})
