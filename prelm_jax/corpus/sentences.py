"""Documents to sentences. Only white space at the edges of a sentence is lost."""

import re
from typing import Literal

import sentencex

# sentencex takes time quadratic in the number of quotation marks and brackets (minutes for a million), so longer lines
# are segmented in chunks.
CHUNK_CHARACTERS = 10_000

# The languages for which sentencex has rules of its own; Chinese ends sentences as the others do, and the corrections
# below are for it. It would take any other name for English.
LANGUAGES = {
    **{"am": "Amharic", "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "da": "Danish"},
    **{"de": "German", "el": "Greek", "en": "English", "es": "Spanish", "fi": "Finnish", "fr": "French"},
    **{"gu": "Gujarati", "hi": "Hindi", "hy": "Armenian", "it": "Italian", "ja": "Japanese", "kk": "Kazakh"},
    **{"kn": "Kannada", "ml": "Malayalam", "mr": "Marathi", "my": "Burmese", "nl": "Dutch", "pa": "Punjabi"},
    **{"pl": "Polish", "pt": "Portuguese", "ru": "Russian", "sk": "Slovak", "ta": "Tamil", "te": "Telugu"},
    **{"uk": "Ukrainian", "zh": "Chinese"},
}

# Errors of sentencex in Chinese and Japanese, in any language setting: a digit or lower-case Latin letter after a full
# stop continues the sentence ("完工。2009年…"), 『』 are no quotation marks, and a quotation ends the sentence even
# before a comma ("「…！」，他說").
_LOOKS_LIKE_CONTINUATION = re.compile("(?<=[。！？])[0-9a-z]")
_CONTINUES_SENTENCE = tuple("，、；：。！？…」』）》】〉")


def split(text: str, how: Literal["library", "line"], language: str = "en") -> list[str]:
    """The sentences of a document: its non-empty lines ("line"), or these segmented further by sentencex ("library").

    sentencex follows the rules of the `language`, one of LANGUAGES: its abbreviations, above all.

    Example: `split("Mr. Smith slept. It was late.", "library") == ["Mr. Smith slept.", "It was late."]`.
    """
    lines = text.split("\n")
    if how == "library":
        lines = [sentence for line in lines for sentence in _segment(line, language)]
    return [sentence for sentence in map(str.strip, lines) if sentence]


def _segment(line: str, language: str) -> list[str]:
    sentences = []
    start = 0
    while start < len(line):
        end = start + CHUNK_CHARACTERS
        if end < len(line):
            end = line.rfind(" ", start, end) + 1 or end
        # The substitutes have the length of the originals, so segments are cut from the line itself.
        chunk = _LOOKS_LIKE_CONTINUATION.sub("一", line[start:end].replace("『", "“").replace("』", "”"))
        segments = sentencex.segment(language, chunk)  # pyrefly: ignore[missing-attribute]  # Compiled, without stubs.
        if end < len(line) and len(segments) > 1:
            del segments[-1]  # The chunk may end inside this sentence: the next chunk begins with it.
        for segment in segments:
            sentence = line[start : start + len(segment)]
            if sentences and sentence.startswith(_CONTINUES_SENTENCE):
                sentences[-1] += sentence
            else:
                sentences.append(sentence)
            start += len(segment)
    return sentences
