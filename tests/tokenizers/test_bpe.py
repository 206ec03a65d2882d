"""BPE: transformers' ids, OpenAI's layout and files, trained vocabularies, and every error."""

import json
import lzma
import os
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, OpenAIGPTTokenizer

from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError
from prelm_jax.tokenizers import bpe
from prelm_jax.tokenizers.bpe import BPE, FILES, BPEConfig, train
from prelm_jax.tokenizers.build import build
from prelm_jax.tokenizers.load import load
from prelm_jax.tokenizers.wordpiece import WordPiece
from prelm_jax.validation import check

CHARACTERS = [*"abeltu.,'<>/", "k", "n", "w", "漢", "é"]
MERGES = [
    *[("a", "b"), ("b", "l"), ("bl", "e</w>"), ("a", "ble</w>"), ("t", "e</w>"), ("u", "n")],
    *[("a", "b</w>"), ("un", "a"), ("ab", "ab</w>"), ("e", "e"), ("l", "e</w>"), ("ab", "le</w>")],
]
TOKENS = [
    "<unk>",
    *CHARACTERS,
    *(character + "</w>" for character in CHARACTERS),
    *dict.fromkeys(first + second for first, second in MERGES),
    "\n</w>",
]
TEXT = st.one_of(
    st.text(),
    st.text(
        st.sampled_from("aabbABéÉe\u0301leltun .,'<>/\t\n\r\x00\x0b\x85\u00a0\u2028\u200b\ufeff\ufffd漢字1ßİΣς\u0130")
    ),
    st.lists(st.sampled_from(["able", "ab", "un", "<unk>", "</w>", "e</w>", "\n", "abab", *" " * 5]), max_size=12).map(
        "".join
    ),
)
PROSE = """The quick brown fox jumps over the lazy dog; the dog sleeps.
Unaffable foxes, quicker dogs: the quickest of foxes! Ébène, naïve café. Dogs jumped and foxes were jumping,
jumpers all, over 12 logs and 122 frogs. Sleepers sleep asleep.
"""


def tokenizer():
    return BPE(TOKENS, MERGES)


def write_files(directory, names=FILES[0], tokens=TOKENS, merges=MERGES):
    vocabulary, merges_file = (directory / name for name in names)
    vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    merges_file.write_text("#version: 0.2\n" + "".join(f"{first} {second}\n" for first, second in merges))
    return vocabulary, merges_file


def reference(vocabulary, merges):
    return OpenAIGPTTokenizer(vocab=str(vocabulary), merges=str(merges), split_special_tokens=True)


def reference_ids(tokenizer, texts):
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def spell(word, tokens, merges):
    """The subwords of a word by the paper's algorithm: join the earliest merge everywhere in the word, and repeat."""
    subwords = [*word[:-1], word[-1] + "</w>"]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while pairs := [pair for pair in pairwise(subwords) if pair in ranks]:
        subwords = join(subwords, min(pairs, key=ranks.__getitem__))
    return [subword if subword in tokens else "<unk>" for subword in subwords]


def join(subwords, merge):
    joined = []
    for subword in subwords:
        if joined and (joined[-1], subword) == merge:
            joined[-1] += subword
        else:
            joined.append(subword)
    return joined


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(PROSE * 3)
    return Corpus((str(path),))


# ---- Ids -------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(texts=st.lists(TEXT, max_size=4))
def test_ids_match_transformers(tmp_path_factory, texts):
    files = write_files(tmp_path_factory.mktemp("vocab"))
    ours, theirs = BPE.from_files(*files), reference(*files)
    expected = reference_ids(theirs, texts)
    assert ours.encode_batch(texts) == expected
    assert ours.encode_batch(texts) == expected  # now from the cache
    assert [ours.decode(ids) for ids in expected] == [theirs.decode(ids) for ids in expected]


@settings(deadline=None)
@given(word=st.text(st.sampled_from("abelunt"), min_size=1, max_size=12))
def test_words_are_spelled_by_merges_in_their_order(word):
    ours = tokenizer()
    assert [ours.tokens[index] for index in ours.encode_batch([word])[0]] == spell(word, TOKENS, MERGES)


def openai(real_data):
    return [real_data / "vocab/openai-gpt" / name for name in FILES[1]]


def test_ids_of_the_published_vocabulary(real_data):
    files = openai(real_data)
    ours, theirs = load(files[0].parent), reference(*files)
    assert ours.vocab_size == 40478
    with lzma.open(real_data / "pretrain/simplewiki.txt.xz", "rt", encoding="utf-8", newline="\n") as file:
        lines = list(islice(file, 10_000))
    assert ours.encode_batch(lines) == reference_ids(theirs, lines)


