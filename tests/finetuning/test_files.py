"""Labelled files: every format gives the same examples, and what is malformed is named or counted, never lost."""

import csv
import gzip
import io
import json

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings

from prelm_jax.data.examples import Answers, Example
from prelm_jax.data.tags import bio_names, bio_tags, is_bio
from prelm_jax.errors import InputError
from prelm_jax.finetuning.files import (
    Columns,
    FileSpec,
    LabelledData,
    check_labels,
    label_names,
    print_counts,
    read_examples,
)

# Any text but what UTF-8 cannot hold (surrogates) and what the readers refuse (NUL).
characters = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
texts = st.text(characters, min_size=1).filter(str.strip)
# A cell of a TSV holds neither tabs nor line ends; a table begins with no byte order mark of its own.
cells = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\t\r\n\ufeff"), min_size=1)
cells = cells.filter(str.strip)
line_ends = st.sampled_from(["\n", "\r\n", "\r"])
property_test = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def texts_and_labels(data: LabelledData) -> list[tuple]:
    return [(*example.sequences[0], example.label) for example in data.examples]


def error_of(spec, kind, columns=None) -> str:
    with pytest.raises(InputError) as error:
        read_examples(spec, kind, columns)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- Any text in any format ------------------------------------------------------------------------------------------


@property_test
@given(st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=5), line_ends, st.booleans(), st.data())
def test_any_cells_of_a_tsv(write, rows, end, header, data):
    """With a byte order mark or not, compressed or not; quotation marks are text."""
    lines = [["a", "b", "label"], *rows] if header else rows
    content = end.join("\t".join(row) for row in lines) + data.draw(st.sampled_from(["", end, end + end]))
    content = (data.draw(st.sampled_from(["", "\ufeff"])) + content).encode()
    compressed = data.draw(st.booleans())
    path = write("t.tsv.gz" if compressed else "t.tsv", gzip.compress(content) if compressed else content)
    columns = Columns("a", "b", "label") if header else Columns("0", "1", "-1")
    found = read_examples(f"{path},header={'yes' if header else 'no'}", "label", columns)
    assert texts_and_labels(found) == [(a, b, label.strip()) for a, b, label in rows]
    assert [example.id for example in found.examples] == [str(i) for i in range(len(rows))]
    assert set(found.counts) <= {"blank lines"}


@property_test
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5), line_ends, st.booleans())
def test_any_cells_of_a_csv(write, rows, end, mark):
    """Cells may hold commas, quotation marks and line ends."""
    buffer = io.StringIO(newline="")
    # The writer quotes line ends that are not its own only if it quotes everything.
    writer = csv.writer(buffer, lineterminator=end, quoting=csv.QUOTE_MINIMAL if end == "\r\n" else csv.QUOTE_ALL)
    writer.writerows([("text", "label"), *rows])
    path = write("t.csv", "\ufeff" * mark + buffer.getvalue())
    assert texts_and_labels(read_examples(path, "label")) == [(text, label.strip()) for text, label in rows]


@property_test
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5), st.booleans(), st.sampled_from(["array", "lines"]))
def test_any_values_of_json_and_parquet(write, tmp_path, rows, ascii_only, layout):
    objects = [{"text": text, "label": label, "other": None} for text, label in rows]
    lines = [json.dumps(each, ensure_ascii=ascii_only) for each in objects]
    content = "\n".join(lines) if layout == "lines" else f"[{','.join(lines)}]"
    expected = [(text, label.strip()) for text, label in rows]
    assert texts_and_labels(read_examples(write("t.json", content), "label")) == expected
    pq.write_table(pa.Table.from_pylist(objects), tmp_path / "t.parquet")
    assert texts_and_labels(read_examples(str(tmp_path / "t.parquet"), "label")) == expected


words = st.text(st.characters(exclude_categories=("Cs", "Z", "C")), min_size=1, max_size=5)


