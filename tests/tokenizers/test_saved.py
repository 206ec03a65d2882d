"""Tokenizers as other programs save them: added tokens, classes and settings, with transformers' ids or refused."""

import dataclasses
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken as LibraryToken
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.added_tokens import AddedToken
from prelm_jax.tokenizers.base import FRAME_ROLES
from prelm_jax.tokenizers.bpe import BPE
from prelm_jax.tokenizers.build import build
from prelm_jax.tokenizers.load import load
from prelm_jax.tokenizers.saved import BERT_CLASSES, read_max_length
from prelm_jax.tokenizers.sentencepiece import SentencePiece
from prelm_jax.tokenizers.wordpiece import SPECIAL_TOKENS, WordPiece, WordPieceConfig

LETTERS = [*"abcnewyorkid19x", "é", "漢", "字"]
WORDPIECES = [*SPECIAL_TOKENS, "[unused0]", *LETTERS, *(f"##{letter}" for letter in LETTERS), *"<>[]{}.,_+'", "the"]
BPE_TOKENS = ["<unk>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), *(f"{mark}</w>" for mark in "<>[].,_"), "ne"]
MERGES = [("n", "e")]


def wordpiece():
    return WordPiece(WORDPIECES)


def bpe():
    return BPE(BPE_TOKENS, MERGES)


def sentencepiece():
    tokens = [*SPECIAL_TOKENS, "▁", *LETTERS, *"<>[]{}.,_+'\n", "▁ne", "▁the"]
    model = models.Unigram([(token, -float(i)) for i, token in enumerate(tokens)], 1, False)
    return SentencePiece(json.loads(Tokenizer(model).to_str())["model"], lowercase=True)


def quick_tour(directory, normalizer=None, pre_tokenizer=None, model=None):
    """The tokenizer of the library's quick tour, as transformers saves it."""
    ids = {token: id for id, token in enumerate([*SPECIAL_TOKENS, *LETTERS, *"<>[]{}._AY\u0301", "ne", "<>"])}
    tokenizer = Tokenizer(model or models.BPE(ids, [("n", "e"), ("<", ">")], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.Whitespace()
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **roles).save_pretrained(directory)


def save_vocab_txt(directory):
    (directory / "vocab.txt").write_text("".join(f"{token}\n" for token in WORDPIECES))
    (directory / "config.json").write_text('{"model_type": "bert"}')


def save_vocab_json(directory):
    bpe().save(directory)
    (directory / "tokenizer.json").unlink()


SAVED = {  # name: writes a directory without added tokens
    "wordpiece": lambda directory: wordpiece().save(directory),
    "vocab.txt": save_vocab_txt,
    "bpe": lambda directory: bpe().save(directory),
    "vocab.json": save_vocab_json,
    "sentencepiece": lambda directory: sentencepiece().save(directory),
    "quick-tour": quick_tour,
    "library-wordpiece": lambda directory: quick_tour(
        directory,
        normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]),
        pre_tokenizers.Whitespace(),
        models.WordPiece({token: id for id, token in enumerate(WORDPIECES)}, unk_token="[UNK]"),
    ),
    "library-words": lambda directory: quick_tour(
        directory,
        normalizers.NFC(),
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]),
        models.WordLevel({token: id for id, token in enumerate(WORDPIECES)}, unk_token="[UNK]"),
    ),
}

CONTENTS = ["covid19", "<e1>", "[E]", "Ab", "new york", "É", "漢字", "e", "<e1", "é漢", "\n", "[unused0]", "the", "+"]
FLAGS = ("special", "normalized", "single_word", "lstrip", "rstrip")
TOKENS = st.lists(
    st.builds(AddedToken, st.sampled_from(CONTENTS), st.just(-1), **{name: st.booleans() for name in FLAGS}),
    max_size=4,
    unique_by=lambda token: token.content,
)
TEXTS = st.lists(
    st.lists(
        st.sampled_from(
            [*CONTENTS, *LETTERS, *"<>[].,_AY", "Covid", "NEW", "\u0301", "\u200d", "\t", "\u3000", *" " * 6]
        )
        | st.text(max_size=3),
        max_size=10,
    ).map("".join),
    min_size=1,
    max_size=4,
)


