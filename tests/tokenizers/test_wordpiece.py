"""WordPiece: transformers' ids, trained vocabularies, files, and every complaint."""

import json
import lzma
import os
import subprocess
import sys
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertTokenizer

from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.load import load
from prelm_jax.tokenizers.wordpiece import SPECIAL_TOKENS, WordPiece, WordPieceConfig, train

# A vocabulary with its special tokens scattered, as in the published ones, and letters of both cases and with accents.
TOKENS = [
    *(
        "[PAD]",
        "[unused0]",
        "[UNK]",
        "[CLS]",
        "a",
        "un",
        "##aff",
        "##able",
        "##a",
        "##b",
        "b",
        "ab",
        "##ab",
        "[SEP]",
        "[MASK]",
    ),
    *(
        ".",
        ",",
        "'",
        "[",
        "]",
        "mask",
        "##s",
        "don",
        "t",
        "é",
        "e",
        "##é",
        "##e",
        "A",
        "##B",
        "Ab",
        "漢",
        "字",
        "##字",
        "1",
        "##1",
    ),
    *("#", "!", "ß", "i", "##\u0307", "σ", "ς", "##ς"),
]
TEXT = st.one_of(
    st.text(),
    st.text(st.sampled_from("aabbABéÉe\u0301 .,'[]#!\t\n\r\x00\x0b\x85\u00a0\u2028\u200b\ufeff\ufffd漢字1ßİΣς\u0130")),
    st.lists(st.sampled_from([*TOKENS, *(" " * 9)]), max_size=12).map("".join),
)
PROSE = """The quick brown fox jumps over the lazy dog; the dog sleeps.
Unaffable foxes, quicker dogs: the quickest of foxes! Ébène, naïve café. Dogs jumped and foxes were jumping,
jumpers all, over 12 logs and 122 frogs. Sleepers sleep asleep.
"""


def write_vocab(directory, tokens=TOKENS):
    path = directory / "vocab.txt"
    path.write_bytes("".join(f"{token}\n" for token in tokens).encode())
    return path


def reference(path, **options):
    return BertTokenizer(vocab=str(path), split_special_tokens=True, **options)


def reference_ids(tokenizer, texts):
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(PROSE * 3)
    return Corpus((str(path),))


# ---- Ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(True, None), (False, None), (True, False), (False, True)])
@settings(deadline=None)
@given(texts=st.lists(TEXT, max_size=4))
def test_ids_are_those_of_transformers(tmp_path_factory, options, texts):
    lowercase, strip_accents = options
    path = write_vocab(tmp_path_factory.mktemp("vocab"))
    ours = WordPiece.from_vocab(path, lowercase, strip_accents)
    theirs = reference(path, do_lower_case=lowercase, strip_accents=strip_accents)
    expected = reference_ids(theirs, texts)
    assert ours.encode_batch(texts) == expected
    assert ours.encode_batch(texts) == expected  # now from memory
    assert [ours.decode(ids) for ids in expected] == [theirs.decode(ids) for ids in expected]


@pytest.mark.parametrize("case", ["uncased", "cased"])
def test_ids_of_published_vocabularies(real_data, case):
    path = real_data / f"vocab/bert-base-{case}-vocab.txt"
    ours = WordPiece.from_vocab(path, lowercase=case == "uncased")
    theirs = reference(path, do_lower_case=case == "uncased")
    assert ours.vocab_size == {"uncased": 30522, "cased": 28996}[case]
    with lzma.open(real_data / "pretrain/simplewiki.txt.xz", "rt", encoding="utf-8") as file:
        lines = list(islice(file, 0, 20_000, 10))
    with lzma.open(real_data / "pretrain/zhwiki.txt.xz", "rt", encoding="utf-8") as file:
        lines += islice(file, 200)
    assert ours.encode_batch(lines) == reference_ids(theirs, lines)


def test_greedy_longest_match_and_unknown_words():
    tokenizer = WordPiece(TOKENS)
    encoded = tokenizer.encode_batch(["unaffable, unaffably a" + "b" * 99, "a" + "b" * 100, "Éa\u0301B"])
    tokens = [[tokenizer.tokens[index] for index in ids] for ids in encoded]
    assert tokens == [["un", "##aff", "##able", ",", "[UNK]", "ab", *["##b"] * 98], ["[UNK]"], ["e", "##ab"]]
    assert tokenizer.unknown_id == tokenizer.special_ids["[UNK]"] == 2


def test_names_of_special_tokens_are_text():
    tokenizer = WordPiece(TOKENS)
    for text in ("[MASK]", "a [MASK]", "[MASK][SEP]"):
        assert not set(tokenizer.encode_batch([text])[0]) & {
            tokenizer.special_ids[name] for name in ("[MASK]", "[SEP]")
        }
    assert tokenizer.encode_batch(["[MASK]"])[0] == [TOKENS.index(token) for token in ("[", "mask", "]")]