@property_test
@given(st.lists(st.lists(words, min_size=1, max_size=4), min_size=1, max_size=4), st.sampled_from([" ", "\t"]))
def test_any_words_of_a_conll_file(write, sentences, separator):
    words_of = [["-" + word if word == "-DOCSTART-" else word for word in sentence] for sentence in sentences]
    lines = ["\n".join(separator.join([word, "_", f"T{len(word)}"]) for word in words) for words in words_of]
    found = read_examples(write("t.conll", "\n\n\n".join(lines)), "tags")
    expected = [(tuple(words), tuple(f"T{len(word)}" for word in words)) for words in words_of]
    assert texts_and_labels(found) == expected


def test_long_cells_and_spaces_around_names(write):
    text = "long " * 30_000
    data = read_examples(write("t.csv", f"text, label\n{text},x\n"), "label")
    assert texts_and_labels(data) == [(text, "x")]


def test_blank_lines_are_counted(write):
    assert read_examples(write("t.tsv", "\ntext\tlabel\n \t\na\tx\n\n"), "label").counts == {"blank lines": 3}
    assert read_examples(write("t.csv", "text,label\n\na,x\n,\n"), "label").counts == {"blank lines": 2}


def test_quotation_marks_mean_something_in_csv_alone(write):
    content = 'text{0}label\n"a ""b"""{0}"x"\n'
    assert texts_and_labels(read_examples(write("t.csv", content.format(",")), "label")) == [('a "b"', "x")]
    assert texts_and_labels(read_examples(write("t.tsv", content.format("\t")), "label")) == [('"a ""b"""', '"x"')]
    assert "t.csv:2 " in error_of(write("t.csv", 'text,label\n"a" b,x\n'), "label")
    message = error_of(write("t.csv", 'text,label\n"two\nlines",x\n"never closed,y\nc,z\n'), "label")
    assert "t.csv:4 " in message and "format=tsv" in message


# ---- What is malformed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        ("text\tlabel\na\tx\nb\n", 3, "1 columns"),
        ("text\tlabel\na\tx\n\nb\ty\tz\n", 4, "3 columns"),
        ("text\tlabel\na\tx\n\ty\n", 3, "`text`"),
        ("text\tlabel\na\tx\nb\t \n", 3, "`label`"),
    ],
)
def test_a_malformed_line_is_named_or_counted(write, content, line, found):
    path = write("t.tsv", content)
    message = error_of(path, "label")
    assert message.startswith(f"{path}:{line} ") and found in message
    data = read_examples(f"{path},malformed=skip", "label")
    assert texts_and_labels(data) == [("a", "x")] and data.counts["malformed"] == 1


def test_a_header_in_the_middle_is_malformed(write):
    """As in two files that were joined, also with the byte order mark of the second."""
    path = write("t.csv", "text,label\na,x\n\ufefftext, label\nb,y\n")
    message = error_of(path, "label")
    assert message.startswith(f"{path}:3 ") and "header" in message
    data = read_examples(f"{path},malformed=skip", "label")
    assert texts_and_labels(data) == [("a", "x"), ("b", "y")] and data.counts == {"malformed": 1}


@pytest.mark.parametrize(
    ("name", "separator", "remedy"),
    [("t.tsv", ",", "format=csv"), ("t.csv", "\t", "format=tsv"), ("t.csv", ";", "semicolons")],
)
def test_cells_between_other_separators(write, name, separator, remedy):
    assert remedy in error_of(write(name, f"text{separator}label\na{separator}x\n"), "label")
    assert remedy not in error_of(write(name, f"a text{separator}and more\n"), "label")


def test_a_line_without_a_header_needs_the_columns_that_are_read(write):
    """More are counted: some published files give sources after the texts."""
    path = write("t.txt", "a\tx\nb\ty\thttp\nc\tz\n")
    data = read_examples(path, "label", Columns("0", label="1"))
    assert len(data.examples) == 3 and data.counts == {"lines with more columns than the first": 1}
    assert error_of(path, "label", Columns("0", label="2")).startswith(f"{path}:1 ")
    assert "number -3" in error_of(path, "label", Columns("0", label="-3"))


