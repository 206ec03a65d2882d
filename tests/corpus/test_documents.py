"""A corpus: passes, duplicates, shards, the held-out side, fingerprints."""

import json
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.corpus import documents as documents_module
from prelm_jax.corpus import sources
from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError

# ---- Weights and duplicates ------------------------------------------------------------------------------------------


def test_a_weight_is_a_number_of_passes(write, texts):
    one, other = write("1", "a\n\nb"), write("2", "c\n\nd")
    assert texts(f"{one},weight=3", f"{other},weight=1.0") == ["a", "b"] * 3 + ["c", "d"]


def test_weights_apply_to_the_training_side(write, texts):
    lines = [f"document {number}" for number in range(1000)]
    path = write("a.txt", "\n".join(lines))

    def side(name, weight):
        return texts(f"{path},documents=line,weight={weight}", side=name, held_out=0.3)

    training, held_out = side("training", 1), side("held_out", 1)
    for weight in (0.25, 1.25, 2.25):
        passes, found = int(weight), side("training", weight)
        assert side("held_out", weight) == held_out
        assert found[: passes * len(training)] == training * passes
        part = found[passes * len(training) :]
        assert 0.2 < len(part) / len(training) < 0.3
        assert part == [text for text in training if text in set(part)], "the order is kept"
        assert part == side("training", 0.25), "the lowest hashes are kept"
    assert set(side("training", 0.25)) < set(side("training", 0.5)) < set(training)


TEXTS = st.lists(st.sampled_from(["a", "b", "c", "d", "e\n\nf"]), max_size=6)


@settings(deadline=None, max_examples=30)
@given(one=TEXTS, other=TEXTS, weight=st.sampled_from([1, 2]), part_bytes=st.sampled_from([1, 30, 1 << 20]))
def test_the_first_of_duplicates_is_kept(tmp_path_factory, one, other, weight, part_bytes):
    directory = tmp_path_factory.mktemp("duplicates")
    for name, documents in {"1": one, "2": [*other, "a"], "3": ["b"]}.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    specs = (f"{directory}/[12].jsonl,weight={weight}", f"{directory}/[23].jsonl")
    first = list(dict.fromkeys([*one, *other, "a"]))
    rest = [] if "b" in first else ["b"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PART_BYTES", part_bytes)
        corpus = Corpus(specs, deduplicate=True)
        assert [document.text for document in corpus.documents()] == first * weight + rest
    assert corpus.duplicates == len([*one, *other, "a", *other, "a", "b"]) - len(first + rest)
    assert corpus.fingerprint != Corpus(specs).fingerprint


def test_duplicates_are_found_once(write, monkeypatch):
    path = write("a.txt", "one\n\ntwo\n\none")
    assert [document.text for document in Corpus((path,), deduplicate=True).documents()] == ["one", "two"]
    monkeypatch.setattr(documents_module.np, "argsort", lambda *_, **__: pytest.fail("searched again"))
    assert [document.text for document in Corpus((path,), deduplicate=True).documents()] == ["one", "two"]


# ---- Shards ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20), part=st.integers(1, 60), shard=st.integers(1, 60))
def test_shards_hold_all_documents(tmp_path_factory, sizes, part, shard):
    """In order; a part holds several files only up to PART_BYTES."""
    directory = tmp_path_factory.mktemp("parts")
    for number, size in enumerate(sizes):
        (directory / f"{number:02}").write_text("\n\n".join(["a" * size, "b"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PART_BYTES", part)
        patch.setattr(documents_module, "SHARD_CHARACTERS", shard)
        corpus = Corpus((f"{directory}/*",))
        shards = [shard for number, part in enumerate(corpus.parts) for shard in corpus.shards(number, part)]
    assert all(
        sum(file.size for file in part.files) <= part_bytes or len(part.files) == 1
        for part_bytes, part in ((part, found) for found in corpus.parts)
    )
    assert [shard.name for shard in shards] == sorted({shard.name for shard in shards})
    assert [text for shard in shards for text in shard.texts] == [document.text for document in corpus.documents()]
    assert all(sum(map(len, found.texts[:-1])) < shard for found in shards)
    assert sum(found.bytes for found in shards) <= corpus.bytes


# ---- Held out --------------------------------------------------------------------------------------------------------


def test_the_side_depends_on_the_text_alone(write, texts):
    lines = [f"document {number}" for number in range(500)]
    shuffled = random.Random(1).sample(lines, len(lines))
    one = write("one.txt", "\n".join(lines))
    other = write("other.txt", "\n".join(shuffled[:200]))
    another = write("another.jsonl", "\n".join(json.dumps({"text": text}) for text in shuffled[200:]))
    held_out = texts(f"{one},documents=line", side="held_out", held_out=0.3)
    assert sorted(held_out) == sorted(texts(f"{other},documents=line", another, side="held_out", held_out=0.3))
    assert 100 < len(held_out) < 200
    training = texts(f"{one},documents=line", side="training", held_out=0.3)
    assert sorted(training + held_out) == sorted(lines)
    # A larger fraction holds out the same documents and more.
    assert set(held_out) < set(texts(f"{one},documents=line", side="held_out", held_out=0.6))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5))
def test_all_or_nothing_is_held_out(tmp_path_factory, texts, documents):
    path = tmp_path_factory.mktemp("json") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*documents, "never empty"]))
    everything = texts(str(path))
    assert texts(str(path), side="held_out", held_out=1.0) == texts(str(path), side="training") == everything
    assert texts(str(path), side="held_out") == texts(str(path), side="training", held_out=1.0) == []