def test_the_layout_of_the_published_vocabulary(real_data):
    """The layout of `train`: <unk>, the characters, the same with </w>, the merges; OpenAI's adds a newline."""
    ours = load(openai(real_data)[0])
    characters = ours.tokens[1:239]
    assert all(len(character) == 1 for character in characters)
    products = [first + second for first, second in ours.merges]
    assert ours.tokens == ["<unk>", *characters, *(c + "</w>" for c in characters), *products, "\n</w>"]


def test_ids_of_an_independent_fixture(real_data):
    """A line and its ids from AllenNLP's reader, which splits words of the next line differently ("hasn't")."""
    directory = real_data / "fixtures/allennlp-openai-transformer"
    first, _ = json.loads((directory / "indexed_text.json").read_text())
    line, _ = (directory / "text.txt").read_text().splitlines()
    assert load(openai(real_data)[0].parent).encode_batch([line]) == [first]


def test_the_name_of_the_unknown_token_is_text():
    ours = tokenizer()
    assert ours.special_ids == {"<unk>": 0} and ours.unknown_id == 0
    encoded = [[ours.tokens[index] for index in ids] for ids in ours.encode_batch(["<unk>", "z a漢z", "naïve"])]
    assert encoded == [
        ["<</w>", "un", "k</w>", "></w>"],
        ["<unk>", "a</w>", "漢</w>", "<unk>"],
        ["n", "a", "<unk>", "<unk>", "e</w>"],
    ]


def test_decode_joins_subwords():
    ids = [TOKENS.index(token) for token in ("<unk>", "un", "able</w>", ".</w>", "ab</w>")]
    assert tokenizer().decode(np.array(ids)) == "<unk>unable . ab"


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_saved_files_load_here_and_in_transformers(tmp_path):
    ours = tokenizer()
    ours.save(tmp_path / "one", model_max_length=128)
    texts = ["Unable Éa b.", "漢字 ab, don't </w> \n able!", ""]
    for reader in (AutoTokenizer, OpenAIGPTTokenizer):
        theirs = reader.from_pretrained(tmp_path / "one")
        assert isinstance(theirs, OpenAIGPTTokenizer)
        assert theirs.model_max_length == 128
        assert theirs.unk_token == "<unk>"
        assert theirs.convert_ids_to_tokens(range(len(TOKENS))) == TOKENS
        assert reference_ids(theirs, ["un<unk>a"]) == [[*ours.encode_batch(["un"])[0], 0, *ours.encode_batch(["a"])[0]]]
        assert reference_ids(theirs, texts) == ours.encode_batch(texts)
        assert theirs.decode(ours.encode_batch(["unable."])[0]) == "unable ."
    alone = Tokenizer.from_file(str(tmp_path / "one/tokenizer.json"))
    assert [alone.encode(text).ids for text in texts] == ours.encode_batch(texts)
    assert alone.encode("un<unk>a").tokens == ["u", "n</w>", "<unk>", "a</w>"]

    again = load(tmp_path / "one")
    assert again.fingerprint == ours.fingerprint
    again.save(tmp_path / "two", model_max_length=128)
    names = ["merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("kept", [{"tokenizer.json"}, {"vocab.json", "merges.txt"}])
def test_some_of_the_saved_files_are_enough(tmp_path, kept):
    ours = tokenizer()
    ours.save(tmp_path)
    for path in tmp_path.iterdir():
        if path.name not in kept:
            path.unlink()
    assert load(tmp_path).fingerprint == ours.fingerprint
    assert reference_ids(OpenAIGPTTokenizer.from_pretrained(tmp_path), ["unable, ab"]) == ours.encode_batch(
        ["unable, ab"]
    )


def test_no_length_is_written_unless_given(tmp_path):
    tokenizer().save(tmp_path)
    assert "model_max_length" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_files_saved_by_transformers_load(tmp_path):
    reference(*write_files(tmp_path)).save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").fingerprint == tokenizer().fingerprint
    # Older versions wrote a merge as one string, and no type of the model.
    path = tmp_path / "saved/tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]
    del data["model"]["type"]
    path.write_text(json.dumps(data))
    assert load(tmp_path / "saved").fingerprint == tokenizer().fingerprint


@pytest.mark.parametrize("names", FILES)
def test_files_under_hugging_faces_and_openais_names(tmp_path, monkeypatch, names):
    files = write_files(tmp_path, names)
    expected = tokenizer().fingerprint
    assert all(load(path).fingerprint == expected for path in (tmp_path, *files))
    monkeypatch.chdir(tmp_path)
    assert load(names[0]).fingerprint == load(".").fingerprint == expected
    files[1].write_bytes(files[1].read_bytes().partition(b"\n")[2].replace(b"\n", b"\r\n"))  # no header, \\r\\n
    assert load(tmp_path).fingerprint == expected


def test_fingerprints_tell_tokenizers_apart():
    different = [tokenizer(), BPE(TOKENS, MERGES[:-1]), BPE(TOKENS, MERGES[::-1]), BPE([*TOKENS, "z"], MERGES)]
    assert len({other.fingerprint for other in different}) == 4


def test_wordpiece_files_take_precedence(tmp_path):
    wordpiece = WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])
    wordpiece.save(tmp_path)
    write_files(tmp_path)
    assert load(tmp_path).fingerprint == wordpiece.fingerprint
    (tmp_path / "tokenizer.json").unlink()
    assert load(tmp_path).fingerprint == wordpiece.fingerprint


