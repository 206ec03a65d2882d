"""The predictions that BabyLM's scorer takes, of any subject: of each minimal pair the sentence that it prefers.

    {"blimp": {"adjunct_island": {"predictions": [{"id": "adjunct_island_0", "pred": "Who should …"}, …]}, …},
     "blimp_supplement": …}

The scorer compares `pred` with the good sentence of the same line. Of a tie it gets the good one, as it would from
BabyLM's own pipeline, which takes the first of two equal scores: its number is that of a report in which ties count 1.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from prelm_jax.errors import InputError
from prelm_jax.storage import write_file
from prelm_jax.study.base import Test
from prelm_jax.study.pairs import PairsTest
from prelm_jax.study.records import Record, slug

TASKS: Mapping[str, str] = {"blimp": "blimp", "supplement": "blimp_supplement"}  # Their names for our tests.

Predictions = dict[str, dict[str, dict[str, list[dict[str, str]]]]]


def predictions(records: Sequence[tuple[PairsTest, Record]]) -> Predictions:
    """The predictions of one subject from its records of TASKS. Raises InputError where a record lacks pairs."""
    found: Predictions = {}
    for test, record in records:
        task = found.setdefault(TASKS[test.name], {})
        rows = {row.item: row for row in record.rows if not row.kind}
        for pair in test.pairs:
            if pair.item not in rows:
                raise InputError(f"the record of {test.name} and {record.header.subject} lacks {pair.item}: delete it")
            chosen = pair.bad if rows[pair.item].value == 0 else pair.good
            task.setdefault(pair.group, {"predictions": []})["predictions"].append({"id": pair.item, "pred": chosen})
    return found


def check(tests: Sequence[Test]) -> None:
    """Raises InputError unless there are tests that BabyLM has, on all of their pairs."""
    known = [test for test in tests if test.name in TASKS]
    if not known:
        raise InputError(f"--babylm needs a test of BabyLM's: add --tests {' or '.join(TASKS)}")
    if any(test.settings["pairs"] for test in known):
        raise InputError("--babylm needs the predictions for all pairs: add --pairs 0")


def write_predictions(directory: Path, subject: str, records: Sequence[tuple[PairsTest, Record]]) -> Path:
    """Writes the predictions of a subject into a directory; returns the path of the file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{slug(subject)}.json"
    write_file(path, (json.dumps(predictions(records), ensure_ascii=False) + "\n").encode())
    return path
