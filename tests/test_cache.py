"""The cache directory, and that files are built once."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.cache import cache_directory, cached, cached_file
from prelm_jax.errors import InputError


def test_the_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PRELM_CACHE", "~/mine")
    assert cache_directory() == tmp_path / "mine"
    monkeypatch.delenv("PRELM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg/prelm_jax"
    monkeypatch.setenv("PRELM_CACHE", "")  # Not the current directory.
    assert cache_directory() == tmp_path / "xdg/prelm_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == tmp_path / ".cache/prelm_jax"


def test_a_text_is_built_once(monkeypatch, tmp_path):
    monkeypatch.setenv("PRELM_CACHE", str(tmp_path))
    texts = iter(["é\r\n", "another"])
    assert cached("kind", "key", lambda: next(texts)) == "é\r\n"
    assert cached("kind", "key", lambda: next(texts)) == "é\r\n"
    assert cached("kind", "other", lambda: next(texts)) == "another"
    names = {path.name for path in (tmp_path / "kind").iterdir()}
    assert names == {
        name for key in ("key", "other") for name in (f"{key}.txt", f"{key}.txt.sha256", f".{key}.txt.lock")
    }
    subprocess.run(["sha256sum", "--check", "--quiet", "key.txt.sha256"], cwd=tmp_path / "kind", check=True)


def test_an_unfinished_file_is_built_again(monkeypatch, tmp_path):
    monkeypatch.setenv("PRELM_CACHE", str(tmp_path))

    def stop(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_file("kind", "name", stop)
    assert cached_file("kind", "name", lambda path: path.write_text("whole")).read_text() == "whole"
    assert {path.name for path in (tmp_path / "kind").iterdir()} == {"name", "name.sha256", ".name.lock"}


@settings(deadline=None, max_examples=50)
@given(text=st.text(min_size=1), data=st.data())
def test_a_damaged_file_is_built_again(tmp_path_factory, text, data):
    """Also one whose checksum is gone or damaged."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRELM_CACHE", str(directory))
        cached("kind", "key", lambda: text)
        path = data.draw(st.sampled_from([directory / "kind/key.txt", directory / "kind/key.txt.sha256"]))
        content = path.read_bytes()
        damaged = data.draw(
            st.one_of(
                st.none(),
                st.integers(0, len(content) - 1).map(lambda end: content[:end]),
                st.binary(min_size=1).map(lambda more: content + more),
                st.integers(0, 8 * len(content) - 1).map(
                    lambda bit: bytes(x ^ ((i == bit // 8) << bit % 8) for i, x in enumerate(content))
                ),
            )
        )
        path.unlink() if damaged is None else path.write_bytes(damaged)
        assert cached("kind", "key", lambda: "built again") == "built again"
        assert cached("kind", "key", lambda: pytest.fail("built twice")) == "built again"


def test_a_cached_file_that_may_not_be_read_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PRELM_CACHE", str(tmp_path))
    path = cached_file("kind", "name", lambda path: path.write_text("whole"))

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("io.open", refuse)
    with pytest.raises(InputError, match=f"cannot read {path}.sha256: Permission denied"):
        cached_file("kind", "name", lambda path: pytest.fail("built again"))


WRITE = """
import sys
from prelm_jax.cache import cached
print(len(cached("kind", "key", lambda: sys.argv[1] * 5_000_000)))
"""


def test_processes_that_build_the_same_file_end_with_a_whole_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PRELM_CACHE", str(tmp_path))
    processes = [subprocess.Popen([sys.executable, "-c", WRITE, letter], stdout=subprocess.PIPE) for letter in "abc"]
    assert [process.communicate()[0] for process in processes] == [b"5000000\n"] * 3
    assert cached("kind", "key", lambda: pytest.fail("not whole")) in {letter * 5_000_000 for letter in "abc"}
