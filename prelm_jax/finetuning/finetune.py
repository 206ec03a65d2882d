"""Fine-tuning: labeled files -> frames -> batches -> train -> results, for one seed after the other."""

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Mapping, Set
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from prelm_jax.cache import digest
from prelm_jax.data.examples import Label
from prelm_jax.data.tasks import TaskEvaluation
from prelm_jax.families import find_family
from prelm_jax.finetuning import metrics
from prelm_jax.finetuning.card import task_card
from prelm_jax.finetuning.config import FineTuning
from prelm_jax.finetuning.predictions import PREDICTIONS, read_predictions, write_predictions
from prelm_jax.finetuning.results import RESULTS, Results, SeedResult, read_results, seed_directories, write_results
from prelm_jax.finetuning.task import Task, gold_labels, prepare_task
from prelm_jax.formats.base import save
from prelm_jax.inference.base import Sample
from prelm_jax.inference.decoding import Prediction, decode
from prelm_jax.loading import load_checkpoint
from prelm_jax.models.task import TaskModel, TaskModelConfig
from prelm_jax.report.summary import LOSS
from prelm_jax.storage import check_apart, reachable
from prelm_jax.train import placed_batches, train
from prelm_jax.training.contract import Params
from prelm_jax.training.loop import LoopConfig
from prelm_jax.training.step import make_predict
from prelm_jax.workdir import WorkDir


def finetune(
    run: FineTuning, workdir: str | os.PathLike | None = None, seeds: int = 3, take_over: bool = False
) -> tuple[Path, Results]:
    """Trains a task with the seeds 0 to `seeds` - 1, each in its own work directory, or resumes it.

    Returns the directory above the seeds, and the results of all complete seeds, as in its results.json.

    workdir: that directory; by default runs/<task>-<stem of the training file>-<8 hex digits of the identity>.
    Raises InputError for errors that the user can fix, Preempted if SIGTERM stopped a training after saving.
    """
    if workdir is not None:
        run.loop.check_profile(workdir)
    task = prepare_task(run)
    path = reachable(workdir) if workdir is not None else default_workdir(task)
    for each in seed_directories(path):  # All of them, for results.json has the results of one task.
        seeded = task.seeded(int(each.name.removeprefix("seed-")))
        WorkDir(each).check(seeded.record, seeded.run)
    if seeds > 1 and jax.process_index() == 0:
        print(f"{seeds} seeds of {task.run.loop.steps:,} steps; for a first trial: --seeds 1", file=sys.stderr)
    empty = _empty_results(task)
    names = empty.baselines.keys()
    for seed in range(seeds):
        task = task.seeded(seed)
        directory = WorkDir(path / f"seed-{seed}")
        with directory.hold(take_over):
            done = next((each for each in _done(task, path, names) if each.seed == seed), None)
            if done is not None and _is_finished(done, directory, task.run.loop):
                directory.check(task.record, task.run)
                continue
            if jax.process_index() == 0:
                print(f"seed {seed} of {seeds}: {directory.path}", file=sys.stderr)
            result, predictions = _train(task, directory)
            if jax.process_index() == 0:
                write_predictions(directory.path / PREDICTIONS, run.kind, task.dev_examples, predictions, task.names)
                # Another process may have written those of its seed meanwhile.
                others = [each for each in _done(task, path, names) if each.seed != seed]
                ordered = sorted([*others, result], key=lambda each: each.seed)
                write_results(path, dataclasses.replace(empty, seeds=tuple(ordered)))
    results = dataclasses.replace(empty, seeds=_done(task, path, names))
    if jax.process_index() == 0 and results != read_results(path):  # --metric or --positive is another one.
        write_results(path, results)
    return path, results


def _empty_results(task: Task) -> Results:
    """The results before any seed is done."""
    run = task.run
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
        metric=run.metric or next(iter(task.scores(gold_labels(task.dev_examples)))),
        baselines=task.baselines(),
        seeds=(),
        positive=run.positive,
    )


def _done(task: Task, path: Path, names: Set[str]) -> tuple[SeedResult, ...]:
    """The results of the seeds that results.json has, by the metrics of these names.

    A seed is left out, and so evaluated again, where its work directory or its predictions are gone.
    """
    if not (path / RESULTS).is_file():
        return ()
    found, results = [], read_results(path)
    for each in results.seeds:
        directory = WorkDir(path / f"seed-{each.seed}")
        predictions = directory.path / PREDICTIONS
        if directory.exists() and predictions.is_file():
            if (each.scores.keys(), results.positive) != (names, task.run.positive):
                labels = [cast(Label, x.prediction) for x in read_predictions(predictions)]
                each = dataclasses.replace(each, scores=task.scores(labels))
            found.append(each)
    return tuple(found)


def _is_finished(result: SeedResult, directory: WorkDir, settings: LoopConfig) -> bool:
    """Whether a training would add no step to that of a result."""
    if result.step == settings.steps:
        return True
    with contextlib.closing(directory.open_checkpoints()) as checkpoints:
        return settings.gains_nothing(result.step, checkpoints.best_step)


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
    record = task.seeded(0).record
    identity = digest([record.model_type, record.identity, record.segments[0].optimizer])
    return Path("runs") / f"{task.run.name}-{stem}-{identity[:8]}"


def _train(task: Task, directory: WorkDir) -> tuple[SeedResult, list[Prediction]]:
    """Trains a seed to its end; its result and its predictions for the dev examples."""
    run = task.run
    model = task.config.build(jnp.dtype(run.precision))
    batches = task.batches(run.loop.mesh.build().size)
    evaluation = DevEvaluation(task, model)
    step, _ = train(
        run,
        directory,
        task.record,
        task.frame.tokenizer,
        model,
        batches,
        evaluation,
        start=None if run.scratch else task.initial_params,
        largest=batches.largest(),
    )
    evaluations = sum(LOSS in line for line in directory.read_metrics())
    scores = task.scores([each.label for each in evaluation.predictions])
    return SeedResult(run.seed, step, evaluations, scores), evaluation.predictions


class DevEvaluation:
    """Evaluation on the dev examples, each of them once; `predictions` keeps the last results."""

    def __init__(self, task: Task, model: TaskModel):
        self._task = task
        self._batches = TaskEvaluation(task.frame, task.dev_rows, task.run.batch_size)
        self._predict = make_predict(model)
        self._baselines = task.baselines()
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
        scores = task.scores([each.label for each in self.predictions])
        return {"loss": float(loss / weight)} | {name: score.value for name, score in scores.items()}

    def baselines(self) -> dict[str, dict[str, float]]:
        """metric -> trivial baseline -> value."""
        return self._baselines

    def sample(self, params: Params) -> list[Sample]:
        """None of them: predictions.jsonl has every example."""
        return []

    def describe(self, values: Mapping[str, float]) -> str:
        """Metrics with their best trivial baselines."""

        def shown(name: str, value: float) -> str:
            best = max(self._baselines.get(name, {}).values(), default=None)
            return f"{name} {value:.4f}" + ("" if best is None else f" (baseline {best:.4f})")

        return "dev  " + "  ".join(shown(name, value) for name, value in values.items())
