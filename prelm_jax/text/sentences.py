"""Documents to sentences. No character but white space at the edges of a sentence is lost."""

from typing import Literal

import sentencex

# sentencex needs time quadratic in the number of quotation marks and brackets it is given (a million characters of them
# took minutes), so a longer line is given to it in pieces.
PIECE_CHARACTERS = 10_000


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
        segments = sentencex.segment(language, line[start:end])
        if end < len(line) and len(segments) > 1:
            del segments[-1]  # it may go on after the piece; the next piece begins with it
        sentences += segments
        start += sum(map(len, segments))
    return sentences
