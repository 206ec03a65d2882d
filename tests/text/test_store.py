"""The token store: what goes in comes out, it is made once, and damage is noticed."""

import json
import multiprocessing
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.errors import InputError
from prelm_jax.text import store as store_module
from prelm_jax.text.corpus import Corpus
from prelm_jax.text.sentences import split
from prelm_jax.text.store import ARRAYS, Store, prepare
from prelm_jax.text.wordpiece import SPECIAL_TOKENS, WordPiece

TOKENIZER = WordPiece([*SPECIAL_TOKENS, *"abcdefghijklmnopqrstuvwxyz.!", *(f"##{letter}" for letter in "abcdefgh")])
TEXT = "A cab. A bed!\nI faced a cab\n\nZebra x\n\n\x00\x07\n\nBad. \x00. Dad.\n\nfeed bead\nEgg"


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return Corpus((str(path),), held_out=0.4)


def documents_of(store: Store) -> list[list[list[int]]]:
    sentences = [
        store.ids[a:b].tolist() for a, b in zip(store.sentence_offsets, store.sentence_offsets[1:], strict=False)
    ]
    return [sentences[a:b] for a, b in zip(store.document_offsets, store.document_offsets[1:], strict=False)]


def expected_documents(corpus: Corpus, side: str) -> list[tuple[list[list[int]], int]]:
    """The same by one sentence at a time."""
    found = []
    for document in corpus.documents(side):
        sentences = [TOKENIZER.encode_batch([sentence])[0] for sentence in split(document.text, document.sentences)]
        if sentences := [ids for ids in sentences if ids]:
            found.append((sentences, len(document.text.encode())))
    return found


# ---- Preparing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_characters", [1, 20, store_module.BATCH_CHARACTERS])
def test_prepared_stores_hold_the_corpus(corpus, tmp_path, monkeypatch, batch_characters):
    monkeypatch.setattr(store_module, "BATCH_CHARACTERS", batch_characters)
    stores = prepare(corpus, TOKENIZER, tmp_path / "cache")
    assert all(store.num_documents for store in stores)
    assert sum(store.manifest["empty_documents"] for store in stores) == 1
    for side, store in zip(("training", "held_out"), stores, strict=True):
        expected = expected_documents(corpus, side)
        assert documents_of(store) == [document for document, _ in expected]
        assert store.document_bytes.tolist() == [size for _, size in expected]
        in_memory = Store.from_documents([document for document, _ in expected])
        for name in ("ids", "sentence_offsets", "document_offsets"):
            np.testing.assert_array_equal(getattr(store, name), getattr(in_memory, name))
        assert store.sentence_offsets.dtype == store.document_offsets.dtype == store.document_bytes.dtype == np.int64
        flat = [index for document, _ in expected for sentence in document for index in sentence]
        counts = {
            "documents": store.num_documents,
            "sentences": store.num_sentences,
            "tokens": store.num_tokens,
            "bytes": int(store.document_bytes.sum()),
            "unknown_tokens": flat.count(TOKENIZER.unknown_id),
        }
        assert counts == {name: store.manifest[name] for name in counts}
        assert store.num_tokens == len(flat)
    assert sum(store.manifest["unknown_tokens"] for store in stores) > 0


def test_the_size_of_batches_leaves_no_trace(corpus, tmp_path, monkeypatch):
    whole = [store.fingerprint for store in prepare(corpus, TOKENIZER, tmp_path / "whole")]
    monkeypatch.setattr(store_module, "BATCH_CHARACTERS", 1)
    assert [store.fingerprint for store in prepare(corpus, TOKENIZER, tmp_path / "parts")] == whole


def test_a_second_time_nothing_is_read(corpus, monkeypatch):
    first = prepare(corpus, TOKENIZER)
    monkeypatch.setattr(Corpus, "documents", lambda *_: pytest.fail("the corpus was read again"))
    monkeypatch.setattr("prelm_jax.text.corpus._file_digest", lambda _: pytest.fail("the files were read again"))
    second = prepare(Corpus(corpus.sources, corpus.held_out), TOKENIZER)
    assert [store.fingerprint for store in first] == [store.fingerprint for store in second]


def test_fingerprints_tell_stores_apart(corpus, tmp_path):
    cased = WordPiece(TOKENIZER.tokens, lowercase=False)
    stores = [*prepare(corpus, TOKENIZER), *prepare(corpus, cased), *prepare(Corpus(corpus.sources, 1.0), TOKENIZER)]
    assert len({store.fingerprint for store in stores}) == len(stores)
    assert all(len(store.fingerprint) == 64 for store in stores)


@pytest.mark.parametrize(("held_out", "empty"), [(0.0, 1), (1.0, 0)])
def test_a_side_may_be_empty(corpus, held_out, empty):
    store = prepare(Corpus(corpus.sources, held_out), TOKENIZER)[empty]
    assert store.num_documents == store.num_sentences == store.num_tokens == 0
    assert store.sentence_offsets.tolist() == store.document_offsets.tolist() == [0]
    assert store.token_counts(5).tolist() == [0] * 5