def test_decode_joins_pieces():
    tokenizer = WordPiece(TOKENS)
    ids = [TOKENS.index(token) for token in ("[CLS]", "un", "##aff", "##able", ".", "[MASK]", "[SEP]")]
    assert tokenizer.decode(np.array(ids)) == "[CLS] unaffable. [MASK] [SEP]"


def test_continuation_marks_the_pieces_that_continue():
    continuation = WordPiece(TOKENS).continuation
    assert continuation.dtype == bool
    assert [token for token, continues in zip(TOKENS, continuation, strict=True) if continues] == [
        token for token in TOKENS if token[:2] == "##"
    ]


@settings(deadline=None)
@given(texts=st.lists(TEXT, max_size=6), at_once=st.integers(1, 12), remembered=st.integers(0, 12))
def test_ids_do_not_depend_on_the_parts_that_texts_are_encoded_in(texts, at_once, remembered):
    expected = WordPiece(TOKENS).encode_batch(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prelm_jax.tokenizers.cached_encoder.CHARACTERS_AT_ONCE", at_once)
        patch.setattr("prelm_jax.tokenizers.cached_encoder.REMEMBERED_CHARACTERS", remembered)
        ids, lengths = WordPiece(TOKENS).encode_flat(texts)
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)
    assert lengths.tolist() == [len(text) for text in expected]
    assert ids.tolist() == [index for text in expected for index in text]


@pytest.mark.parametrize("lowercase", [True, False])
def test_every_character_between_others(tmp_path, lowercase):
    """Letters, punctuation, ideographs to the ends of their blocks, spaces, controls, marks."""
    borders = [0x3400, 0x4DC0, 0x4E00, 0xA000, 0xF900, 0xFB00, 0x20000, 0x2A6E0, 0x2B820, 0x2B920, 0x2CEB0, 0x2F800]
    near = [code_point for border in borders for code_point in range(border - 3, border + 3)]
    texts = [f"A{chr(c)}b.{chr(c)}\u0301" for c in (*range(0x600), *range(0x2000, 0x2070), *near)]
    theirs = reference(write_vocab(tmp_path), do_lower_case=lowercase)
    assert WordPiece(TOKENS, lowercase).encode_batch(texts) == reference_ids(theirs, texts)


def test_words_are_forgotten_and_learnt_again(monkeypatch):
    """Whatever a text holds, what is remembered of it is bounded."""
    monkeypatch.setattr("prelm_jax.tokenizers.cached_encoder.REMEMBERED_CHARACTERS", 100)
    tokenizer, fresh = WordPiece(TOKENS), WordPiece(TOKENS)
    texts = ["a b ab", "unaffable a", "b" * 1000, "a", *(f"b{number}" for number in range(200)), "unaffable"]
    assert [tokenizer.encode_batch([text])[0] for text in texts] == fresh.encode_batch(texts)
    assert sum(map(len, tokenizer._numbers)) <= 100 + len("unaffable")
    assert len(tokenizer._ids) < 200


# ---- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(True, None), (False, None), (True, False)])
def test_saved_files_are_read_by_transformers_and_by_us(tmp_path, options):
    ours = WordPiece(TOKENS, *options)
    ours.save(tmp_path / "one", model_max_length=128)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "one")
    texts = ["Unaffable Éa b.", "漢字 [MASK] Ab, don't!", ""]
    assert theirs.model_max_length == 128
    assert theirs.convert_ids_to_tokens(range(len(TOKENS))) == TOKENS
    assert reference_ids(theirs, ["un [MASK] a"]) == [[5, 14, 4]]  # there, "[MASK]" is what users write for the mask
    alone = Tokenizer.from_file(str(tmp_path / "one/tokenizer.json"))
    assert alone.encode("un [MASK] a").tokens == ["[CLS]", "un", "[MASK]", "a", "[SEP]"]
    theirs.split_special_tokens = True
    assert reference_ids(theirs, texts) == ours.encode_batch(texts)
    first, second = ours.encode_batch(["a b", "un"])
    special = ours.special_ids
    pair = theirs("a b", "un")
    assert pair["input_ids"] == [special["[CLS]"], *first, special["[SEP]"], *second, special["[SEP]"]]
    assert pair["token_type_ids"] == [0] * 4 + [1] * 2
    assert theirs.decode(ours.encode_batch(["unaffable."])[0]) == "unaffable."

    again = load(tmp_path / "one", lowercase=not options[0])  # the directory says itself
    assert again.fingerprint == ours.fingerprint
    again.save(tmp_path / "two", model_max_length=128)
    names = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_without_a_length_none_is_written(tmp_path):
    WordPiece(TOKENS).save(tmp_path)
    assert "model_max_length" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length > 1e9


