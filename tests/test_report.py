"""The report page: every curve and baseline is on it, it loads nothing, and the same metrics give the same bytes."""

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from prelm_jax.cli.main import main
from prelm_jax.inference.base import Sample
from prelm_jax.report import dashboard, page
from prelm_jax.workdir import WorkDir

VOID = {"meta", "input", "link", "br"}


class Checker(HTMLParser):
    """Tags that are left open, addresses outside of the page, and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]

    def handle_startendtag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())


def make_run(directory, learning_rate=0.1, evaluations=((10, 3.0), (20, 2.5)), lines=20):
    directory.mkdir()
    record = {
        "model_type": "bert",
        "identity": {"seed": 0, "model": {"hidden_size": 8, "name": "<b>&"}},
        "segments": [{"from_step": 0, "optimizer": {"name": "AdamW", "learning_rate": learning_rate}}],
        "sources": {"corpus": ["c.txt"]},
        "loop": {"steps": 20},
        "command": ["pretrain"],
        "statistics": {"documents": [1234, 56], "tokens per document*": [[7, 9000], [7, 8]], "words": ["9,513", "1"]},
        "version": "0",
        "format": 3,
    }
    (directory / "run.json").write_text(json.dumps(record))
    metrics = [{"step": 0, "baseline/masked_lm_loss/unigram": 6.25, "baseline/masked_lm_loss/nothing": "nan"}]
    for step in range(1, lines + 1):
        line = {"step": step, "train/loss": 5 - step / 10, "train/tokens_seen": 100 * step, "train/grad_norm": 1.0}
        metrics.append(line if step == 1 else line | {"perf/seconds_per_step": 30.0})
    metrics += [{"step": s, "evaluation/loss": x, "evaluation/masked_lm_loss": x} for s, x in evaluations]
    torn = '{"step": 21, "train/loss": 9'  # The run is being written.
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + torn)
    for step, _ in evaluations:
        samples = [Sample("the [MASK] barks", "dog", f"<cat> {step / 100}")]
        WorkDir(directory).write_samples(step, samples)
    return directory


def test_read_curves(tmp_path):
    run = page.read_curves(make_run(tmp_path / "run"))
    assert run.series["evaluation/loss"].tolist() == [[10, 3.0], [20, 2.5]]
    # Half a minute a step; the first step, which has no speed of its own, counts as the others do.
    np.testing.assert_allclose(run.progress, [(step, 100 * step, step / 2) for step in range(21)])
    assert run.baselines["masked_lm_loss"]["unigram"] == 6.25
    assert run.settings["model.hidden_size"] == 8


def test_the_page_of_one_run(tmp_path):
    text = page.render([page.read_curves(make_run(tmp_path / "run"))])
    checker = Checker(text)
    assert not checker.open
    assert all(address.startswith("#") for address in checker.addresses)  # clip paths and markers
    assert not re.search(r"@import|url\((?!#)|<script", text)
    for word in (
        "masked lm loss",
        "unigram",
        "steps",
        "tokens",
        "minutes",
        "2.5000",
        "gradient norm before clipping",
        "dog",
        "<cat> 0.1",
        "<cat> 0.2",
        "1,234",
        "7 / 9,000",
        "9,513",
    ):
        assert word in checker.words
    assert "<b>" not in text and "&lt;b&gt;&amp;" in text  # the setting's value
    assert text == page.render([page.read_curves(tmp_path / "run")])


def test_several_runs_share_pictures_and_show_what_differs(tmp_path):
    runs = [page.read_curves(make_run(tmp_path / f"run{i}", 0.1 * (i + 1))) for i in range(12)]
    text = page.render(runs)
    assert len(set(re.findall(r"stroke: (#[0-9a-f]{6})", text))) == len(page.COLORS)
    assert "optimizer.learning_rate" in text and "hidden_size" not in text
    assert "The runs have the same settings" in page._differences([runs[0], runs[0]], ["a", "b"])


@pytest.mark.parametrize(("name", "zeros"), [("train/learning_rate", 2), ("train/loss", 1)])
def test_the_vertical_axis_of_a_rate_starts_at_zero(tmp_path, name, zeros):
    """A rate that is nearly constant looks so. The horizontal axis always starts at 0."""
    run = page.read_curves(make_run(tmp_path / "run"))
    run.series[name] = np.array([[0, 0.98], [10, 1.0], [20, 1.0]])
    labels = re.findall(r">([\d.]+)</text>", page._picture(name, "steps", [run], ["a"]))
    assert [float(label) for label in labels].count(0) == zeros


def test_long_runs_are_thinned():
    """A spike stays on the page, as the upper bound of its point."""
    points = np.column_stack([np.arange(100_001.0), np.ones(100_001)])
    points[5000, 1] = 9
    thin = page._thinned(points, 400)
    assert len(thin) == 400 and (np.diff(thin[:, 0]) > 0).all() and (thin[:, 2] == 1).all()
    assert np.flatnonzero(thin[:, 3] == 9) == np.flatnonzero(thin[:, 1] > 1) == 20
    np.testing.assert_array_equal(page._thinned(points[:3], 400), points[:3, [0, 1, 1, 1]])


def test_later_lines_replace_earlier_ones(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('}\n{"step": 10, "evaluation/loss": 2.0}\n{"step": 5, "train/loss": 1.0}\n')
    series = page.read_curves(run).series
    assert series["evaluation/loss"].tolist() == [[10, 2.0], [20, 2.5]]
    assert series["train/loss"][[3, 4, 5], 1].tolist() == [4.6, 1.0, 4.4]


def test_samples_of_later_steps_are_dropped(tmp_path):
    """They are those of a run that was resumed before them."""
    run = WorkDir(make_run(tmp_path / "run"))
    run.write_samples(15, [Sample("a", "b", "c")])
    with (run.path / "samples.jsonl").open("a") as file:
        file.write('{"step": 20, "samp')
    assert run.read_samples() == {10: [Sample("the [MASK] barks", "dog", "<cat> 0.1")], 15: [Sample("a", "b", "c")]}


@pytest.mark.parametrize("lines", [0, 1])
def test_a_run_that_has_just_begun(tmp_path, lines):
    text = page.render([page.read_curves(make_run(tmp_path / "run", evaluations=(), lines=lines))])
    assert "not evaluated" in text and not Checker(text).open


def test_report_command(tmp_path, capsys):
    make_run(tmp_path / "run")
    main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")])
    assert "2.5000" in (tmp_path / "page.html").read_text()
    with pytest.raises(SystemExit) as exit:
        main(["report", str(tmp_path / "none"), "--output", str(tmp_path / "page.html")])
    assert exit.value.code == 1 and "none" in capsys.readouterr().err
    assert "2.5000" in (tmp_path / "page.html").read_text()
    with pytest.raises(SystemExit):  # Said before the runs are read.
        main(["report", str(tmp_path / "none"), "--output", str(tmp_path / "nowhere" / "page.html")])
    assert f"there is no directory {tmp_path / 'nowhere'}" in capsys.readouterr().err


@pytest.fixture
def draw(monkeypatch):
    """`draw(program)`: dashboards do not wait between pages, and run this program to draw one."""
    monkeypatch.setattr(dashboard, "SECONDS", 0)
    return lambda program: monkeypatch.setattr(dashboard, "PROGRAM", f"import sys; {program}")


def test_a_page_reloads_itself_until_the_run_ends(tmp_path, draw, monkeypatch):
    run = WorkDir(make_run(tmp_path / "run"))
    monkeypatch.setattr(sys, "argv", ["-c", str(run.path), str(run.path / "report.html"), "running"])
    exec(dashboard.PROGRAM)  # As the other process does.
    running = (run.path / "report.html").read_text()
    assert page.REFRESH in running and "2.5000" in running
    with pytest.raises(KeyboardInterrupt), dashboard.Dashboard(run, active=True):
        raise KeyboardInterrupt
    assert (run.path / "report.html").read_text() == running.replace(page.REFRESH, "")
    draw("open(sys.argv[2], 'a').write(sys.argv[3] + ' ')")
    with dashboard.Dashboard(run, active=True) as board:
        board.refresh()
        board._process.wait()
        board.refresh()
        board._process.wait()
    assert (run.path / "report.html").read_text().endswith("running running finished ")


def test_a_page_that_cannot_be_drawn_does_not_end_the_run(tmp_path, draw, capsys):
    run = WorkDir(make_run(tmp_path / "run"))
    draw("raise OSError('the disk is full')")
    with dashboard.Dashboard(run, active=True) as board:
        board.refresh()
        board._process.wait()
        board.refresh()
        board._process.wait()
    errors = capsys.readouterr().err
    assert errors.count("report.html could not be drawn: OSError: the disk is full") == 1 and errors.count("\n") == 2


def test_a_short_run_draws_no_page(tmp_path):
    run = WorkDir(make_run(tmp_path / "run"))
    with dashboard.Dashboard(run, active=True) as board:
        board.refresh()
    assert not (run.path / "report.html").exists()