def error_of(call, *arguments) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", ""),
        ("[]", ""),
        ('{"<unk>": 0, "a</w>": 2}', ": the ids of the vocabulary are not 0 to 1"),
        ('{"<unk>": 0, "a</w>": "1"}', ": the ids of the vocabulary are not 0 to 1"),
        ('{"<unk>": 0, "a</w>": 0}', ": the ids of the vocabulary are not 0 to 1"),
        ('{"a": 0, "a</w>": 1}', ": the vocabulary lacks <unk>"),
        ("{}", ": the vocabulary lacks <unk>"),
        ('{"<unk>": 0, "Ġthe": 1}', ": no entry of the vocabulary ends with </w>"),
        ('{"<unk>": 0, "b</w>": 1}', ": the merge 'a b' needs 'a'"),
        ('{"<unk>": 0, "b</w>": 1, "a": 2, "b": 3}', ": the merge 'a b' needs 'ab'"),
    ],
)
def test_a_wrong_vocabulary_is_refused(tmp_path, content, message):
    vocabulary, _ = write_files(tmp_path, merges=[("a", "b")])
    vocabulary.write_text(content)
    assert error_of(load, tmp_path).startswith(f"{vocabulary}{message}")


@pytest.mark.parametrize("line", ["a", "", "a b c", " b", "a "])
def test_a_wrong_merge_is_refused(tmp_path, line):
    _, merges = write_files(tmp_path)
    merges.write_text(f"#version: 0.2\na b\n{line}\n")
    assert error_of(load, tmp_path).startswith(f"{merges}:3 is {line!r}")


def test_a_repeated_entry_is_refused():
    assert "'a'" in error_of(BPE, [*TOKENS, "a"], MERGES)


@pytest.mark.parametrize("names", FILES)
def test_missing_merges_are_refused(tmp_path, names):
    vocabulary, merges = write_files(tmp_path, names)
    merges.unlink()
    for path in (tmp_path, vocabulary):
        assert str(merges) in error_of(load, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["model"].update(end_of_word_suffix=None), "model has end_of_word_suffix None"),
        (lambda data: data["model"].update(unk_token="[UNK]"), "model has unk_token '[UNK]'"),
        (lambda data: data["normalizer"].update(lowercase=False), "normalizer has lowercase False"),
        (lambda data: data.update(normalizer=None), "normalizer has type None"),
        (lambda data: data["pre_tokenizer"].update(type="ByteLevel"), "pre_tokenizer has type 'ByteLevel'"),
        (lambda data: data["model"]["vocab"].update(z=99), f": the ids of the vocabulary are not 0 to {len(TOKENS)}"),
        (lambda data: data["model"]["merges"].append(["k", "w"]), ": the merge 'k w' needs 'kw'"),
        (lambda data: data["model"]["merges"].append(["k"]), ": the merge ['k'] is not"),
        (lambda data: data["added_tokens"].append({"content": "<new>", "id": 99}), "<new>"),
    ],
)
def test_another_kind_of_tokenizer_json_is_refused(tmp_path, change, message):
    tokenizer().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    found = error_of(load, tmp_path)
    assert found.startswith(str(path))
    assert message in found


# ---- Training --------------------------------------------------------------------------------------------------------


