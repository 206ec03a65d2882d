"""The command that trains a task: finetune."""

from typing import TYPE_CHECKING, Annotated

from prelm_jax.bounds import Positive
from prelm_jax.cache import cache_compiled_programs
from prelm_jax.cli.experiments import TASK
from prelm_jax.cli.options import AnyPath

if TYPE_CHECKING:
    from prelm_jax.finetuning.config import FineTuning


def finetune(
    run: Annotated["FineTuning", TASK],
    workdir: AnyPath | None = None,
    seeds: Positive = 3,
    take_over: bool = False,
    dry_run: bool = False,
) -> None:
    """Train a task on a pretrained encoder with one or more seeds, or resume it.

    Args:
        workdir: Directory of all seeds; if unset, runs/TASK-FILE-HASH, named after the training file and settings.
        seeds: Number of seeds (0, 1, …), each trained separately; 1 for a first trial. Finished seeds are skipped.
        take_over: In a bucket or on a network disk, take over the lease of a dead process at once.
        dry_run: Read the files, time some steps here, and print what the seeds will cost; train and save nothing.
    """
    import jax

    from prelm_jax.finetuning import finetune
    from prelm_jax.finetuning.results import results_table
    from prelm_jax.report.summary import print_table
    from prelm_jax.training import processes

    cache_compiled_programs()
    if dry_run:
        from prelm_jax.planning.rehearsal import rehearsal_table, rehearse_task

        print_table(rehearsal_table(rehearse_task(run, seeds)))
        return
    with processes.joined():
        path, results = finetune.finetune(run, workdir, seeds, take_over)
        if jax.process_index() == 0:
            print_table(results_table(results))
            if results.spread(results.metric).at_baseline == len(results.seeds):
                print("\nNo seed is above the baseline: try a higher --optimizer.learning-rate, or more --epochs.")
            print(f"\nThe seeds are in {path}.\nNext:\n  prelm export {path} DIRECTORY\n  prelm report {path}")