def reference_ids(directory, texts):
    """transformers' ids, where the names of special tokens are not in the texts."""
    return AutoTokenizer.from_pretrained(directory)(texts, add_special_tokens=False)["input_ids"]


def as_dict(token):
    return {name: value for name, value in dataclasses.asdict(token).items() if name != "id"}


def add_by_transformers(directory, added):
    """As `add_tokens` and `save_pretrained` do."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for token in added:
        tokenizer.add_tokens([LibraryToken(**as_dict(token))], special_tokens=token.special)
    tokenizer.save_pretrained(directory)


def add_to_decoder(directory, added):
    """In tokenizer_config.json, as transformers 4.34 and later write it."""
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    known = AutoTokenizer.from_pretrained(directory)
    ids, new = known.get_vocab(), len(known)
    config["added_tokens_decoder"] = {str(id): token.__getstate__() for id, token in known.added_tokens_decoder.items()}
    for token in added:
        id = ids.get(token.content, new)
        new += id == new
        config["added_tokens_decoder"][str(id)] = as_dict(token)
    path.write_text(json.dumps(config))


def add_to_file(directory, added):
    """In added_tokens.json, beside a vocabulary without a tokenizer.json; without options."""
    known = AutoTokenizer.from_pretrained(directory).get_vocab()
    new = [token.content for token in added if token.content not in known]
    ids = {content: len(known) + i for i, content in enumerate(new)}
    (directory / "added_tokens.json").write_text(json.dumps(ids))


WAYS = {
    "transformers": (add_by_transformers, list(SAVED)),
    "decoder": (add_to_decoder, list(SAVED)),
    "file": (add_to_file, ["vocab.txt", "vocab.json"]),
}


def check_added_tokens(directory, way, kind, added, texts):
    SAVED[kind](directory)
    WAYS[way][0](directory, added)
    try:
        ours = load(directory)
    except InputError as error:
        # Two tokens that are one when normalized, of which the library finds any, or one that is nothing then.
        assert "when normalized" in str(error) and {"É", "\n"} & {token.content for token in added}
        return
    expected = reference_ids(directory, texts)
    assert ours.encode_batch(texts) == expected
    assert ours.encode_batch(texts) == expected  # now from the cache
    ours.save(directory / "again")
    assert reference_ids(directory / "again", texts) == expected
    again = load(directory / "again")
    assert (again.tokens, again.fingerprint) == (ours.tokens, ours.fingerprint)
    assert again.encode_batch(texts) == expected


ALL = pytest.mark.parametrize(("way", "kind"), [(way, kind) for way, (_, kinds) in WAYS.items() for kind in kinds])
SETTINGS = settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.too_slow])


@ALL
@SETTINGS
@given(added=TOKENS, texts=TEXTS)
def test_added_tokens_have_transformers_ids(tmp_path_factory, way, kind, added, texts):
    check_added_tokens(tmp_path_factory.mktemp("saved"), way, kind, added, texts)


@pytest.mark.slow
@ALL
@settings(SETTINGS, max_examples=40)
@given(added=TOKENS, texts=TEXTS)
def test_more_added_tokens_have_transformers_ids(tmp_path_factory, way, kind, added, texts):
    check_added_tokens(tmp_path_factory.mktemp("saved"), way, kind, added, texts)


def test_added_tokens_beside_a_vocab_txt(tmp_path):
    tokens = [*SPECIAL_TOKENS, "the", "c", "##o", "##v", "##i", "##d", "##1", "##9"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    (tmp_path / "added_tokens.json").write_text('{"covid19": 13}')
    ours = load(tmp_path)
    assert ours.encode_batch(["the covid19"]) == [[5, 13]]
    assert ours.tokens == [*tokens, "covid19"] and ours.decode([5, 13]) == "the covid19"


def test_added_tokens_of_a_tokenizer_json(tmp_path):
    WordPiece([*SPECIAL_TOKENS, *(f"w{i}" for i in range(388))]).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"].append({"id": 393, "content": "<e1>", "special": True, "normalized": False})
    path.write_text(json.dumps(data))
    assert load(tmp_path).encode_batch(["<e1>"]) == [[393]]


# ---- Added tokens that are refused -----------------------------------------------------------------------------------


def error_of(call, *arguments) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("tokens", [{"a1": 20}, {"a1": 5}, {"the": 3}, {"a1": "20"}, {"a1": True}, {"": 20}])
def test_ids_that_transformers_would_not_give_are_refused(tmp_path, tokens):
    save_vocab_txt(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(tokens))
    assert repr(next(iter(tokens))) in error_of(load, tmp_path)


def test_tokens_that_are_the_same_when_normalized_are_refused(tmp_path):
    save_vocab_txt(tmp_path)
    ids = {"Covid": len(WORDPIECES), "covid": len(WORDPIECES) + 1}
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
    message = error_of(load, tmp_path)
    assert "'Covid'" in message and "'covid'" in message
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load(tmp_path).encode_batch(["covid Covid"]) == [list(ids.values())[::-1]]


def test_texts_without_added_tokens_are_not_encoded_one_by_one(monkeypatch):
    added = [AddedToken("covid19"), AddedToken("<e1>"), AddedToken("[E]", special=True, normalized=False)]
    tokenizer = WordPiece(WORDPIECES, added=added)
    encoded = []
    whole = tokenizer._encode_with_added
    monkeypatch.setattr(tokenizer, "_encode_with_added", lambda text: encoded.append(text) or whole(text))
    texts = ["the new e 19, (one)", "a covid19 b", "COVID 19", "<e1>", "[E]"] * 2
    assert tokenizer.encode_batch(texts)[1][1] == len(WORDPIECES)
    assert encoded == ["a covid19 b", "<e1>", "[E]"] * 2


# ---- Classes and settings --------------------------------------------------------------------------------------------

FOREIGN = ["BertJapaneseTokenizer", "RobertaTokenizerFast", "GPT2Tokenizer", "T5TokenizerFast", "MyTokenizer", "Bert"]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("kind", ["vocab.txt", "wordpiece", "sentencepiece", "vocab.json"])
def test_foreign_classes_are_refused_by_name(tmp_path, name, file, kind):
    SAVED[kind](tmp_path)
    path = tmp_path / file
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | {"tokenizer_class": name}))
    if (tmp_path / "tokenizer_config.json").exists() and file == "config.json":
        load(tmp_path)  # tokenizer_config.json names a class already.
    else:
        message = error_of(load, tmp_path)
        assert message.startswith(f"{path}: ") and repr(name) in message


def test_code_of_its_own_is_refused(tmp_path):
    save_vocab_txt(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"auto_map": {"AutoTokenizer": ["my.Tokenizer", null]}, "tokenizer_class": "BertTokenizer"}')
    assert error_of(load, tmp_path).startswith(f"{path}: auto_map")


@pytest.mark.parametrize("name", sorted(BERT_CLASSES))
def test_classes_of_bert_are_the_same_in_transformers(name, tmp_path):
    save_vocab_txt(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["The New York, É 漢字 19", "nE.w"]
    assert isinstance(theirs, BertTokenizer)
    assert load(tmp_path).encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("role", ["unk", "cls", "sep", "pad", "mask"])
def test_other_special_tokens_are_refused(tmp_path, role):
    save_vocab_txt(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({f"{role}_token": "[unused0]"}))
    assert error_of(load, tmp_path).startswith(f"{path}: {role}_token is '[unused0]'")


CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "do_lower_case": st.booleans(),
        "strip_accents": st.none() | st.booleans(),
        "tokenize_chinese_chars": st.booleans(),
    },
)


@settings(deadline=None, max_examples=40)
@given(config=CONFIGS, kind=st.sampled_from(["vocab.txt", "wordpiece"]), texts=TEXTS)
def test_settings_of_bert_give_transformers_ids(tmp_path_factory, config, kind, texts):
    directory = tmp_path_factory.mktemp("saved")
    SAVED[kind](directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "BertTokenizer", **config}))
    ours = load(directory)
    expected = reference_ids(directory, texts)
    assert ours.encode_batch(texts) == expected
    ours.save(directory / "again")
    assert reference_ids(directory / "again", texts) == expected
    assert load(directory / "again").fingerprint == ours.fingerprint


def test_a_default_against_the_pipeline_is_refused(tmp_path):
    """transformers takes BertTokenizer's default, which is against what the tokenizer was trained with."""
    WordPiece(WORDPIECES, lowercase=False).save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"tokenizer_class": "BertTokenizer"}')
    message = error_of(load, tmp_path)
    assert str(path) in message and '"do_lower_case": false' in message and "--cased" in message
    assert not load(tmp_path, lowercase=False).lowercase
    path.write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": false}')
    assert not load(tmp_path).lowercase


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": pre_tokenizers.ByteLevel()}, "the pre_tokenizer has type ByteLevel"),
        ({"pre_tokenizer": pre_tokenizers.Punctuation()}, "no pre_tokenizer splits at white space"),
        ({"normalizer": normalizers.Prepend("x")}, "the normalizer has type Prepend"),
        ({"model": models.BPE({"[UNK]": 0, "x": 1}, [], dropout=0.1, unk_token="x")}, "dropout 0.1"),
        ({"model": models.BPE({"[UNK]": 0, "x": 1}, [], unk_token="x")}, "unk_token 'x'"),
        ({"model": models.Unigram([(token, -1.0) for token in SPECIAL_TOKENS], None, False)}, "no unk_id"),
    ],
)
def test_pipelines_that_are_not_supported(tmp_path, changes, message):
    quick_tour(tmp_path, **changes)
    found = error_of(load, tmp_path)
    assert found.startswith(f"{tmp_path}/tokenizer.json: ") and message in found