# ---- Fingerprints ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_covers_content_options_and_fraction(write):
    one, same, other = write("a.txt", "one"), write("b.txt", "one"), write("c.txt", "two")
    assert Corpus((one,)).fingerprint == Corpus((same,)).fingerprint == Corpus((one,)).fingerprint
    different = [
        (one,),
        (other,),
        (one, one),
        (one, other),
        (other, one),
        (f"{one},sentences=line",),
        (f"{one},documents=file",),
    ]
    fingerprints = [Corpus(specs).fingerprint for specs in different] + [Corpus((one,), 0.1).fingerprint]
    assert len(set(fingerprints)) == len(fingerprints)
    assert all(len(fingerprint) == 64 for fingerprint in fingerprints)


def test_content_is_hashed_once(write, monkeypatch):
    """Whatever the options and the rest of the corpus; again when the file has changed."""
    path, other = write("a.txt", "one"), write("b.txt", "two")
    hashed = []
    content_digest = documents_module._content_digest
    monkeypatch.setattr(
        documents_module, "_content_digest", lambda file: (hashed.append(file.path), content_digest(file))[1]
    )
    first = Corpus((path,)).fingerprint
    assert Corpus((path,)).fingerprint == first
    assert len({first, Corpus((path,), 0.5).fingerprint, Corpus((path, f"{other},sentences=line")).fingerprint}) == 3
    assert hashed == [path, other]
    write("a.txt", "two")
    os.utime(path, ns=(1, 1))
    assert Corpus((path,)).fingerprint != first
    assert hashed == [path, other, path]


def test_content_of_the_same_size_and_time_is_hashed_again(write):
    path = write("a.txt", "one")
    os.utime(path, ns=(1, 1))
    first = Corpus((path,)).fingerprint
    write("a.txt", "two")
    os.utime(path, ns=(1, 1))
    assert Corpus((path,)).fingerprint == Corpus((write("b.txt", "two"),)).fingerprint != first


def test_fingerprints_are_those_of_earlier_versions(write):
    """So that runs resume."""
    content = "Am 3. Mai kam Dr. Bach.\n\nEr schlief.\n"
    found = {
        Corpus((write(name, content) + options,), held_out=0.25).fingerprint[:16]
        for name, options in [("a.txt", ""), ("b.txt", ",language=en"), ("a", ",weight=1,sentences=library")]
    }
    assert found == {"254d47614028dfc2"}
    assert Corpus((f"{write('a.txt', content)},language=de",), held_out=0.25).fingerprint[:16] not in found


@pytest.mark.parametrize("held_out", [-0.1, 1.5, float("nan")])
def test_held_out_is_a_fraction(held_out):
    with pytest.raises(InputError, match=f"held_out is (?i:{held_out})"):
        Corpus(("python-docs",), held_out)


# ---- Progress --------------------------------------------------------------------------------------------------------


def test_progress_counts_bytes_of_files(write, capsys):
    path = write("a.txt", "one\n\n" * 100_000)
    assert len(list(Corpus((path,)).documents(description="read"))) == 100_000
    assert capsys.readouterr() == ("", "read: 0.5/0.5 MB\n")
