"""All kinds of tokenizers: roles, tokens and saved files."""

import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from prelm_jax.tokenizers.bpe import BPE
from prelm_jax.tokenizers.load import load
from prelm_jax.tokenizers.sentencepiece import SentencePiece
from prelm_jax.tokenizers.wordpiece import WordPiece
from prelm_jax.tokenizers.words import WordVocabulary

BERT = {"pad_id": "[PAD]", "unknown_id": "[UNK]", "cls_id": "[CLS]", "sep_id": "[SEP]", "mask_id": "[MASK]"}
GPT = {"unknown_id": "<unk>"}
ELMO = {"bos_id": "<S>", "eos_id": "</S>", "unknown_id": "<UNK>"}
ALL_ROLES = ("pad_id", "unknown_id", "cls_id", "sep_id", "mask_id", "bos_id", "eos_id")


def sentencepiece(tokens, model_type):
    unknown = "[UNK]" if "[UNK]" in tokens else "<unk>"
    if model_type == "unigram":
        model = models.Unigram([(token, -1.0) for token in tokens], tokens.index(unknown), False)
    else:
        model = models.BPE({token: id for id, token in enumerate(tokens)}, [], unk_token=unknown, fuse_unk=True)
    return SentencePiece(json.loads(Tokenizer(model).to_str())["model"], lowercase=True, proto=b"proto")


KINDS = {  # name: (special tokens by role, tokens -> tokenizer)
    "wordpiece": (BERT, WordPiece),
    "bpe": (GPT, lambda tokens: BPE(tokens, [])),
    "sentencepiece-unigram-bert": (BERT, functools.partial(sentencepiece, model_type="unigram")),
    "sentencepiece-unigram-gpt": (GPT, functools.partial(sentencepiece, model_type="unigram")),
    "sentencepiece-bpe-gpt": (GPT, functools.partial(sentencepiece, model_type="bpe")),
    "words": (ELMO, WordVocabulary),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_roles_tokens_and_special_ids_agree_after_save_and_load(tmp_path_factory, kind, data):
    special, make = KINDS[kind]
    words = data.draw(st.lists(st.text("aé漢▁", min_size=1, max_size=4), unique=True))
    tokens = data.draw(st.permutations([*special.values(), *words, "z</w>"]))
    if kind == "words":  # There the special tokens come first, in any order.
        tokens.sort(key=lambda token: token not in special.values())
    saved = make(tokens)
    directory = tmp_path_factory.mktemp("saved")
    saved.save(directory, data.draw(st.sampled_from([None, 128])))
    for tokenizer in (saved, load(directory)):
        assert isinstance(tokenizer, type(saved))
        assert tokenizer.tokens == tokens and tokenizer.vocab_size == len(tokens)
        assert tokenizer.special_ids == {token: tokens.index(token) for token in special.values()}
        roles = {role: getattr(tokenizer, role) for role in ALL_ROLES}
        assert roles == {role: tokenizer.special_ids.get(special.get(role)) for role in ALL_ROLES}
        assert tokenizer.open_vocabulary == (kind == "words")
        assert tokenizer.fingerprint == saved.fingerprint


# ---- Saved files -----------------------------------------------------------------------------------------------------


def as_json(**settings):
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


BERT_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
GPT_TOKENS = {"unk_token": "<unk>"}
WORDPIECE = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "strip_accents": None}
ANY_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128}
FILES = {
    "wordpiece": {
        "special_tokens_map.json": as_json(**BERT_TOKENS),
        "tokenizer_config.json": as_json(**BERT_TOKENS, **WORDPIECE, tokenize_chinese_chars=True, model_max_length=128),
        "vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\né\nz</w>\n",
    },
    "bpe": {
        "special_tokens_map.json": as_json(**GPT_TOKENS),
        "tokenizer_config.json": as_json(
            **GPT_TOKENS, pad_token="<unk>", tokenizer_class="OpenAIGPTTokenizer", model_max_length=128
        ),
        "vocab.json": '{"<unk>": 0, "é": 1, "z</w>": 2}\n',
        "merges.txt": "#version: 0.2\n",
    },
    "sentencepiece-unigram-bert": {
        "special_tokens_map.json": as_json(**BERT_TOKENS),
        "tokenizer_config.json": as_json(**BERT_TOKENS, **ANY_CLASS),
        "spiece.model": "proto",
    },
    "sentencepiece-bpe-gpt": {
        "special_tokens_map.json": as_json(**GPT_TOKENS),
        "tokenizer_config.json": as_json(**GPT_TOKENS, **ANY_CLASS),
        "spiece.model": "proto",
    },
    "words": {
        "tokenizer_config.json": as_json(tokenize=False),
        "vocab.txt": "<S>\n</S>\n<UNK>\né\nz</w>\n",
    },
}


@pytest.mark.parametrize("kind", FILES)
def test_saved_files_byte_for_byte(kind, tmp_path):
    special, make = KINDS[kind]
    make([*special.values(), "é", "z</w>"]).save(tmp_path, model_max_length=128)
    found = {path.name: path.read_bytes().decode() for path in tmp_path.iterdir()}
    tokenizer = json.loads(found.pop("tokenizer.json", "null"))
    assert found == FILES[kind]
    if kind == "words":
        assert tokenizer is None
        return
    assert [token["content"] for token in tokenizer["added_tokens"]] == list(special.values())
    assert all(token["special"] for token in tokenizer["added_tokens"])
    if special is GPT:
        assert tokenizer["post_processor"] is None
        return

    def spelled(template):
        """For example "[CLS]:0 A:0 [SEP]:0"."""
        return " ".join(f"{part['id']}:{part['type_id']}" for item in template for part in item.values())

    processor = tokenizer["post_processor"]
    assert spelled(processor["single"]) == "[CLS]:0 A:0 [SEP]:0"
    assert spelled(processor["pair"]) == "[CLS]:0 A:0 [SEP]:0 B:1 [SEP]:1"
    ids = {token: entry["ids"] for token, entry in processor["special_tokens"].items()}
    assert ids == {"[CLS]": [2], "[SEP]": [3]}
