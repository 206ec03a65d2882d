"""Documents to sentences. No character but white space at the edges of a sentence is lost."""

import re
from typing import Literal

import sentencex

# sentencex needs time quadratic in the number of quotation marks and brackets it is given (a million characters of them
# took minutes), so a longer line is given to it in pieces.
PIECE_CHARACTERS = 10_000

# What sentencex gets wrong in Chinese and Japanese, whatever the language: it takes a digit or a small letter after a
# full stop for a sentence that goes on ("完工。2009年…"), 『』 for no quotation marks, and what follows a quotation
# for a new sentence even after a comma ("「…！」，他說").
_SEEMS_TO_GO_ON = re.compile("(?<=[。！？])[0-9a-z]")
_GOES_ON = tuple("，、；：。！？…」』）》】〉")


def split(text: str, how: Literal["library", "line"], language: str = "en") -> list[str]:
    """The sentences of a document: its non-empty lines ("line"), or these split further by sentencex ("library").

    A sentence never goes over the end of a line. `language` is the two-letter code that sentencex takes.
    """
    lines = text.split("\n")
    if how == "library":
        lines = [sentence for line in lines for sentence in _segment(line, language)]
    return [sentence for sentence in map(str.strip, lines) if sentence]


def _segment(line: str, language: str) -> list[str]:
    sentences = []
    start = 0
    while start < len(line):
        end = start + PIECE_CHARACTERS
        if end < len(line):
            end = line.rfind(" ", start, end) + 1 or end
        piece = _SEEMS_TO_GO_ON.sub("一", line[start:end].replace("『", "“").replace("』", "”"))
        segments = sentencex.segment(language, piece)
        if end < len(line) and len(segments) > 1:
            del segments[-1]  # it may go on after the piece; the next piece begins with it
        for segment in segments:
            sentence = line[start : start + len(segment)]
            if sentences and sentence.startswith(_GOES_ON):
                sentences[-1] += sentence
            else:
                sentences.append(sentence)
            start += len(segment)
    return sentences
