"""The report of work directories and studies as one HTML page."""

import os
from collections.abc import Sequence
from pathlib import Path

from prelm_jax.finetuning.results import RESULTS, read_results, seed_directories
from prelm_jax.finetuning.sections import section
from prelm_jax.report.page import read_curves, render
from prelm_jax.storage import is_remote, output_file, reachable, write_file
from prelm_jax.study import page, records, scores
from prelm_jax.workdir import WorkDir


def write_report(paths: Sequence[str | os.PathLike], output: str | os.PathLike) -> Path | None:
    """Writes one page for runs, fine-tunings and studies; returns the folder of its data, if there is a study.

    For a fine-tuning it shows all seeds and the mistakes of the median seed. The scores of a study (a directory of
    records) come first, with the results of the given fine-tunings; the data of its figures and tables are also written
    as CSV and LaTeX to a folder next to the page: `report-data` for `report.html`.

    Raises InputError for a path that is none of these.

        prelm_jax.write_report(["runs/bert-demo", "runs/bert-muon"], "report.html")
    """
    with output_file(output) as file:  # What is wrong with it is said before the work.
        seeds = {path: seed_directories(path) for path in paths}
        studies = [path for path, found in seeds.items() if not found and _is_study(path)]
        seeds = {path: found for path, found in seeds.items() if path not in studies}
        curves = [read_curves(each) for path, found in seeds.items() for each in found or [path]]
        sections = [section(path) for path, found in seeds.items() if found]
        files, title = {}, ""
        if studies:
            tuned = {str(path): read_results(path) for path in seeds if (reachable(path) / RESULTS).is_file()}
            study = page.draw(scores.read_results(list(map(Path, studies))), tuned)
            sections, files, title = [study.html, *sections], study.files, "Study"
        text = render(curves, sections, title=title)
        file.write_text(text, encoding="utf-8")
    if not files:
        return None
    folder = Path(output).with_name(f"{Path(output).stem}-data")
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        write_file(folder / name, content.encode())
    return folder


def _is_study(path: str | os.PathLike) -> bool:
    """Whether a directory holds records, and is no run."""
    return not is_remote(path) and not WorkDir(path).exists() and bool(records.find(path))
