"""From a corpus to its stores: nothing is lost, and neither shards, kills nor processes change a bit."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.corpus import documents as documents_module
from prelm_jax.corpus import prepare as preparation
from prelm_jax.corpus.documents import Corpus
from prelm_jax.corpus.prepare import SIDES, count_words, make_shards_locally, prepare, store_path
from prelm_jax.corpus.sentences import split
from prelm_jax.corpus.store import Store
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.wordpiece import SPECIAL_TOKENS, WordPiece
from prelm_jax.tokenizers.words import WordVocabulary

TOKENIZER = WordPiece([*SPECIAL_TOKENS, *"abcdefghijklmnopqrstuvwxyz.!", *(f"##{letter}" for letter in "abcdefgh")])
TEXT = "A cab. A bed!\nI faced a cab\n\nZebra x\n\n\x01\x07\n\nBad. \x01. Dad.\n\nfeed bead\nEgg"


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return Corpus((str(path),), held_out=0.4)


@pytest.fixture
def small_shards(monkeypatch):
    """One document a shard, all made in this process."""
    monkeypatch.setattr(documents_module, "SHARD_CHARACTERS", 5)
    monkeypatch.setattr(preparation, "_in_processes", in_this_process)


def in_this_process(make, shards, advance, directory):
    for shard in shards:
        make(shard)
        advance(shard.bytes)


def documents_of(store: Store) -> list[list[list[int]]]:
    sentences = [
        store.ids[a:b].tolist() for a, b in zip(store.sentence_offsets, store.sentence_offsets[1:], strict=False)
    ]
    return [sentences[a:b] for a, b in zip(store.document_offsets, store.document_offsets[1:], strict=False)]


def expected_documents(corpus: Corpus, side: str) -> list[tuple[list[list[int]], int]]:
    """The documents of a side and their bytes, tokenized one sentence at a time."""
    found = []
    for document in corpus.documents(side):
        sentences = [
            TOKENIZER.encode_batch([sentence])[0]
            for sentence in split(document.text, document.sentences, document.language)
        ]
        if sentences := [ids for ids in sentences if ids]:
            found.append((sentences, len(document.text.encode())))
    return found


def files(directory) -> dict[str, bytes]:
    """The content of every file in a directory, except locks."""
    found = (path for path in directory.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


# ---- Content ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_characters", [1, 20, preparation.BATCH_CHARACTERS])
def test_prepared_stores_hold_the_corpus(corpus, tmp_path, monkeypatch, batch_characters):
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", batch_characters)
    stores = prepare(corpus, TOKENIZER, tmp_path / "cache")
    assert all(store.num_documents for store in stores)
    assert sum(store.manifest["empty_documents"] for store in stores) == 1
    for side, store in zip(SIDES, stores, strict=True):
        expected = expected_documents(corpus, side)
        assert documents_of(store) == [document for document, _ in expected]
        assert store.document_bytes.tolist() == [size for _, size in expected]
        flat = [index for document, _ in expected for sentence in document for index in sentence]
        counts = {
            "documents": len(expected),
            "tokens": len(flat),
            "bytes": sum(size for _, size in expected),
            "words": sum(
                len(document.text.split()) for document in corpus.documents(side) if "\x01\x07" not in document.text
            ),
            "unknown_tokens": flat.count(TOKENIZER.unknown_id),
            "longest_word": max(len(word) for document in corpus.documents(side) for word in document.text.split()),
        }
        assert counts == {name: store.manifest[name] for name in counts}
    assert sum(store.manifest["unknown_tokens"] for store in stores) > 0


@settings(deadline=None, max_examples=30)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1), shard=st.integers(1, 30))
def test_no_document_is_lost(tmp_path_factory, texts, shard):
    """Any text, in shards of any size: every document is in a store or counted as empty."""
    directory = tmp_path_factory.mktemp("any")
    lines = [json.dumps({"text": text}) for text in [*texts, "abc"]]
    (directory / "a.jsonl").write_text("\n".join(lines))
    corpus = Corpus((str(directory / "a.jsonl"),), held_out=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "SHARD_CHARACTERS", shard)
        patch.setattr(preparation, "_in_processes", in_this_process)
        stores = prepare(corpus, TOKENIZER, directory)
        words, _ = prepare(
            Corpus((f"{directory}/a.jsonl,sentences=line",)), WordVocabulary(["<S>", "</S>", "<UNK>", "abc"]), directory
        )
    documents = list(corpus.documents())
    assert len(documents) == sum(bool(text.strip()) for text in [*texts, "abc"])
    assert sum(store.num_documents + store.manifest["empty_documents"] for store in stores) == len(documents)
    for side, store in zip(SIDES, stores, strict=True):
        expected = expected_documents(corpus, side)
        assert documents_of(store) == [document for document, _ in expected]
        assert store.document_bytes.tolist() == [size for _, size in expected]
    # An open vocabulary restores everything between white space.
    bounds = zip(words.spellings.offsets, words.spellings.offsets[1:], strict=False)
    spelled = [bytes(words.spellings.bytes[a:b]).decode() for a, b in bounds]
    found = [[spelled[index] for sentence in document for index in sentence] for document in documents_of(words)]
    assert found == [text.split() for text in (document.text for document in documents) if text.split()]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        (" It's\u00a0a \n\t sentence. ", 3),
        ("naïve café", 2),
        ("今天天气很好。", 7),  # The full stop stands alone.
        ("在2024年 now", 4),
        ("ひらがなと漢字", 3),  # Kana are no ideographs.
        ("\U00020000\U0002f800\uf900㐀", 4),
    ],
)
def test_words_are_runs_without_white_space_or_ideographs(text, words):
    assert count_words(text) == words


@pytest.mark.parametrize("tokenizer", [TOKENIZER, WordVocabulary(["<S>", "</S>", "<UNK>", "a", "cab"], tokenize=True)])
def test_the_size_of_shards_changes_nothing(corpus, tmp_path, monkeypatch, small_shards, tokenizer):
    prepare(corpus, tokenizer, tmp_path / "shards")
    monkeypatch.undo()
    prepare(corpus, tokenizer, tmp_path / "whole")
    assert files(tmp_path / "shards") == files(tmp_path / "whole")


def test_weights_and_duplicates_reach_the_store(tmp_path, small_shards):
    (tmp_path / "a.txt").write_text("a cab\n\na bed\n\na cab")
    (tmp_path / "b.txt").write_text("a bed\n\nbad")
    sources = (f"{tmp_path}/a.txt,weight=2", f"{tmp_path}/b.txt")
    store, _ = prepare(Corpus(sources, deduplicate=True), TOKENIZER, tmp_path)
    expected = ["a cab", "a bed", "a cab", "a bed", "bad"]
    assert documents_of(store) == [TOKENIZER.encode_batch([text]) for text in expected]


def test_existing_stores_are_not_made_again(corpus, monkeypatch):
    first = prepare(corpus, TOKENIZER)
    monkeypatch.setattr(Corpus, "shards", lambda *_: pytest.fail("the corpus was read again"))
    monkeypatch.setattr(
        "prelm_jax.corpus.documents._content_digest", lambda _: pytest.fail("the files were read again")
    )
    second = prepare(Corpus(corpus.sources, corpus.held_out), TOKENIZER)
    assert [store.fingerprint for store in first] == [store.fingerprint for store in second]


def test_the_language_reaches_the_sentences(tmp_path):
    (tmp_path / "a.txt").write_text("Am 3. Mai kam Dr. Bach. Er schlief.")
    counts = {}
    for language in ("en", "de"):
        store, _ = prepare(Corpus((f"{tmp_path}/a.txt,language={language}",)), TOKENIZER, tmp_path)
        counts[language] = store.num_sentences
    assert counts == {"en": 3, "de": 2}


def test_fingerprints_differ(corpus, tmp_path):
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


@pytest.mark.parametrize(
    ("content", "lack"),
    [
        ("\x01\n\n\x07\x07", "no tokens: nothing in it is text to the tokenizer"),
        (" \n\n\t", "no text: give files with text in them"),
        ("", "no text: give files with text in them"),
    ],
)
def test_a_corpus_without_tokens_is_refused(tmp_path, content, lack):
    path = tmp_path / "a.txt"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        prepare(Corpus((str(path),)), TOKENIZER, tmp_path / "cache")
    assert str(error.value) == f"the corpus {path} holds {lack}"
    assert files(tmp_path / "cache") == {}  # Nothing unfinished is left.


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_take_two_bytes_where_they_can(tmp_path, vocab_size, dtype):
    letters = [chr(0x10000 + number) for number in range(vocab_size - len(SPECIAL_TOKENS) - 1)]
    path = tmp_path / "a.txt"
    path.write_text("last a")
    store, _ = prepare(Corpus((str(path),)), WordPiece([*SPECIAL_TOKENS, *letters, "last"]), tmp_path)
    assert store.ids.dtype == dtype
    assert store.gather(np.array([0, 1])).tolist() == [vocab_size - 1, 1]


def test_the_tokenizer_gets_a_batch_at_a_time(tmp_path, monkeypatch):
    """Never much more than BATCH_CHARACTERS, however long the corpus."""
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 1000)
    path = tmp_path / "a.txt"
    largest = []

    class Watched(WordPiece):
        def encode_flat(self, texts):
            largest.append(sum(map(len, texts)))
            return super().encode_flat(texts)

    path.write_text("A cab. A bed.\n\n" * 2000)
    prepare(Corpus((str(path),)), Watched(TOKENIZER.tokens), tmp_path)
    assert len(largest) > 20
    assert max(largest) < 1100


# ---- Hostile text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        ("a" * 1_000_000, {"[UNK]"}),
        ("a\x02b \x01 c\x7f", {"a", "##b", "c"}),
        ("a [MASK] [PAD]", {"a", "[UNK]", "m", "##a", "p", "##d"}),
    ],
    ids=["a word of a million characters", "control characters", "names of special tokens"],
)
def test_hostile_text_is_text(tmp_path, content, tokens):
    (tmp_path / "a.txt").write_text(f"{content}\n\nx")
    store, _ = prepare(Corpus((f"{tmp_path}/a.txt",)), TOKENIZER, tmp_path)
    assert store.num_documents == 2
    assert {TOKENIZER.tokens[index] for index in store.ids[:-1]} <= tokens
    assert store.manifest["longest_word"] == max(map(len, content.split()))


def test_a_line_of_50_mb(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a cab " + b" " * 50_000_000 + b"a bed\n")
    store, _ = prepare(Corpus((f"{tmp_path}/a.txt",)), TOKENIZER, tmp_path)
    assert store.ids.tolist() == TOKENIZER.encode_batch(["a cab a bed"])[0]
    assert store.document_bytes.tolist() == [50_000_011]


# ---- Stops, kills and full disks -------------------------------------------------------------------------------------


def test_an_interrupted_preparation_resumes(corpus, tmp_path, monkeypatch, small_shards):
    """Interrupted before the third shard, and again while shards are merged: no shard is made twice."""
    prepare(corpus, TOKENIZER, tmp_path / "undisturbed")
    made = []
    make_shard = preparation.make_shard

    def stop_at_the_third(shard, *arguments, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(shard.name)
        make_shard(shard, *arguments, **options)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "make_shard", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, TOKENIZER, tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(
            preparation, "make_shard", lambda shard, **rest: (made.append(shard.name), make_shard(shard, **rest))
        )
        patch.setattr(preparation.Writer, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, TOKENIZER, tmp_path / "stopped")
    assert made == sorted(set(made)) and len(made) > 3
    monkeypatch.setattr(preparation, "make_shard", lambda *_, **__: pytest.fail("a shard was made again"))
    prepare(corpus, TOKENIZER, tmp_path / "stopped")
    assert files(tmp_path / "stopped") == files(tmp_path / "undisturbed")


def test_shards_left_by_a_kill_are_removed(corpus, tmp_path):
    """A kill between the rename of the stores and the removal of the shards."""
    prepare(corpus, TOKENIZER, tmp_path / "cache")
    before = files(tmp_path / "cache")
    target = store_path(corpus, TOKENIZER, tmp_path / "cache")
    partial = preparation.partial_path(target)
    partial.mkdir()
    (partial / "000000-000000.npz").write_bytes(b"left over")
    prepare(corpus, TOKENIZER, tmp_path / "cache")
    assert files(tmp_path / "cache") == before


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_shard_is_named_and_made_again(corpus, tmp_path, damage, small_shards):
    def make_and_damage(*arguments):
        make_shards_locally(*arguments)
        file = min(arguments[-1].glob("*.npz"))
        content = bytearray(file.read_bytes())
        content[content.index(b"ids.npy") + 120] ^= 1
        file.write_bytes(content if damage == "flip" else content[:-1])

    with pytest.raises(InputError, match=r"000000-000000\.npz is damaged: the same command"):
        prepare(corpus, TOKENIZER, tmp_path / "cache", make_and_damage)
    prepare(corpus, TOKENIZER, tmp_path / "cache")
    prepare(corpus, TOKENIZER, tmp_path / "undisturbed")
    assert files(tmp_path / "cache") == files(tmp_path / "undisturbed")


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_a_damaged_store_is_made_again(tmp_path_factory, data):
    """Whatever happens to one of its files: it is cut, longer, overwritten, deleted, or swapped with another."""
    directory = tmp_path_factory.mktemp("damaged")
    (directory / "a.txt").write_text(TEXT)
    corpus = Corpus((f"{directory}/a.txt",), held_out=0.4)
    prepare(corpus, TOKENIZER, directory)
    before = files(directory)
    target = store_path(corpus, TOKENIZER, directory)
    paths = sorted(path for path in target.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(paths))
    content = path.read_bytes()
    position = data.draw(st.integers(0, len(content)))
    damage = data.draw(st.sampled_from(["cut", "longer", "overwritten", "deleted", "a directory", "swapped", "sides"]))
    if damage == "sides":
        (target / "training").rename(target / "other")
        (target / "held_out").rename(target / "training")
        (target / "other").rename(target / "held_out")
    elif damage == "swapped":
        other = data.draw(st.sampled_from(paths))
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif damage in ("deleted", "a directory"):
        path.unlink()
        if damage == "a directory":
            path.mkdir()
    else:
        extra = data.draw(st.binary(min_size=1, max_size=9))
        kept = {"cut": position, "longer": len(content), "overwritten": position}[damage]
        rest = content[position + len(extra) :] if damage == "overwritten" else b""
        path.write_bytes(content[:kept] + (extra if damage != "cut" else b"") + rest)
    stores = prepare(corpus, TOKENIZER, directory)
    assert with_manifests(files(directory)) == with_manifests(before)
    assert [store.manifest["side"] for store in stores] == list(SIDES)


def with_manifests(contents: dict[str, bytes]) -> dict[str, object]:
    """These files with the manifests as values: a manifest without its last line end is no damage."""
    return {name: json.loads(x) if name.endswith("manifest.json") else x for name, x in contents.items()}


def test_a_store_is_damaged_while_it_is_read(corpus, tmp_path, capsys):
    """Who reads keeps what was mapped; the next one is told."""
    training, _ = prepare(corpus, TOKENIZER, tmp_path)
    ids = training.ids.tolist()
    path = store_path(corpus, TOKENIZER, tmp_path) / "held_out" / "ids"
    path.write_bytes(b"")
    capsys.readouterr()
    prepare(corpus, TOKENIZER, tmp_path)
    assert f"{path} has 0 bytes" in capsys.readouterr().err
    assert training.ids.tolist() == ids


@pytest.mark.parametrize("shard_characters", [1 << 20, 1 << 10], ids=["a shard", "the store"])
def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path, monkeypatch, shard_characters):
    """The disk is full for a shard, or for the arrays of the store."""
    monkeypatch.setattr(documents_module, "SHARD_CHARACTERS", shard_characters)
    monkeypatch.setattr(preparation, "_in_processes", in_this_process)
    (tmp_path / "a.txt").write_text("a cab\n\n" * 10_000)
    corpus = Corpus((f"{tmp_path}/a.txt",))
    corpus.fingerprint  # noqa: B018
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            prepare(corpus, TOKENIZER, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.path.basename(error.value.filename) == ("000000-000000.npz" if shard_characters == 1 << 20 else "ids")
    assert not store_path(corpus, TOKENIZER, tmp_path / "cache").exists()
    assert prepare(corpus, TOKENIZER, tmp_path / "cache")[0].num_documents == 10_000


PREPARE = """
import sys
from prelm_jax.corpus import documents, prepare
from prelm_jax.tokenizers.wordpiece import WordPiece
documents.SHARD_CHARACTERS = 10_000
tokenizer = WordPiece.from_vocab(sys.argv[2])
prepare.prepare(documents.Corpus((sys.argv[1],), 0.3), tokenizer, sys.argv[3])
"""


def test_killed_at_random_moments_equals_undisturbed(tmp_path):
    """SIGKILL for all its processes; the undisturbed store is made in one process."""
    rng = random.Random(0)
    words = ["a", "cab", "bed", "face", "feed", "zebra"]
    documents = (" ".join(rng.choices(words, k=rng.randint(1, 400))) for _ in range(1000))
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    TOKENIZER.save(tmp_path / "tokenizer")
    arguments = [f"{tmp_path}/a.txt", f"{tmp_path}/tokenizer/vocab.txt", f"{tmp_path}/killed"]
    command = [sys.executable, "-c", PREPARE, *arguments]
    for shards in sorted(rng.sample(range(1, 60), 3)):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        while len(list((tmp_path / "killed").rglob("*.npz"))) < shards:
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert list((tmp_path / "killed").rglob("*.npz")), "killed before the end"
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    prepare(Corpus((f"{tmp_path}/a.txt",), 0.3), TOKENIZER, tmp_path / "undisturbed")
    assert files(tmp_path / "killed") == files(tmp_path / "undisturbed")


# ---- Processes -------------------------------------------------------------------------------------------------------


def prepare_elsewhere(corpus, directory, queue):
    made = []

    def make_shards(*arguments):
        made.append(True)
        make_shards_locally(*arguments)

    queue.put(([store.fingerprint for store in prepare(corpus, TOKENIZER, directory, make_shards)], len(made)))


def test_one_of_two_processes_prepares(corpus, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=prepare_elsewhere, args=(corpus, tmp_path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    (one, made), (other, also_made) = (queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert one == other == [store.fingerprint for store in prepare(corpus, TOKENIZER, tmp_path)]
    assert made + also_made == 1


@pytest.mark.parametrize("end", ["error", "death"])
def test_the_end_of_a_worker_is_an_error(tmp_path, monkeypatch, end):
    """The worker's own InputError, or one that names memory as a likely reason."""
    monkeypatch.setattr(documents_module, "SHARD_CHARACTERS", 10)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    (tmp_path / "a.txt").write_text("a cab, a cab\n\n" * 3)

    class Deadly(WordPiece):
        def encode_flat(self, texts):
            if end == "death":
                os.kill(os.getpid(), signal.SIGKILL)
            raise InputError("these are no texts")

    with pytest.raises(InputError) as error:
        prepare(Corpus((f"{tmp_path}/a.txt",)), Deadly(TOKENIZER.tokens), tmp_path / "cache")
    expected = "these are no texts" if end == "error" else "a tokenizer worker died"
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.npz"))


