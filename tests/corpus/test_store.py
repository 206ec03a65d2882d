"""The token store: content, counts and damage."""

import hashlib
import json
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.cache import digest
from prelm_jax.corpus import store as store_module
from prelm_jax.corpus.store import ARRAYS, STORE_FORMAT, DamagedStore, Store, Writer
from prelm_jax.errors import InputError


def documents_of(store: Store) -> list[list[list[int]]]:
    sentences = [
        store.ids[a:b].tolist() for a, b in zip(store.sentence_offsets, store.sentence_offsets[1:], strict=False)
    ]
    return [sentences[a:b] for a, b in zip(store.document_offsets, store.document_offsets[1:], strict=False)]


# ---- In memory -------------------------------------------------------------------------------------------------------

DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=4), max_size=5)


@settings(deadline=None)
@given(documents=DOCUMENTS)
def test_from_documents(documents):
    store = Store.from_documents(documents)
    kept = [[sentence for sentence in document if sentence] for document in documents]
    kept = [document for document in kept if document]
    assert documents_of(store) == kept
    assert store.manifest["empty_documents"] == len(documents) - len(kept)
    lengths = [len(sentence) for document in kept for sentence in document]
    assert store.sentence_offsets.tolist() == [0, *accumulate(lengths)]
    assert store.document_offsets.tolist() == [0, *accumulate(map(len, kept))]
    assert store.document_bytes.tolist() == [0] * len(kept)
    flat = [index for document in kept for sentence in document for index in sentence]
    assert store.token_counts(100).tolist() == [flat.count(index) for index in range(100)]


@settings(deadline=None)
@given(one=DOCUMENTS, other=DOCUMENTS)
def test_fingerprints_in_memory_cover_the_content(one, other):
    one, other = Store.from_documents(one), Store.from_documents(other)
    same = documents_of(one) == documents_of(other) and one.manifest == other.manifest
    assert (one.fingerprint == other.fingerprint) == same


def test_gather_keeps_the_shape():
    store = Store.from_documents([[[5, 6, 7], [8]], [[9, 70_000]]])
    positions = np.array([[0, 5], [3, 3]])
    gathered = store.gather(positions)
    assert gathered.dtype == np.int32
    assert gathered.tolist() == [[5, 70_000], [8, 8]]
    with pytest.raises(IndexError):
        store.gather(np.array([6]))


def test_tokens_are_counted_in_chunks(monkeypatch):
    monkeypatch.setattr(store_module, "CHUNK_ITEMS", 2)
    store = Store.from_documents([[[1, 2, 1], [4, 1]]])
    assert store.token_counts(6).tolist() == [0, 3, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="broadcast"):
        store.token_counts(4)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_quantiles_of_lengths(monkeypatch, chunk):
    monkeypatch.setattr(store_module, "CHUNK_ITEMS", chunk)
    rng = np.random.default_rng(0)
    documents = [[[1] * length for length in rng.integers(1, 50, rng.integers(1, 5))] for _ in range(101)]
    store = Store.from_documents(documents)
    lengths = {
        "documents": [sum(map(len, document)) for document in documents],
        "sentences": [len(sentence) for document in documents for sentence in document],
    }
    for unit, values in lengths.items():
        expected = np.quantile(values, [0.5, 0.9, 0.99, 1], method="inverted_cdf")
        assert store.length_quantiles(unit) == expected.tolist()
    assert Store.from_documents([]).length_quantiles("documents") == [0, 0, 0, 0]
    assert store.count_of_length_one("documents") == sum(len(document) == 1 for document in documents)
    assert store.count_of_length_one("sentences") == lengths["sentences"].count(1)


# ---- On disk ---------------------------------------------------------------------------------------------------------


def write(directory, documents, batch: int = 2) -> Store:
    """A store, written in batches of documents."""
    writer = Writer(directory, np.uint16, words=False)
    for start in range(0, len(documents), batch):
        part = [[sentence for sentence in document if sentence] for document in documents[start : start + batch]]
        arrays = {
            "ids": [index for document in part for sentence in document for index in sentence],
            "sentence_lengths": [len(sentence) for document in part for sentence in document],
            "document_lengths": [len(document) for document in part if document],
            "document_bytes": [start + i for i, document in enumerate(part) if document],
            "words": [1, start],
            "unknown_tokens": [0],
            "empty_documents": [part.count([])],
            "longest_word": [start, 0],
        }
        writer.append({name: np.array(values, np.int64) for name, values in arrays.items()})
    writer.finish({"side": "training"})
    return Store.open(directory)


