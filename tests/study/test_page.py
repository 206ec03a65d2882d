"""The page of a study: the same bytes for the same records, every number from them, nothing loaded from elsewhere."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
from study_records import header, pairs, probe, write_study
from test_report import Checker, make_run

from prelm_jax.cli.main import main
from prelm_jax.finetuning.metrics import Score
from prelm_jax.finetuning.results import Results as Tuned
from prelm_jax.finetuning.results import SeedResult
from prelm_jax.study import records, statistics
from prelm_jax.study.figures import _labels
from prelm_jax.study.page import draw
from prelm_jax.study.parts import short_names
from prelm_jax.study.records import Row
from prelm_jax.study.scores import Column, Results, model_name, read_results


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def page(study):
    return draw(read_results([study]))


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_page_is_whole_and_loads_nothing(study, tmp_path, capsys):
    main(["report", str(study), "--output", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    checker = Checker(text)
    assert not checker.open
    assert all(address.startswith(("#", "data:text/")) for address in checker.addresses)
    for heading in (
        "Protocol",
        "Scores",
        "Differences",
        "Learning curves",
        "Layers",
        "Similarity of layers",
        "Details",
    ):
        assert heading in checker.words
    assert "penalties 0.1 1; sentences dev 10, train 30; version 1" in checker.words
    assert "npi<&_>" in checker.words and "The [bank] <of> a river" in checker.words  # Escaped.
    written = {path.name for path in (tmp_path / "page-data").iterdir()}
    assert written == set(re.findall(r'download="(.*?)"', text)) >= {"summary.csv", "summary.tex", "upos-layers.csv"}
    assert str(tmp_path / "page-data") in capsys.readouterr().out


def test_a_value_that_rounds_to_zero_is_not_negative():
    correlation, accuracy = (Column("", "", (), metric) for metric in ("spearman", "accuracy"))
    assert [correlation.show(x) for x in (-0.004, -0.006, 0.5)] == ["0.00", "−0.01", "0.50"]
    assert [accuracy.show(x, "+") for x in (-0.0004, -0.0006, 0.5)] == ["+0.0", "−0.1", "+50.0"]


def test_runs_and_fine_tunings_are_no_studies(study, tmp_path):
    """Though they have folders with .jsonl files; with a study they are on its page."""
    runs = [make_run(tmp_path / "run")]
    (runs[0] / "profile").mkdir()
    (runs[0] / "profile" / "a.jsonl").write_text("{}\n")
    (tmp_path / "tuned").mkdir()
    make_run(tmp_path / "tuned" / "seed-0")
    main(["report", str(tmp_path / "tuned"), str(runs[0]), "--output", str(tmp_path / "page.html")])
    assert not (tmp_path / "page-data").exists()
    main(["report", str(study), str(runs[0]), "--output", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    assert "Held-out text" in text and "Learning curves" in text and not Checker(text).open


def test_the_same_records_give_the_same_bytes(study, tmp_path):
    """In another process, from a copy elsewhere, whose records took another time to measure."""
    copy = shutil.copytree(study, tmp_path / "copy")
    for path in records.find(copy):
        first, *rest = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps(json.loads(first) | {"seconds": 123.0}), *rest]) + "\n")
    main(["report", str(study), "--output", str(tmp_path / "a.html")])
    command = ["from prelm_jax.cli.main import main; main()", "report", copy, "--output", tmp_path / "b.html"]
    subprocess.run([sys.executable, "-c", *map(str, command)], check=True, capture_output=True)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    for file in (tmp_path / "a-data").iterdir():
        assert file.read_bytes() == (tmp_path / "b-data" / file.name).read_bytes()


def test_scores_and_intervals_are_those_of_the_rows(study, page):
    """The dev set chooses the layer, and the test set gives its score."""
    found = read_results([study])
    row = next(row for row in table(page.files["summary.csv"]) if row["model"] == "elmo")
    elmo = next(
        records.read(path)
        for path in records.find(study)
        if path.name.startswith("runs-elmo-") and path.parent.name == "upos"
    )
    dev = {n: statistics.value([x for x in elmo.rows if (x.layer, x.kind) == (n, "dev")], "accuracy") for n in range(3)}
    layer = max(dev, key=dev.__getitem__)
    own = [x for x in elmo.rows if (x.layer, x.kind) == (layer, "")]
    assert float(row["upos"]) == pytest.approx(statistics.value(own, "accuracy"))
    score = found.score(next(m for m in found.models if m.family == "elmo"), found.columns[1])
    assert (score.layer, score[:3]) == (layer, statistics.interval(own, "accuracy"))
    control = [x for x in elmo.rows if (x.layer, x.kind) == (layer, "control")]
    assert score.kinds == {"majority": 0.5, "control": statistics.value(control, "accuracy")}
    detail = next(row for row in table(page.files["details.csv"]) if (row["model"], row["test"]) == ("elmo", "upos"))
    selectivity = 100 * (score.value - score.kinds["control"])
    assert f"selectivity {selectivity:.1f}" in detail["other lines"] and detail["layer"] == f"{layer} (dev)"


def test_curves_have_the_checkpoints_and_the_table_the_models(study, page):
    points = table(page.files["blimp-words.csv"])
    assert [(row["model"], row["words_seen"]) for row in points if row["family"] == "bert"] == [
        ("bert", "2000000"),
        ("bert-trunk", "500000"),
        ("bert-trunk", "1000000"),
    ]
    models = [row["model"] for row in table(page.files["summary.csv"])]
    assert models == ["unigram:bert", "word2vec:a", "untrained:bert:demo", "bert", "elmo", "openai-gpt"]
    layers = table(page.files["upos-layers.csv"])
    assert {row["relative_depth"] for row in layers if row["model"] == "bert"} == {"0.0000", "0.5000", "1.0000"}
    assert {(row["model"], row["layer"]) for row in layers if row["line"] == "all layers"} == {
        ("majority", ""),
        ("word2vec:a", ""),
    }


def test_ties_and_unknown_words_are_shown(page):
    row = next(row for row in table(page.files["details.csv"]) if row["model"].startswith("unigram"))
    assert (row["ties"], row["with unknown words"]) == ("10.0%", "10.0%") and row["score without these"]
    assert float(row["score if ties are right"]) == pytest.approx(float(row["score"]) + 5)
    other = next(row for row in table(page.files["details.csv"]) if (row["model"], row["test"]) == ("bert", "blimp"))
    assert (other["ties"], other["score if ties are right"]) == ("0.0%", "")


def test_differences_are_paired_and_named(study, page):
    found = read_results([study])
    bert, elmo = (next(m for m in found.models if m.name == f"runs/{name}") for name in ("bert", "elmo"))
    rows = [row for row in table(page.files["differences.csv"]) if row["test"] == "blimp"]
    assert {row["budget"] for row in rows} == {"equal words and FLOPs"} and len(rows) == 3
    row = next(row for row in rows if (row["model"], row["minus"]) == ("bert", "elmo"))
    column = found.columns[0]
    interval = statistics.difference(found.rows(bert, column), found.rows(elmo, column), column.metric)
    assert [float(row[name]) for name in ("difference", "low", "high")] == pytest.approx(interval, rel=1e-5)
    assert row["different"] == ("no" if interval.low <= 0 <= interval.high else "yes")


def test_seeds_are_one_row_and_must_not_overlap(tmp_path):
    """Two models whose interval excludes zero are not called different while their seeds overlap."""
    for family, skills in (("bert", (0.0, 1.0)), ("elmo", (0.9, 1.0)), ("openai-gpt", (0.0, 0.1))):
        for seed, skill in enumerate(skills):
            rows = [Row(str(i), str(i), float(i < 40 * skill)) for i in range(40)]
            of_seed = header("blimp", "macro_accuracy", f"x/seed-{seed}/{family}", family, words_seen=1000, seed=seed)
            records.write(tmp_path, of_seed, rows)
    found = read_results([tmp_path])
    assert [model.name for model in found.models] == ["x/bert", "x/elmo", "x/openai-gpt"]
    bert, elmo, gpt = found.models
    column = found.columns[0]
    assert (score := found.score(bert, column)) and (score.value, score.lowest, score.highest) == (0.5, 0, 1)
    (difference, differ), (_, apart) = found.difference(bert, elmo, column), found.difference(elmo, gpt, column)
    assert difference.high < 0 and not differ and apart
    assert [model_name(name) for name in ("seed-0/a", "r/seed-12@50", "r/seeds-1/b")] == ["a", "r@50", "r/seeds-1/b"]


def test_other_data_is_another_column_and_another_model_an_error(tmp_path):
    records.write(
        tmp_path, header("blimp", "macro_accuracy", "a", "bert", settings={"pairs": 10}, step=1), pairs(0.5, 0)
    )
    records.write(
        tmp_path,
        header("blimp", "macro_accuracy", "a", "bert", settings={"pairs": 20}, data="e" * 64, step=1),
        pairs(0.5, 1),
    )
    found = read_results([tmp_path])
    assert [found.label(column) for column in found.columns] == ["blimp pairs 10", "blimp pairs 20"]
    later = header("blimp", "macro_accuracy", "a", "bert", settings={"pairs": 10}, model="aa", step=2)
    path = records.write(tmp_path, later, pairs(1.0, 2))
    found = read_results([tmp_path])
    assert found.score(found.models[0], found.columns[0]).value == 1  # Of the later step.
    records.write(
        tmp_path,
        header("blimp", "macro_accuracy", "a", "bert", settings={"pairs": 10}, model="bb", step=2),
        pairs(1.0, 2),
    )
    with pytest.raises(Exception, match=f"{path}.* two models .* delete one"):
        read_results([tmp_path])


def test_tuned_scores_stand_beside_the_others(study):
    """In the row of the model that was fine-tuned; one that is not in the study has a row of its own."""
    seeds = tuple(SeedResult(seed, 9, 1, {"accuracy": Score(x, 0.01)}) for seed, x in enumerate((0.7, 0.8)))
    facts = ("train.tsv", "dev.tsv", 8, 8, ("no", "yes"), "accuracy", {"accuracy": {"constant": 0.5}}, seeds)
    tuned = {
        f"tuned/{i}": Tuned("finetuning:classify", "label", "bert", start, f"data/{name}-train.tsv", *facts[1:])
        for i, (start, name) in enumerate((("./runs/bert/", "cola"), ("my-gpt", "cola"), ("runs/elmo", "sst")))
    }
    page = draw(read_results([study]), tuned)
    rows = {row["model"]: row for row in table(page.files["summary.csv"])}
    cola, sst = "tuned: classify, cola-train", "tuned: classify, sst-train"
    assert rows["bert"][cola] == rows["my-gpt"][cola] == "75.0 (70.0 to 80.0), baseline 50.0"
    assert rows["elmo"][sst] and not rows["elmo"][cola] and not rows["my-gpt"]["blimp"] and rows["bert"]["blimp"]
    assert "75.0 (70.0 to 80.0)" in page.html and page.files["summary.tex"].count("75.0 (70.0 to 80.0)") == 3


def test_a_fine_tuning_of_a_seed_is_in_the_row_of_its_model(tmp_path):
    """Two of one task are told apart by their directories."""
    study = write_study(tmp_path, seeds=2)
    seeds = (SeedResult(0, 9, 1, {"accuracy": Score(0.7, 0.01)}),)
    facts = ("train.tsv", "dev.tsv", 8, 8, ("no", "yes"), "accuracy", {}, seeds)
    tuned = {
        f"tuned/{seed}": Tuned("finetuning:classify", "label", "bert", f"runs/seed-{seed}/bert", *facts)
        for seed in range(2)
    }
    page = draw(read_results([study]), tuned)
    rows = {row["model"]: row for row in table(page.files["summary.csv"])}
    assert [rows["bert"][f"tuned: classify, train (tuned/{seed})"] for seed in range(2)] == ["70.0", "70.0"]


def test_a_row_is_of_one_step(tmp_path, capsys):
    """A run that was trained on between two tests."""
    for test, step in (("blimp", 1), ("zorro", 2)):
        of_model = header(test, "macro_accuracy", "a", "bert", step=step, model=f"a{step}")
        records.write(tmp_path, of_model, pairs(0.5, step))
    found = read_results([tmp_path])
    assert [column.test for column in found.columns] == ["zorro"] and found.models[0].headers[0].step == 2
    assert "left out: 1" in capsys.readouterr().err


def test_a_revision_and_the_name_of_a_directory_are_no_steps(tmp_path):
    names = ["runs/a", "hub:owner/name@5", "models/a@v2", "runs/a@5", "runs/a@best"]
    for name in names:
        records.write(tmp_path, header("blimp", "macro_accuracy", name, "bert"), pairs(0.5, 0))
    found = read_results([tmp_path])
    assert {model.name for model in found.models} == set(names[:3])
    assert {model.base for model in found.all_models if model.is_point} == {"runs/a"}


def test_seeds_of_different_depth(tmp_path):
    """The layers that the first seed has count."""
    for seed, layers in ((0, 3), (1, 2)):
        of_model = header("upos", "accuracy", f"seed-{seed}/a", "bert")
        records.write(tmp_path, of_model, [row for row in probe(0.5, seed, layers) if row.kind != "dev"])
    found = read_results([tmp_path])
    score = found.score(found.models[0], found.columns[0])
    assert score.layer == 2 and score.lowest == score.highest  # Of the one seed that has it.


def test_the_best_is_bold_where_more_is_better(tmp_path):
    for family, value in (("bert", 0.25), ("elmo", 0.75)):
        for test, metric in (("blimp", "macro_accuracy"), ("selfsim", "mean")):
            of_model = header(test, metric, family, family, settings={"other": None, "model": "ab" * 32})
            records.write(tmp_path, of_model, [Row("0", "0", value)])
    page = draw(read_results([tmp_path]))
    assert r"\textbf{75.0}" in page.files["summary.tex"] and r"\textbf{0.75}" not in page.files["summary.tex"]
    assert "<td>model abababab</td>" in page.html and "None" not in page.html
    assert "Learning curves" not in page.html and "blimp-words.csv" not in page.files  # There are no checkpoints.


def test_latex(page):
    lines = page.files["summary.tex"].splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrrr}" and lines[-1] == r"\end{tabular}"
    assert all(line.count("&") == 5 and line.endswith(r" \\") for line in lines[2:-2] if not line.startswith("\\"))
    assert sum(r"\textbf" in line for line in lines) >= 1 and all(x.isascii() for x in lines)


def test_short_names():
    names = ["runs/study/a/bert", "runs/study/gpt", "untrained:study:bert", "untrained:runs/study/gpt", "my-bert"]
    assert list(short_names(names).values()) == ["a/bert", "gpt", "untrained:study:bert", "untrained:gpt", "my-bert"]
    assert short_names(["a/b", "word2vec:a/c.txt,sentences=line"]) == {
        "a/b": "b",
        "word2vec:a/c.txt,sentences=line": "word2vec:c.txt",
    }


def test_labels_of_near_constants_are_one():
    constant = {"a": 1.0, "b": 2.0, "c": 1.1, "d": 1.5}
    assert _labels(constant, 0.5) == [(1.5, "a, c, d"), (2.0, "b")]
    assert _labels(constant, 0.0) == [(1.0, "a"), (1.1, "c"), (1.5, "d"), (2.0, "b")] and _labels({}, 1.0) == []


def test_maps_have_their_data(page):
    rows = table(page.files["cka-bert.csv"])
    assert len(rows) == 9 and float(rows[1]["cka"]) == pytest.approx(2 / 3, rel=1e-5)
    moved = table(page.files["replacement-elmo-1.csv"])
    assert [(row["moved"], row["replaced"]) for row in moved if float(row["distance"])] == [("<b>", "a"), ("c", "<b>")]


def test_a_study_without_scores(tmp_path):
    """Only a map, of a model measured alone: no table of tests, no differences."""
    records.write(tmp_path, header("cka", "mean", "a", "bert"), [Row("0 0", "", 1.0)])
    page = draw(read_results([tmp_path]))
    assert "cka-a.csv" in page.files and "differences.csv" not in page.files and not Checker(page.html).open


def test_results_need_no_probe(tmp_path):
    """A probe without a dev set has the score of its top layer."""
    rows = [row for row in probe(0.5, 0, 3) if row.kind != "dev"]
    records.write(tmp_path, header("upos", "accuracy", "a", "bert"), rows)
    found = Results([(path, records.read(path)) for path in records.find(tmp_path)])
    assert found.chosen(found.models[0], found.columns[0]) == (2, "top")
