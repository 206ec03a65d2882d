"""Fine-tuning: labelled files -> frames -> batches -> train -> results, for one seed after the other."""

import dataclasses
import hashlib
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from prelm_jax.cache import digest
from prelm_jax.data.examples import Example, Label
from prelm_jax.data.frames import WIDTHS, Frame
from prelm_jax.data.framing import frame_examples
from prelm_jax.data.rows import Row
from prelm_jax.data.tasks import TaskBatches, TaskEvaluation, best_num_rows, weighted
from prelm_jax.errors import InputError
from prelm_jax.families import find_family
from prelm_jax.finetuning import metrics
from prelm_jax.finetuning.card import task_card
from prelm_jax.finetuning.config import FineTuning
from prelm_jax.finetuning.files import check_labels, label_names, print_counts, read_examples
from prelm_jax.finetuning.predictions import PREDICTIONS, write_predictions
from prelm_jax.finetuning.results import RESULTS, Results, SeedResult, read_results, write_results
from prelm_jax.formats.base import LoadedModel, ModelConfig, save
from prelm_jax.formats.transfer import initial_params
from prelm_jax.hub import fetch, is_hub_name
from prelm_jax.inference.base import Pretrained, Sample
from prelm_jax.inference.decoding import Prediction, decode
from prelm_jax.loading import load_checkpoint, load_encoder
from prelm_jax.models import heads
from prelm_jax.models.task import EncoderConfig, TaskModel, TaskModelConfig
from prelm_jax.run import RunRecord, with_name
from prelm_jax.storage import check_apart, reachable
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.train import placed_batches, train
from prelm_jax.training.contract import Params
from prelm_jax.training.parameters import path_name
from prelm_jax.training.step import make_predict
from prelm_jax.workdir import WorkDir

# The fields that say how examples and parameters are found. Both are compared by fingerprint.
SOURCES = ("name", "train", "dev", "init_from", "columns", "metric", "positive")


class Task(NamedTuple):
    """A fine-tuning whose files are read: all that its seeds share."""

    run: FineTuning
    pretrained: Pretrained
    tokenizer: Tokenizer
    config: TaskModelConfig
    frame: Frame
    names: tuple[str, ...]  # Of labels, by number.
    train_examples: list[Example]
    dev_examples: list[Example]
    train_rows: list[Row]
    dev_rows: list[Row]
    facts: dict[str, object]  # What decides the bits besides the fields of the run.

    def batches(self, seed: int, devices: int, batch_size: int | None = None) -> TaskBatches:
        """The training batches of a seed, packed where that pays; `batch_size`: instead of the run's."""
        size, rows = batch_size or self.run.batch_size, self.train_rows
        if not (self.frame.packs and self.config.head.packs):
            return TaskBatches(self.frame, rows, size, seed)
        # The same for 1, 2, 4 and 8 devices, of which each gets as many packed rows.
        multiple = self.run.accumulate * math.lcm(8, devices)
        lengths = np.random.default_rng(0).permutation([row.length for row in rows])
        return TaskBatches(self.frame, rows, size, seed, best_num_rows(lengths, size, multiple))