def test_columns_that_are_not_there(write, tmp_path):
    message = error_of(write("t.tsv", "sentence\tlabel\na\tx\n"), "label")
    assert "`text`" in message and "sentence, label" in message and "--columns" in message
    assert "no header" in error_of(f"{write('t.tsv', 'text')},header=no", "label")
    assert "`2`" in error_of(f"{write('t.tsv', 'a,b')},header=yes", "label", Columns("0", label="2"))
    assert "2 columns `label`" in error_of(write("t.tsv", "text\tlabel\tlabel\n"), "label")
    message = error_of(write("t.jsonl", '\n{"body": "a", "label": "x"}\n'), "label")
    assert message.startswith(f"{tmp_path}/t.jsonl:2 ") and "`text`" in message and "body, label" in message
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "t.parquet")
    assert "`text`" in error_of(f"{tmp_path}/t.parquet", "label")
    assert "only 0, 1 " in error_of(write("t.conll", "a O\n"), "tags", Columns(label="2"))
    assert "upos" in error_of(write("t.conllu", "1\ta" + "\t_" * 8), "tags", Columns(label="pos"))


@pytest.mark.parametrize(
    ("name", "content", "kind", "parts"),
    [
        ("t.jsonl", '{"text": 3, "label": "x"}', "label", (":1 ", "`text` 3", "text")),
        ("t.jsonl", '{"text": "a", "label": 1.5}', "label", ("`label` 1.5",)),
        ("t.jsonl", '{"text": "a", "label": null}', "label", ("`label`",)),
        ("t.jsonl", '{"text": "a", "label": "x"}\n{"text"\n', "label", (":2 ", "JSON")),
        ("t.jsonl", '{"text": "\\ud800", "label": "x"}', "label", (":1 ", "JSON")),
        ("t.jsonl", "3", "label", (":1 ", "object")),
        ("t.json", "[3, ", "label", ("JSON",)),
        ("t.tsv", "text\tlabel\na\tgood\n", "number", (":2 ", '"good"', "number")),
        ("t.tsv", "text\tlabel\na\t1_000\n", "number", ("1_000",)),
        ("t.jsonl", '{"text": "a", "label": NaN}', "number", ("NaN",)),
        ("t.jsonl", '{"text": "a", "label": true}', "number", ("true",)),
        ("t.jsonl", '{"tokens": [], "tags": []}', "tags", (":1 ", "words")),
        ("t.jsonl", '{"tokens": ["a", " "], "tags": ["O", "O"]}', "tags", ("no text",)),
        ("t.jsonl", '{"tokens": ["a"], "tags": ["O", "O"]}', "tags", ("1 words", "2 tags")),
        ("t.conll", "a O\nb\n\n", "tags", (":2 ", "1 columns")),
        ("t.conllu", "1\ta\n", "tags", (":1 ", "2 columns")),
        ("t.conll", "a\nb\n\nc\n", "tags", (":1 ", "one column")),
        ("t.jsonl", '{"tokens": ["a"], "tags": [null]}', "tags", (":1 ", "`tags` null")),
        ("t.jsonl", '{"text": "a", "options": ["b"], "label": 0}', "choice", ("1 option", "--columns.options")),
        (
            "t.jsonl",
            '{"text": "a", "options": ["b", "c"], "label": 2}',
            "choice",
            ("label 2", "--columns.first-option"),
        ),
        ("t.jsonl", '{"text": "a", "options": ["b", "c"], "label": "C"}', "choice", ("label C", "2 options")),
        ("t.json", '{"data": [{"title": "a"}]}', "spans", ("paragraphs", "format=jsonl")),
        ("t.json", "[]", "spans", ("SQuAD",)),
        ("t.tsv", "text\tlabel\n", "label", ("no examples",)),
        ("t.tsv", "", "label", ("no examples",)),
        ("t.tsv", b"text\tlabel\na\tx\nb\xff\ty\n", "label", (":3 ", "byte 16", "iconv")),
        ("t.tsv", "text\tlabel\na\0\tx\n", "label", ("NUL",)),
    ],
)
def test_errors(write, name, content, kind, parts):
    message = error_of(write(name, content), kind)
    assert name in message and all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("t.tsv,format=excel", "label-text"),
        ("t.tsv,header=maybe", "yes, no"),
        ("t.tsv,quoting=no", "malformed"),
        ("no.tsv", "no.tsv"),
        ("no*.tsv", "no*.tsv"),
        ("gs://bucket/t.tsv", "gs://bucket/t.tsv"),
    ],
)
def test_errors_of_a_spec(spec, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in error_of(spec, "label")


def test_a_header_that_would_be_an_example(write):
    path = write("t.csv", "sentence,label\na,x\nb,y\nc,x\nd,y\n")
    columns = Columns("0", label="1")
    message = error_of(path, "label", columns)
    assert "(label)" in message and "header=yes" in message
    assert len(read_examples(f"{path},header=yes", "label", columns).examples) == 4
    assert len(read_examples(f"{path},header=no", "label", columns).examples) == 5
    assert len(read_examples(write("t.csv", "text,label\na,x\nb,y\nc,y\nd,z\ne,z"), "label").examples) == 5


def test_identifiers_are_unique(write):
    path = write("t.tsv", "text\tlabel\tn\na\tx\t7\nb\ty\t8\n")
    assert [example.id for example in read_examples(path, "label", Columns(id="n")).examples] == ["7", "8"]
    path = write("t.tsv", "text\tlabel\tn\na\tx\t7\nb\ty\t7\n")
    assert " 7" in error_of(path, "label", Columns(id="n"))


# ---- Kinds -----------------------------------------------------------------------------------------------------------


def test_names_of_formats(write):
    """The ending says it, else the kind; an option overrules both."""
    kinds = {"a.CSV.gz": "csv", "a.tab": "tsv", "a.ndjson.zst": "jsonl", "a.pq": "parquet", "a.iob2": "conll"}
    kinds |= {"a.conllu": "conllu", "a.json": "jsonl", "a.txt": "tsv"}
    assert {name: FileSpec.parse(name).format_of(name, "label") for name in kinds} == kinds
    assert FileSpec.parse("a.json").format_of("a.json", "spans") == "squad"
    assert FileSpec.parse("a.txt").format_of("a.txt", "tags") == "conll"
    assert FileSpec.parse("a.csv,format=tsv").format_of("a.csv", "label") == "tsv"
    data = read_examples(f"{write('TREC', 'DESC:manner How far is it ?')},format=label-text", "label")
    assert texts_and_labels(data) == [("How far is it ?", "DESC:manner")]


def test_the_files_of_a_glob_follow_each_other(write, tmp_path):
    write("b.tsv", "label\ttext\ny\tb\n")
    write("a.csv", "text,label\na,x\n")
    data = read_examples(f"{tmp_path}/*.?sv", "label")
    assert texts_and_labels(data) == [("a", "x"), ("b", "y")] and [each.id for each in data.examples] == ["0", "1"]


def test_without_labels(write):
    data = read_examples(write("t.tsv", "text\na\n"), "label", labelled=False)
    assert data.examples == [Example("0", (("a",),), None)]
    data = read_examples(write("t.conll", "a\nb\n"), "tags", labelled=False)
    assert data.examples == [Example("0", ((("a", "b"),),), None)]
    question = {"question": "q", "id": "1"}
    path = write("t.json", json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [question]}]}]}))
    assert read_examples(path, "spans", labelled=False).examples == [Example("1", (("q", "c"),), None)]