@settings(deadline=None)
@given(documents=DOCUMENTS, batch=st.integers(1, 3))
def test_written_as_in_memory(tmp_path_factory, documents, batch):
    store, expected = (
        write(tmp_path_factory.mktemp("store") / "side", documents, batch),
        Store.from_documents(documents),
    )
    for name in ("ids", "sentence_offsets", "document_offsets"):
        np.testing.assert_array_equal(getattr(store, name), getattr(expected, name))
    filled = [number for number, document in enumerate(documents) if any(document)]
    assert store.document_bytes.tolist() == filled
    assert store.sentence_offsets.dtype == store.document_offsets.dtype == store.document_bytes.dtype == np.int64
    counts = {
        "documents": store.num_documents,
        "sentences": store.num_sentences,
        "tokens": store.num_tokens,
        "bytes": sum(filled),
        "empty_documents": len(documents) - len(filled),
        "longest_word": max(range(0, max(len(documents), 1), batch)),
        "words": sum(1 + start for start in range(0, len(documents), batch)),
    }
    assert counts == {name: store.manifest[name] for name in counts}
    assert store.num_words == counts["words"]
    assert store.tokens_per_word == store.num_tokens / max(store.num_words, 1)


@pytest.fixture
def directory(tmp_path):
    """The directory of a store."""
    write(tmp_path / "key/training", [[[1, 2], [3]], [[4]]])
    return tmp_path / "key/training"


def error_of(directory) -> str:
    with pytest.raises(DamagedStore) as error:
        Store.open(directory)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("damage", ["cut", "longer", "gone"])
def test_a_damaged_array_is_named(directory, name, damage):
    path = directory / name
    content = path.read_bytes()
    size = {"cut": len(content) - 1, "longer": len(content) + 1, "gone": 0}[damage]
    path.write_bytes((content + b"\0")[:size])
    if damage == "gone":
        path.unlink()
    assert error_of(directory) == f"{path} has {size} bytes, not {len(content)}"


@pytest.mark.parametrize("content", [None, "", "{", "{}", "[]", "null", '{"checksum": 1}', "[" * 100_000])
def test_a_damaged_manifest_is_named(directory, content):
    manifest = directory / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    assert error_of(directory).startswith(f"{manifest} is ")


def test_every_flipped_bit_of_a_manifest_is_noticed(directory):
    """Except of white space between its items, which JSON ignores."""
    manifest = directory / "manifest.json"
    content = manifest.read_bytes()
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        manifest.write_bytes(damaged)
        if bytes(damaged).split() != content.split():
            assert error_of(directory).startswith(f"{manifest} is damaged")


def test_a_store_that_may_not_be_read_is_not_damaged(directory, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("io.open", refuse)
    with pytest.raises(InputError, match=f"cannot read {directory}/manifest.json") as error:
        Store.open(directory)
    assert not isinstance(error.value, DamagedStore)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_wrong_checksum_is_named(directory, name):
    content = bytearray((directory / name).read_bytes())
    content[0] ^= 1
    (directory / name).write_bytes(content)
    assert error_of(directory).startswith(f"{directory / name} is damaged ")


def test_a_store_of_another_version(directory):
    path = directory / "manifest.json"
    manifest = Store.open(directory).manifest | {"format": STORE_FORMAT + 1}
    path.write_text(json.dumps(manifest | {"checksum": digest(manifest)}))
    assert error_of(directory).startswith(f"{path} ") and "version" in error_of(directory)


def test_checksums_match_the_files(directory):
    store = Store.open(directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    assert {**store.manifest, "checksum": manifest["checksum"]} == manifest and manifest["format"] == STORE_FORMAT
    for name in ARRAYS:
        content = (directory / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == store.manifest["checksums"][name]
