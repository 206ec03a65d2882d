"""The cache directory, and that files are built once."""

import pytest

from prelm_jax.cache import cache_directory, cached, cached_file


def test_the_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PRELM_CACHE", "~/mine")
    assert cache_directory() == tmp_path / "mine"
    monkeypatch.delenv("PRELM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
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
    assert names == {"key.txt", "other.txt", ".key.txt.lock", ".other.txt.lock"}


def test_an_unfinished_file_is_built_again(monkeypatch, tmp_path):
    monkeypatch.setenv("PRELM_CACHE", str(tmp_path))

    def stop(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_file("kind", "name", stop)
    assert cached_file("kind", "name", lambda path: path.write_text("whole")).read_text() == "whole"