def prepare(run: FineTuning) -> Task:
    """Reads the files of a task and the model that it starts from. Raises InputError for what the user can mend."""
    missing = [f"--{name.replace('_', '-')}" for name in ("init_from", "train", "dev") if getattr(run, name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} must be given")
    if is_hub_name(str(run.init_from)):
        run = dataclasses.replace(run, init_from=fetch(str(run.init_from))[0])
    train_data, dev_data = (read_examples(str(spec), run.kind, run.columns) for spec in (run.train, run.dev))
    names = label_names(train_data.examples, run.kind)
    check_labels(str(run.train), train_data, run.kind, names)
    check_labels(str(run.dev), dev_data, run.kind, names)

    metrics.check_positive(run.kind, run.positive, names)
    if run.metric is not None and run.metric not in (
        known := metrics.scores(run.kind, dev_data.examples, _gold(dev_data.examples), names, run.positive)
    ):
        raise InputError(f"--metric {run.metric}: the metrics of this task are {', '.join(known)}")
    pretrained = load_encoder(str(run.init_from))
    family = find_family(pretrained.config.model_type, run.init_from)
    tokenizer = family.frame.task_tokenizer(pretrained.tokenizer)
    positions = getattr(pretrained.config, "max_position_embeddings", None)  # ELMo's have no end.
    max_length = min(run.max_length or WIDTHS[-1], positions or WIDTHS[-1])
    if not 0 <= run.reinitialize_layers <= pretrained.config.num_layers:
        raise InputError(f"--reinitialize-layers {run.reinitialize_layers}: there are {pretrained.config.num_layers}")
    if run.kind == "spans" and not family.frame.answers:
        raise InputError(f"{run.init_from} reads from left to right (GPT), so it cannot tell where an answer begins")
    frame = family.frame(tokenizer, max_length, run.symmetric)
    framed = []
    for spec, data in ((run.train, train_data), (run.dev, dev_data)):
        rows, num_cut = frame_examples(frame, data.examples, run.kind, names, run.stride)
        if jax.process_index() == 0:
            print_counts(str(spec), data.counts, num_cut, len(data.examples), max_length)
        framed.append(rows)
    if (weight_N := run.weights_by_label(names, framed[0])) is not None:
        framed[0] = weighted(framed[0], weight_N)
    vocab_size = max(pretrained.config.vocab_size or 0, tokenizer.vocab_size)
    config = TaskModelConfig(
        cast(EncoderConfig, dataclasses.replace(pretrained.config, vocab_size=vocab_size)),
        _head(run.head, names, framed[0]),
        run.tune,
        run.layer_decay,
        run.lm_coefficient,
    )
    config.check_together()
    facts: dict[str, object] = {
        "head": with_name(config.head),
        "encoder": config.encoder,
        "labels": names,
        "max_length": max_length,
        "train_fingerprint": _fingerprint(train_data.examples),
        "dev_fingerprint": _fingerprint(dev_data.examples),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "encoder_fingerprint": None if run.scratch else params_fingerprint(pretrained.params),
    }
    return Task(
        run.scheduled(len(framed[0])),
        pretrained,
        tokenizer,
        config,
        frame,
        names,
        train_data.examples,
        dev_data.examples,
        framed[0],
        framed[1],
        facts,
    )


def finetune(
    run: FineTuning, workdir: str | os.PathLike | None = None, seeds: int = 3, take_over: bool = False
) -> tuple[Path, Results]:
    """Trains a task with the seeds 0 to `seeds` - 1, each in a work directory of its own; resumes what is there.

    Returns the directory above them and the results of all that are complete, which results.json there holds as well.

    workdir: that directory; by default runs/<task>-<stem of the training file>-<8 hex of the identity>.
    Raises InputError for what the user can mend, Preempted when SIGTERM stopped a training after saving.
    """
    task = prepare(run)
    path = reachable(workdir) if workdir is not None else default_workdir(task)
    if seeds > 1 and jax.process_index() == 0:
        print(f"{seeds} seeds of {task.run.loop.steps:,} steps; for a first trial: --seeds 1", file=sys.stderr)
    for seed in range(seeds):
        directory = WorkDir(path / f"seed-{seed}")
        with directory.hold(take_over):
            results = _results(task, path)
            if directory.exists() and any(
                (each.seed, each.step) == (seed, task.run.loop.steps) for each in results.seeds
            ):
                seeded = dataclasses.replace(task.run, seed=seed)
                directory.check(_record(task, seeded), seeded)
                continue
            if jax.process_index() == 0:
                print(f"seed {seed} of {seeds}: {directory.path}", file=sys.stderr)
            result, predictions = _train(task, seed, directory)
            if jax.process_index() == 0:
                write_predictions(directory.path / PREDICTIONS, run.kind, task.dev_examples, predictions, task.names)
                others = [each for each in _results(task, path).seeds if each.seed != seed]
                ordered = sorted([*others, result], key=lambda each: each.seed)
                write_results(path, dataclasses.replace(results, seeds=tuple(ordered)))
    return path, _results(task, path)


def _results(task: Task, path: Path) -> Results:
    """The results in a directory, without seeds where there are none yet."""
    run = task.run
    if (path / RESULTS).is_file():
        return read_results(path)
    return Results(
        task=run.name,
        kind=run.kind,
        model_type=task.config.model_type,
        init_from=None if run.scratch else run.init_from,
        train=str(run.train),
        dev=str(run.dev),
        train_examples=len(task.train_examples),
        dev_examples=len(task.dev_examples),
        labels=task.names,
        metric=run.metric or next(iter(_scores(task, _gold(task.dev_examples)))),
        baselines=_baselines(task),
        seeds=(),
    )


def _gold(examples: Sequence[Example]) -> list[Label]:
    return [cast(Label, example.label) for example in examples]


def _scores(task: Task, labels: Sequence[Label]) -> dict[str, metrics.Score]:
    """The metrics of predictions for the dev examples."""
    return metrics.scores(task.run.kind, task.dev_examples, labels, task.names, task.run.positive)


def _baselines(task: Task) -> dict[str, dict[str, float]]:
    """metric -> trivial baseline -> value."""
    return metrics.baselines(
        task.run.kind, task.dev_examples, task.names, task.run.positive, training=task.train_examples
    )


def export(workdir: str | os.PathLike, directory: str | os.PathLike, seed: int | None = None) -> int:
    """Writes the model of a seed as a model directory in the format that others read; returns the seed.

    workdir: the directory above the seeds. seed: by default that of the median. Raises InputError for one that is not
    complete.
    """
    results = read_results(workdir)
    chosen = results.of_seed(seed)
    source = WorkDir(reachable(workdir) / f"seed-{chosen.seed}")
    check_apart(directory, source.path, *filter(None, [results.init_from]))
    record = source.read_record()
    _, model = load_checkpoint(source, chosen.step)
    format = find_family(record.model_type, source.path).format
    name, command = Path(directory).name, shlex.join(record.command)
    has_class = format.head_class(cast(TaskModelConfig, model.config).head) is not None
    card = task_card(results, chosen.seed, name, format.library if has_class else "prelm_jax", command)
    save(model.loaded, format, directory, card)
    return chosen.seed


def default_workdir(task: Task) -> Path:
    """runs/<task>-<stem of the training file>-<8 hex of the identity>."""
    stem = Path(str(task.run.train).partition(",")[0]).name.partition(".")[0]
    record = _record(task, dataclasses.replace(task.run, seed=0))
    identity = digest([record.model_type, record.identity, record.segments[0].optimizer])
    return Path("runs") / f"{task.run.name}-{stem}-{identity[:8]}"


def _record(task: Task, run: FineTuning) -> RunRecord:
    return RunRecord.of(run, task.config.model_type, SOURCES, task.facts)


def _train(task: Task, seed: int, directory: WorkDir) -> tuple[SeedResult, list[Prediction]]:
    """Trains a seed to its end; its result and its predictions for the dev examples."""
    run = dataclasses.replace(task.run, seed=seed)
    model = task.config.build(jnp.dtype(run.precision))
    batches = task.batches(seed, run.loop.mesh.build().size)
    evaluation = DevEvaluation(task, model)
    start = None if run.scratch else lambda fresh: initial(task, fresh)
    record, largest = _record(task, run), batches.largest()
    step, _ = train(run, directory, record, task.tokenizer, model, batches, evaluation, start, largest=largest)
    looks = sum("evaluation/loss" in line for line in directory.read_metrics())
    scores = _scores(task, [each.label for each in evaluation.predictions])
    return SeedResult(seed, step, looks, scores), evaluation.predictions


def initial(task: Task, fresh: Params) -> Params:
    """The parameters to start from: the pretrained ones, but for new ones and the layers to reinitialize."""
    loaded = cast(LoadedModel[ModelConfig, Tokenizer], task.pretrained.loaded)
    format = find_family(task.config.model_type, task.run.init_from).format
    params = initial_params(loaded, format, cast(ModelConfig, task.config.encoder), fresh, task.tokenizer)
    if not task.run.reinitialize_layers:
        return params

    def choose(path: tuple[object, ...], new: jax.Array, loaded: jax.Array) -> jax.Array:
        return new if task.config.depth(path_name(path)) <= task.run.reinitialize_layers else loaded

    return jax.tree_util.tree_map_with_path(choose, fresh, params)


def _head(head: heads.Config, names: Sequence[str], rows: Sequence[Row]) -> heads.Config:
    """The head for the labels of the training file."""
    if isinstance(head, heads.Label):
        number = len(names) if head.kind != "number" else 1
        return dataclasses.replace(head, num_labels=number, pair=len(rows[0].texts) == 2)
    return dataclasses.replace(head, num_tags=len(names)) if isinstance(head, heads.Tags) else head


def _fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 (hex) of examples."""
    return digest([dataclasses.astuple(example) for example in examples])


def params_fingerprint(params: Params) -> str:
    """SHA-256 (hex) of parameters and their names."""
    found = hashlib.sha256()
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.asarray(value).tobytes())
    return found.hexdigest()


class DevEvaluation:
    """Evaluation on the dev examples, each of them once; `predictions` keeps the last results."""

    def __init__(self, task: Task, model: TaskModel):
        self._task = task
        self._batches = TaskEvaluation(task.frame, task.dev_rows, task.run.batch_size)
        self._predict = make_predict(model)
        self._baselines: dict[str, dict[str, float]] = {}
        self.predictions: list[Prediction] = []

    def __call__(self, params: Params, carry: Params, mesh: jax.sharding.Mesh) -> dict[str, float]:
        """`loss`, the mean over the examples, and the metrics of the task by name."""
        count = len(self._batches)
        placed = (batch for _, batch in placed_batches(self._batches, 0, count, mesh))
        outputs: dict[int, dict[str, np.ndarray]] = {}
        loss = weight = 0.0
        for step, found in enumerate(self._predict(params, carry, placed)):
            loss += found["loss"].sum(dtype=np.float64)
            weight += found["weight"].sum(dtype=np.float64)
            for i, row in enumerate(self._batches.numbers(step)[: self._batches.num_real(step)]):
                assert row not in outputs
                outputs[int(row)] = {name: values[i] for name, values in found.items()}
        assert len(outputs) == len(self._task.dev_rows)
        task = self._task
        ordered = [outputs[row] for row in range(len(outputs))]
        threshold = metrics.null_threshold(task.dev_examples)
        self.predictions = decode(task.run.kind, task.dev_examples, task.dev_rows, ordered, task.names, threshold)
        scores = _scores(task, [each.label for each in self.predictions])
        return {"loss": float(loss / weight)} | {name: score.value for name, score in scores.items()}

    def baselines(self) -> dict[str, dict[str, float]]:
        """metric -> trivial baseline -> value."""
        return _baselines(self._task)

    def sample(self, params: Params) -> list[Sample]:
        """None: predictions.jsonl has every example."""
        return []

    def describe(self, values: Mapping[str, float]) -> str:
        """Metrics beside their best trivial baselines."""
        self._baselines = self._baselines or self.baselines()

        def shown(name: str, value: float) -> str:
            best = max(self._baselines.get(name, {}).values(), default=None)
            return f"{name} {value:.4f}" + ("" if best is None else f" (baseline {best:.4f})")

        return "dev  " + "  ".join(shown(name, value) for name, value in values.items())
