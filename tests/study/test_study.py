"""A study: subjects × tests -> records, each measured once."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from study_subjects import WordSubject

from prelm_jax.cli.main import main
from prelm_jax.errors import InputError
from prelm_jax.study import records
from prelm_jax.study.pairs import Pair, PairsTest
from prelm_jax.study.study import study

PAIRS = [Pair("a_0", "a", "good cat", "bad cat"), Pair("a_1", "a", "good", "bad"), Pair("b_0", "b", "bad", "good")]


def test_what_is_measured_is_not_measured_again(tmp_path, capsys):
    subject, test = WordSubject(good=1), PairsTest("own", PAIRS, limit=2)
    (path,) = study([subject], [test], tmp_path)
    assert "own: words: 6/6 lines" in capsys.readouterr().err
    record = records.read(path)
    assert [row.value for row in record.rows] == [1, 1, 0]
    assert record.header.settings == {"pairs": 2, "scoring": "sum of words"} and record.header.data == test.fingerprint
    before, number = path.read_bytes(), len(subject.asked)
    assert study([subject], [test], tmp_path) == [path]
    assert path.read_bytes() == before and len(subject.asked) == number


def test_other_data_models_and_settings_are_measured(tmp_path):
    paths = [
        *study([WordSubject("1"), WordSubject("2")], [PairsTest("own", PAIRS)], tmp_path),
        *study([WordSubject("1")], [PairsTest("own", PAIRS[:2]), PairsTest("own", PAIRS, limit=3)], tmp_path),
    ]
    assert len(set(paths)) == 4 and sorted(paths) == records.find(tmp_path)


def test_an_interrupted_test_leaves_no_record(tmp_path):
    class Interrupted(WordSubject):
        def score(self, texts):
            yield next(super().score(texts))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study([WordSubject(), Interrupted("2")], [PairsTest("own", PAIRS)], tmp_path)
    assert len(records.find(tmp_path)) == 1


def test_errors_name_the_test_and_the_subject(tmp_path):
    class Short(WordSubject):
        def score(self, texts):
            raise InputError("line 3 has 9 tokens, but the model takes 8")

    with pytest.raises(InputError, match="own, words: line 3"):
        study([Short()], [PairsTest("own", PAIRS)], tmp_path)


def test_a_subject_that_cannot_is_refused_before_it_is_asked(tmp_path):
    class Embeds(WordSubject):
        scoring, num_layers = "", 2

    for subject, needs in ((Embeds(), "score"), (WordSubject(), "embed")):
        test = PairsTest("own", PAIRS)
        test.needs = needs
        with pytest.raises(InputError, match=f"words .*{test.name} needs"):
            study([subject], [test], tmp_path)
        assert subject.asked == []


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model directory of each family."""
    folder = tmp_path_factory.mktemp("models")
    return {family: tiny.directory(folder / family, family) for family in ("bert", "openai-gpt")}


def test_the_command_line(models, tmp_path, capsys):
    data = tmp_path / "data" / "blimp"
    data.mkdir(parents=True)
    (data / "verbs.jsonl").write_text('{"sentence_good": "the cat sees", "sentence_bad": "the cat see"}\n' * 3)
    options = ["--tests", "blimp", "--output", str(tmp_path / "out"), "--data", str(data.parent)]
    main(["study", *map(str, models.values()), *options, "--pairs", "2"])
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == [str(path) for path in records.find(tmp_path / "out")]
    for path, family in zip(printed, models, strict=True):
        record = records.read(path)
        assert (record.header.family, record.header.rows) == (family, 2)
        assert [row.item for row in record.rows] == ["verbs_0", "verbs_1"]
    main(["study", str(models["bert"]), *options, "--pairs", "0", "--babylm", str(tmp_path / "predictions")])
    path, predictions = capsys.readouterr().out.split()
    assert path not in printed and records.read(path).header.rows == 3
    assert len(json.loads(Path(predictions).read_text())["blimp"]["verbs"]["predictions"]) == 3


def write_pairs(path: Path, number: int) -> Path:
    rows = ["the cat sees\tthe cat see", "a dog\ta dogs"] * (number // 2)
    path.write_text("\n".join(["sentence_good\tsentence_bad", *rows]) + "\n")
    return path


def test_a_full_disk_is_named(models, tmp_path, full_disk, capsys):
    pairs = write_pairs(tmp_path / "pairs.tsv", 400)
    arguments = ["study", str(models["openai-gpt"]), "--tests", f"pairs:{pairs}", "--output"]
    main([*arguments, str(tmp_path / "small"), "--pairs", "2"])  # Compiles, which writes to the cache.
    with full_disk(10_000), pytest.raises(SystemExit) as stopped:
        main([*arguments, str(tmp_path / "out"), "--pairs", "0"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prelm: ")]
    assert stopped.value.code == 1 and str(tmp_path / "out") in line
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_killed_and_resumed_it_gives_the_same_page(models, tmp_path):
    files = [write_pairs(tmp_path / f"{number}.tsv", 2 * number) for number in range(1, 13)]
    arguments = [*map(str, models.values()), "--tests", *(f"pairs:{path}" for path in files), "replacement"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    main(["study", *arguments, "--output", str(whole)])
    command = ["from prelm_jax.cli.main import main; main()", "study", *arguments, "--output", str(resumed)]
    process = subprocess.Popen([sys.executable, "-c", *command], stderr=subprocess.DEVNULL)
    while len(records.find(resumed)) < 3:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and len(records.find(resumed)) < len(records.find(whole)) == 26
    main(["study", *arguments, "--output", str(resumed)])
    for directory in (whole, resumed):
        main(["report", str(directory), "--output", f"{directory}.html"])
    assert Path(f"{resumed}.html").read_bytes() == Path(f"{whole}.html").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--tests", "blimb"], "blimb"),
        (["--tests", "blimp", "--data", "nowhere"], "nowhere/blimp"),
        (["--tests", "pairs:nowhere.tsv"], "nowhere.tsv"),
        (["--tests", "pairs:{pairs}", "--babylm", "x"], "--tests blimp"),
        (["nothing", "--tests", "pairs:{pairs}"], "nothing"),
        (["untrained:nothing:demo", "--tests", "pairs:{pairs}"], "nothing"),
        (["runs/a@x", "--tests", "pairs:{pairs}"], "runs/a@x"),
        ([], "--tests"),
    ],
)
def test_mistakes_are_one_line(arguments, complaint, models, tmp_path, capsys):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("sentence_good\tsentence_bad\nthe cat sees\tthe cat see\n")
    arguments = [each.format(pairs=pairs) for each in arguments]
    if not arguments or arguments[0].startswith("--"):
        arguments = [str(models["bert"]), *arguments]
    with pytest.raises(SystemExit) as stopped:
        main(["study", *arguments, "--output", str(tmp_path / "out")])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prelm: ")]
    assert stopped.value.code == 1 and complaint in line
    assert records.find(tmp_path / "out") == []
