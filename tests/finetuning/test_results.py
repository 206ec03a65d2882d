"""Results of several seeds: the median, what is printed of them, the card, and the report page."""

import dataclasses
import io
import json
import re
import statistics
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import get_args

import hypothesis.strategies as st
import pytest
from hypothesis import given
from rich.console import Console

from prelm_jax.cli.main import main
from prelm_jax.data.examples import Answers, Example, Kind
from prelm_jax.errors import InputError
from prelm_jax.finetuning.card import task_card
from prelm_jax.finetuning.metrics import Score
from prelm_jax.finetuning.predictions import PREDICTIONS, read_predictions, write_predictions
from prelm_jax.finetuning.results import Results, SeedResult, read_results, results_table, write_results
from prelm_jax.finetuning.sections import section
from prelm_jax.inference.decoding import Prediction
from prelm_jax.inference.heads import METHODS


def make_results(values: dict[int, float], **changes) -> Results:
    """Results with an accuracy for each seed, beside a baseline of 0.5."""
    seeds = tuple(
        SeedResult(n, 100, 3, {"macro_f1": Score(0.25, 0.02), "accuracy": Score(x, 0.01)}) for n, x in values.items()
    )
    results = Results(
        "polarity", "label", "bert", None, "data/train.tsv", "data/dev.tsv,header=yes", 8000, 872, ("no", "yes"),
        "accuracy", {"accuracy": {"best constant": 0.5, "coin": 0.4}}, seeds,
    )  # fmt: skip
    return dataclasses.replace(results, **changes)


@given(st.dictionaries(st.integers(0, 20), st.sampled_from([0.4, 0.5, 0.6, 0.75]), min_size=1, max_size=6))
def test_spread_over_seeds(values):
    results = make_results(values)
    found, x = results.spread("accuracy"), list(values.values())
    assert found.mean == pytest.approx(sum(x) / len(x))
    assert (found.lowest, found.highest, found.baseline, found.error) == (min(x), max(x), 0.5, 0.01)
    assert found.deviation == (pytest.approx(statistics.stdev(x)) if len(x) > 1 else None)
    assert found.at_baseline == sum(each <= 0.5 for each in x)
    assert sum(each <= found.median for each in x) * 2 >= len(x) > sum(each < found.median for each in x) * 2
    median = results.median_seed()
    assert values[median.seed] == found.median
    assert median.seed == min(seed for seed, value in values.items() if value == found.median)


def test_the_lower_median_of_four_seeds():
    assert make_results({0: 0.9, 1: 0.7, 2: 0.8, 3: 0.6}).median_seed().seed == 1
    assert make_results({3: 0.7, 5: 0.7, 4: 0.7}).of_seed(None).seed == 3
    assert make_results({3: 0.7, 5: 0.9}).of_seed(5).seed == 5
    with pytest.raises(InputError, match=r"--seed 4 .* 3, 5"):
        make_results({3: 0.7, 5: 0.9}).of_seed(4)
    assert make_results({0: 0.7}).spread("macro_f1").baseline is None


def test_results_are_read_as_written(tmp_path):
    results = make_results({0: 0.9, 1: 0.7}, init_from="runs/bert", labels=("é", "\n"))
    write_results(tmp_path, results)
    assert read_results(tmp_path) == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace('"macro_f1"', '"other"', 1))
    with pytest.raises(InputError, match=r"results\.json"):
        read_results(tmp_path)
    path.write_text(path.read_text().replace('"seed": 0', '"seed": -1', 1))
    with pytest.raises(InputError, match=r"results\.json: seeds\.0\.seed"):
        read_results(tmp_path)
    with pytest.raises(InputError, match=r"no results\.json"):
        read_results(tmp_path / "none")


