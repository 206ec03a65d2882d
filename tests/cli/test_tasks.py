"""classify, tag, choose, answer: of directories with heads."""

import gzip
import json

import jax
import numpy as np
import pytest

from prelm_jax import load
from prelm_jax.cli.main import main
from prelm_jax.formats import huggingface_bert
from prelm_jax.formats.base import abstract_params, save
from prelm_jax.formats.heads import join
from prelm_jax.models.bert import BertConfig
from prelm_jax.models.heads import Choice, Label, Span, Tags
from prelm_jax.models.task import TaskModelConfig
from prelm_jax.tokenizers.wordpiece import SPECIAL_TOKENS, WordPiece
from prelm_jax.training.parameters import path_name

HEADS = {
    "label": (Label(num_labels=2), ("no", "yes")),
    "labels": (Label(num_labels=2, kind="labels"), ("insult", "threat")),
    "number": (Label(num_labels=1, kind="number"), ()),
    "tags": (Tags(num_tags=3), ("B-X", "I-X", "O")),
    "choice": (Choice(), ()),
    "spans": (Span(), ()),
}
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "the cat sat on the mat " * 9,
                    "qas": [{"id": "a", "question": "who sat?"}, {"id": "b", "question": "where?", "answers": []}],
                },
            ]
        }
    ]
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a directory for each kind of predictions."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = WordPiece([*SPECIAL_TOKENS, *"abcdefghijklmnopqrstuvwxyz?", "the", "cat", "sat", "on", "mat"])
    config = BertConfig(tokenizer.vocab_size, 16, 1, 2, 32, intermediate_size=32)
    bare = huggingface_bert.FORMAT
    save(without_head(config, tokenizer), bare, folder / "bare", "")
    encoder = bare.read(folder / "bare", True)
    for kind, (head, names) in HEADS.items():
        task = TaskModelConfig(config, head)
        rng = np.random.default_rng(1)
        params = jax.tree.map(
            lambda x, rng=rng: rng.normal(size=x.shape).astype(np.float32), abstract_params(task)["head"]
        )
        by_path = {path_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(params)}
        save(join(task, encoder, by_path, names, 32), bare, folder / kind, "")
    return folder


def without_head(config, tokenizer):
    from prelm_jax.formats.base import LoadedModel

    return LoadedModel(config, jax.jit(config.build().init_params)(jax.random.key(0)), tokenizer)


@pytest.fixture
def printed(capsys):
    """`printed(*arguments)` is (lines on stdout, lines on stderr) of a command."""

    def run(*arguments):
        capsys.readouterr()
        main(list(map(str, arguments)))
        output = capsys.readouterr()
        return output.out.split("\n")[:-1], output.err.splitlines()

    return run


def test_classify_reads_texts_and_tables(models, printed, tmp_path):
    texts = ["the cat", "", "the cat sat on the mat " * 9]
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in texts))
    expected = load(models / "label").classify(texts)
    lines, notes = printed("classify", models / "label", tmp_path / "texts.txt")
    assert lines == [f"{each.label}\t{max(each.probabilities):.4f}" for each in expected]
    assert any("1 of 3" in note and "32 tokens" in note for note in notes)
    (tmp_path / "texts.txt.gz").write_bytes(gzip.compress("".join(f"{text}\r\n" for text in texts).encode("utf-8-sig")))
    assert printed("classify", models / "label", tmp_path / "texts.txt.gz")[0] == lines
    (tmp_path / "texts.txt").write_text("no\tthe cat\nyes\tsat on\n")  # A table, if a column is named.
    lines, _ = printed("classify", models / "label", tmp_path / "texts.txt", "--columns.text", "1", "--json")
    expected = load(models / "label").classify(["the cat", "sat on"])
    assert [list(json.loads(line)["probabilities"].values()) for line in lines] == [
        list(each.probabilities) for each in expected
    ]
    (tmp_path / "pairs.csv").write_text('number,a,b\n7,"the, cat",sat\n8,on,mat\n')
    options = ["--columns.text", "a", "--columns.pair", "b", "--columns.id", "number", "--json"]
    lines, _ = printed("classify", models / "label", tmp_path / "pairs.csv", *options)
    found = [json.loads(line) for line in lines]
    expected = load(models / "label").classify([("the, cat", "sat"), ("on", "mat")])
    assert [(each["id"], each["prediction"]) for each in found] == [("7", expected[0].label), ("8", expected[1].label)]
    assert found[0]["probabilities"] == dict(zip(("no", "yes"), expected[0].probabilities, strict=True))