def test_labels_are_names_in_order(write):
    path = write("t.jsonl", "\n".join(f'{{"text": "a", "label": {x}}}' for x in ("10", '"9"', "true", "-1")))
    examples = read_examples(path, "label").examples
    assert label_names(examples, "label") == ("-1", "10", "9", "true")
    assert label_names([each for each in examples if each.label != "true"], "label") == ("-1", "9", "10")
    data = LabelledData(examples, {})
    check_labels("t", data, "label", ("10", "9", "true", "-1", "lines"))
    with pytest.raises(InputError, match=r"^t .*\(true\).* 10, 9, -1"):
        check_labels("t", data, "label", ("10", "9", "-1"))
    with pytest.raises(InputError, match=r"^t: .* 10"):
        check_labels("t", LabelledData(examples[:1], {}), "label", ("10", "9"))


def test_integers_are_names_of_tags(write):
    path = write("t.jsonl", '{"tokens": ["a", "b"], "tags": [10, 9]}')
    data = read_examples(path, "tags")
    assert data.examples[0].label == ("10", "9") and label_names(data.examples, "tags") == ("9", "10")


def test_where_there_is_nothing_to_learn(write):
    """In the training file; a held-out file may lack labels that the model knows."""
    for name, content, kind in (("t.csv", "text,labels\na,\n", "labels"), ("t.conll", "a O\nb O\n", "tags")):
        data = read_examples(write(name, content), kind)
        with pytest.raises(InputError, match=rf"^{name}: .*nothing to learn"):
            check_labels(name, data, kind, label_names(data.examples, kind))
        check_labels(name, data, kind, ("O", "x"))