@pytest.mark.parametrize("lowercase", [True, False])
def test_what_transformers_saves_is_read(tmp_path, lowercase):
    path = write_vocab(tmp_path)
    theirs = reference(path, do_lower_case=lowercase)
    theirs.save_pretrained(tmp_path / "saved")
    expected = WordPiece.from_vocab(path, lowercase).fingerprint
    assert load(tmp_path / "saved").fingerprint == expected
    # Older directories: vocab.txt with settings, and vocab.txt alone.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
    assert load(tmp_path).fingerprint == expected
    (tmp_path / "tokenizer_config.json").unlink()
    assert load(tmp_path, lowercase).fingerprint == load(path, lowercase).fingerprint == expected
    # A tokenizer.json alone says it too.
    (tmp_path / "saved/tokenizer_config.json").unlink()
    assert load(tmp_path / "saved", not lowercase).fingerprint == expected


def test_line_endings_of_a_vocabulary_do_not_matter(tmp_path):
    expected = WordPiece(TOKENS).fingerprint
    for content in ("\n".join(TOKENS), "\r\n".join(TOKENS) + "\r\n"):
        (tmp_path / "vocab.txt").write_bytes(content.encode())
        assert load(tmp_path / "vocab.txt").fingerprint == expected


def test_a_token_may_be_odd_white_space(tmp_path):
    # BERT's Chinese vocabulary has U+2028 on a line of its own.
    tokenizer = load(write_vocab(tmp_path, [*TOKENS, "\u2028", "z"]))
    assert tokenizer.tokens[-2:] == ["\u2028", "z"]


def test_fingerprints_tell_tokenizers_apart():
    different = [WordPiece(TOKENS), WordPiece(TOKENS, False), WordPiece(TOKENS, True, False), WordPiece(TOKENS[::-1])]
    assert len({tokenizer.fingerprint for tokenizer in different}) == 4
    assert WordPiece(TOKENS, True, True).fingerprint == WordPiece(TOKENS).fingerprint


def complaint(call, *arguments) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[PAD]\n\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", ":2 is blank: a vocabulary has a token on every line"),
        (b"[PAD]\n \t\r\n[UNK]\n", ":2 is blank: a vocabulary has a token on every line"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n\n", ":6 is blank: a vocabulary has a token on every line"),
        (b"\n", ":1 is blank: a vocabulary has a token on every line"),
        (
            b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\na\n",
            ": the vocabulary holds 'a' more than once: remove all but one",
        ),
        (
            b"[PAD]\n[UNK]\n[CLS]\na\n",
            ": the vocabulary has no [SEP] and no [MASK]: it needs [PAD] [UNK] [CLS] [SEP] [MASK]",
        ),
        (b"[PAD]\nab\xff\n", " is not UTF-8 at byte 8: convert the file"),
    ],
)
def test_a_wrong_vocabulary_is_refused(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    assert complaint(load, path) == f"{path}{message}"


def test_a_wrong_path_is_refused(tmp_path, monkeypatch):
    message = f"there is no tokenizer at {tmp_path}/no: give a directory, a vocab.txt or a vocab.json"
    assert complaint(load, tmp_path / "no") == message
    names = "tokenizer.json, vocab.txt, or vocab.json and merges.txt"
    message = f"{tmp_path} holds no tokenizer: give a directory with {names}"
    assert complaint(load, tmp_path) == message
    assert complaint(WordPiece.from_vocab, tmp_path) == f"cannot read {tmp_path}: Is a directory"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data["model"].update(type="BPE"),
            "is no tokenizer of BERT's kind: its model is ('BPE', '##', 100), not",
        ),
        (
            lambda data: data["normalizer"].update(handle_chinese_chars=False),
            "its normalizer is ('BertNormalizer', True, False)",
        ),
        (lambda data: data.update(pre_tokenizer=None), "its pre_tokenizer is None, not BertPreTokenizer"),
        (lambda data: data["model"]["vocab"].update(z=99), f"the ids of the vocabulary are not 0 to {len(TOKENS)}"),
        (
            lambda data: data["added_tokens"].append({"content": "<new>", "id": 99}),
            "the added tokens <new> are not in the vocabulary: put them there",
        ),
        (lambda data: data["model"]["vocab"].pop(TOKENS[-1]) and data["model"]["vocab"].update({"#": 1}), "the ids of"),
    ],
)
def test_another_kind_of_tokenizer_json_is_refused(tmp_path, change, message):
    WordPiece(TOKENS).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    found = complaint(load, tmp_path)
    assert found.startswith(str(path))
    assert message in found


