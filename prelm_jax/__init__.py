"""ELMo, GPT-1 and BERT in JAX and Flax: pretrain, fine-tune and use them.

The public interface, imported when it is first used:

    model = prelm_jax.load("my-bert")               # a model directory or a work directory
    summary = prelm_jax.pretrain(run, "runs/mine")  # run: a prelm_jax.Run
    path, results = prelm_jax.finetune(task)        # task: a FineTuning, for example from experiments/finetuning.py
    prelm_jax.write_report(["runs/mine"], "report.html")
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prelm_jax.finetuning.finetune import finetune
    from prelm_jax.loading import load
    from prelm_jax.pretraining import pretrain
    from prelm_jax.reporting import write_report
    from prelm_jax.run import Run

__version__ = "0.1.0"
__all__ = ["Run", "finetune", "load", "pretrain", "write_report"]

_HOMES = {
    "Run": "run",
    "finetune": "finetuning.finetune",
    "load": "loading",
    "pretrain": "pretraining",
    "write_report": "reporting",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
