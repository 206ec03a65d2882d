"""The command that measures what pretrained models know: study."""

import os
from pathlib import Path
from typing import Annotated

import tyro

from prelm_jax.bounds import NotNegative
from prelm_jax.cache import cache_compiled_programs
from prelm_jax.cli.experiments import load_run
from prelm_jax.cli.options import AnyPath, Positional

DATA = Path(os.environ.get("PRELM_DATA", "data")) / "study"


def study(
    subjects: Annotated[Positional[tuple[AnyPath, ...]], tyro.conf.arg(metavar="SUBJECT …")],
    tests: tuple[str, ...],
    output: Path,
    data: Path = DATA,
    pairs: NotNegative = 100,
    babylm: Path | None = None,
) -> None:
    """Measure what pretrained models know, and write a record for each subject (a model) and test.

    Existing records are not measured again. prelm report OUTPUT draws them.

    Args:
        subjects: A model directory, a work directory, hub:OWNER/NAME, or RUN@STEP (STEP: a number, best or newest);
            or untrained:, unigram: or trigram: followed by a work directory or the name of an experiment, untrained:
            also by a model directory; or word vectors: word2vec:SPEC trains them on a corpus, and a file contains them
            in word2vec's text format.
        tests: Tests by name. Minimal pairs: blimp, supplement, zorro, agreement, climp, and pairs:FILES for your own.
            Probes by layer: upos, deprel, verb-number, length, depth, tense, subject-number, object-number,
            bigram-shift; uuas and dspr, the structural probe. Senses: coarsewsd, semcor, wic, scws. Words: ws353,
            simlex, men, analogies, and similarity:FILE, a TSV of word, word, rating. Geometry: selfsim, cka, and
            cka:SUBJECT to compare with the layers of another subject. To look at: neighbors, replacement.
        output: Directory of the records.
        data: Directory of the test sets, one folder each; if unset, $PRELM_DATA/study.
        pairs: Number of minimal pairs to read from each paradigm, from its start; 0 for all.
        babylm: Directory for one file of predictions per subject, for BabyLM's scorer (needs --pairs 0).
    """
    from prelm_jax.study import babylm as predictions
    from prelm_jax.study import records
    from prelm_jax.study.base import Settings
    from prelm_jax.study.opening import open_subject
    from prelm_jax.study.pairs import PairsTest
    from prelm_jax.study.study import study
    from prelm_jax.study.subjects import Subject
    from prelm_jax.study.tests import make_test

    cache_compiled_programs()

    def opened(subject: str) -> Subject:
        return open_subject(subject, lambda reference: load_run(reference)[1])

    settings = Settings(data, pairs, opened)
    made = [make_test(name, settings) for name in tests]
    if babylm is not None:
        predictions.check(made)
    paths = study(map(opened, subjects), made, output)
    if babylm is not None:
        for number, subject in enumerate(subjects):
            own = zip(made, paths[number * len(made) :], strict=False)
            found = [(test, records.read(path)) for test, path in own if isinstance(test, PairsTest)]
            kept = [(test, record) for test, record in found if test.name in predictions.TASKS]
            paths.append(predictions.write_predictions(babylm, subject, kept))
    print(*paths, sep="\n")
