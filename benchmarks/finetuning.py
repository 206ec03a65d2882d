"""Fine-tuning on real tasks: `prelm finetune` beside Hugging Face's Trainer, and beside less of a model.

    python benchmarks/finetuning.py --data ../shared/data/tasks --init-from minilm=DIR --record ours.json
    python benchmarks/finetuning.py --data ../shared/data/tasks --init-from minilm=DIR --record trainer.json \
        --contenders trainer
    python benchmarks/finetuning.py --table ours.json trainer.json

ours       `prelm finetune`, all parameters trained
trainer    transformers' model for the task and its Trainer: the same pretrained weights, head and its initial
           distribution, dropout, optimizer, schedule, epochs, batch size, longest row and examples; padded to the
           longest row of a batch
frozen     `prelm finetune` with the encoder as it is, by the recipe of classify_frozen and tag_frozen
scratch    as ours, from fresh parameters
words      no neural network: scikit-learn's logistic regression on the words of a text and their pairs, or on a word
           and its two neighbors

All are measured by the same code on the same examples, which no choice was made on. A record keeps what was done, and
the same command does what is missing, so that parts (`--tasks`, `--contenders`, each with a record of its own) can run
side by side. With `--table RECORD …` nothing is trained, and one table printed: mean ± standard deviation over seeds,
and Welch's t between ours and Trainer's.

Needs the extra `test`; `pip install accelerate` for the Trainer, `pip install scikit-learn` for words.
"""

import dataclasses
import itertools
import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import harness
import numpy as np
import torch
import transformers
import tyro
from rich.console import Console
from rich.table import Table

from prelm_jax.data.examples import Columns, Example, Kind
from prelm_jax.finetuning import metrics
from prelm_jax.finetuning.files import label_names, read_examples
from prelm_jax.finetuning.results import read_results

Contender = Literal["ours", "trainer", "frozen", "scratch", "words"]
WARMUP, WEIGHT_DECAY, EPS, CLIP_NORM = 0.1, 0.01, 1e-6, 1.0
NO_LABEL = -100  # What PyTorch's cross entropy leaves out.


@dataclasses.dataclass(frozen=True)
class Task:
    """A labeled data set. `metric`: the one that its papers report. `examples`: of the training file, drawn once."""

    kind: Kind
    train: str
    test: str
    metric: str
    columns: Columns = dataclasses.field(default_factory=Columns)
    max_length: int = 128
    examples: int | None = None


