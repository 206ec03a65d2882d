"""Minimal pairs: of two sentences that differ by little, a model should find the acceptable one more probable.

A pair is right (1) if the acceptable sentence has the higher score, wrong (0) if the other has, and a tie (0.5) if both
have the same, as when they differ only in words outside of a vocabulary. (Harnesses that take the first of two equal
scores give 100 % to a model that cannot tell the sentences apart.) The scores are sums, not means.

blimp        Warstadt et al. 2020: a paradigm a file, JSON lines
supplement   BabyLM's additions to it, the same
zorro        Huebner et al. 2021: words that children hear; line 2k - 1 is the unacceptable sentence, 2k the other
agreement    Linzen et al. 2016: verbs of Wikipedia in both numbers, by the nouns of the other number before them
climp        Xiang et al. 2021: Chinese; CSV, the sentences of a pair in consecutive rows
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from prelm_jax.cache import digest
from prelm_jax.errors import InputError
from prelm_jax.finetuning.records import Fields, Malformed
from prelm_jax.finetuning.tables import read_jsonl
from prelm_jax.study.records import Row
from prelm_jax.study.subjects import Subject


class Pair(NamedTuple):
    """Two sentences of which the first is better."""

    item: str
    group: str
    good: str
    bad: str
    kinds: tuple[str, ...] = ()  # Lines of the report in which the pair counts besides that of all pairs.


@dataclasses.dataclass(frozen=True)
class PairsTest:
    """Minimal pairs. Fulfills `tests.Test`.

    If the subject reads in two directions, each of them is a line of its own, `forward` and `backward`.
    """

    name: str
    pairs: Sequence[Pair]
    metric: str = "macro_accuracy"
    limit: int = 0  # Pairs of each paradigm that were asked for; 0: all.
    needs: Literal["score"] = "score"

    @property
    def settings(self) -> Mapping[str, object]:
        """What the rows depend on besides the data and the subject."""
        return {"pairs": self.limit}

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the pairs."""
        return digest(list(self.pairs))

    @property
    def num_texts(self) -> int:
        """The number of sentences."""
        return 2 * len(self.pairs)

    def measure(self, subject: Subject) -> Iterator[Row]:
        """The rows of a subject, one a pair, and another for each of the pair's kinds and the subject's directions."""
        scores = subject.score([text for pair in self.pairs for text in (pair.good, pair.bad)])
        for pair, good, bad in zip(self.pairs, scores, scores, strict=True):
            lines = dict.fromkeys(("", *pair.kinds), (good.total, bad.total))
            lines |= {name: (good.directions[name], bad.directions[name]) for name in good.directions}
            for kind, (better, worse) in lines.items():
                value = 0.5 if better == worse else float(better > worse)
                value = value if abs(better) + abs(worse) < float("inf") else float("nan")
                unknown = good.unknown + bad.unknown
                yield Row(pair.item, pair.group, value, None, kind, better == worse, unknown)


def blimp(data: Path, limit: int) -> PairsTest:
    """BLiMP; `limit`: pairs of each paradigm, 0 for all."""
    return _json_pairs("blimp", data / "blimp", limit)


def _json_pairs(name: str, folder: Path, limit: int) -> PairsTest:
    pairs = [pair for path in _files(folder, (".jsonl",)) for pair in islice(_read_json(path), limit or None)]
    return PairsTest(name, pairs, limit=limit)


def _read_json(path: Path) -> Iterator[Pair]:
    columns = ("sentence_good", "sentence_bad")
    records = read_jsonl(str(path), columns, None, Counter())
    for number, (where, fields) in enumerate(records):
        good, bad = (_text(where, fields, column) for column in columns)
        yield Pair(f"{_stem(path)}_{number}", _stem(path), good, bad)


def _text(where: str, fields: Fields, column: str) -> str:
    """A sentence in a record. Raises InputError where there is none."""
    try:
        value = fields(column)
    except Malformed as error:
        raise InputError(f"{error.where or where} {error}") from None
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: `{column}` is {value!r}: must be a sentence")
    return value


def _files(folder: Path, endings: Sequence[str]) -> list[Path]:
    """The files of a folder with some endings, compressed or not, sorted by name."""
    pattern = re.compile(rf"({'|'.join(map(re.escape, endings))})(\.(gz|bz2|xz|zst))?$")
    found = sorted(path for path in folder.glob("*") if pattern.search(path.name)) if folder.is_dir() else []
    if not found:
        raise InputError(f"{folder}: no {' or '.join(endings)} files of the test there; give its folder with --data")
    return found


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]
