"""The page of a study: its protocol, a table of scores with intervals, curves, and the data of each of them.

A pure function of records: the same ones give the same bytes.

    html, files = draw(read_results([Path("study")]))
"""

from collections.abc import Mapping
from typing import NamedTuple

from prelm_jax.finetuning.results import Results as Tuned
from prelm_jax.study import figures, tables
from prelm_jax.study.parts import Parts
from prelm_jax.study.scores import Results


class Page(NamedTuple):
    """HTML, and by name the files that go with it."""

    html: str
    files: dict[str, str]


def draw(results: Results, tuned: Mapping[str, Tuned] | None = None) -> Page:
    """The page of some records, and of fine-tunings by directory."""
    parts = Parts(results)
    tables.protocol(parts)
    tables.summary(parts, tuned or {})
    tables.differences(parts)
    figures.learning_curves(parts)
    figures.layer_curves(parts)
    figures.similarities(parts)
    figures.replacements(parts)
    tables.neighbors(parts)
    tables.details(parts)
    return Page("\n".join(parts.html), parts.files)
