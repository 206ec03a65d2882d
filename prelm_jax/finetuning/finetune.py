"""Fine-tuning: labelled files -> frames -> batches -> train -> results, for one seed after the other."""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from prelm_jax.cache import digest
from prelm_jax.data.examples import Example, Label
from prelm_jax.data.frames import WIDTHS, Frame, Row
from prelm_jax.data.tasks import TaskBatches, TaskEvaluation
from prelm_jax.errors import InputError
from prelm_jax.families import find_family
from prelm_jax.finetuning import metrics
from prelm_jax.finetuning.config import FineTuning
from prelm_jax.finetuning.files import check_labels, label_names, read_examples
from prelm_jax.formats.base import LoadedModel, ModelConfig
from prelm_jax.formats.transfer import initial_params
from prelm_jax.hub import fetch, is_hub_name
from prelm_jax.inference.base import Pretrained
from prelm_jax.loading import load
from prelm_jax.models import heads
from prelm_jax.models.task import EncoderConfig, TaskModel, TaskModelConfig
from prelm_jax.run import RunRecord, with_name
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.train import placed_batches, train
from prelm_jax.training.contract import Params
from prelm_jax.training.step import make_predict
from prelm_jax.workdir import WorkDir

# The fields that say how examples and parameters are found. Both are compared by fingerprint.
SOURCES = ("train", "dev", "init_from", "columns")


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


class Result(NamedTuple):
    """How the model of a seed does on the dev examples."""

    step: int
    values: dict[str, float]
    predictions: list[Label]