def test_a_corpus_without_tokens_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\x00\n\n\x07\x07")
    with pytest.raises(InputError) as error:
        prepare(Corpus((str(path),)), TOKENIZER, tmp_path / "cache")
    assert str(error.value) == f"the corpus {path} has no tokens: nothing in it is text to the tokenizer"
    assert list((tmp_path / "cache/stores").iterdir()) == []  # nothing half-made is left


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_take_two_bytes_where_they_can(tmp_path, vocab_size, dtype):
    letters = [chr(0x10000 + number) for number in range(vocab_size - len(SPECIAL_TOKENS) - 1)]
    path = tmp_path / "a.txt"
    path.write_text("last a")
    store, _ = prepare(Corpus((str(path),)), WordPiece([*SPECIAL_TOKENS, *letters, "last"]), tmp_path)
    assert store.ids.dtype == dtype
    assert store.gather(np.array([0, 1])).tolist() == [vocab_size - 1, 1]


def prepare_elsewhere(corpus, directory, queue):
    queue.put([store.fingerprint for store in prepare(corpus, TOKENIZER, directory)])


def test_processes_that_prepare_at_once_agree(corpus, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=prepare_elsewhere, args=(corpus, tmp_path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert results[0] == results[1] == [store.fingerprint for store in prepare(corpus, TOKENIZER, tmp_path)]


def test_the_slower_of_two_takes_what_the_faster_made(corpus, tmp_path, monkeypatch):
    write = store_module._write

    def write_after_another(*arguments):
        monkeypatch.setattr(store_module, "_write", write)
        prepare(corpus, TOKENIZER, tmp_path / "cache")
        write(*arguments)

    monkeypatch.setattr(store_module, "_write", write_after_another)
    assert prepare(corpus, TOKENIZER, tmp_path / "cache")[0].num_documents
    assert len(list((tmp_path / "cache/stores").iterdir())) == 1


def test_a_stop_in_the_middle_leaves_nothing(corpus, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WordPiece, "encode_batch", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, TOKENIZER, tmp_path / "cache")
    assert list((tmp_path / "cache/stores").iterdir()) == []
    assert prepare(corpus, TOKENIZER, tmp_path / "cache")[0].num_documents


@settings(deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_no_document_is_lost(tmp_path_factory, texts):
    """Any text at all, and every document is in a store or counted as empty."""
    directory = tmp_path_factory.mktemp("any")
    lines = [json.dumps({"text": text}) for text in [*texts, "abc"]]
    (directory / "a.jsonl").write_text("\n".join(lines))
    corpus = Corpus((str(directory / "a.jsonl"),), held_out=0.5)
    stores = prepare(corpus, TOKENIZER, directory)
    found = [size for store in stores for size in store.document_bytes.tolist()]
    assert len(found) + sum(store.manifest["empty_documents"] for store in stores) == len(list(corpus.documents()))
    assert len(list(corpus.documents())) == sum(bool(text.strip()) for text in [*texts, "abc"])
    expected = [size for side in ("training", "held_out") for _, size in expected_documents(corpus, side)]
    assert found == expected


# ---- Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("damage", ["cut", "longer", "gone"])
def test_a_damaged_array_is_named(corpus, tmp_path, name, damage):
    prepare(corpus, TOKENIZER, tmp_path)
    (directory,) = (tmp_path / "stores").iterdir()
    path = directory / "training" / name
    content = path.read_bytes()
    size = {"cut": len(content) - 1, "longer": len(content) + 1, "gone": 0}[damage]
    path.write_bytes((content + b"\0")[:size])
    if damage == "gone":
        path.unlink()
    with pytest.raises(InputError) as error:
        prepare(corpus, TOKENIZER, tmp_path)
    assert str(error.value) == f"{path} has {size} bytes, not {len(content)}: delete {directory} and run again"


@pytest.mark.parametrize("content", [None, "", "{", "{}"])
def test_a_damaged_manifest_is_named(corpus, tmp_path, content):
    prepare(corpus, TOKENIZER, tmp_path)
    (directory,) = (tmp_path / "stores").iterdir()
    manifest = directory / "held_out/manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises(InputError) as error:
        Store.open(directory / "held_out")
    assert str(error.value).startswith(f"{directory / 'held_out'} is no complete token store (")
    assert str(error.value).endswith(f"): delete {directory} and run again")


def test_checksums_are_those_of_the_files(corpus, tmp_path):
    import hashlib

    training, _ = prepare(corpus, TOKENIZER, tmp_path)
    (directory,) = (tmp_path / "stores").iterdir()
    assert json.loads((directory / "training/manifest.json").read_text()) == training.manifest
    for name in ARRAYS:
        content = (directory / "training" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == training.manifest["checksums"][name]


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
def test_fingerprints_in_memory_are_of_the_content(one, other):
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


def test_counting_goes_in_pieces(monkeypatch):
    monkeypatch.setattr(store_module, "COUNTED_AT_ONCE", 2)
    store = Store.from_documents([[[1, 2, 1], [4, 1]]])
    assert store.token_counts(6).tolist() == [0, 3, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="broadcast"):
        store.token_counts(4)


def test_preparing_holds_a_batch_not_the_corpus(tmp_path, monkeypatch):
    """Of ten times the text, no more is ever handed to the tokenizer at once."""
    monkeypatch.setattr(store_module, "BATCH_CHARACTERS", 1000)
    path = tmp_path / "a.txt"
    largest = []

    class Watched(WordPiece):
        def encode_batch(self, texts):
            largest.append(sum(map(len, texts)))
            return super().encode_batch(texts)

    path.write_text("A cab. A bed.\n\n" * 2000)
    prepare(Corpus((str(path),)), Watched(TOKENIZER.tokens), tmp_path)
    assert len(largest) > 20
    assert max(largest) < 1100