def test_several_labels(write):
    path = write("t.csv", 'text,labels,rude,new\na,"x, y,x",1,0\nb,,0,True\nc,z,0,0\n')
    assert texts_and_labels(read_examples(path, "labels")) == [("a", ("x", "y")), ("b", ()), ("c", ("z",))]
    data = read_examples(path, "labels", Columns(indicators=("rude", "new")))
    assert texts_and_labels(data) == [("a", ("rude",)), ("b", ("new",)), ("c", ())]
    assert label_names(data.examples, "labels") == ("new", "rude")
    path = write("t.jsonl", '{"text": "a", "labels": ["x", 3]}\n{"text": "b", "labels": []}')
    assert texts_and_labels(read_examples(path, "labels")) == [("a", ("x", "3")), ("b", ())]
    assert "`new` 2" in error_of(write("t.jsonl", '{"text": "a", "new": 2}'), "labels", Columns(indicators=("new",)))


def test_choices(write):
    """The label is a number, a letter or the name of a column."""
    path = write("t.csv", "sent1,sent2,e0,e1,label\nA man.,He,runs.,sits.,1\nA dog.,It,barks.,sings.,e0\n")
    data = read_examples(path, "choice", Columns("sent1", "sent2", options=("e0", "e1")))
    assert [example.sequences for example in data.examples] == [
        (("A man.", "He runs."), ("A man.", "He sits.")),
        (("A dog.", "It barks."), ("A dog.", "It sings.")),
    ]
    assert [example.label for example in data.examples] == [1, 0]
    path = write("t.jsonl", '{"text": "a", "options": ["x", "y", "z"], "label": "C"}')
    assert read_examples(path, "choice").examples == [Example("0", (("a", "x"), ("a", "y"), ("a", "z")), 2)]
    path = write("t.csv", "text,e0,e1,label\na,b,c,2\n")
    columns = Columns(options=("e0", "e1"), first_option=1)
    assert read_examples(path, "choice", columns).examples == [Example("0", (("a", "b"), ("a", "c")), 1)]
    path = write("t.tsv", "a\tx\ty\tz\t0\nb\tx\ty\tz\t1\nc\tx\ty\tz\t2\n")
    columns = Columns("0", options=("1", "2", "3"), label="4")  # Whose numbers are no names of options.
    assert [example.label for example in read_examples(path, "choice", columns).examples] == [0, 1, 2]


def answers_of(path: str) -> list[tuple]:
    return [(example.id, example.sequences, example.label) for example in read_examples(path, "spans").examples]


def test_answers(write, tmp_path):
    passage = "Ada wrote it in 1843. 😀 Ada!"
    answer = {"text": "Ada", "answer_start": 24}
    questions = [
        {
            "id": "a",
            "question": "Who?",
            "answers": [{"text": "Ada", "answer_start": 0}, answer],
            "is_impossible": False,
        },
        {"id": "b", "question": "Why?", "answers": [], "plausible_answers": [answer]},
    ]
    squad = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": passage, "qas": questions}]}]}
    labels = [Answers(("Ada", "Ada"), (0, 24)), Answers()]
    expected = [
        (each["id"], ((each["question"], passage),), label) for each, label in zip(questions, labels, strict=True)
    ]
    assert answers_of(write("t.json", json.dumps(squad, indent=1))) == expected
    rows = [each | {"context": passage} for each in questions]
    assert answers_of(write("t.jsonl", "\n".join(map(json.dumps, rows)))) == [
        (str(i), *rest) for i, (_, *rest) in enumerate(expected)
    ]
    for row in rows:  # As Hugging Face's datasets have them.
        row["answers"] = {name: [each[name] for each in row["answers"]] for name in ("text", "answer_start")}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert answers_of(f"{tmp_path}/t.parquet") == [(str(i), *rest) for i, (_, *rest) in enumerate(expected)]

    answer["answer_start"] = 23
    message = error_of(write("t.json", json.dumps(squad)), "spans")
    assert "question a" in message and '"Ada"' in message and "23" in message
    data = read_examples(f"{tmp_path}/t.json,malformed=skip", "spans")
    assert [each.id for each in data.examples] == ["b"] and data.counts == {"malformed": 1}


