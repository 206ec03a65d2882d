"""SPECs: locations, options and errors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelm_jax.corpus.documents import Corpus
from prelm_jax.corpus.spec import OPTIONS, Spec, parse
from prelm_jax.errors import InputError


@pytest.mark.parametrize(
    ("item", "spec"),
    [
        ("a.txt", Spec("a.txt")),
        ("python-docs,weight=2.5", Spec("python-docs", weight=2.5)),
        ("n/*.txt.xz,documents=file,sentences=line", Spec("n/*.txt.xz", documents="file", sentences="line")),
        ("a.jsonl.gz,field=body,cleaning=gpt", Spec("a.jsonl.gz", field="body", cleaning="gpt")),
        ("tfds:a/b:1.0.0:train[:2],field=x", Spec("tfds:a/b:1.0.0:train[:2]", field="x")),
        ("a, b [1].txt,weight=1", Spec("a, b [1].txt")),
        ("a,b=1/c.txt,documents=line", Spec("a,b=1/c.txt", documents="line")),  # Options hold no slash.
        ("x=1.txt", Spec("x=1.txt")),
        ("./field=x", Spec("./field=x")),
        ("a[,]b=1.txt", Spec("a[,]b=1.txt")),
        ("a.txt,language=de,weight=2", Spec("a.txt", language="de", weight=2)),
        ("a.json,field=body", Spec("a.json", field="body")),
    ],
)
def test_location_and_options(item, spec):
    assert parse([item]) == [spec]


def test_options_belong_to_their_own_item():
    assert [spec.documents for spec in parse(["a.txt", "b.txt,documents=line", "c.txt"])] == [
        "blank-line",
        "line",
        "blank-line",
    ]


@pytest.mark.parametrize("option", ["documents=line", "documents=line,sentences=line", "weight=2", "field="])
def test_an_option_without_a_source_is_refused(option):
    with pytest.raises(InputError) as error:
        parse(["a.txt", option])
    assert str(error.value).startswith(f"{option} has no source: ")
    assert str(error.value).endswith(f"SOURCE,{option}")


@pytest.mark.parametrize(
    ("item", "names"),
    [
        ("a.txt,document=file", ["document:", *OPTIONS]),
        ("a.txt,documents=page", ["documents", "blank-line, file, line", "page"]),
        ("a.txt,b=c.txt", ["b:", "[,]"]),
        ("a.txt,sentences=", ["sentences", "library, line", "nothing"]),
        *(
            (f"a.txt,language={language}", ["am, ar, bg,", "did you mean de?"])
            for language in ("DE", "de-AT", "german")
        ),
        ("a.txt,language=xx", ["am, ar, bg,", "not xx; leave it out"]),
        ("a.txt,language=", ["nothing"]),
        ("a.txt,language=de,sentences=line", ["language="]),
        ("a.txt,cleaning=bert", ["cleaning", "none, gpt", "bert"]),
        ("python-docs,documents=line", ["documents="]),
        ("a.jsonl.gz,documents=line", ["documents="]),
        ("tfds:a,documents=line", ["documents="]),
        ("a.parquet,documents=line", ["documents="]),
        ("a.txt,field=body", ["field=", ".jsonl, .parquet"]),
        ("python-docs,field=body", ["field="]),
        ("a.jsonl,field=", ["field", "nothing"]),
        ("a.parquet.gz", ["Parquet"]),
        *(
            (f"a.txt,weight={weight}", ["weight", "0", "1000"])
            for weight in ("0", "-1", "nan", "inf", "two", "1e18", "")
        ),
    ],
)
def test_errors_name_the_item_and_the_option(item, names):
    """When the corpus is constructed, before any file is read."""
    with pytest.raises(InputError) as error:
        Corpus((item,))
    message = str(error.value)
    assert message.startswith(f"{item}: ") and "\n" not in message
    assert all(name in message for name in names)


TEXTS = st.one_of(st.text(), st.sampled_from([*OPTIONS, "line", "de", "gpt", "2", "1e18", "-1", "a.txt", "./", "[,]"]))


OPTION = st.tuples(st.just(","), st.sampled_from(sorted(OPTIONS)), st.just("="), TEXTS).map("".join)


@given(st.lists(st.one_of(TEXTS, OPTION, st.sampled_from(",=,=")), min_size=1, max_size=8).map("".join))
def test_any_text_is_a_spec_or_refused(item):
    """In one line, before any file is read; a location that comes back is read as itself."""
    try:
        (spec,) = parse([item])
    except InputError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert 0 < spec.weight <= 1000 and item.startswith(spec.location)
        assert item == spec.location or item[len(spec.location)] == ","
        assert parse([spec.location]) == [Spec(spec.location)]


def test_a_corpus_has_sources():
    with pytest.raises(InputError, match="no sources"):
        parse([])