def prepare(run: FineTuning) -> Task:
    """Reads the files of a task and the model that it starts from. Raises InputError for what the user can mend."""
    missing = [f"--{name.replace('_', '-')}" for name in ("init_from", "train", "dev") if getattr(run, name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} must be given")
    if is_hub_name(str(run.init_from)):
        run = dataclasses.replace(run, init_from=fetch(str(run.init_from))[0])
    train_data, dev_data = (read_examples(str(spec), run.kind, run.columns) for spec in (run.train, run.dev))
    for spec, data in ((run.train, train_data), (run.dev, dev_data)):
        for name, count in data.counts.items():
            print(f"{spec}: {count:,} {name}", file=sys.stderr)
    names = label_names(train_data.examples, run.kind)
    check_labels(str(run.train), train_data, run.kind, names)
    check_labels(str(run.dev), dev_data, run.kind, names)

    pretrained = load(str(run.init_from))
    tokenizer = pretrained.tokenizer
    if tokenizer is None:
        raise InputError(f"{run.init_from} has no tokenizer")
    family = find_family(pretrained.config.model_type, run.init_from)
    longest = getattr(pretrained.config, "max_position_embeddings", WIDTHS[-1])
    max_length = run.max_length or min(longest, WIDTHS[-1])
    if max_length > longest:
        raise InputError(f"--max-length {max_length}: the model has {longest} positions")
    frame = family.frame(tokenizer, max_length, run.symmetric)
    framed = []
    for spec, data in ((run.train, train_data), (run.dev, dev_data)):
        found = frame.frame(data.examples, run.kind, names, run.stride)
        if found.num_cut:
            share = found.num_cut / found.num_examples
            print(f"{spec}: {found.num_cut:,} examples ({share:.1%}) cut to {max_length} tokens", file=sys.stderr)
        framed.append(found.rows)
    config = TaskModelConfig(
        cast(EncoderConfig, dataclasses.replace(pretrained.config, vocab_size=tokenizer.vocab_size)),
        _head(run.head, names, framed[0]),
        run.tune,
        run.layer_decay,
        run.lm_coefficient,
    )
    facts: dict[str, object] = {
        "head": with_name(config.head),
        "encoder": config.encoder,
        "labels": names,
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
    run: FineTuning, workdir: str | os.PathLike | None = None, seeds: int = 1, take_over: bool = False
) -> dict[int, Result]:
    """Trains a task with several seeds, 0 to `seeds` - 1, each in a work directory of its own; resumes what is there.

    workdir: the directory above; by default runs/<task>-<stem of the training file>-<8 hex of the identity>.
    Raises InputError for what the user can mend, Preempted when SIGTERM stopped a training after saving.
    """
    task = prepare(run)
    path = Path(workdir) if workdir is not None else default_workdir(task)
    results = {}
    for seed in range(seeds):
        print(f"seed {seed} of {seeds}, in {path / f'seed-{seed}'}", file=sys.stderr)
        results[seed] = _train(task, seed, WorkDir(path / f"seed-{seed}"), take_over)
    return results


def default_workdir(task: Task) -> Path:
    """runs/<task>-<stem of the training file>-<8 hex of the identity>."""
    stem = Path(str(task.run.train).partition(",")[0]).name.partition(".")[0]
    record = _record(task, dataclasses.replace(task.run, seed=0))
    identity = digest([record.model_type, record.identity, record.segments[0].optimizer])
    return Path("runs") / f"{task.run.kind}-{stem}-{identity[:8]}"


def _record(task: Task, run: FineTuning) -> RunRecord:
    return RunRecord.of(run, task.config.model_type, SOURCES, task.facts)


def _train(task: Task, seed: int, directory: WorkDir, take_over: bool) -> Result:
    run = dataclasses.replace(task.run, seed=seed)
    model = task.config.build(jnp.dtype(run.precision))
    batches = TaskBatches(task.frame, task.train_rows, run.batch_size, seed)
    evaluation = DevEvaluation(task, model)
    start = None if run.scratch else lambda fresh: _initial(task, fresh)
    with directory.hold(take_over):
        step, values = train(run, directory, _record(task, run), task.tokenizer, model, batches, evaluation, start)
    return Result(step, values, evaluation.predictions)


def _initial(task: Task, fresh: Params) -> Params:
    """The parameters to start from: of the pretrained encoder, but for the top layers to reinitialize."""
    loaded = cast(LoadedModel[ModelConfig, Tokenizer], task.pretrained.loaded)
    format = find_family(task.config.model_type, task.run.init_from).format
    return initial_params(loaded, format, cast(ModelConfig, task.config.encoder), fresh, task.tokenizer)


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
    """Evaluation on the dev examples, each of them once. `predictions`: those of the last evaluation."""

    def __init__(self, task: Task, model: TaskModel):
        self._task = task
        self._batches = TaskEvaluation(task.frame, task.dev_rows, task.run.batch_size)
        self._predict = make_predict(model)
        self.predictions: list[Label] = []

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
        self.predictions = decode(task, [outputs[row] for row in range(len(outputs))])
        scores = metrics.scores(task.run.kind, task.dev_examples, self.predictions, task.names)
        return {"loss": loss / weight} | {name: score.value for name, score in scores.items()}

    def baselines(self) -> dict[str, dict[str, float]]:
        """metric -> trivial baseline -> value."""
        task = self._task
        return metrics.baselines(task.run.kind, task.dev_examples, task.names, training=task.train_examples)

    def describe(self, values: Mapping[str, float]) -> str:
        """Metrics beside their baselines."""
        baselines = self.baselines()

        def shown(name: str, value: float) -> str:
            found = ", ".join(f"{baseline} {x:.4f}" for baseline, x in baselines.get(name, {}).items())
            return f"{name} {value:.4f}" + (f" ({found})" if found else "")

        return "dev  " + "  ".join(shown(name, value) for name, value in values.items())


def decode(task: Task, outputs: Sequence[Mapping[str, np.ndarray]]) -> list[Label]:
    """The prediction for each dev example from the outputs of its rows."""
    if task.run.kind == "label":
        return [task.names[int(output["scores"].argmax())] for output in outputs]
    raise NotImplementedError(task.run.kind)