@pytest.mark.parametrize("answers", ['"Ada"', '[{"text": "Ada"}]', '{"text": ["Ada"], "answer_start": []}', "[3]"])
def test_answers_of_other_shapes_are_refused(write, answers):
    path = write("t.jsonl", f'{{"question": "a", "context": "Ada", "answers": {answers}}}')
    assert "answer_start" in error_of(path, "spans")


def test_classes_of_hugging_face_are_names(tmp_path):
    """The numbers of a Parquet file are those of its metadata; -1 stands for none."""
    features = {
        "label": {"names": ["no", "yes"], "_type": "ClassLabel"},
        "tags": {"feature": {"names": ["O", "B-PER"], "_type": "ClassLabel"}, "_type": "Sequence"},
        "text": [{"names": {"dtype": "string", "_type": "Value"}}],  # Of another type than the column, and no classes.
        "tokens": [{"dtype": "string", "_type": "Value"}],
    }
    table = pa.table({"text": ["a", "b"], "tokens": [["c"], ["d", "e"]], "label": [1, 0], "tags": [[0], [1, 0]]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "t.parquet")
    path = f"{tmp_path}/t.parquet"
    assert texts_and_labels(read_examples(path, "label")) == [("a", "yes"), ("b", "no")]
    assert [each.label for each in read_examples(path, "tags").examples] == [("O",), ("B-PER", "O")]
    table = table.set_column(2, "label", pa.array([-1, 0]))
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "t.parquet")
    assert "row 0 has no `label`" in error_of(path, "label")


