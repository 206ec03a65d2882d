"""BPE: transformers' ids, OpenAI's layout and files, trained vocabularies, and every complaint."""

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
from prelm_jax.tokenizers.load import load
from prelm_jax.tokenizers.wordpiece import WordPiece

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
    """The pieces of a word, by the paper's algorithm: join the earliest merge, all over the word, and again."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while pairs := [pair for pair in pairwise(pieces) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        joined = []
        for piece in pieces:
            if joined and (joined[-1], piece) == best:
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined
    return [piece if piece in tokens else "<unk>" for piece in pieces]


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(PROSE * 3)
    return Corpus((str(path),))


# ---- Ids -------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(texts=st.lists(TEXT, max_size=4))
def test_ids_are_those_of_transformers(tmp_path_factory, texts):
    files = write_files(tmp_path_factory.mktemp("vocab"))
    ours, theirs = BPE.from_files(*files), reference(*files)
    expected = reference_ids(theirs, texts)
    assert ours.encode_batch(texts) == expected
    assert ours.encode_batch(texts) == expected  # now from memory
    assert [ours.decode(ids) for ids in expected] == [theirs.decode(ids) for ids in expected]


@settings(deadline=None)
@given(word=st.text(st.sampled_from("abelunt"), min_size=1, max_size=12))
def test_words_are_spelled_by_the_merges_in_their_order(word):
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
    """What `train` lays out: <unk>, the characters, the same with </w>, the merges (and there a newline)."""
    ours = load(openai(real_data)[0])
    characters = ours.tokens[1:239]
    assert all(len(character) == 1 for character in characters)
    products = [first + second for first, second in ours.merges]
    assert ours.tokens == ["<unk>", *characters, *(c + "</w>" for c in characters), *products, "\n</w>"]


def test_ids_of_an_independent_fixture(real_data):
    """A line and its ids from AllenNLP's reader; in the next one words are split otherwise ("hasn't")."""
    directory = real_data / "fixtures/allennlp-openai-transformer"
    first, _ = json.loads((directory / "indexed_text.json").read_text())
    line, _ = (directory / "text.txt").read_text().splitlines()
    assert load(openai(real_data)[0].parent).encode_batch([line]) == [first]


def test_the_name_of_the_unknown_is_text():
    ours = tokenizer()
    assert ours.special_ids == {"<unk>": 0} and ours.unknown_id == 0
    encoded = [[ours.tokens[index] for index in ids] for ids in ours.encode_batch(["<unk>", "z a漢z", "naïve"])]
    assert encoded == [
        ["<</w>", "un", "k</w>", "></w>"],
        ["<unk>", "a</w>", "漢</w>", "<unk>"],
        ["n", "a", "<unk>", "<unk>", "e</w>"],
    ]


def test_decode_joins_pieces():
    ids = [TOKENS.index(token) for token in ("<unk>", "un", "able</w>", ".</w>", "ab</w>")]
    assert tokenizer().decode(np.array(ids)) == "<unk>unable . ab"


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_saved_files_are_read_by_transformers_and_by_us(tmp_path):
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
def test_a_part_of_the_saved_files_is_enough(tmp_path, kept):
    ours = tokenizer()
    ours.save(tmp_path)
    for path in tmp_path.iterdir():
        if path.name not in kept:
            path.unlink()
    assert load(tmp_path).fingerprint == ours.fingerprint
    assert reference_ids(OpenAIGPTTokenizer.from_pretrained(tmp_path), ["unable, ab"]) == ours.encode_batch(
        ["unable, ab"]
    )


def test_without_a_length_none_is_written(tmp_path):
    tokenizer().save(tmp_path)
    assert "model_max_length" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_what_transformers_saves_is_read(tmp_path):
    reference(*write_files(tmp_path)).save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").fingerprint == tokenizer().fingerprint
    # Older ones wrote a merge as one string, and no type of the model.
    path = tmp_path / "saved/tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]
    del data["model"]["type"]
    path.write_text(json.dumps(data))
    assert load(tmp_path / "saved").fingerprint == tokenizer().fingerprint


@pytest.mark.parametrize("names", FILES)
def test_a_vocabulary_and_its_merges_under_either_name(tmp_path, monkeypatch, names):
    files = write_files(tmp_path, names)
    expected = tokenizer().fingerprint
    assert all(load(path).fingerprint == expected for path in (tmp_path, *files))
    monkeypatch.chdir(tmp_path)
    assert load(names[0]).fingerprint == load(".").fingerprint == expected
    files[1].write_bytes(files[1].read_bytes().partition(b"\n")[2].replace(b"\n", b"\r\n"))  # no header, line ends
    assert load(tmp_path).fingerprint == expected


def test_fingerprints_tell_tokenizers_apart():
    different = [tokenizer(), BPE(TOKENS, MERGES[:-1]), BPE(TOKENS, MERGES[::-1]), BPE([*TOKENS, "z"], MERGES)]
    assert len({other.fingerprint for other in different}) == 4


def test_a_wordpiece_beside_is_still_read(tmp_path):
    wordpiece = WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])
    wordpiece.save(tmp_path)
    write_files(tmp_path)
    assert load(tmp_path).fingerprint == wordpiece.fingerprint
    (tmp_path / "tokenizer.json").unlink()
    assert load(tmp_path).fingerprint == wordpiece.fingerprint