def test_predictions_are_read_as_written(tmp_path):
    path = tmp_path / PREDICTIONS
    examples = [
        Example("a", (("one\ntwo", "é" * 300),), "yes"),
        Example("b", ((("New", "York"),),), ("B-LOC", "I-LOC")),
        Example("c", (("story", "x"), ("story", "y")), 1),
        Example("d", (("Who?", "Ada."),), Answers(("Ada", "Ada."), (0, 0))),
        Example("e", (("Who?", "Ada."),), Answers()),
    ]
    predicted = [Prediction(x) for x in ("no", ("O", "O"), 0, Answers(("Ada",), (0,)), Answers())]
    write_predictions(path, "label", examples, predicted)
    found = read_predictions(path)
    assert [each.id for each in found] == list("abcde")
    assert [each.text for each in found[1:3]] == ["New York", "story | x | y"]
    assert found[0].text.startswith("one\ntwo | éé") and len(found[0].text) == 200
    assert [each.gold for each in found] == ["yes", ["B-LOC", "I-LOC"], 1, ["Ada", "Ada."], []]
    assert [each.prediction for each in found] == ["no", ["O", "O"], 0, "Ada", ""]
    write_predictions(path, "label", examples[:1], [Prediction("no", (2 / 3, 1 / 3))], ("no", "yes"))
    assert read_predictions(path)[0].probabilities == {"no": 0.666667, "yes": 0.333333}
    with path.open("a") as file:
        file.write('{"id": 3}\n')
    with pytest.raises(InputError, match=r"jsonl:2.*id"):
        read_predictions(path)


def printed(results: Results) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(results_table(results))
    return console.file.getvalue()


def test_the_table_has_each_metric_beside_its_baseline():
    text = printed(make_results({0: 0.9, 1: 0.45, 2: 0.8}))
    row = next(line for line in text.splitlines() if " accuracy " in line)
    for cell in ("71.7 ± 23.6", "80.0", "45.0 to 90.0", " 1.0 ", "best constant 50.0, coin 40.0", "1 of 3"):
        assert cell in row, cell
    assert "seed 2" in text and text.index("accuracy") < text.index("macro f1")
    one = printed(make_results({0: 0.9}))
    assert " 90.0 " in one and "±" not in one and "seeds" not in one


@pytest.mark.parametrize("init_from", [None, "hub:org/small-bert@30b0a37", "runs/mini", "runs/bert: mini/exported"])
def test_a_card_is_read_by_hugging_face(init_from):
    """As a model-index with the numbers of the exported seed."""
    from huggingface_hub import ModelCard

    results = make_results({0: 0.9, 1: 0.45, 2: 0.8}, init_from=init_from, task='a "task": #1')
    text = task_card(results, 2, "my: model", "transformers", "finetune finetuning:polarity")
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert data.model_name == "my: model" and data.pipeline_tag == "text-classification"
    assert data.base_model == ("org/small-bert" if str(init_from).startswith("hub:") else None)
    found = {each.metric_name: (each.metric_type, each.metric_value) for each in data.eval_results}
    assert found == {"accuracy": ("accuracy", 0.8), "macro f1": ("f1", 0.25)}
    assert {(each.task_name, each.dataset_name) for each in data.eval_results} == {('a "task": #1', "dev.tsv")}
    assert "seed 2, the median of 3 seeds by accuracy" in text and "3 evaluations" in text
    assert "`prelm finetune finetuning:polarity`" in text and "| 71.7 ± 23.6 | 80.0 |" in text
    assert "seed 0, chosen by hand" in task_card(results, 0, "m", "transformers", "")
    json.dumps(data.to_dict())


@pytest.mark.parametrize("kind", get_args(Kind))
def test_the_usage_on_a_card_is_a_method_of_the_kind(kind):
    text = task_card(make_results({0: 0.9}, kind=kind), 0, "my-model", "transformers", "")
    used = []

    class Model:
        def __getattr__(self, name):
            return lambda inputs: used.append((name, inputs)) or []

    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    exec(code.replace("import prelm_jax", ""), {"prelm_jax": SimpleNamespace(load=lambda path: Model())})
    [(name, inputs)] = used
    assert name == METHODS[kind]
    assert len(inputs[0]) == 2 if kind in ("choice", "spans") else isinstance(inputs[0], str)


# ---- The report page -------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Complains about tags that are not closed, and collects the cells of all tables."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.cells = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def make_directory(path, results, examples, predicted, probabilities=None) -> str:
    """The directory of a fine-tuning whose only work directory is that of the median seed; returns its section."""
    write_results(path, results)
    seed = path / f"seed-{results.median_seed().seed}"
    seed.mkdir()
    (seed / "run.json").write_text("{}")
    scores = probabilities or [()] * len(predicted)
    found = [Prediction(label, each) for label, each in zip(predicted, scores, strict=True)]
    write_predictions(seed / PREDICTIONS, results.kind, examples, found, results.labels)
    text = section(path)
    assert text == section(path)
    return text


