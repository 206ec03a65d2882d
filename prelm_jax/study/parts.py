"""What the sections of a page of a study have in common: HTML that grows, files beside it, names and families."""

import base64
import csv
import io
import itertools
from collections.abc import Sequence
from html import escape

from prelm_jax.report.page import COLORS
from prelm_jax.study.scores import Model, Results

NAMES = {"bert": "BERT", "openai-gpt": "GPT", "elmo": "ELMo"}
FAMILIES = ("bert", "openai-gpt", "elmo", "word2vec", "trigram", "unigram")  # Each has a color.

Rows = Sequence[Sequence[str]]


class Parts:
    """The HTML of a page and its files as they grow; `labels`: what it calls a model, or a run with its checkpoints."""

    def __init__(self, results: Results):
        self.results = results
        self.labels = short_names([name for model in results.all_models for name in (model.name, model.base)])
        self.html: list[str] = []
        self.files: dict[str, str] = {}

    def add(self, html: str) -> None:
        """Adds to the end of the page."""
        self.html.append(html)

    def link(self, name: str, content: str, kind: str = "text/csv") -> str:
        """A link that holds the content of a file, which is written beside the page, too."""
        self.files[name] = content
        data = base64.b64encode(content.encode()).decode()
        return f'<a class="data" download="{name}" href="data:{kind};base64,{data}">{name}</a>'

    def link_csv(self, name: str, header: Sequence[str], rows: Rows) -> str:
        """A link to a table as CSV."""
        output = io.StringIO()
        csv.writer(output, lineterminator="\n").writerows([header, *rows])
        return self.link(f"{file_name(name)}.csv", output.getvalue())

    def figure(self, name: str, caption: str, svg: str, header: Sequence[str], rows: Rows) -> str:
        """A picture with its data."""
        link = self.link_csv(name, header, rows)
        return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}{link}</figure>"

    def grid(self, title: str, text: str, figures: Sequence[str]) -> None:
        """Adds a section of pictures, unless there is none."""
        if figures:
            self.add(f'<h2>{title}</h2><p>{text}</p><div class="grid">{"".join(figures)}</div>')


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names without the directories that all of those with directories have in common, and without options of corpora.

    `short_names(["a/b/c", "a/b/d/e", "word2vec:a/b/c.txt,sentences=line"])` has the values c, d/e and word2vec:c.txt.
    """
    paths = [name.split("/")[:-1] for name in names if "/" in name and ":" not in name]
    common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    prefix = "".join(f"{parts[0]}/" for parts in common)
    kinds = {name: name.partition(":") for name in names}
    return {
        name: f"{kind}:{rest.removeprefix(prefix).partition(',')[0]}" if colon else name.removeprefix(prefix)
        for name, (kind, colon, rest) in kinds.items()
    }


def file_name(label: str) -> str:
    """A label as a part of a file's name."""
    return "-".join("".join(x if x.isalnum() or x in "-." else " " for x in label).split())


def color(family: str) -> str:
    return COLORS[FAMILIES.index(family) % len(COLORS)] if family in FAMILIES else COLORS[-1]


def family_name(name: str) -> str:
    return NAMES.get(name, name)


def legend(models: Sequence[Model]) -> str:
    families = [family for family in FAMILIES if any(model.family == family for model in models)]
    return " ".join(f'<span style="color: {color(each)}">■</span> {escape(family_name(each))}.' for each in families)