def test_several_labels_and_numbers(models, printed, tmp_path):
    (tmp_path / "texts.txt").write_text("the cat\non the mat\n")
    several = load(models / "labels").classify(["the cat", "on the mat"])
    assert printed("classify", models / "labels", tmp_path / "texts.txt")[0] == ["\t".join(x.label) for x in several]
    numbers = load(models / "number").classify(["the cat", "on the mat"])
    assert printed("classify", models / "number", tmp_path / "texts.txt")[0] == [f"{x.label:.4f}" for x in numbers]
    lines, _ = printed("classify", models / "number", tmp_path / "texts.txt", "--json")
    assert json.loads(lines[0]) == {"id": "0", "prediction": numbers[0].label}


def test_tag_writes_columns(models, printed, tmp_path):
    sentences = [["the", "cat"], ["the", "cat", "sat"] * 20]
    (tmp_path / "words.txt").write_text("".join(f"{' '.join(words)}\n" for words in sentences))
    (tmp_path / "words.conll").write_text("\n".join("".join(f"{word} O\n" for word in words) for words in sentences))
    expected = load(models / "tags").tag(sentences)
    lines = [
        line
        for words, each in zip(sentences, expected, strict=True)
        for line in [*(f"{word}\t{tag}" for word, tag in zip(words, each.label, strict=True)), ""]
    ]
    assert printed("tag", models / "tags", tmp_path / "words.txt")[0] == lines
    assert printed("tag", models / "tags", tmp_path / "words.conll")[0] == lines
    (tmp_path / "blank.txt").write_text("".join(f" \n{' '.join(words)}\n" for words in sentences))
    found, notes = printed("tag", models / "tags", tmp_path / "blank.txt")
    assert found == lines and f"{tmp_path}/blank.txt: 2 blank lines" in notes
    found, _ = printed("tag", models / "tags", tmp_path / "words.conll", "--json")
    assert json.loads(found[0])["prediction"] == list(expected[0].label)


