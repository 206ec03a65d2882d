"""WordPiece: transformers' ids, trained vocabularies, files, and every error."""

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
from prelm_jax.tokenizers.build import build
from prelm_jax.tokenizers.load import load
from prelm_jax.tokenizers.wordpiece import SPECIAL_TOKENS, WordPiece, WordPieceConfig, train

# Special tokens are scattered, as in published vocabularies; letters have both cases, and accents.
TOKENS = [
    *["[PAD]", "[unused0]", "[UNK]", "[CLS]", "a", "un", "##aff", "##able", "##a", "##b"],
    *["b", "ab", "##ab", "[SEP]", "[MASK]", ".", ",", "'", "[", "]", "mask", "##s", "don"],
    *["t", "é", "e", "##é", "##e", "A", "##B", "Ab", "漢", "字", "##字", "1", "##1"],
    *["#", "!", "ß", "i", "##\u0307", "σ", "ς", "##ς"],
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
def test_ids_match_transformers(tmp_path_factory, options, texts):
    lowercase, strip_accents = options
    path = write_vocab(tmp_path_factory.mktemp("vocab"))
    ours = WordPiece.from_vocab(path, lowercase, strip_accents)
    theirs = reference(path, do_lower_case=lowercase, strip_accents=strip_accents)
    expected = reference_ids(theirs, texts)
    assert ours.encode_batch(texts) == expected
    assert ours.encode_batch(texts) == expected  # now from the cache
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


def test_names_of_special_tokens_in_a_text_are_text():
    tokenizer = WordPiece(TOKENS)
    for text in ("[MASK]", "a [MASK]", "[MASK][SEP]"):
        assert not {tokenizer.mask_id, tokenizer.sep_id} & set(tokenizer.encode_batch([text])[0])
    assert tokenizer.encode_batch(["[MASK]"])[0] == [TOKENS.index(token) for token in ("[", "mask", "]")]


def test_decode_joins_subwords():
    tokenizer = WordPiece(TOKENS)
    ids = [TOKENS.index(token) for token in ("[CLS]", "un", "##aff", "##able", ".", "[MASK]", "[SEP]")]
    assert tokenizer.decode(np.array(ids)) == "[CLS] unaffable. [MASK] [SEP]"


def test_continuation_is_true_for_subwords_that_continue_a_word():
    continuation = WordPiece(TOKENS).continuation
    assert continuation.dtype == bool
    assert [token for token, continues in zip(TOKENS, continuation, strict=True) if continues] == [
        token for token in TOKENS if token[:2] == "##"
    ]


@settings(deadline=None)
@given(texts=st.lists(TEXT, max_size=6), at_once=st.integers(1, 12), cached=st.integers(0, 12))
def test_ids_do_not_depend_on_the_sizes_of_blocks_and_cache(texts, at_once, cached):
    expected = WordPiece(TOKENS).encode_batch(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prelm_jax.tokenizers.cached_encoder.CHARACTERS_AT_ONCE", at_once)
        patch.setattr("prelm_jax.tokenizers.cached_encoder.CACHED_CHARACTERS", cached)
        ids, lengths = WordPiece(TOKENS).encode_flat(texts)
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)
    assert lengths.tolist() == [len(text) for text in expected]
    assert ids.tolist() == [index for text in expected for index in text]


@pytest.mark.parametrize("lowercase", [True, False])
def test_every_character_between_others(tmp_path, lowercase):
    """Letters, punctuation, ideographs at the borders of their blocks, spaces, controls, combining characters."""
    borders = [0x3400, 0x4DC0, 0x4E00, 0xA000, 0xF900, 0xFB00, 0x20000, 0x2A6E0, 0x2B820, 0x2B920, 0x2CEB0, 0x2F800]
    near = [code_point for border in borders for code_point in range(border - 3, border + 3)]
    texts = [f"A{chr(c)}b.{chr(c)}\u0301" for c in (*range(0x600), *range(0x2000, 0x2070), *near)]
    theirs = reference(write_vocab(tmp_path), do_lower_case=lowercase)
    assert WordPiece(TOKENS, lowercase).encode_batch(texts) == reference_ids(theirs, texts)


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr("prelm_jax.tokenizers.cached_encoder.CACHED_CHARACTERS", 100)
    tokenizer, fresh = WordPiece(TOKENS), WordPiece(TOKENS)
    texts = ["a b ab", "unaffable a", "b" * 1000, "a", *(f"b{number}" for number in range(200)), "unaffable"]
    assert [tokenizer.encode_batch([text])[0] for text in texts] == fresh.encode_batch(texts)
    assert sum(map(len, tokenizer._numbers)) <= 100 + len("unaffable")
    assert len(tokenizer._chunk_ids) < 200


# ---- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(True, None), (False, None), (True, False)])
def test_saved_files_load_here_and_in_transformers(tmp_path, options):
    ours = WordPiece(TOKENS, *options)
    ours.save(tmp_path / "one", model_max_length=128)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "one")
    texts = ["Unaffable Éa b.", "漢字 [MASK] Ab, don't!", ""]
    assert theirs.model_max_length == 128
    assert theirs.convert_ids_to_tokens(range(len(TOKENS))) == TOKENS
    assert reference_ids(theirs, ["un [MASK] a"]) == [[5, 14, 4]]  # in transformers "[MASK]" is the mask
    alone = Tokenizer.from_file(str(tmp_path / "one/tokenizer.json"))
    assert alone.encode("un [MASK] a").tokens == ["[CLS]", "un", "[MASK]", "a", "[SEP]"]
    theirs.split_special_tokens = True
    assert reference_ids(theirs, texts) == ours.encode_batch(texts)
    first, second = ours.encode_batch(["a b", "un"])
    pair = theirs("a b", "un")
    assert pair["input_ids"] == [ours.cls_id, *first, ours.sep_id, *second, ours.sep_id]
    assert pair["token_type_ids"] == [0] * 4 + [1] * 2
    assert theirs.decode(ours.encode_batch(["unaffable."])[0]) == "unaffable."

    again = load(tmp_path / "one", lowercase=not options[0])  # overridden by the directory
    assert again.fingerprint == ours.fingerprint
    again.save(tmp_path / "two", model_max_length=128)
    names = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_no_length_is_written_unless_given(tmp_path):
    WordPiece(TOKENS).save(tmp_path)
    assert "model_max_length" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length > 1e9