PAIR = Columns("sentence1", "sentence2", "label")
SIMILARITY = Columns("5", "6", "4")
UNHEADED = Columns("0", None, "1")
CHNSENTICORP = "zh/ChnSentiCorp/{}.tsv"
TASKS = {
    "sst2": Task("label", "sst2/train.tsv", "sst2/test.tsv", "accuracy", Columns("sentence"), examples=8000),
    "rte": Task("label", "glue-small/RTE/train_full.tsv", "glue-small/RTE/dev.tsv", "accuracy", PAIR),
    "cola": Task(
        "label", "glue-small/CoLA/train_full.tsv", "glue-small/CoLA/dev.tsv", "matthews", Columns("3", None, "1")
    ),
    "stsb": Task(
        "number",
        "stsbenchmark/sts-train.csv,format=tsv",
        "stsbenchmark/sts-dev.csv,format=tsv",
        "spearman",
        SIMILARITY,
    ),
    "sick": Task(
        "label",
        "sick/SICK_train.txt",
        "sick/SICK_test_annotated.txt",
        "accuracy",
        Columns("sentence_A", "sentence_B", "entailment_judgment"),
    ),
    "trec": Task(
        "label",
        "senteval-small/TREC.train.all,format=label-text",
        "senteval-small/TREC.test.all,format=label-text",
        "accuracy",
    ),
    "ewt": Task(
        "tags", "ud-en-ewt/en_ewt-ud-train.conllu", "ud-en-ewt/en_ewt-ud-dev.conllu", "accuracy", max_length=512
    ),
    "chnsenticorp": Task("label", "zh/ChnSentiCorp/train.tsv", "zh/ChnSentiCorp/dev.tsv", "accuracy", UNHEADED),
    "resume": Task(
        "tags",
        "zh/ner/resume/train.char.bmes,format=tsv",
        "zh/ner/resume/dev.char.bmes,format=tsv",
        "span_f1",
        UNHEADED,
        max_length=512,
    ),
}
TITLES = {
    "sst2": "SST-2",
    "rte": "RTE",
    "cola": "CoLA",
    "stsb": "STS-B",
    "sick": "SICK",
    "trec": "TREC",
    "ewt": "UD-EWT, UPOS",
    "chnsenticorp": "ChnSentiCorp",
    "resume": "Resume NER",
}
ENGLISH = ("sst2", "rte", "cola", "stsb", "sick", "trec", "ewt")
EXPERIMENTS = {"label": "classify", "number": "rate", "tags": "tag"}
FROZEN = {"label": "classify_frozen", "tags": "tag_frozen"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which contenders on which tasks."""

    data: Path = Path("../shared/data/tasks")  # Directory with the files of TASKS.
    init_from: tuple[str, ...] = ()  # NAME=DIR of each pretrained model; the Trainer takes directories of BERT.
    tasks: tuple[str, ...] = ENGLISH
    contenders: tuple[Contender, ...] = ("ours",)
    seeds: int = 3
    learning_rate: float = 1e-4
    epochs: int = 3
    batch_size: int = 32
    limit: tuple[int, int] | None = None  # Examples to train on and to test on at most, for a trial.
    directory: Path = Path("runs/benchmark")  # For the work directories of ours, and for drawn examples.
    record: Path = Path("finetuning.json")
    table: tuple[Path, ...] = ()  # Records to print, instead of training.


@dataclasses.dataclass(frozen=True)
class Data:
    """The files of a task, as commands name them, and their examples."""

    task: Task
    train: str
    test: str
    columns: Columns
    examples: list[Example]
    test_examples: list[Example]

    @property
    def names(self) -> tuple[str, ...]:
        return label_names(self.examples, self.task.kind)

    def scores(self, predictions: Sequence[Any]) -> dict[str, float]:
        """Each metric of predictions for the test examples."""
        found = metrics.scores(self.task.kind, self.test_examples, predictions, self.names)
        return {name: score.value for name, score in found.items()}


def read_data(s: Settings, name: str) -> Data:
    """The files of a task; where not all examples are wanted, files with some of them, drawn once."""
    task = TASKS[name]
    train, test = (str(s.data / spec) for spec in (task.train, task.test))
    read = [read_examples(spec, task.kind, task.columns).examples for spec in (train, test)]
    limits = s.limit or (task.examples, None)
    if limits == (None, None):
        return Data(task, train, test, task.columns, *read)
    written, kept = [], []
    for part, limit, examples in zip(("train", "test"), limits, read, strict=True):
        size = min(limit or len(examples), len(examples))
        kept.append([examples[i] for i in sorted(random.Random(0).sample(range(len(examples)), size))])
        path = s.directory / f"{name}-{part}-{size}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text("".join(json.dumps(as_object(example)) + "\n" for example in kept[-1]))
        unfinished.replace(path)
        written.append(str(path))
    has_pair = task.columns.pair is not None
    return Data(task, *written, Columns(pair="pair" if has_pair else None), *kept)


def as_object(example: Example) -> dict[str, object]:
    """An example in the columns that are read by default."""
    (first, *rest), label = example.sequences[0], example.label
    if isinstance(label, tuple):
        return {"tokens": list(first), "tags": list(label)}
    return {"text": first, **({"pair": rest[0]} if rest else {}), "label": label}


# ---- Ours ------------------------------------------------------------------------------------------------------------


def command(s: Settings, data: Data, contender: str, init_from: str, workdir: Path) -> list[str]:
    """The arguments of `prelm` that train a contender."""
    experiment = EXPERIMENTS[data.task.kind]
    arguments = ["--init-from", init_from, "--train", data.train, "--dev", data.test, "--workdir", str(workdir)]
    arguments += ["--metric", data.task.metric, "--seeds", str(s.seeds), "--max-length", str(data.task.max_length)]
    for name, value in vars(data.columns).items():
        arguments += [f"--columns.{name}", value] if name in ("text", "pair", "label") and value is not None else []
    if contender == "frozen":
        return ["finetune", f"finetuning:{FROZEN[data.task.kind]}", *arguments]
    arguments += ["--epochs", str(s.epochs), "--batch-size", str(s.batch_size), "--warmup", str(WARMUP)]
    arguments += ["--optimizer.learning-rate", str(s.learning_rate), "--optimizer.bias-correction", "moments"]
    arguments += ["--optimizer.weight-decay", str(WEIGHT_DECAY), "--optimizer.eps", str(EPS)]
    arguments += ["--optimizer.clip-norm", str(CLIP_NORM)]
    return ["finetune", f"finetuning:{experiment}", *arguments, *(["--scratch"] if contender == "scratch" else [])]


def train_ours(s: Settings, data: Data, contender: str, init_from: str, workdir: Path) -> Iterator[dict[str, float]]:
    """The metrics of each seed, trained by the command."""
    subprocess.run([sys.executable, "-m", "prelm_jax", *command(s, data, contender, init_from, workdir)], check=True)
    for seed in read_results(workdir).seeds[: s.seeds]:
        yield {name: score.value for name, score in seed.scores.items()}


# ---- Trainer ---------------------------------------------------------------------------------------------------------


class Collator:
    """Pads the rows of a batch, and their labels, to the longest."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        labels = [row["labels"] for row in rows]
        inputs = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        batch = dict(self._tokenizer.pad(inputs, return_tensors="pt"))
        if isinstance(labels[0], list):
            width = batch["input_ids"].shape[1]
            labels = [tags + [NO_LABEL] * (width - len(tags)) for tags in labels]
        return batch | {"labels": torch.tensor(labels)}


def rows_of(data: Data, examples: Sequence[Example], tokenizer: Any) -> list[dict[str, Any]]:
    """Examples as Trainer takes them; a tag stands at the first piece of its word."""
    numbers = {name: number for number, name in enumerate(data.names)}
    rows = []
    for example in examples:
        parts, label = example.sequences[0], example.label
        words = data.task.kind == "tags"
        texts = [list(part) if words else part for part in parts]
        row = tokenizer(*texts, truncation=True, max_length=data.task.max_length, is_split_into_words=words)
        if words:
            ids = row.word_ids()
            tags = [numbers[tag] for tag in cast(tuple, label)]
            first = [i is not None and i != before for i, before in zip(ids, [None, *ids[:-1]], strict=True)]
            found = [tags[i] if begins else NO_LABEL for i, begins in zip(ids, first, strict=True)]
            if sum(first) != len(tags):
                raise SystemExit(f"Trainer would lose words of example {example.id}")
        else:
            found = label if data.task.kind == "number" else numbers[cast(str, label)]
        rows.append({**row, "labels": found})
    return rows


def trainer(s: Settings, data: Data, init_from: str, seed: int, callbacks: Sequence[Any] = ()) -> Any:
    """A Trainer that is ready to train."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(init_from)
    transformers.set_seed(seed)
    words, number = data.task.kind == "tags", data.task.kind == "number"
    kind = transformers.AutoModelForTokenClassification if words else transformers.AutoModelForSequenceClassification
    options = {"num_labels": 1, "problem_type": "regression"} if number else {"num_labels": len(data.names)}
    model = kind.from_pretrained(init_from, **options)
    rows = rows_of(data, data.examples, tokenizer)
    steps = s.epochs * math.ceil(len(rows) / s.batch_size)
    arguments = transformers.TrainingArguments(
        output_dir=str(s.directory / "trainer"),
        num_train_epochs=s.epochs,
        per_device_train_batch_size=s.batch_size,
        per_device_eval_batch_size=s.batch_size,
        learning_rate=s.learning_rate,
        weight_decay=WEIGHT_DECAY,
        adam_epsilon=EPS,
        max_grad_norm=CLIP_NORM,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    found = transformers.Trainer(
        model=model, args=arguments, data_collator=Collator(tokenizer), train_dataset=rows, callbacks=list(callbacks)
    )
    warmup = int(WARMUP * steps)
    rate = lambda step: step / warmup if step < warmup else 1 - step / steps  # noqa: E731 # BERT's, as ours.
    found.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(found.create_optimizer(), rate)
    return found


def train_by_trainer(s: Settings, data: Data, init_from: str, seed: int) -> dict[str, float]:
    """The metrics of a seed."""
    found = trainer(s, data, init_from, seed)
    found.train()
    rows = rows_of(data, data.test_examples, transformers.AutoTokenizer.from_pretrained(init_from))
    output = found.predict(rows)
    if data.task.kind == "number":
        return data.scores([float(value) for value in output.predictions[:, 0]])
    best = output.predictions.argmax(-1)
    if data.task.kind == "label":
        return data.scores([data.names[i] for i in best])
    return data.scores(
        [
            tuple(data.names[i] for i, tag in zip(ids, tags, strict=True) if tag != NO_LABEL)
            for ids, tags in zip(best, output.label_ids, strict=True)
        ]
    )


# ---- Words -----------------------------------------------------------------------------------------------------------


def fit_words(data: Data) -> dict[str, float]:
    """The metrics of logistic regression."""
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.linear_model import LogisticRegression, Ridge

    tags = data.task.kind == "tags"
    features = FeatureHasher(2**18, input_type="string", alternate_sign=False)

    def of(examples: Sequence[Example]) -> Any:
        found = (each for example in examples for each in (word_features if tags else text_features)(example))
        return features.transform(found)

    labels = [tag for each in data.examples for tag in (cast(tuple, each.label) if tags else (each.label,))]
    model = Ridge() if data.task.kind == "number" else LogisticRegression(max_iter=30 if tags else 300, tol=1e-3)
    predicted = model.fit(of(data.examples), labels).predict(of(data.test_examples)).tolist()
    if not tags:
        return data.scores(predicted)
    each = iter(predicted)
    return data.scores([tuple(next(each) for _ in cast(tuple, example.label)) for example in data.test_examples])


def text_features(example: Example) -> list[list[str]]:
    """Words and pairs of neighbors of each text; which words both texts have, and which one has."""
    found, sets = [], []
    for place, text in enumerate(cast(tuple[str, ...], example.sequences[0])):
        lowered = text.lower()
        words = lowered.split() if lowered.isascii() or " " in lowered.strip() else list(lowered)
        found += [f"{place} {word}" for word in words]
        found += [f"{place} {a} {b}" for a, b in itertools.pairwise(words)]
        sets.append(set(words))
    if len(sets) == 2:
        found += [f"both {word}" for word in sets[0] & sets[1]] + [f"one {word}" for word in sets[0] ^ sets[1]]
    return [found]


def word_features(example: Example) -> list[list[str]]:
    """Each word with its neighbors, its ending and its form."""
    words = ["<S>", *cast(tuple[str, ...], example.sequences[0][0]), "</S>"]
    return [
        [f"= {w.lower()}", f"< {before.lower()}", f"> {after.lower()}", f"… {w[-3:]}", f"A {w[:1].isupper()}"]
        for before, w, after in zip(words, words[1:], words[2:], strict=False)
    ]


# ---- Records and tables ----------------------------------------------------------------------------------------------


def run(s: Settings) -> None:
    """Does what the record has not yet."""
    record = json.loads(s.record.read_text()) if s.record.exists() else {"machine": harness.machine(), "results": []}
    recipe = json.loads(
        json.dumps({name: getattr(s, name) for name in ("learning_rate", "epochs", "batch_size", "limit")})
    )
    if record.setdefault("recipe", recipe) != recipe:
        raise SystemExit(f"{s.record} has results of another recipe: {record['recipe']}")
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # JAX takes TF32 on a GPU too.
    models = dict(item.split("=", 1) for item in s.init_from)
    for name in s.tasks:
        data = read_data(s, name)
        baselines = metrics.baselines(data.task.kind, data.test_examples, data.names, training=data.examples)
        baseline = max(baselines[data.task.metric].values())
        for contender in s.contenders:
            if contender == "frozen" and data.task.kind not in FROZEN:
                continue
            for model, init_from in {"": ""}.items() if contender == "words" else models.items():
                key = {"task": name, "model": model, "contender": contender}
                result = next((r for r in record["results"] if {k: r[k] for k in key} == key), None)
                if result is None:
                    result = {**key, "metric": data.task.metric, "baseline": baseline, "seeds": [], "seconds": 0.0}
                    record["results"].append(result)
                if len(result["seeds"]) >= (1 if contender == "words" else s.seeds):
                    continue
                workdir = s.directory / f"{name}-{model}-{contender}"
                for scores in measure(s, data, contender, init_from, workdir, result):
                    value = scores[data.task.metric]
                    print(f"{TITLES[name]}, {f'{model} {contender}'.strip()}: {100 * value:.2f}", flush=True)
                    harness.write_json(s.record, record)


def measure(
    s: Settings, data: Data, contender: str, init_from: str, workdir: Path, result: dict[str, Any]
) -> Iterator[dict[str, float]]:
    """Adds the metrics of seeds, and the seconds that they took, to a result."""
    done, began = len(result["seeds"]), time.monotonic()
    if contender == "words":
        found = iter([fit_words(data)])
    elif contender == "trainer":
        found = (train_by_trainer(s, data, init_from, seed) for seed in range(done, s.seeds))
    else:
        result["command"] = shlex.join(["prelm", *command(s, data, contender, init_from, workdir)])
        found = list(train_ours(s, data, contender, init_from, workdir))[done:]
    for scores in found:
        result["seconds"] += time.monotonic() - began
        began = time.monotonic()
        result["seeds"].append(scores)
        yield scores


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """Welch's t between two samples; NaN where it is not defined."""
    if min(len(a), len(b)) < 2:
        return math.nan
    error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
    difference = statistics.fmean(a) - statistics.fmean(b)
    return difference / error if error else math.copysign(math.inf, difference) if difference else 0.0


def print_tables(records: Sequence[dict[str, Any]]) -> None:
    """A table of all results, a row for each model and task; then the means over the tasks."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    facts, words = {}, {}
    for result in (result for record in records for result in record["results"] if result["seeds"]):
        facts[result["task"]] = (result["metric"], result["baseline"])
        found = [100 * scores[result["metric"]] for scores in result["seeds"]]
        if result["contender"] == "words":
            words[result["task"]] = found
        else:
            values.setdefault((result["model"], result["task"]), {}).setdefault(result["contender"], []).extend(found)
    for task, found in words.items():
        for row in [row for (_, other), row in values.items() if other == task] or [values.setdefault(("", task), {})]:
            row["words"] = found
    order = ("ours", "trainer", "frozen", "scratch", "words")
    shown = [name for name in order if any(name in row for row in values.values())]
    compared = {"ours", "trainer"} <= set(shown)
    table = Table("model", "task", "metric (× 100)", *shown, *(["t"] if compared else []), "baseline")
    places = {name: place for place, name in enumerate(TASKS)}
    for (model, task), row in sorted(values.items(), key=lambda item: (item[0][0], places[item[0][1]])):
        metric, baseline = facts[task]
        cells = [mean_and_deviation(row.get(name, [])) for name in shown]
        cells += [f"{welch(row.get('ours', []), row.get('trainer', [])):+.1f}"] if compared else []
        table.add_row(model, TITLES[task], metric, *cells, f"{100 * baseline:.1f}")
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    for first, second in (("ours", "trainer"), ("ours", "scratch"), ("ours", "frozen"), ("frozen", "scratch")):
        for model in dict.fromkeys(model for model, _ in values):
            rows = [row for (name, _), row in values.items() if name == model and first in row and second in row]
            if rows:
                means = [[float(np.mean(row[side])) for row in rows] for side in (first, second)]
                a, b = map(statistics.fmean, means)
                print(f"{model}: mean of {len(rows)} tasks: {first} {a:.2f}, {second} {b:.2f}, difference {a - b:+.2f}")


def mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f} ({len(values)})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    settings = tyro.cli(Settings)
    if settings.table:
        print_tables([json.loads(path.read_text()) for path in settings.table])
    else:
        run(settings)