def test_choose_prints_the_number_of_an_option(models, printed, tmp_path):
    choices = [("the cat", ["sat", "on", "the mat"]), ("on", ["the", "mat"])]
    records = [{"text": text, "options": options} for text, options in choices]
    (tmp_path / "choices.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    expected = load(models / "choice").choose(choices)
    lines, _ = printed("choose", models / "choice", tmp_path / "choices.jsonl")
    assert lines == [f"{each.label}\t{max(each.probabilities):.4f}" for each in expected]


def test_answer_writes_the_files_of_the_scorer(models, printed, tmp_path):
    (tmp_path / "dev.json").write_text(json.dumps(SQUAD))
    printed("answer", models / "spans", tmp_path / "dev.json", tmp_path / "out", "--null-threshold", "1e9")
    files = {file.name: json.loads(file.read_text()) for file in (tmp_path / "out").iterdir()}
    assert set(files) == {"predictions.json", "nbest_predictions.json", "null_odds.json"}
    assert all(set(content) == {"a", "b"} for content in files.values())
    passage = SQUAD["data"][0]["paragraphs"][0]["context"]
    for id in ("a", "b"):
        best = max((x for x in files["nbest_predictions.json"][id] if x["text"]), key=lambda x: x["probability"])
        assert files["predictions.json"][id] == best["text"] and best["text"] in passage
        assert set(best) == {"text", "probability", "start_logit", "end_logit"}
        assert sum(x["probability"] for x in files["nbest_predictions.json"][id]) == pytest.approx(1)
    printed("answer", models / "spans", tmp_path / "dev.json", tmp_path / "none", "--null-threshold", "-1e9")
    assert set(json.loads((tmp_path / "none/predictions.json").read_text()).values()) == {""}


def test_evaluate_scores_every_kind(models, printed, tmp_path):
    """Against counts by hand of what the commands predict; lines that are left out and texts that are cut are said."""
    texts, golds = ["the cat", "on the mat", "sat " * 60, "a"], ["yes", "no", "yes", "yes"]
    lines = [f"{text}\t{label}\n" for text, label in zip(texts, golds, strict=True)]
    (tmp_path / "test.tsv").write_text("text\tlabel\n" + "".join(lines) + "broken\n")
    spec, output = f"{tmp_path}/test.tsv,malformed=skip", tmp_path / "predictions.jsonl"
    options = ["--test", spec, "--positive", "yes", "--predictions", output]
    lines, notes = printed("evaluate", models / "label", *options)
    predicted = [each.label for each in load(models / "label").classify(texts)]
    accuracy = np.mean([a == b for a, b in zip(predicted, golds, strict=True)])
    row = next(line.split("│") for line in lines if "accuracy" in line)
    error = (accuracy * (1 - accuracy) / 3) ** 0.5
    assert [cell.strip() for cell in row[2:5]] == [f"{100 * accuracy:.1f}", f"{100 * error:.1f}", "best constant 75.0"]
    assert any(line.startswith("│ f1 ") for line in lines)
    assert any("1 malformed" in note for note in notes) and any("1 of 4" in note for note in notes)
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(x["gold"], x["prediction"]) for x in written] == list(zip(golds, predicted, strict=True))
    records = {
        "labels": {"text": "the cat", "labels": ["threat"]},
        "number": {"text": "the cat", "label": 2.5},
        "choice": {"text": "the cat", "options": ["sat", "on"], "label": 1},
        "tags": {"tokens": ["the", "cat"], "tags": ["O", "B-X"]},
        "spans": {"question": "who?", "context": "the cat", "answers": [{"text": "cat", "answer_start": 4}]},
    }
    metrics = {"labels": "micro f1", "number": "pearson", "choice": "accuracy", "tags": "span f1", "spans": "f1"}
    for kind, record in records.items():
        (tmp_path / "test.jsonl").write_text(2 * f"{json.dumps(record)}\n")
        lines, _ = printed("evaluate", models / kind, "--test", tmp_path / "test.jsonl")
        assert any(line.startswith(f"│ {metrics[kind]} ") for line in lines)


def test_what_cannot_be_evaluated_is_said_in_one_line(models, fails, tmp_path):
    (tmp_path / "test.tsv").write_text("text\tlabel\nthe cat\tyes\non\tno\n")
    (tmp_path / "other.tsv").write_text("text\tlabel\nthe cat\tyes\non\tmaybe\n")
    test = ("--test", tmp_path / "test.tsv")
    assert "bare has no head" in fails("evaluate", models / "bare", *test)
    assert "maybe" in fails("evaluate", models / "label", "--test", tmp_path / "other.tsv")
    assert "sentence" in fails("evaluate", models / "label", *test, "--columns.text", "sentence")
    assert "not a number" in fails("evaluate", models / "number", *test)
    assert "--positive maybe" in fails("evaluate", models / "label", *test, "--positive", "maybe")
    assert "test.tsv" in fails("evaluate", models / "label", *test, "--predictions", tmp_path / "test.tsv")
    assert "--step 3" in fails("evaluate", models / "label", *test, "--step", "3")
    assert "--test" in fails("evaluate", models / "label")
    for options, name in ((("--predictions", "x"), "--predictions"), ((*test, "--corpus", "x"), "--corpus")):
        assert name in fails("evaluate", models / "label", *options)


def test_what_cannot_be_done_is_said_in_one_line(models, fails, tmp_path):
    (tmp_path / "texts.txt").write_text("the cat\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "table.tsv").write_text("sentence\tlabel\nthe cat\tyes\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("")
    texts = tmp_path / "texts.txt"
    assert "bare has no head" in fails("classify", models / "bare", texts)
    assert "tags" in (message := fails("classify", models / "tags", texts)) and "tag" in message
    assert "empty.txt has no texts" in fails("classify", models / "label", tmp_path / "empty.txt")
    assert "text" in (message := fails("classify", models / "label", tmp_path / "table.tsv")) and "table.tsv" in message
    assert "out" in fails("answer", models / "spans", texts, tmp_path / "out")
    assert "masked LM head" in fails("fill", models / "label", "the [MASK]")
