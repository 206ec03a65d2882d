"""Keeps the sentences of test sets out of a corpus, by exact match, whatever their case, spaces and punctuation."""

import csv
import html
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from prelm_jax.corpus.documents import Corpus
from prelm_jax.corpus.prepare import count_words
from prelm_jax.corpus.readers import extension
from prelm_jax.corpus.sentences import split
from prelm_jax.finetuning.records import text_lines
from prelm_jax.storage import output_file

ENDINGS = (".jsonl", ".tsv", ".tab", ".csv", ".txt", ".sgml", ".conllu")


class Excluded(NamedTuple):
    """What a corpus has after the exclusion."""

    words: int
    sentences: int
    left_out: int  # Sentences of test sets.


def exclude(sources: Sequence[str], tests: Iterable[Path], output: Path, words: int | None = None) -> Excluded:
    """Writes the documents of a corpus without the sentences of test sets, a sentence a line, to read as
    `OUTPUT,sentences=line`.

    tests: files of test sets; any field of them that is a sentence of the corpus is left out of it.
    words: stop after the document that reaches this number.
    """
    known = {key for path in tests for sentence in sentences_of(path) if (key := normal(sentence))}
    count = kept = left_out = 0
    with output_file(output) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        for document in Corpus(tuple(sources)).documents(description="excluding test sentences"):
            sentences = split(document.text, document.sentences, document.language)
            found = [sentence for sentence in sentences if normal(sentence) not in known]
            left_out += len(sentences) - len(found)
            kept += len(found)
            if found:
                file.write("\n".join(found) + "\n\n")
                count += sum(map(count_words, found))
            if words is not None and count >= words:
                break
    return Excluded(count, kept, left_out)


def normal(sentence: str) -> str:
    """The letters and digits of a sentence, in lower case: "Don't!" and "do n't ." are one."""
    return "".join(x for x in sentence.lower() if x.isalnum())


def data_files(folder: Path) -> list[Path]:
    """The files of test sets in a folder and below it, sorted."""
    return sorted(path for path in folder.rglob("*") if extension(path.name) in ENDINGS and "README" not in path.name)


def sentences_of(path: Path) -> Iterator[str]:
    """The fields of each line of a test set, each also cut into sentences; of SemCor's SGML, its sentences."""
    lines = [line for _, line in text_lines(str(path))]
    if extension(path.name) == ".sgml":
        for sentence in "".join(lines).split("</s>"):
            yield html.unescape(re.sub(r"<[^>]*>", " ", sentence.rpartition("<s ")[2].partition(">")[2]))
        return
    for line in lines:
        for field in _fields(line, extension(path.name)):
            plain = re.sub(r"</?b>|<eos>", " ", field)
            yield plain
            yield from split(plain, "library")


def _fields(line: str, ending: str) -> list[str]:
    if ending == ".jsonl":
        try:
            record = json.loads(line)
        except ValueError:
            return []
        return [value for value in record.values() if isinstance(value, str)] if isinstance(record, dict) else []
    if ending == ".conllu":
        return [line.partition("=")[2]] if line.startswith("# text") else []
    return next(csv.reader([line.rstrip("\r\n")]), []) if ending == ".csv" else line.split("\t")
