import dataclasses

import jax
import numpy as np
import pytest
import tiny

from prelm_jax.cli.main import main
from prelm_jax.loading import load
from prelm_jax.planning.rehearsal import rehearsal_table, rehearse
from prelm_jax.pretraining import prepare, pretrain


@pytest.mark.parametrize("family", ["bert", pytest.param("elmo", marks=pytest.mark.slow)])
def test_the_figures_are_those_of_the_run(family, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(tiny.text(seed=0))
    run = tiny.with_loop(dataclasses.replace(tiny.FAMILIES[family](), corpus=(str(corpus),)), keep=1)
    found = rehearse(run)
    pretrain(run, tmp_path / "run")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(load(tmp_path / "run").params))
    assert found.parameters == parameters and found.steps == 12
    moments = 2 if family == "bert" else 1  # Of AdamW and Adagrad.
    assert 0 <= found.checkpoint_bytes - 4 * (1 + moments) * parameters < 4096
    assert found.checkpoints == 3, "of steps 5, 10 and 12"
    assert 0 < found.memory_needed < found.memory_available and found.step_seconds > 0
    text = prepare(run).training
    if family == "bert":  # [CLS] and [SEP] are tokens, and not of the text.
        batches = run.data.build(text, prepare(run).tokenizer, run.batch_size, run.seed)
        read = np.mean([(batches[step]["segments"] != 0).sum() for step in range(4)])
        assert found.passes == pytest.approx(12 * read / text.num_tokens)
    (column, *_), (cells, *_) = (list(each.cells) for each in rehearsal_table(found).columns)
    assert column == "parameters" and f"{parameters:,}" in cells


def test_by_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text(tiny.text(seed=0))
    main(["pretrain", f"{tiny.__file__}:bert", "--corpus", "corpus.txt", "--dry-run"])
    out = capsys.readouterr().out
    assert "passes over the text" in out and "a step reads 8 of " in out
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"], "nothing is written"