@pytest.mark.parametrize("lowercase", [True, False])
def test_files_saved_by_transformers_load(tmp_path, lowercase):
    path = write_vocab(tmp_path)
    theirs = reference(path, do_lower_case=lowercase)
    theirs.save_pretrained(tmp_path / "saved")
    expected = WordPiece.from_vocab(path, lowercase).fingerprint
    assert load(tmp_path / "saved").fingerprint == expected
    # Older directories: vocab.txt with settings, and a lone vocab.txt.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
    assert load(tmp_path).fingerprint == expected
    (tmp_path / "tokenizer_config.json").unlink()
    assert load(tmp_path, lowercase).fingerprint == load(path, lowercase).fingerprint == expected
    # A lone tokenizer.json has the settings, and older ones no type of model.
    (tmp_path / "saved/tokenizer_config.json").unlink()
    assert load(tmp_path / "saved", not lowercase).fingerprint == expected
    data = json.loads((tmp_path / "saved/tokenizer.json").read_text())
    del data["model"]["type"]
    (tmp_path / "saved/tokenizer.json").write_text(json.dumps(data))
    assert load(tmp_path / "saved").fingerprint == expected


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


def error_of(call, *arguments) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[PAD]\n\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", ":2 is blank"),
        (b"[PAD]\n \t\r\n[UNK]\n", ":2 is blank"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n\n", ":6 is blank"),
        (b"\n", ":1 is blank"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\na\n", ":6 holds 'a', as line 8 does"),
        (b"[PAD]\n[UNK]\n[CLS]\na\n", ": the vocabulary lacks [SEP] [MASK]"),
        (b"[PAD]\nab\xff\n", " is not UTF-8 at byte 8"),
    ],
)
def test_a_wrong_vocabulary_is_refused(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    assert error_of(load, path).startswith(f"{path}{message}")


def test_a_wrong_path_is_refused(tmp_path):
    assert f"{tmp_path}/no: " in error_of(load, tmp_path / "no")
    assert error_of(load, tmp_path).startswith(f"{tmp_path} holds no tokenizer")
    assert str(tmp_path) in error_of(WordPiece.from_vocab, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["model"].update(type="BPE"), "model has type 'BPE'"),
        (lambda data: data["model"].update(max_input_chars_per_word=99), "model has max_input_chars_per_word 99"),
        (lambda data: data["normalizer"].update(handle_chinese_chars="no"), "handle_chinese_chars 'no'"),
        (lambda data: data.update(pre_tokenizer=None), "pre_tokenizer has type None"),
        (lambda data: data["model"]["vocab"].update(z=99), f"the ids of the vocabulary are not 0 to {len(TOKENS)}"),
        (lambda data: data["added_tokens"].append({"content": "<new>", "id": 99}), "<new>"),
        (lambda data: data["model"]["vocab"].pop(TOKENS[-1]) and data["model"]["vocab"].update({"#": 1}), "the ids of"),
    ],
)
def test_another_kind_of_tokenizer_json_is_refused(tmp_path, change, message):
    WordPiece(TOKENS).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    found = error_of(load, tmp_path)
    assert found.startswith(str(path))
    assert message in found