def test_a_trained_vocabulary(prose):
    tokens, merges = train(prose, 40)
    text = PROSE.translate({ord(a): b for a, b in zip("Éèïé", "Eeie", strict=True)}).lower()
    counts = Counter("".join(text.split()))
    characters = sorted(counts, key=lambda character: (-counts[character], character))
    assert tokens == [
        "<unk>",
        *characters,
        *(f"{character}</w>" for character in characters),
        *(first + second for first, second in merges),
    ]
    assert len(merges) == len(set(merges)) == 40
    assert "the</w>" in tokens
    ours = BPE(tokens, merges)
    ids = ours.encode_batch([PROSE])[0]
    assert ours.unknown_id not in ids
    assert len(ids) < 0.6 * len("".join(PROSE.split()))


def test_merges_are_the_most_frequent_pairs(prose):
    """Counts pairs again after each merge. Ties between equally frequent pairs may be broken either way."""
    _, merges = train(prose, 12)
    words = Counter()
    ours = bpe._pipeline(["<unk>", "a</w>"], [])
    for document in prose.documents():
        normal = ours.normalizer.normalize_str(document.text)
        words.update((*word[:-1], word[-1] + "</w>") for word, _ in ours.pre_tokenizer.pre_tokenize_str(normal))
    for merge in merges:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        assert pairs[merge] == max(pairs.values())
        joined = Counter()
        for word, count in words.items():
            joined[tuple(join(word, merge))] += count
        words = joined


def test_a_small_corpus_gives_few_merges(prose):
    tokens, merges = train(prose, 40000)
    assert 50 < len(merges) < 300
    assert {"the</w>", "unaffable</w>", "jumpers</w>", "ebene</w>"} <= set(tokens)  # nothing left to merge


def test_a_pair_that_occurs_once_is_not_merged(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ab ab cd")
    assert train(Corpus((str(path),)), 100)[1] == [("a", "b</w>")]


def test_a_trained_vocabulary_loads_in_transformers(prose, tmp_path):
    ours = build(BPEConfig(60), prose)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert reference_ids(theirs, PROSE.split("\n")) == ours.encode_batch(PROSE.split("\n"))
    assert load(tmp_path).fingerprint == ours.fingerprint


def test_training_is_the_same_in_every_process(prose):
    program = "import sys; from prelm_jax.tokenizers.bpe import *; print(train(Corpus((sys.argv[1],)), 90))"
    command = [sys.executable, "-W", "error", "-c", program, prose.sources[0]]
    outputs = {
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{train(prose, 90)}\n"}


def test_rare_characters_are_left_out(tmp_path):
    path = tmp_path / "a.txt"
    rare = "".join(chr(code_point) for code_point in range(0x4E00, 0x4E00 + 50))
    path.write_text(("the quick brown fox " * 100 + "\n\n") * 400 + rare)
    tokens, _ = train(Corpus((str(path),)), 100)
    assert not set(rare) & set("".join(tokens))
    assert {"the</w>", "quick</w>", "brown</w>", "fox</w>"} <= set(tokens)


def test_only_the_training_side_is_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"{chr(0x4E00 + number)}{number}" for number in range(200)))
    corpus = Corpus((str(path),), held_out=0.5)
    tokens = set(train(corpus, 1000)[0])
    held_out = [document.text[0] for document in corpus.documents("held_out")]
    assert len(held_out) > 50
    assert not tokens & set(held_out)
    assert all(document.text[0] in tokens for document in corpus.documents("training"))


def test_build_caches_the_vocabulary(prose, monkeypatch):
    first = build(BPEConfig(50), prose)
    assert (first.tokens, first.merges) == train(prose, 50)
    monkeypatch.setattr(Corpus, "documents", lambda *_: pytest.fail("read again"))
    assert build(BPEConfig(50), Corpus(prose.sources)).fingerprint == first.fingerprint


def test_build_distinguishes_configurations_and_corpora(prose):
    corpora = [prose, Corpus((f"{prose.sources[0]},documents=line",), held_out=0.5)]
    assert len({build(BPEConfig(n), corpus).fingerprint for n in (0, 20, 21) for corpus in corpora}) == 6


def test_build_loads_a_vocabulary_without_reading_the_corpus(prose, tmp_path, monkeypatch):
    monkeypatch.setattr(Corpus, "documents", lambda *_: pytest.fail("read"))
    write_files(tmp_path)
    assert build(BPEConfig(path=str(tmp_path)), prose).fingerprint == tokenizer().fingerprint


def test_the_expected_size_is_that_of_gpt1():
    assert BPEConfig(40_000).expected_vocab_size == 40_478


def test_a_negative_number_of_merges():
    assert "num_merges is -1" in error_of(check, BPEConfig(-1))