def test_settings_that_are_not_supported_or_not_json_are_refused(tmp_path):
    write_vocab(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"tokenize_chinese_chars": false}')
    assert complaint(load, tmp_path) == f"{path}: tokenize_chinese_chars=false is not supported"
    path.write_text("[]")
    assert complaint(load, tmp_path) == f"{path} is not a JSON object"
    path.write_text("{")
    assert complaint(load, tmp_path).startswith(f"{path} is not JSON: ")
    path.unlink()
    path.mkdir()
    assert complaint(load, tmp_path) == f"cannot read {path}: Is a directory"


# ---- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_trained_vocabulary(prose, lowercase):
    tokens = train(prose, 120, lowercase)
    assert len(tokens) == len(set(tokens)) == 120
    assert tokens[:5] == list(SPECIAL_TOKENS)
    # Then the characters, by count and code point, and the same with "##" where they are not words of their own.
    text = PROSE.translate({ord(a): b for a, b in zip("Éèïé", "Eeie", strict=True)}).lower() if lowercase else PROSE
    counts = Counter("".join(text.split()))
    characters = sorted(counts, key=lambda character: (-counts[character], character))
    continuing = [f"##{character}" for character in characters if character.isalnum()]
    assert tokens[5 : 5 + len(characters) + len(continuing)] == characters + continuing
    assert "##s" in tokens and "##." not in tokens and "dog" in tokens
    tokenizer = WordPiece(tokens, lowercase)
    ids = tokenizer.encode_batch([PROSE])[0]
    assert tokenizer.unknown_id not in ids
    assert len(ids) < len("".join(PROSE.split())) / 2


def test_a_small_corpus_gives_a_small_vocabulary(prose):
    tokens = train(prose, 30522)
    assert 100 < len(tokens) < 200
    assert {"the", "unaffable", "jumpers", "ebene"} <= set(tokens)  # nothing is left to merge


def test_training_is_the_same_in_every_process(prose, tmp_path):
    program = "import sys; from prelm_jax.tokenizers.wordpiece import *; print(train(Corpus((sys.argv[1],)), 150))"
    command = [sys.executable, "-W", "error", "-c", program, prose.sources[0]]
    outputs = {
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{train(prose, 150)}\n"}


def test_rare_characters_do_not_eat_the_vocabulary(tmp_path):
    path = tmp_path / "a.txt"
    rare = "".join(chr(code_point) for code_point in range(0x4E00, 0x4E00 + 50))
    path.write_text(("the quick brown fox " * 100 + "\n\n") * 400 + rare)
    tokens = train(Corpus((str(path),)), 100)
    # Of 640,050 characters 50 are rare: less than the 0.01 % that may go.
    assert not set(rare) & set("".join(tokens))
    assert {"the", "quick", "brown", "fox"} <= set(tokens)


def test_ideographs_have_no_continuing_piece(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("漢字かな交じり文 漢字、한국어 " * 20)
    tokens = train(Corpus((str(path),)), 100)
    assert "漢" in tokens and "##漢" not in tokens and "##か" in tokens


def test_only_the_training_side_is_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"{chr(0x4E00 + number)}{number}" for number in range(200)))
    corpus = Corpus((str(path),), held_out=0.5)
    tokens = set(train(corpus, 1000))
    held_out = [document.text[0] for document in corpus.documents("held_out")]
    assert len(held_out) > 50
    assert not tokens & set(held_out)
    assert all(document.text[0] in tokens for document in corpus.documents("training"))


@pytest.mark.parametrize("vocab_size", [3, 60])
def test_a_vocabulary_that_is_too_small(prose, vocab_size):
    message = complaint(WordPieceConfig(vocab_size).build, prose)
    characters = len(set("".join(PROSE.lower().split())) - set("éèï"))
    assert message.startswith(
        f"vocab_size={vocab_size} is too small for the {characters} characters of the corpus: give at"
    )


def test_build_keeps_the_vocabulary(prose, monkeypatch):
    first = WordPieceConfig(150).build(prose)
    assert first.tokens == train(prose, 150)
    monkeypatch.setattr(Corpus, "documents", lambda *_: pytest.fail("read again"))
    assert WordPieceConfig(150).build(Corpus(prose.sources)).fingerprint == first.fingerprint


def test_build_tells_configurations_and_corpora_apart(prose):
    configs = [WordPieceConfig(110), WordPieceConfig(111), WordPieceConfig(110, lowercase=False)]
    assert len({config.build(prose).fingerprint for config in configs}) == 3
    assert WordPieceConfig(110).build(
        Corpus((f"{prose.sources[0]},documents=line",), held_out=0.5)
    ).fingerprint not in {config.build(prose).fingerprint for config in configs}


def test_build_takes_a_vocabulary_and_does_not_read_the_corpus(prose, tmp_path, monkeypatch):
    monkeypatch.setattr(Corpus, "documents", lambda *_: pytest.fail("read"))
    config = WordPieceConfig(path=str(write_vocab(tmp_path)), lowercase=False)
    assert config.build(prose).fingerprint == WordPiece(TOKENS, lowercase=False).fingerprint
