"""The report of work directories, of pretraining and of fine-tuning alike, as one HTML page."""

import os
from collections.abc import Sequence

from prelm_jax.finetuning.results import seed_directories
from prelm_jax.finetuning.sections import section
from prelm_jax.report.page import read_curves, render
from prelm_jax.storage import output_file


def write_report(paths: Sequence[str | os.PathLike], output: str | os.PathLike) -> None:
    """Writes the page of some work directories; of a fine-tuning, it shows all seeds and what the median one got wrong.

    Raises InputError for a path that is no work directory.

        prelm_jax.write_report(["runs/bert-demo", "runs/bert-muon"], "report.html")
    """
    seeds = {path: seed_directories(path) for path in paths}
    curves = [read_curves(each) for path, found in seeds.items() for each in found or [path]]
    page = render(curves, [section(path) for path, found in seeds.items() if found])
    with output_file(output) as file:
        file.write_text(page, encoding="utf-8")