def test_settings_that_are_not_supported_or_not_json_are_refused(tmp_path):
    write_vocab(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"tokenize_chinese_chars": "no"}')
    assert error_of(load, tmp_path).startswith(f"{path}: tokenize_chinese_chars is 'no'")
    for content in ("[]", "{"):
        path.write_text(content)
        assert str(path) in error_of(load, tmp_path)
    path.unlink()
    path.mkdir()
    assert str(path) in error_of(load, tmp_path)


# ---- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_trained_vocabulary(prose, lowercase):
    tokens = train(prose, 120, lowercase)
    assert len(tokens) == len(set(tokens)) == 120
    assert tokens[:5] == list(SPECIAL_TOKENS)
    # The characters by count, then code point, and with "##" those that are not words of their own.
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
    assert {"the", "unaffable", "jumpers", "ebene"} <= set(tokens)  # nothing left to merge


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


def test_rare_characters_are_left_out(tmp_path):
    path = tmp_path / "a.txt"
    rare = "".join(chr(code_point) for code_point in range(0x4E00, 0x4E00 + 50))
    path.write_text(("the quick brown fox " * 100 + "\n\n") * 400 + rare)
    tokens = train(Corpus((str(path),)), 100)
    # 50 of 640,050 characters are rare, fewer than the 0.01 % that may be left out.
    assert not set(rare) & set("".join(tokens))
    assert {"the", "quick", "brown", "fox"} <= set(tokens)


def test_ideographs_do_not_continue_words(tmp_path):
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
    message = error_of(build, WordPieceConfig(vocab_size), prose)
    characters = len(set("".join(PROSE.lower().split())) - set("éèï"))
    assert f"vocab_size={vocab_size} " in message and f" {characters} " in message


def test_build_caches_the_vocabulary(prose, monkeypatch):
    first = build(WordPieceConfig(150), prose)
    assert first.tokens == train(prose, 150)
    monkeypatch.setattr(Corpus, "documents", lambda *_: pytest.fail("read again"))
    assert build(WordPieceConfig(150), Corpus(prose.sources)).fingerprint == first.fingerprint


def test_build_distinguishes_configurations_and_corpora(prose):
    configs = [WordPieceConfig(110), WordPieceConfig(111), WordPieceConfig(110, lowercase=False)]
    fingerprints = {build(config, prose).fingerprint for config in configs}
    assert len(fingerprints) == 3
    other = Corpus((f"{prose.sources[0]},documents=line",), held_out=0.5)
    assert build(WordPieceConfig(110), other).fingerprint not in fingerprints


def test_build_loads_a_vocabulary_without_reading_the_corpus(prose, tmp_path, monkeypatch):
    monkeypatch.setattr(Corpus, "documents", lambda *_: pytest.fail("read"))
    config = WordPieceConfig(path=str(write_vocab(tmp_path)), lowercase=False)
    assert build(config, prose).fingerprint == WordPiece(TOKENS, lowercase=False).fingerprint


def test_the_expected_size_is_that_of_the_trained_vocabulary(prose):
    config = WordPieceConfig(120)
    assert build(config, prose).vocab_size == config.expected_vocab_size == 120