def complaint(call, *arguments) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", " is not JSON: "),
        ("[]", " is not a JSON object"),
        ('{"<unk>": 0, "a</w>": 2}', ": the ids of the vocabulary are not 0 to 1"),
        ('{"<unk>": 0, "a</w>": "1"}', ": the ids of the vocabulary are not 0 to 1"),
        ('{"<unk>": 0, "a</w>": 0}', ": the ids of the vocabulary are not 0 to 1"),
        ('{"a": 0, "a</w>": 1}', ": the vocabulary has no <unk>: GPT-1's has"),
        ("{}", ": the vocabulary has no <unk>: GPT-1's has"),
        (
            '{"<unk>": 0, "Ġthe": 1}',
            ": no entry of the vocabulary ends with </w>: is it a byte-level one (GPT-2)?",
        ),
        ('{"<unk>": 0, "b</w>": 1}', ": the merge 'a b' needs 'a': it is not in the vocabulary"),
        ('{"<unk>": 0, "b</w>": 1, "a": 2, "b": 3}', ": the merge 'a b' needs 'ab': it is not in the vocabulary"),
    ],
)
def test_a_wrong_vocabulary_is_refused(tmp_path, content, message):
    vocabulary, _ = write_files(tmp_path, merges=[("a", "b")])
    vocabulary.write_text(content)
    assert complaint(load, tmp_path).startswith(f"{vocabulary}{message}")


@pytest.mark.parametrize("line", ["a", "", "a b c", " b", "a "])
def test_a_wrong_merge_is_refused(tmp_path, line):
    _, merges = write_files(tmp_path)
    merges.write_text(f"#version: 0.2\na b\n{line}\n")
    assert complaint(load, tmp_path) == f"{merges}:3 is {line!r}, not two pieces with a space between them"


def test_a_repeated_entry_is_refused():
    message = "the vocabulary holds 'a' more than once: remove all but one"
    assert complaint(BPE, [*TOKENS, "a"], MERGES) == message


@pytest.mark.parametrize("names", FILES)
def test_missing_merges_are_refused(tmp_path, names):
    vocabulary, merges = write_files(tmp_path, names)
    merges.unlink()
    for path in (tmp_path, vocabulary):
        assert complaint(load, path) == f"cannot read {merges}: No such file or directory"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data["model"].update(end_of_word_suffix=None),
            " is no tokenizer of GPT-1's kind: its model has end_of_word_suffix None, not '</w>'",
        ),
        (lambda data: data["model"].update(unk_token="[UNK]"), "its model has unk_token '[UNK]', not '<unk>'"),
        (lambda data: data["normalizer"].update(lowercase=False), "its normalizer has lowercase False, not True"),
        (lambda data: data.update(normalizer=None), "its normalizer has type None, not 'BertNormalizer'"),
        (
            lambda data: data["pre_tokenizer"].update(type="ByteLevel"),
            "its pre_tokenizer has type 'ByteLevel', not 'BertPreTokenizer'",
        ),
        (lambda data: data["model"]["vocab"].update(z=99), f": the ids of the vocabulary are not 0 to {len(TOKENS)}"),
        (lambda data: data["model"]["merges"].append(["k", "w"]), ": the merge 'k w' needs 'kw': it is not in the vo"),
        (lambda data: data["model"]["merges"].append(["k"]), ": the merge ['k'] is not two pieces"),
        (
            lambda data: data["added_tokens"].append({"content": "<new>", "id": 99}),
            ": the added tokens <new> are not in the vocabulary: put them there",
        ),
    ],
)
def test_another_kind_of_tokenizer_json_is_refused(tmp_path, change, message):
    tokenizer().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    found = complaint(load, tmp_path)
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
    """The first merges by counting, one word at a time; where pairs are as frequent, any of them will do."""
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
            pieces = []
            for piece in word:
                if pieces and (pieces[-1], piece) == merge:
                    pieces[-1] += piece
                else:
                    pieces.append(piece)
            joined[tuple(pieces)] += count
        words = joined


def test_a_small_corpus_gives_few_merges(prose):
    tokens, merges = train(prose, 40000)
    assert 50 < len(merges) < 300
    assert {"the</w>", "unaffable</w>", "jumpers</w>", "ebene</w>"} <= set(tokens)  # nothing is left to merge


def test_a_pair_that_is_seen_once_is_not_merged(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ab ab cd")
    assert train(Corpus((str(path),)), 100)[1] == [("a", "b</w>")]


def test_a_trained_vocabulary_goes_through_transformers(prose, tmp_path):
    ours = BPEConfig(60).build(prose)
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


def test_rare_characters_do_not_eat_the_vocabulary(tmp_path):
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


def test_build_keeps_the_vocabulary(prose, monkeypatch):
    first = BPEConfig(50).build(prose)
    assert (first.tokens, first.merges) == train(prose, 50)
    monkeypatch.setattr(Corpus, "documents", lambda *_: pytest.fail("read again"))
    assert BPEConfig(50).build(Corpus(prose.sources)).fingerprint == first.fingerprint


def test_build_tells_configurations_and_corpora_apart(prose):
    corpora = [prose, Corpus((f"{prose.sources[0]},documents=line",), held_out=0.5)]
    assert len({BPEConfig(n).build(corpus).fingerprint for n in (0, 20, 21) for corpus in corpora}) == 6


def test_build_takes_a_vocabulary_and_does_not_read_the_corpus(prose, tmp_path, monkeypatch):
    monkeypatch.setattr(Corpus, "documents", lambda *_: pytest.fail("read"))
    write_files(tmp_path)
    assert BPEConfig(path=str(tmp_path)).build(prose).fingerprint == tokenizer().fingerprint


def test_a_negative_number_of_merges():
    assert complaint(BPEConfig, -1) == "tokenizer.num_merges is -1: give 0 or more"
