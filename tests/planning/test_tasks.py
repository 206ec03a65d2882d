"""The cost of a fine-tuning, planned and tried."""

import random

import numpy as np
import pytest
import tiny

from prelm_jax.cli.main import main
from prelm_jax.data.tasks import TaskBatches
from prelm_jax.finetuning.config import FineTuning
from prelm_jax.finetuning.task import prepare_task
from prelm_jax.models.heads import Label
from prelm_jax.planning import rehearsal
from prelm_jax.planning.plan import plan, task_work
from prelm_jax.planning.rehearsal import rehearse_task
from prelm_jax.training.loop import LoopConfig
from prelm_jax.training.optimizer import AdamW
from prelm_jax.training.sharding import MeshConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three epochs of 20 texts of 8 tokens, but one in ten of 47."""
    folder, rng = tmp_path_factory.mktemp("task"), random.Random(0)
    lines = [f"{' '.join(rng.choices(tiny.WORDS, k=45 if i % 10 == 3 else 6))}\t{'ab'[i % 2]}\n" for i in range(20)]
    (folder / "train.tsv").write_text("text\tlabel\n" + "".join(lines))
    init_from = tiny.directory(folder / "bert", "bert", max_position_embeddings=64)
    loop = LoopConfig(steps=2**31 - 1, save_every=5, keep=1, mesh=MeshConfig(devices=2))
    file = str(folder / "train.tsv")
    return FineTuning("test", Label(), AdamW(1e-3, 0, 1), 4, 3, loop, file, file, str(init_from))


def test_the_work_of_a_plan_is_the_widest_batch(run):
    (scheduled, work), task = task_work(run, 2), prepare_task(run)
    batches = TaskBatches(task.frame, task.train_rows, 4, 0)
    widths = [batches[step]["tokens"].shape[-1] for step in range(5)]
    assert set(widths) == {8, 48} and scheduled.loop.steps == 15
    assert work(4).batch["tokens"].shape == (4, 1, 48) and work(2).batch["tokens"].shape == (2, 1, 48)
    assert work(4).fill == pytest.approx(np.mean(widths) / 48)


@pytest.mark.slow
def test_a_plan_has_the_steps_and_parameters_of_the_task(run):
    planned = plan(run, "local")
    assert planned.tokens == 4 * 48 and planned.steps == 15 and planned.fill < 1
    assert planned.days == pytest.approx(15 * planned.seconds * planned.fill / 86400)
    assert planned.sizes["parameters"][0] == 4 * parameters(prepare_task(run))


def parameters(task):
    from jax import tree

    from prelm_jax.formats.base import abstract_params

    return sum(leaf.size for leaf in tree.leaves(abstract_params(task.config)))


@pytest.mark.slow
def test_a_dry_run_times_both_widths_and_counts_all_seeds(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rehearsals = []
    monkeypatch.setattr(
        rehearsal, "rehearse_task", lambda *args: rehearsals.append(rehearse_task(*args)) or rehearsals[0]
    )
    files = ["--train", str(run.train), "--dev", str(run.dev), "--init-from", str(run.init_from)]
    main(["finetune", "finetuning:classify", *files, "--batch-size", "4", "--mesh.devices", "2", "--dry-run"])
    assert "3 seeds" in capsys.readouterr().out and not list(tmp_path.iterdir()), "nothing is written"
    (found,), task = rehearsals, prepare_task(run)
    assert (found.steps, found.seeds, found.parameters) == (15, 3, parameters(task))
    assert found.corpus_tokens == sum(row.length for row in task.train_rows) and found.passes == pytest.approx(3)
    assert "20 examples" in found.reading and "48 tokens" in found.reading and ", 8 tokens" in found.reading
    assert 3600 * found.hours == pytest.approx(found.compile_seconds + 45 * found.step_seconds)
