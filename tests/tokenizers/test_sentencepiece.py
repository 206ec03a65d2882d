"""SentencePiece: transformers' ids, the package's subwords, trained vocabularies, files, and every error."""

import json
import lzma
import os
import subprocess
import sys
from itertools import islice

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.build import build
from prelm_jax.tokenizers.load import load
from prelm_jax.tokenizers.sentencepiece import ROLES, SentencePieceConfig

PROSE = """The quick brown fox jumps over the lazy dog; the dog sleeps.
Unaffable foxes, quicker dogs: the quickest of foxes! Ébène, naïve café. Dogs jumped and foxes were jumping,
jumpers all, over 12 logs and 122 frogs [or not] <perhaps>. 漢字かな交じり文、漢字。
"""
TEXT = st.one_of(
    st.text(),
    st.text(
        st.sampled_from("aabdDogjumpséÉe\u0301 .,▁[]<>!\t\n\r\x00\x0b\x85\u00a0\u2028\u200b\ufffd漢字1ßİΣς\u0130ﬁ㎏")
    ),
    st.lists(st.sampled_from(["[MASK]", "[UNK]", "<unk>", "[", "fox", "jump", "漢字", "▁", *" " * 3]), max_size=9).map(
        "".join
    ),
)
CONFIGS = {
    f"{model_type}-{special_tokens}-{lowercase}": SentencePieceConfig(150, model_type, lowercase, special_tokens)
    for model_type, special_tokens, lowercase in [
        ("unigram", "bert", True),
        ("unigram", "gpt", False),
        ("bpe", "bert", False),
        ("bpe", "gpt", True),
    ]
}


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "prose.txt"
    path.write_text("\n\n".join([PROSE] * 3))
    return Corpus((str(path),))


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def ours(config, prose):
    return build(config, prose)


