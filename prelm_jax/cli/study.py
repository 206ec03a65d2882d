"""The command that measures what pretrained models know: study."""

import os
from pathlib import Path
from typing import Annotated

import tyro

from prelm_jax.bounds import NotNegative
from prelm_jax.cache import cache_compiled_programs
from prelm_jax.cli.options import AnyPath, Positional

DATA = Path(os.environ.get("PRELM_DATA", "data")) / "study"


def study(
    subjects: Annotated[Positional[tuple[AnyPath, ...]], tyro.conf.arg(metavar="SUBJECT …")],
    tests: tuple[str, ...],
    output: Path,
    data: Path = DATA,
    pairs: NotNegative = 100,
) -> None:
    """Measure what pretrained models know, and write a record for each of them and each test.

    Records that are there already are not measured again. prelm report OUTPUT draws them.

    Args:
        subjects: Models: a model directory, a work directory, or a checkpoint of it, RUN@STEP.
        tests: Tests by name.
        output: Directory of the records.
        data: Directory of the test sets, a folder for each; if unset, $PRELM_DATA/study.
        pairs: Minimal pairs of each paradigm to read, the first ones; 0 for all.
    """
    from prelm_jax.study.study import study
    from prelm_jax.study.subjects import open_subject
    from prelm_jax.study.tests import Settings, make_test

    cache_compiled_programs()
    settings = Settings(data, pairs)
    made = [make_test(name, settings) for name in tests]
    for path in study(map(open_subject, subjects), made, output):
        print(path)