# ---- Beam ------------------------------------------------------------------------------------------------------------


def test_beam_makes_the_same_shards(tmp_path, monkeypatch):
    """With its local runner; files, passes and JSON lines, duplicates dropped."""
    pytest.importorskip("apache_beam", reason="the extra `beam` is not installed")
    from prelm_jax.corpus.beam import make_shards_with

    monkeypatch.setattr(documents_module, "SHARD_CHARACTERS", 30)
    monkeypatch.setattr(preparation, "_in_processes", in_this_process)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "a cab"}) + "\n" + json.dumps({"body": "Egg. Bad."}))
    sources = (f"{tmp_path}/a.txt,weight=1.5", f"{tmp_path}/b.jsonl,field=body", f"{tmp_path}/a.txt")
    corpus = Corpus(sources, held_out=0.4, deduplicate=True)
    for tokenizer in (TOKENIZER, WordVocabulary(["<S>", "</S>", "<UNK>", "a", "cab"])):
        made = []
        for make_shards in (make_shards_locally, make_shards_with(["--runner=DirectRunner"])):
            directory = tmp_path / str(len(list(tmp_path.iterdir())))
            directory.mkdir()
            make_shards(corpus, tokenizer, directory)
            made.append(files(directory))
        assert made[0] == made[1] and len(made[0]) > 4
    with pytest.raises(InputError, match="--beam --runner=Nobody: Unexpected pipeline runner: Nobody"):
        make_shards_with(["--runner=Nobody"])(corpus, TOKENIZER, tmp_path)


def test_beam_is_not_installed(monkeypatch):
    from prelm_jax.corpus.beam import make_shards_with

    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(InputError, match=r'--beam needs Apache Beam: pip install "prelm_jax\[beam\]"'):
        make_shards_with([])
