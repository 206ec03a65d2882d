"""BabyLM's predictions, scored as its scorer does, against our own numbers."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
from study_subjects import WordSubject

from prelm_jax.cli.main import main
from prelm_jax.errors import InputError
from prelm_jax.pretraining import pretrain
from prelm_jax.study import babylm, records, statistics
from prelm_jax.study.pairs import Pair, PairsTest
from prelm_jax.study.scores import read_results
from prelm_jax.study.study import study


def scored(predictions, data):
    """The mean over sub-tasks of the share of predictions that equal the good sentence of their line, in order."""
    shares = []
    for subtask, found in predictions.items():
        good = [line["sentence_good"].strip() for line in data[subtask]]
        chosen = [each["pred"].strip() for each in found["predictions"]]
        shares.append(np.mean([a == b for a, b in zip(chosen, good, strict=True)]))
    return np.mean(shares)


@pytest.fixture
def measured(tmp_path):
    """Pairs of random words, some of which are ties; 2 paradigms of other sizes."""
    rng = np.random.default_rng(0)
    words = np.array(list("abcdefgh"))
    texts = [(" ".join(rng.choice(words, 3)), " ".join(rng.choice(words, 3))) for _ in range(60)]
    data = {"one": texts[:20], "two": texts[20:]}
    pairs = [Pair(f"{name}_{i}", name, *pair) for name, found in data.items() for i, pair in enumerate(found)]
    tests = [PairsTest("blimp", pairs), PairsTest("supplement", pairs[:20])]
    paths = study([WordSubject(a=1, b=2, c=2)], tests, tmp_path)
    lines = {name: [{"sentence_good": good} for good, _ in found] for name, found in data.items()}
    return lines, [(test, records.read(path)) for test, path in zip(tests, paths, strict=True)]


def test_their_score_is_ours_with_ties_right(measured, tmp_path):
    data, found = measured
    path = babylm.write_predictions(tmp_path / "predictions", "runs/a", found)
    assert path == tmp_path / "predictions" / "runs-a.json"
    written = json.loads(path.read_text())
    assert list(written) == ["blimp", "blimp_supplement"] and list(written["blimp"]) == ["one", "two"]
    assert written["blimp"]["one"]["predictions"][3]["id"] == "one_3"
    rows = found[0][1].rows
    assert statistics.ties(rows) > 0.1
    ours = statistics.value(statistics.with_ties(rows, 1.0), "macro_accuracy")
    assert scored(written["blimp"], data) == pytest.approx(ours) != statistics.value(rows, "macro_accuracy")


def test_directions_do_not_count(tmp_path):
    test = PairsTest("blimp", [Pair("a_0", "a", "good", "bad")])
    (path,) = study([WordSubject(good=1, directions=("forward", "backward"))], [test], tmp_path)
    found = babylm.predictions([(test, records.read(path))])
    assert found == {"blimp": {"a": {"predictions": [{"id": "a_0", "pred": "good"}]}}}


def test_a_record_that_lacks_pairs_is_refused(measured):
    (test, record), _ = measured[1]
    with pytest.raises(InputError, match="lacks one_7"):
        babylm.predictions([(test, records.Record(record.header, record.rows[:7]))])


def test_what_babylm_needs():
    pair = [Pair("a_0", "a", "good", "bad")]
    babylm.check([PairsTest("blimp", pair), PairsTest("zorro", pair, limit=3)])
    with pytest.raises(InputError, match="--pairs 0"):
        babylm.check([PairsTest("blimp", pair, limit=3)])
    with pytest.raises(InputError, match="--tests blimp or supplement"):
        babylm.check([PairsTest("zorro", pair)])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "openai-gpt", "elmo"])
def test_the_file_of_each_family(family, tmp_path):
    """Scored by BabyLM's rules it has the number that the page gives if ties are right."""
    rng = np.random.default_rng(0)
    words = np.array(["the", "a", "cat", "dog", "sees", "see", "red"])
    data = {}
    for name, number in (("one", 6), ("two", 20)):
        texts = [(" ".join(rng.choice(words, 4)), " ".join(rng.choice(words, 4))) for _ in range(number)]
        texts += [(text, text) for text, _ in texts[:5]]  # Ties.
        data[name] = [{"sentence_good": good, "sentence_bad": bad} for good, bad in texts]
        (tmp_path / "blimp").mkdir(exist_ok=True)
        (tmp_path / "blimp" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in data[name]))
    (tmp_path / "corpus.txt").write_text(tiny.text(0))
    run = dataclasses.replace(tiny.FAMILIES[family](), corpus=(str(tmp_path / "corpus.txt"),), held_out=0.0)
    model, output = tmp_path / "run", tmp_path / "records"
    pretrain(tiny.with_loop(run, steps=2), model)
    options = ["--tests", "blimp", "--pairs", "0", "--data", str(tmp_path), "--babylm", str(tmp_path / "predictions")]
    main(["study", str(model), *options, "--output", str(output)])
    (file,) = (tmp_path / "predictions").iterdir()
    found = read_results([output])
    score = found.score(found.models[0], found.columns[0])
    assert score.ties == 10 / 36 and score.ties_right > score.value
    assert scored(json.loads(file.read_text())["blimp"], data) == pytest.approx(score.ties_right)
