"""A study of random numbers, for the tests of the page."""

import random
from pathlib import Path

from prelm_jax.study import records
from prelm_jax.study.records import Header, Row

MODELS = {"bert": 0.60, "openai-gpt": 0.70, "elmo": 0.75}
LAYERS = {"bert": 3, "openai-gpt": 3, "elmo": 3, "word2vec": 1}


def header(test: str, metric: str, subject: str, family: str, **changes: object) -> Header:
    """A header; its model is another one for each subject."""
    fields = {
        "model": subject.encode().hex(),
        "data": "da" * 32,
        "settings": {"scoring": f"sum of {family}"} if metric == "macro_accuracy" else {},
        "version": "1",
    }
    return Header(**{"test": test, "metric": metric, "subject": subject, "family": family, **fields, **changes})


def pairs(skill: float, seed: int, tied: bool = False) -> list[Row]:
    """Rows of minimal pairs, ten of each of four paradigms."""
    rng = random.Random(seed)
    rows = []
    for paradigm in ("agreement", "anaphora", "island", "npi<&_>"):
        for i in range(10):
            tie = tied and i == 0
            value = 0.5 if tie else float(rng.random() < skill)
            rows.append(Row(f"{paradigm}_{i}", paradigm, value, tie=tie, unknown=int(i == 1)))
    return rows


def probe(skill: float, seed: int, layers: int) -> list[Row]:
    """Rows of a probe: test, dev and control task of each layer, and the majority."""
    rng = random.Random(seed)
    rows = [Row(str(i), str(i // 4), float(i % 4 < 2), None, "majority") for i in range(40)]
    for layer in range(layers):
        for kind, drop in (("", 0.0), ("dev", 0.0), ("control", 0.3)):
            chance = skill - drop + (0.2 if layer == 1 else 0)
            rows += [Row(str(i), str(i // 4), float(rng.random() < chance), layer, kind) for i in range(40)]
    return rows


def cka(layers: int) -> list[Row]:
    """The similarity of each layer with each."""
    return [
        Row(f"{layer} {other}", "", 1 - abs(layer - other) / layers)
        for layer in range(layers)
        for other in range(layers)
    ]


def neighbors() -> list[Row]:
    return [Row(f"The [bank] <of> a river ⇒ the left [bank] {i}", "bank", 0.9 - i / 10, 2) for i in range(2)]


def replacement() -> list[Row]:
    """Words that move if their left neighbor is replaced."""
    words = range(3)
    return [Row(f"0 {i} {j}", "a <b> c", float(j == i - 1), None) for i in words for j in words]


def write_study(directory: Path, seeds: int = 1) -> Path:
    """Records of the families at equal words, of checkpoints, an untrained BERT, a unigram and word2vec."""
    number = 0
    for seed in range(seeds):
        for family, skill in MODELS.items():
            name = f"runs/seed-{seed}/{family}" if seeds > 1 else f"runs/{family}"
            facts = {"step": 100, "words_seen": 2_000_000, "flops": 1e15, "seed": seed}
            number += 1
            records.write(directory, header("blimp", "macro_accuracy", name, family, **facts), pairs(skill, number))
            rows = probe(skill, number, LAYERS[family])
            probing = {"settings": {"sentences": {"train": 30, "dev": 10}, "penalties": [0.1, 1], "version": 1}}
            records.write(directory, header("upos", "accuracy", name, family, **facts, **probing), rows)
            records.write(directory, header("cka", "mean", name, family, **facts), cka(LAYERS[family]))
            records.write(directory, header("neighbors", "mean", name, family, **facts), neighbors())
            records.write(directory, header("replacement", "mean", name, family, **facts), replacement())
            for step in (25, 50):
                facts = {"step": step, "words_seen": 20_000 * step, "flops": 1e13 * step, "seed": seed}
                at = header("blimp", "macro_accuracy", f"{name}-trunk@{step}", family, **facts)
                records.write(directory, at, pairs(skill * (0.8 + step / 500), number + step))
    records.write(directory, header("upos", "accuracy", "untrained:bert:demo", "bert", **probing), probe(0.4, 99, 3))
    records.write(directory, header("upos", "accuracy", "word2vec:a", "word2vec", **probing), probe(0.5, 98, 1))
    records.write(
        directory, header("blimp", "macro_accuracy", "unigram:runs/bert", "unigram"), pairs(0.5, 97, tied=True)
    )
    return directory