def test_tensorflow_datasets(tmp_path, monkeypatch):
    """Classes are names; lists and answers are those of other formats."""
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    passage = "Ada wrote it in 1843."
    record = {
        "sentence": "é",
        "label": "yes",
        "tokens": ["a", "b"],
        "ner": [0, 1],
        "question": "Who?",
        "context": passage,
        "answers": [{"text": "Ada", "answer_start": 0}, {"text": "1843", "answer_start": 16}],
    }
    features = {
        **dict.fromkeys(("sentence", "question", "context"), tfds.features.Text()),
        "label": tfds.features.ClassLabel(names=["no", "yes"]),
        "tokens": tfds.features.Sequence(tfds.features.Text()),
        "ner": tfds.features.Sequence(tfds.features.ClassLabel(names=["O", "B-PER"])),
        "answers": tfds.features.Sequence(
            {"text": tfds.features.Text(), "answer_start": tfds.features.Scalar(np.int32)}
        ),
    }
    with tfds.core.registered.skip_registration():

        class MyTask(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            url_infos = None

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": [(0, record)], "test": [(0, record | {"label": -1, "answers": []})]}

            def _generate_examples(self):
                raise NotImplementedError

    MyTask(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    assert texts_and_labels(read_examples("tfds:my_task", "label", Columns("sentence"))) == [("é", "yes")]
    assert texts_and_labels(read_examples("tfds:my_task", "tags", Columns(label="ner"))) == [
        (("a", "b"), ("O", "B-PER"))
    ]
    answers = Answers(("Ada", "1843"), (0, 16))
    assert texts_and_labels(read_examples("tfds:my_task:train", "spans")) == [("Who?", passage, answers)]
    assert texts_and_labels(read_examples("tfds:my_task:test", "spans")) == [("Who?", passage, Answers())]
    assert "record 0 has no `label`" in error_of("tfds:my_task:test", "label", Columns("sentence"))
    assert "`text`" in error_of("tfds:my_task", "label")


# ---- Tags ------------------------------------------------------------------------------------------------------------


def encode(spans: list[tuple[str, int]], scheme: str) -> list[str]:
    """Tags of spans (type, length) that follow each other, with one O for type ""."""
    tags, before = [], ""
    for name, length in spans:
        if not name:
            tags.append("O")
        elif scheme == "IOB1":  # B- only between neighbors of a type.
            tags += [f"{'B' if name == before else 'I'}-{name}", *[f"I-{name}"] * (length - 1)]
        elif scheme == "BIO":
            tags += [f"B-{name}", *[f"I-{name}"] * (length - 1)]
        else:
            begin, inside, end, single = scheme
            middle = [f"{begin}-{name}", *[f"{inside}-{name}"] * (length - 2), f"{end}-{name}"]
            tags += [f"{single}-{name}"] if length == 1 else middle
        before = name
    return tags


spans = st.lists(st.tuples(st.sampled_from(["", "PER", "I-ORG", "中"]), st.integers(1, 4)), max_size=6)


@pytest.mark.parametrize("scheme", ["IOB1", "BIO", "BIES", "BILU", "BMES"])
@given(spans)
def test_all_schemes_are_read_as_bio(scheme, spans):
    assert list(bio_tags(encode(spans, scheme))) == encode(spans, "BIO")


def test_conll_2003(write):
    """IOB1 with boundaries of documents, as published."""
    content = (
        "-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\nUN NNP I-NP B-ORG\nof IN I-PP O\n\n-DOCSTART- -X- O O\n\nI P I-NP O\n"
    )
    data = read_examples(write("eng.testa", content), "tags")
    assert texts_and_labels(data) == [(("EU", "UN", "of"), ("B-ORG", "B-ORG", "O")), (("I",), ("O",))]
    assert data.counts == {"document boundaries": 2, "tags converted to BIO": 1}
    assert is_bio(label_names(data.examples, "tags"))


def test_no_word_is_lost_after_a_document_boundary(write):
    """In AIDA's files no blank line follows it."""
    data = read_examples(write("t.conll", "-DOCSTART-\nEU B-ORG\nof O\n\nI O\n"), "tags")
    assert texts_and_labels(data) == [(("EU", "of"), ("B-ORG", "O")), (("I",), ("O",))]
    assert data.counts == {"document boundaries": 1}


def test_names_of_other_schemes_become_those_of_bio():
    assert bio_names(("O", "S-PER", "M-LOC", "E-LOC", "B-PER")) == ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    for names in (("O", "B-PER", "I-PER"), ("NOUN", "VERB"), ("O",), ("S-x", "-LRB-")):
        assert bio_names(names) is names


def test_nothing_is_counted_where_all_tags_are_of_bio(write):
    data = read_examples(write("t.conll", "a B-X\nb I-X\nc O\n"), "tags")
    assert data.examples[0].label == ("B-X", "I-X", "O") and data.counts == {}


def test_tags_that_mark_no_spans_stay(write):
    """A part of speech may begin like a span. What is BIO already is not counted."""
    assert read_examples(write("bio.conll", "a B-x\nb I-x\n"), "tags").counts == {}
    data = read_examples(write("t.conll", "a S-x\nb -LRB-\nc O\n"), "tags")
    assert data.examples[0].label == ("S-x", "-LRB-", "O")
    assert not is_bio(("S-x", "-LRB-", "O")) and not is_bio(("O",)) and not is_bio(())


@pytest.mark.parametrize(
    ("kind", "expected"), [("label", "examples (25.0%) cut to 99"), ("spans", "questions (25.0%) cut to 64")]
)
def test_what_was_cut_is_printed(kind, expected, capsys):
    """Of long examples the end; where an answer is to be found, the end of long questions alone."""
    print_counts("t.json", {"malformed": 2}, 1, 4, kind, 99)
    assert capsys.readouterr().err.splitlines() == ["t.json: 2 malformed", f"t.json: 1 of 4 {expected} tokens"]


def test_conllu(write):
    rows = [
        ["1-2", "can't", "_", "_"],
        ["1", "ca", "can", "AUX"],
        ["2", "n't", "not", "PART"],
        ["2.1", "go", "go", "VERB"],
        ["3", "# 1", "#", "SYM"],
    ]
    lines = ["# text = can't # 1", *("\t".join([*row, *"_" * 6]) for row in rows)]
    path = write("t.conllu", "\n".join(lines) + "\n\n# the end\n")
    data = read_examples(path, "tags")
    assert texts_and_labels(data) == [(("ca", "n't", "# 1"), ("AUX", "PART", "SYM"))]
    assert data.counts == {"multiword tokens and empty nodes": 2}
    assert read_examples(path, "tags", Columns("LEMMA", label="2")).examples[0].sequences == ((("can", "not", "#"),),)


# ---- Published files -------------------------------------------------------------------------------------------------

# SPEC, kind, columns: numbers of examples and labels, and counts by the first word of their names.
PUBLISHED = {
    ("sst2/dev.tsv", "label", Columns("sentence")): (6735, 2, {}),
    ("sst2/test.tsv", "label", Columns("sentence")): (872, 2, {}),
    ("glue-small/CoLA/train_full.tsv", "label", Columns("3", label="1")): (8551, 2, {}),
    ("glue-small/CoLA/dev.tsv", "label", Columns("3", label="1")): (1043, 2, {}),
    ("glue-small/RTE/train_full.tsv", "label", Columns("sentence1", "sentence2")): (2490, 2, {}),
    ("glue-small/RTE/dev.tsv,header=yes", "label", Columns("1", "2", "-1")): (277, 2, {}),
    ("glue-small/WNLI/dev.tsv", "label", Columns("sentence1", "sentence2", id="index")): (71, 2, {}),
    ("stsbenchmark/sts-train.csv,format=tsv", "number", Columns("5", "6", "4")): (5749, 0, {"lines": 197}),
    ("stsbenchmark/sts-dev.csv,format=tsv", "number", Columns("5", "6", "4")): (1500, 0, {"lines": 22}),
    ("stsbenchmark/sts-test.csv,format=tsv", "number", Columns("5", "6", "4")): (1379, 0, {"lines": 284}),
    ("sick/SICK_train.txt", "label", Columns("sentence_A", "sentence_B", "entailment_judgment")): (4500, 3, {}),
    ("sick/SICK_test_annotated.txt", "number", Columns("1", "2", "relatedness_score")): (4927, 0, {}),
    ("senteval-small/TREC.train.all,format=label-text", "label", Columns()): (5452, 6, {}),
    ("senteval-small/TREC.test.all,format=label-text", "label", Columns()): (500, 6, {}),
    ("senteval-small/rt-polarity.all,format=label-text", "label", Columns()): (10662, 2, {}),
    ("senteval-small/mpqa.all,format=label-text,malformed=skip", "label", Columns()): (10603, 2, {"malformed": 3}),
    ("agnews/alps.dev.tsv", "label", Columns("0", label="1")): (10001, 4, {}),
    ("agnews/test.csv", "label", Columns("1", "2", "0")): (7599, 4, {}),
    ("ud-en-ewt/en_ewt-ud-dev.conllu", "tags", Columns()): (2001, 17, {"multiword": 363}),
    ("ud-en-ewt/en_ewt-ud-test.conllu", "tags", Columns(label="xpos")): (2077, 48, {"multiword": 356}),
    ("zh/ner/resume/dev.char.bmes,format=tsv", "tags", Columns("0", label="1")): (463, 17, {"tags": 6956}),
    ("zh/ner/weibo/train.all.bmes", "tags", Columns()): (1350, 17, {"tags": 3107}),
    ("zh/ChnSentiCorp/train.tsv", "label", Columns("0", label="1")): (9600, 2, {}),
    ("zh/AFQMC/dev.txt", "label", Columns("0", "1", "2")): (4316, 2, {}),
    ("xquad/xquad.en.json", "spans", Columns()): (1190, 0, {}),
    ("xquad/xquad.zh.json", "spans", Columns()): (1190, 0, {}),
}


@pytest.mark.parametrize(("spec", "kind", "columns"), PUBLISHED, ids=lambda x: x if isinstance(x, str) else "")
def test_published_files(real_data, spec, kind, columns):
    path = real_data / "tasks" / spec
    if not path.parent.is_dir():
        pytest.skip(f"no {path.parent}")
    data = read_examples(str(path), kind, columns)
    counts = {name.split()[0]: count for name, count in data.counts.items()}
    assert (len(data.examples), len(label_names(data.examples, kind)), counts) == PUBLISHED[spec, kind, columns]