@pytest.fixture(scope="module")
def directory(config, ours, tmp_path_factory):
    """A model directory with the tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    ours.save(directory, model_max_length=128)
    model_type = {"bert": "bert", "gpt": "openai-gpt"}[config.special_tokens]
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return directory


@pytest.fixture(scope="module")
def theirs(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.split_special_tokens = True
    return tokenizer


def theirs_ids(theirs, texts):
    return theirs(texts, add_special_tokens=False)["input_ids"] if texts else []


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(TEXT, max_size=4))
def test_ids_match_transformers(ours, theirs, texts):
    expected = theirs_ids(theirs, texts)
    assert ours.encode_batch(texts) == expected
    assert ours.encode_batch(texts) == expected  # now from the cache
    assert [ours.decode(ids) for ids in expected] == [theirs.decode(ids) for ids in expected]


def test_ids_of_real_text_match_transformers_and_the_package(real_data, tmp_path):
    """The package is given normalized text, as its file expects."""
    lines = []
    for name in ("simplewiki", "zhwiki"):
        with lzma.open(real_data / f"pretrain/{name}.txt.xz", "rt", encoding="utf-8", newline="\n") as file:
            lines += [line for line in islice(file, 300) if line.strip()]
    (tmp_path / "corpus.txt").write_text("".join(lines))
    ours = build(SentencePieceConfig(4000), Corpus((str(tmp_path / "corpus.txt"),)))
    ours.save(tmp_path / "saved")
    ids = ours.encode_batch(lines)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert ids == theirs_ids(theirs, lines)
    package = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "saved/spiece.model"))
    normal = [ours._pipeline.normalizer.normalize_str(line) for line in lines]
    assert package.encode(normal) == ids


def test_special_tokens_come_first_and_their_names_in_a_text_are_text(ours, config):
    names = list(ROLES[config.special_tokens].values())
    assert ours.tokens[: len(names)] == names
    assert ours.special_ids == {name: index for index, name in enumerate(names)}
    assert ours.tokens[ours.unknown_id] in ("[UNK]", "<unk>")
    if config.special_tokens == "bert":
        assert ours.unknown_id not in ours.encode_batch(["["])[0]
    for name in names:
        assert len(ours.encode_batch([name])[0]) > 2


def test_continuation_is_false_where_words_begin(ours):
    ids = ours.encode_batch(["the foxes [jumping]"])[0]
    begins = [ours.tokens[index] for index in ids if not ours.continuation[index]]
    assert len(begins) == 3 and all(subword.startswith("▁") for subword in begins)
    assert not any(ours.continuation[index] for index in ours.special_ids.values())


def test_lower_casing_and_normal_forms(ours, config):
    assert (ours.encode_batch(["FOX"]) == ours.encode_batch(["fox"])) == config.lowercase
    a, b = ours.encode_batch(["  e\u0301\u00a0x\x00y\t", "é xy"])
    assert a == b


def test_saved_files_load_here_and_in_transformers(config, ours, directory, tmp_path):
    theirs = AutoTokenizer.from_pretrained(directory)
    assert theirs.model_max_length == 128
    assert theirs.convert_ids_to_tokens(range(ours.vocab_size)) == ours.tokens
    first, second = ours.encode_batch(["the dog", "fox"])
    pair = theirs("the dog", "fox")["input_ids"]
    if config.special_tokens == "bert":
        assert pair == [ours.cls_id, *first, ours.sep_id, *second, ours.sep_id]
        assert (theirs.pad_token_id, theirs.mask_token_id) == (ours.pad_id, ours.mask_id) == (0, 4)
        assert ours.mask_id in theirs("the [MASK]")["input_ids"]
    else:
        assert pair == [*first, *second]

    again = load(directory)
    assert again.fingerprint == ours.fingerprint
    again.save(tmp_path, model_max_length=128)
    names = ["special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_training_is_the_same_in_every_process(prose):
    program = """if True:
        import sys
        from prelm_jax.tokenizers.sentencepiece import *
        for kind in ("unigram", "bpe"):
            print(digest(SentencePieceConfig(150, kind)._train(Corpus((sys.argv[1],)))))
    """
    command = [sys.executable, "-W", "error", "-c", program, prose.sources[0]]
    outputs = {
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1


def test_a_large_corpus_is_sampled(prose, monkeypatch):
    monkeypatch.setattr("prelm_jax.tokenizers.sentencepiece.TRAINING_CHARACTERS", 300)
    assert "文" not in build(SentencePieceConfig(60), Corpus((f"{prose.sources[0]},documents=file",))).tokens


def test_build_caches_the_vocabulary_and_distinguishes_configurations(prose, monkeypatch):
    fingerprints = {build(config, prose).fingerprint for config in CONFIGS.values()}
    assert len(fingerprints) == len(CONFIGS)
    monkeypatch.setattr(Corpus, "documents", lambda *_: pytest.fail("read again"))
    assert {build(config, Corpus(prose.sources)).fingerprint for config in CONFIGS.values()} == fingerprints


def test_build_loads_a_vocabulary_without_reading_the_corpus(directory, ours, prose, monkeypatch):
    monkeypatch.setattr(Corpus, "documents", lambda *_: pytest.fail("read"))
    assert build(SentencePieceConfig(path=str(directory)), prose).fingerprint == ours.fingerprint


def error_of(call, *arguments) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_vocabulary_that_is_too_small(prose):
    assert "vocab_size=10 " in error_of(build, SentencePieceConfig(10), prose)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["normalizer"]["normalizers"].pop(0), "its normalizer "),
        (lambda data: data["pre_tokenizer"]["pretokenizers"].pop(), "its pre_tokenizer "),
        (lambda data: data.update(normalizer=None), "its normalizer "),
        (lambda data: data["model"].update(vocab=[["a", 0.0], ["a", 0.0]]), "'a'"),
        (lambda data: data["model"].update(vocab=[["a", 0.0]]), "'[PAD]' has the id 0, but its place is 1"),
        (lambda data: data.update(model={"type": "Unigram"}), "'vocab'"),
        (lambda data: data["model"].update(unk_id=10**6), "the tokenizers library cannot read it"),
    ],
)
def test_another_kind_of_tokenizer_json_is_refused(prose, tmp_path, change, message):
    build(CONFIGS["unigram-bert-True"], prose).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    found = error_of(load, tmp_path)
    assert found.startswith(str(path)) and message in found


def test_the_file_of_the_package_is_not_needed(prose, tmp_path):
    """transformers does not copy it."""
    ours = build(CONFIGS["unigram-bert-True"], prose)
    ours.save(tmp_path / "one")
    AutoTokenizer.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert not (tmp_path / "two/spiece.model").exists()
    again = load(tmp_path / "two")
    assert again.fingerprint == ours.fingerprint
    again.save(tmp_path / "three")
    assert load(tmp_path / "three").fingerprint == ours.fingerprint