def test_section_of_labels(tmp_path):
    examples = [Example(str(i), ((f"<text {i}>",),), label) for i, label in enumerate(["no", "no", "yes", "yes"])]
    probabilities = [(x, 1 - x) for x in (0.9, 0.1, 0.2, 0.8)]
    results = make_results({0: 0.9, 1: 0.5, 2: 0.4})
    text = make_directory(tmp_path, results, examples, ["no", "yes", "yes", "no"], probabilities)
    cells = Tags(text).cells
    assert "<text" not in text and "Seed 1, the median by accuracy" in text
    assert "best constant 50.0, coin 40.0" in cells and "2 of 3" in cells
    start = cells.index("gold \\ predicted")
    assert cells[start : start + 9] == ["gold \\ predicted", "no", "yes", "no", "1", "1", "yes", "1", "1"]
    # Confidences 0.9, 0.9, 0.8, 0.8: one of each is right.
    assert "calibration error: 35.0" in text and cells[cells.index("80.0") - 1 :][:3] == ["2", "80.0", "50.0"]
    assert "2 of 4 are not" in text
    start = cells.index("confidence") + 1
    assert cells[start : start + 10] == ["1", "<text 1>", "no", "yes", "0.9", "3", "<text 3>", "yes", "no", "0.8"]


def test_section_of_many_labels_lists_confusions(tmp_path):
    names = tuple(f"l{i:02}" for i in range(21))
    examples = [Example(str(i), (("a",),), name) for i, name in enumerate([*names, "l00"])]
    predicted = [*names[1:], "l00", "l01"]
    cells = Tags(make_directory(tmp_path, make_results({0: 0.9}, labels=names), examples, predicted)).cells
    start = cells.index("gold") + 3
    assert "gold \\ predicted" not in cells and cells[start : start + 3] == ["l00", "l01", "2"]


@pytest.mark.parametrize(
    ("kind", "labels", "golds", "predicted", "expected"),
    [
        ("labels", ("x", "y"), [("x", "y"), ()], [("x",), ()], ["x y", "x", "1"]),
        ("number", (), [1.0, 5.0], [1.5, 3.0], ["5", "3", "2"]),
        ("tags", ("B-A", "O"), [("B-A", "O")], [("O", "O")], ["B-A O", "O O", "1"]),
        ("choice", (), [1, 0], [1, 1], ["0", "1", "1"]),
        (
            "spans",
            (),
            [Answers(("b",), (0,)), Answers()],
            [Answers(("b",), (0,)), Answers(("b",), (0,))],
            ["", "b", "1"],
        ),
    ],
)
def test_sections_of_other_kinds(tmp_path, kind, labels, golds, predicted, expected):
    """The last error is shown with its gold label, its prediction and how wrong that is."""
    part = ("a", "b") if kind == "tags" else "b"
    examples = [Example(str(i), ((part, "b"),), gold) for i, gold in enumerate(golds)]
    baselines = {"no_answer_f1": {"best constant": 1.0}, "accuracy": {"best constant": 0.5}}
    results = make_results({0: 0.9}, kind=kind, labels=labels, baselines=baselines)
    cells = Tags(make_directory(tmp_path, results, examples, predicted)).cells
    wrong = {"number": 1}.get(kind, 0)
    assert cells[len(cells) - 3 - 5 * wrong :][:3] == expected


def test_report_of_a_fine_tuning(tmp_path, capsys):
    """Recognized by its seeds, whose curves share pictures; before a seed is done there is nothing else."""
    record = {
        "model_type": "bert",
        "identity": {},
        "sources": {},
        "loop": {},
        "command": [],
        "version": "0",
        "format": 3,
    }
    record["segments"] = [{"from_step": 0, "optimizer": {"name": "AdamW"}}]
    for seed in (10, 9):
        (tmp_path / f"seed-{seed}").mkdir()
        (tmp_path / f"seed-{seed}/run.json").write_text(json.dumps(record))
        lines = [{"step": 1, "evaluation/accuracy": 0.625, "baseline/accuracy/best constant": 0.5}]
        (tmp_path / f"seed-{seed}/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert section(tmp_path) == ""
    write_results(tmp_path, make_results({9: 0.9, 10: 0.5}))
    main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    assert text.index("seed-9<") < text.index("seed-10<") and text.count("best constant") > 1
    assert "polarity: bert from scratch, 872 examples of data/dev.tsv" in text