@pytest.mark.parametrize("length", ["Infinity", "NaN", "0", "true", '"512"'])
def test_a_longest_text_of_no_length_is_refused(tmp_path, length):
    """transformers writes 1e30 for no limit."""
    path = tmp_path / "tokenizer_config.json"
    path.write_text(f'{{"model_max_length": {length}}}')
    assert f"{path}: model_max_length" in error_of(read_max_length, tmp_path)
    path.write_text('{"model_max_length": 1e30}')
    assert read_max_length(tmp_path) == int(1e30)


def test_other_tokens_around_a_text_are_refused(tmp_path):
    quick_tour(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["post_processor"] = json.loads(json.dumps(data["post_processor"]).replace("[CLS]", "[BEGIN]"))
    path.write_text(json.dumps(data))
    message = error_of(load, tmp_path)
    assert message.startswith(f"{path}: ") and "[BEGIN]" in message


def test_hindi_lower_cased_keeps_its_vowels(tmp_path):
    text = "अपने में New"
    (tmp_path / "corpus.txt").write_text(f"{text}\n" * 20)
    corpus = Corpus((str(tmp_path / "corpus.txt"),))
    ours = build(WordPieceConfig(60, strip_accents=False), corpus)
    assert ours.decode(ours.encode_batch([text])[0]) == "अपने में new"
    stripping = build(WordPieceConfig(60), corpus)
    assert stripping.decode(stripping.encode_batch([text])[0]) == "अपन म new"
    ours.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/tokenizer_config.json").read_text())["strip_accents"] is False
    assert reference_ids(tmp_path / "saved", [text]) == ours.encode_batch([text])
    assert load(tmp_path / "saved").fingerprint == ours.fingerprint
    lone = build(WordPieceConfig(path=str(tmp_path / "saved/vocab.txt"), strip_accents=False), corpus)
    assert lone.fingerprint == ours.fingerprint


# ---- vocab.txt -------------------------------------------------------------------------------------------------------


def follow(path, message):
    """Does what the message says: writes the suggested token on the line that it names."""
    number, token = re.match(rf"{re.escape(str(path))}:(\d+) .*such as (\S+)$", message).groups()
    lines = path.read_text().split("\n")
    lines[int(number) - 1] = token
    path.write_text("\n".join(lines))


@pytest.mark.parametrize("words", [SPECIAL_TOKENS, ("<S>", "</S>", "<UNK>")])
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_the_remedy_for_a_vocab_txt_moves_no_id(tmp_path_factory, words, data):
    """Blank and repeated lines, CRLF and a byte order mark."""
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    lines = data.draw(st.lists(st.sampled_from(["", " ", "the", "a", "[unused0]", "b", "c"]), max_size=8))
    lines = [*words, *lines, "last"]
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    path.write_bytes(data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + (end.join(lines) + end).encode())
    for _ in range(9):
        try:
            tokenizer = load(path)
            break
        except InputError as error:
            assert "line numbers are ids" in str(error)
            follow(path, str(error))
    assert tokenizer.vocab_size == len(lines) and tokenizer.tokens[: len(words)] == list(words)
    kept = {line: index for index, line in enumerate(lines) if line.strip()}  # Of repeated ones the last, as others do.
    assert {token: tokenizer.ids[token] for token in kept} == kept


@pytest.mark.parametrize("name", ["vocab.txt", "data.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ['{\n    "a": 1,\n    "b": {\n    "c": 1}}', '["a", "b"]'])
def test_json_is_not_a_vocab_txt(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    message = error_of(load, path)
    assert message.startswith(f"{path} is JSON") and "tokenizer.json" in message


def test_missing_special_tokens_are_added_without_moving_ids(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\nthe\n")
    message = error_of(load, path)
    assert "[SEP] [MASK]" in message and "line numbers are ids" in message and "at the end" in message
    path.write_text(path.read_text() + "[SEP]\n[MASK]\n")
    assert load(path).encode_batch(["the"]) == [[3]]


# The frame that GPT-1 puts around the texts of a task


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "wordpiece", "quick-tour"])
def test_a_framed_tokenizer_puts_its_tokens_around_texts_in_transformers(kind, tmp_path):
    SAVED[kind](tmp_path)
    plain = load(tmp_path)
    framed = plain.framed()
    new = [token for role, token in FRAME_ROLES.items() if role not in plain.roles]
    assert framed.tokens == [*plain.tokens, *new] and framed.framed() is framed
    assert framed.fingerprint != plain.fingerprint
    framed.save(tmp_path, model_max_length=9)
    again, theirs = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (again.fingerprint, again.roles, again.tokens) == (framed.fingerprint, framed.roles, framed.tokens)
    texts = ["new york", "the _start_ is", "x"]
    first, second, third = framed.encode_batch(texts)
    assert framed.bos_id not in second  # The name of a special token in a text is text.
    start, delimiter, extract = framed.bos_id, framed.sep_id, framed.cls_id
    assert theirs(texts[0])["input_ids"] == [start, *first, extract]
    assert theirs(texts[0], texts[2])["input_ids"] == [start, *first, delimiter, *third, extract]
    cut = theirs(texts[0] * 9, truncation=True)
    assert set(cut) == {"input_ids", "attention_mask"}
    assert len(cut["input_ids"]) == 9 and cut["input_ids"][-1] == extract
    assert theirs.pad_token_id == framed.pad_id
    theirs.save_pretrained(tmp_path / "resaved")
    assert load(tmp_path / "resaved").roles == framed.roles


def test_without_the_template_the_frame_is_text(tmp_path):
    """As where a user has added the tokens by hand."""
    bpe().framed().save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | {"post_processor": None}))
    loaded, theirs = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.bos_id is None
    assert loaded.encode_batch(["_start_ new"]) == [theirs("_start_ new")["input_ids"]]


def test_a_vocabulary_that_spells_a_token_of_the_frame_is_refused():
    with pytest.raises(InputError, match="_start_"):
        BPE([*BPE_TOKENS, "_start_"], MERGES).framed()


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "wordpiece", "quick-tour"])
def test_offsets_are_those_of_transformers(kind, tmp_path):
    SAVED[kind](tmp_path)
    ours, theirs = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("New  york, néw 漢字 idx1\tnew", "", " the\u00a0<unk> [MASK] ", "a\u0301b"):
        ids, offsets = ours.encode_with_offsets(text)
        if "[" not in text:  # Which is a special token there.
            encoded = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
            assert ids.tolist() == encoded["input_ids"]
            spans = [text[begin:end].strip() for begin, end in encoded["offset_mapping"]]
            assert [text[begin:end] for begin, end in offsets] == spans
        assert [ids.tolist()] == ours.encode_batch([text])
