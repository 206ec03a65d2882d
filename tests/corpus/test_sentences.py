"""Sentences: only white space is lost, and the end of a line ends a sentence."""

import lzma
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prelm_jax.corpus import sentences
from prelm_jax.corpus.sentences import split

PROSE = st.text(st.sampled_from("ab A.!?\"'()[]“”’…。！？-:;,\n\t\r\x0b\x85\u2028\u3000\x00é1"), max_size=80)


def without_space(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("how", ["library", "line"])
@settings(deadline=None)
@given(text=st.one_of(st.text(), PROSE))
@example(text=" Dr. Who said: “Go.”  Then left.\n\n  He went.\r\n")
def test_no_character_is_lost(how, text):
    found = split(text, how)
    assert without_space("".join(found)) == without_space(text)
    assert all(sentence == sentence.strip() != "" for sentence in found)
    assert not any("\n" in sentence for sentence in found)


@settings(deadline=None)
@given(text=PROSE)
def test_no_character_of_a_long_line_is_lost(text):
    # Chunks of eight characters: even a short text is cut many times.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentences, "CHUNK_CHARACTERS", 8)
        found = split(text, "library")
    assert without_space("".join(found)) == without_space(text)


@pytest.mark.parametrize("language", sentences.LANGUAGES)
@settings(deadline=None, max_examples=5)
@given(text=st.one_of(st.text(), PROSE))
@example(text="Am 3. Mai kam z.B. Dr. Bach nach Bonn! पहला वाक्य। «Oui. Non.» ¿Qué? Ναι; 今天。明天。 ዛሬ። Այսօր։")
def test_no_character_is_lost_in_any_language(language, text):
    assert without_space("".join(split(text, "library", language))) == without_space(text)


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("de", ["Am 3. Mai kam Dr. Bach.", "Er schlief."]),
        ("it", ["Il Sig. Rossi vide il dott. Bianchi.", "Dormiva."]),
        ("uk", ["Це було в 1990 р. Київ.", "Він спав."]),
        ("es", ["La Sra. García vino.", "Durmió."]),
        ("el", ["Τι είναι αυτό;", "Δεν ξέρω."]),
        ("zh", ["今天天气很好。", "我们去公园吧！"]),
    ],
)
def test_each_language_has_its_rules(language, expected):
    text = ("" if language == "zh" else " ").join(expected)
    assert split(text, "library", language) == expected
    assert (split(text, "library") == expected) == (language == "zh")


def test_the_library_splits_within_lines():
    text = "Mr. Smith went home. He slept.\n\nIt was late"
    assert split(text, "library") == ["Mr. Smith went home.", "He slept.", "It was late"]
    assert split(text, "line") == ["Mr. Smith went home. He slept.", "It was late"]


@pytest.mark.parametrize(
    "expected",
    [
        ["今天天气很好。", "我们去公园吧！", "好吗？", "好"],
        ["大桥于1995年完工。", "2009年提出扩建，2014年完工！", "3人受伤。", "iPhone讓用戶滿意。"],
        ["圆周率约为3.14159。", "误差不到0.1％。"],
        ["他说：“天气很好。我们走吧！”", "然后他走了。", "「你好嗎？」", "他問。"],
        ["他說：「1876年到了。1877年呢？」，然後離開。", "（見上。）真的吗？！", "是的……好吧。"],
        ["他說：『好。』", "然後走。", "他們高呼「萬歲！」、「起來！」。", "完。"],
    ],
)
def test_chinese_punctuation(expected):
    """Also before digits and Latin letters; quoted speech is one sentence, and punctuation never begins one."""
    assert split("".join(expected), "library") == expected


def test_chinese_paragraphs(real_data):
    """Full stops outside of quotation marks and brackets end sentences; little else does."""
    with lzma.open(real_data / "pretrain/zhwiki.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read(300_000)
    found = split(text, "library")
    inside = re.compile(r"[（(「『“《\"][^）)」』”》\"]*[）)」』”》\"]?")
    plain = [inside.sub("", sentence) for sentence in found]
    assert len(found) > 6000
    assert sum(bool(re.search("[。！？](?=.)", sentence)) for sentence in plain) < 0.003 * len(found)
    assert sum(sentence.startswith(tuple("，、；：。！？」』）》”’")) for sentence in found) < 0.001 * len(found)
    lines = {line.strip()[-1:] for line in text.split("\n")} | set(' ”」』）)’"。！？!?.…：:；;')
    assert sum(sentence[-1] not in lines for sentence in found) < 0.001 * len(found)


def test_a_long_line_is_split_as_short_ones_are(monkeypatch):
    expected = [f"This is sentence {number} of a very long line." for number in range(200)]
    monkeypatch.setattr(sentences, "CHUNK_CHARACTERS", 500)
    assert split(" ".join(expected), "library") == expected


def test_quotation_marks_take_linear_time():
    started = time.process_time()
    split("( \" ' " * 50_000, "library")
    assert time.process_time() - started < 20  # In one chunk: many minutes.
