"""Tags of words: spans in BIO, and other schemes converted to it."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

from prelm_jax.data.examples import Example


def is_bio(names: Iterable[str]) -> bool:
    """Whether tags mark spans in BIO: `B-` and `I-` before a type, and `O`."""
    types = set(names) - {"O"}
    return bool(types) and all(re.match(r"[BI]-.", name, re.DOTALL) for name in types)


def bio_names(names: Sequence[str]) -> Sequence[str]:
    """The names of the same tags in BIO, if all are of BIOES, BILOU or BMES; else the names as they are.

    Those of IOB1 are as they are, because they are the same as those of BIO.

    Example: O S-PER B-PER E-PER are O B-PER I-PER.
    """
    if is_bio(names) or not _mark_spans(names):
        return names
    types = dict.fromkeys(name[2:] for name in names if name != "O")
    return (*(["O"] if "O" in names else []), *(f"{prefix}-{type}" for type in types for prefix in "BI"))


def with_bio_tags(examples: list[Example], counts: Counter[str]) -> list[Example]:
    """The examples with spans in BIO, if all tags are of BIO, IOB1, BIOES, BILOU or BMES; else unchanged."""
    if not _mark_spans(tag for example in examples for tag in cast(tuple[str, ...], example.label)):
        return examples
    converted = []
    for example in examples:
        tags = cast(tuple[str, ...], example.label)
        bio = bio_tags(tags)
        counts["tags converted to BIO"] += sum(a != b for a, b in zip(tags, bio, strict=True))
        converted.append(replace(example, label=bio))
    return converted


def _mark_spans(names: Iterable[str]) -> bool:
    """Whether tags mark spans, in BIO or one of the schemes that `bio_tags` reads."""
    types = set(names) - {"O"}
    return bool(types) and all(re.match(r"[BIMESLU]-.", name, re.DOTALL) for name in types)


def bio_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """Tags of IOB1, BIOES, BILOU or BMES in BIO; BIO is unchanged.

    Example: I-PER I-PER O S-LOC B-ORG E-ORG is B-PER I-PER O B-LOC B-ORG I-ORG.
    """
    result, inside = [], ""  # The type of the span that the next word may continue.
    for tag in tags:
        prefix, _, name = tag.partition("-")
        continues = prefix in "IMEL" and name == inside
        result.append(tag if tag == "O" else f"{'I' if continues else 'B'}-{name}")
        inside = "" if tag == "O" else name
    return tuple(result)


def spans_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, word after the last) of the spans of BIO tags, read as conlleval does.

    A span begins at B-, and at an I- that does not continue a span of its type. Example: I-PER I-PER B-PER I-LOC has
    ("PER", 0, 2), ("PER", 2, 3), ("LOC", 3, 4).
    """
    spans: list[tuple[str, int, int]] = []
    inside = ""
    for position, tag in enumerate(tags):
        name = "" if tag == "O" else tag[2:]
        if name and name == inside and tag[0] == "I":
            spans[-1] = (name, spans[-1][1], position + 1)
        elif name:
            spans.append((name, position, position + 1))
        inside = name
    return spans
