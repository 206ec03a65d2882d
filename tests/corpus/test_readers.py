"""Whole files as lines and JSON; what is read as documents is in test_corpus.py."""

import pytest

from prelm_jax.errors import InputError
from prelm_jax.storage import read_json, read_lines


def test_lines_end_at_line_feeds_only(tmp_path):
    file = tmp_path / "input.txt"
    for data, lines in [
        (b"", []),
        (b"a", ["a"]),
        (b"a\n", ["a"]),
        (b"a\n\nb\n\n", ["a", "", "b", ""]),
        ("a\r\nb\x0bc\x85\u2028d".encode(), ["a\r", "b\x0bc\x85\u2028d"]),
    ]:
        file.write_bytes(data)
        assert read_lines(file) == lines


def test_input_that_cannot_be_read_is_refused(tmp_path):
    file = tmp_path / "input.txt"
    with pytest.raises(InputError, match=r"cannot read .*input\.txt: No such file"):
        read_lines(file)
    file.write_bytes("é\n".encode() + b"a\xff")
    with pytest.raises(InputError, match=r"input\.txt is not UTF-8 at byte 4: convert the file"):
        read_lines(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON: Expecting property name"),
        (b"[" * 100_000, "is not JSON: "),
        (b"[1]", "is not a JSON object"),
        (b'{"a": "\xff"}', "is not UTF-8 at byte 7: convert the file"),
    ],
)
def test_what_is_not_a_json_object_is_refused(tmp_path, content, message):
    file = tmp_path / "settings.json"
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_json(file)
    assert str(error.value).startswith(f"{file} {message}")
    file.write_bytes(b'{"a": 1}')
    assert read_json(file) == {"a": 1}
