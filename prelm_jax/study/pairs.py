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

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from prelm_jax.cache import digest
from prelm_jax.corpus.readers import extension
from prelm_jax.corpus.sources import matching_files
from prelm_jax.errors import InputError
from prelm_jax.finetuning.records import Fields, Malformed, Record, text_lines
from prelm_jax.finetuning.tables import read_csv, read_jsonl, read_tsv
from prelm_jax.study.base import Make, Settings, Test
from prelm_jax.study.records import Row
from prelm_jax.study.subjects import Subject


class Pair(NamedTuple):
    """Two sentences of which the first is better."""

    item: str
    group: str
    good: str
    bad: str
    kinds: tuple[str, ...] = ()  # Lines of the report in which the pair counts besides that of all pairs.


class PairsTest(Test):
    """Minimal pairs; `limit`: how many of each paradigm were asked for, 0 for all.

    If the subject reads in two directions, each of them is a line of its own, `forward` and `backward`.
    """

    metric, needs = "macro_accuracy", "score"

    def __init__(self, name: str, pairs: Sequence[Pair], limit: int = 0):
        if not pairs:
            raise InputError(f"{name}: there are no pairs in its files")
        self.name, self.pairs, self.settings = name, pairs, {"pairs": limit}

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the pairs."""
        return digest(list(self.pairs))

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


def _published(name: str, folders: Sequence[str], ending: str, read: Callable[[Path], Iterator[Pair]]) -> Make:
    """A test whose paradigms are the files with an ending in the first of its folders that there is."""

    def make(settings: Settings, _: str) -> PairsTest:
        return PairsTest(name, _read(_files(settings.data, folders, ending), read, settings.pairs), settings.pairs)

    return make


def _agreement(settings: Settings, _: str) -> PairsTest:
    """Verbs in both numbers, with a line for each number of attractors, which are limited as paradigms are."""
    counts: Counter[tuple[str, ...]] = Counter()
    pairs = []
    for pair in _linzen_pairs(settings.data / "agreement" / "linzen.tsv"):
        counts[pair.kinds] += 1
        if not settings.pairs or counts[pair.kinds] <= settings.pairs:
            pairs.append(pair)
    return PairsTest("agreement", pairs, settings.pairs)


def _own(settings: Settings, files: str) -> PairsTest:
    """Pairs of one's own: TSV, CSV or JSON lines with the columns `sentence_good` and `sentence_bad`.

    files: a path or glob. Each file is a paradigm; if there is one file, each pair is a group.
    """
    if not files:
        raise InputError("pairs needs files: pairs:FILES, with the columns sentence_good and sentence_bad")
    paths = [Path(path) for path in matching_files(files)]
    readers = {".csv": read_csv, **dict.fromkeys((".jsonl", ".ndjson", ".json"), read_jsonl)}
    pairs = _read(paths, lambda path: _column_pairs(path, readers.get(extension(str(path)), read_tsv)), settings.pairs)
    pairs = pairs if len(paths) > 1 else [pair._replace(group=pair.item) for pair in pairs]
    return PairsTest(f"pairs:{files}", pairs, settings.pairs)


def _read(paths: Iterable[Path], read: Callable[[Path], Iterator[Pair]], limit: int) -> list[Pair]:
    return [pair for path in paths for pair in islice(read(path), limit or None)]


Read = Callable[[str, Sequence[str], bool | None, Counter[str]], Iterator[Record]]


def _json_pairs(path: Path) -> Iterator[Pair]:
    return _column_pairs(path, read_jsonl)


def _column_pairs(path: Path, read: Read) -> Iterator[Pair]:
    columns = ("sentence_good", "sentence_bad")
    for number, (where, fields) in enumerate(read(str(path), columns, None, Counter())):
        good, bad = (_text(where, fields, column) for column in columns)
        yield _pair(path, number, good, bad)


def _zorro_pairs(path: Path) -> Iterator[Pair]:
    lines = [(where, line.strip()) for where, line in text_lines(str(path))]
    for number, ((_, bad), (where, good)) in enumerate(zip(lines[::2], [*lines[1::2], ("", "")], strict=False)):
        if not (good and bad):
            raise InputError(f"{where or path}: a pair is two lines, and one is missing or blank")
        yield _pair(path, number, good, bad)


def _climp_pairs(path: Path) -> Iterator[Pair]:
    """Columns: number, phenomenon, name, sentence, 1 if it is grammatical and 0 if not."""
    rows = [
        (where, _text(where, fields, "2"), _text(where, fields, "3"))
        for where, fields in read_csv(str(path), ("2", "3"), True, Counter())
    ]
    for number, ((_, good, one), (where, bad, zero)) in enumerate(zip(rows[::2], rows[1::2], strict=False)):
        if (one, zero) != ("1", "0"):
            raise InputError(f"{where}: a pair is a sentence with label 1 and one with label 0, not {one} and {zero}")
        yield _pair(path, number, good, bad)


def _linzen_pairs(path: Path) -> Iterator[Pair]:
    """Columns: position of the verb from 0, its correct and wrong form, number of attractors, sentence with <eos>."""
    columns = ("position", "correct", "wrong", "attractors", "sentence")
    for number, (where, fields) in enumerate(read_tsv(str(path), columns, True, Counter())):
        position, correct, wrong, attractors, sentence = (_text(where, fields, column) for column in columns)
        words = sentence.removesuffix("<eos>").split()
        index = int(position) if position.isdecimal() else len(words)
        if index >= len(words) or words[index].lower() != correct.lower():
            raise InputError(f"{where}: word {position} of the sentence is not {correct!r}")
        wrong = wrong.lower() if words[index].islower() else wrong
        bad = " ".join([*words[:index], wrong, *words[index + 1 :]])
        pair = _pair(path, number, " ".join(words), bad)
        yield pair._replace(group=pair.item, kinds=(f"{attractors} attractors",))


def _pair(path: Path, number: int, good: str, bad: str) -> Pair:
    paradigm = path.name.partition(".")[0]
    return Pair(f"{paradigm}_{number}", paradigm, good, bad)


def _text(where: str, fields: Fields, column: str) -> str:
    """A cell with text. Raises InputError where there is none."""
    try:
        value = fields(column)
    except Malformed as error:
        raise InputError(f"{error.where or where} {error}") from None
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: `{column}` is {value!r}: must be text")
    return value


def _files(data: Path, folders: Sequence[str], ending: str) -> list[Path]:
    """The files of a test set with an ending, compressed or not, sorted by name; in the first of its folders."""
    folder = next((data / name for name in folders if (data / name).is_dir()), data / folders[0])
    found = sorted(path for path in folder.glob("*") if extension(str(path)) == ending)
    found = [path for path in found if not path.name.startswith("published")]  # Scores of others.
    if not found:
        raise InputError(f"{folder}: no {ending} files of the test there; give the folder of the test sets with --data")
    return found


TESTS: Mapping[str, Make] = {
    "blimp": _published("blimp", ("blimp", "blimp_filtered"), ".jsonl", _json_pairs),
    "supplement": _published("supplement", ("blimp-supplement", "supplement_filtered"), ".jsonl", _json_pairs),
    "zorro": _published("zorro", ("zorro",), ".txt", _zorro_pairs),
    "agreement": _agreement,
    "climp": _published("climp", ("climp-zh",), ".csv", _climp_pairs),
    "pairs": _own,
}
