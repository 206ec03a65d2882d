"""Commands that train, and what comes before and after: pretrain, evaluate, report, export, prepare, batch, plan."""

import contextlib
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from prelm_jax.bounds import Bounds, Fraction, NotNegative, Positive, Seed, Size
from prelm_jax.cache import cache_compiled_programs
from prelm_jax.cli.experiments import EXPERIMENT, EXPERIMENT_OR_TASK, load_run
from prelm_jax.cli.models import load_kind
from prelm_jax.cli.options import AnyPath, Positional, Remainder, Step
from prelm_jax.cli.tasks import ALL_USUAL
from prelm_jax.data.examples import Columns
from prelm_jax.errors import InputError
from prelm_jax.storage import is_remote, reachable

if TYPE_CHECKING:
    from prelm_jax.finetuning.config import FineTuning
    from prelm_jax.run import Run


def pretrain(
    run: Annotated["Run", EXPERIMENT],
    workdir: AnyPath = "runs/{name}",
    extend_to: Positive | None = None,
    take_over: bool = False,
    dry_run: bool = False,
) -> None:
    """Train an experiment, or resume it.

    Args:
        workdir: Directory of the run, local or gs://…; if it holds a run of the same experiment, that run resumes.
        extend_to: Extend a run to this step, from its newest checkpoint, on the schedule of a run of this length.
        take_over: In a bucket or on a network disk, take over the lease of a dead process at once.
        dry_run: Prepare the corpus, time three steps here, and print what the run will cost; train and save nothing.
    """
    import jax

    from prelm_jax import pretraining
    from prelm_jax.families import find_family
    from prelm_jax.report.summary import print_table, summary_table
    from prelm_jax.training import processes

    cache_compiled_programs()
    if dry_run:
        from prelm_jax.planning.rehearsal import rehearsal_table, rehearse

        print_table(rehearsal_table(rehearse(run)))
        return
    with processes.joined():
        summary = pretraining.pretrain(run, workdir, extend_to, take_over)
        if jax.process_index() == 0:
            print_table(summary_table(summary))
            print(f"\nThe run is in {workdir}. To train it for longer, add --extend-to STEP to the command.")
            with contextlib.suppress(InputError):  # A family from outside of the package has no example, and no format.
                example = find_family(run.model.model_type, workdir).example
                print(f"Next:\n  prelm export {workdir} DIRECTORY\n  {example.format(workdir)}")


def evaluate(
    model: Positional[str],
    workdir: AnyPath | None = None,
    corpus: tuple[str, ...] = (),
    test: str | None = None,
    columns: Columns = ALL_USUAL,
    positive: str | None = None,
    predictions: Path | None = None,
    step: Step = "newest",
    sample: Annotated[Fraction, Bounds(above=0)] = 1.0,
    batch_size: Size | None = None,
    devices: Annotated[Size | None, tyro.conf.arg(name="mesh.devices")] = None,
) -> None:
    """Evaluate a run on its held-out text or another corpus, or a fine-tuned model on a labeled file (--test).

    Each target, or example, is scored exactly once.

    Args:
        model: Work directory of a run; or, for a model defined outside the package, its experiment FILE.py:NAME.
            With --test a model directory, the work directory of a seed, or the directory above seeds: the median seed.
        workdir: Work directory of the run; only if the first argument is an experiment.
        corpus: Sources of text to evaluate on; if unset, the held-out side of the run's own corpus.
        test: File of labeled examples to evaluate a fine-tuned model on, as SPEC (docs/finetuning.md).
        positive: With --test, the label whose precision and recall the metric f1 is about.
        predictions: With --test, file to write: JSON lines, one prediction each.
        sample: Fraction of the text to read, spread over it; below 1 if the whole text takes too long.
        batch_size: Rows at once; lower it if memory runs out (the result stays the same). The run's own if unset.
        devices: Number of devices; all of them if unset.
    """
    from prelm_jax import pretraining
    from prelm_jax.report.summary import print_table, summary_table

    of_tasks = {"--columns": columns != ALL_USUAL, "--positive": positive, "--predictions": predictions}
    of_runs = {"--workdir": workdir, "--corpus": corpus, "--sample": sample != 1, "--batch-size": batch_size}
    of_runs["--mesh.devices"] = devices
    if given := [name for name, value in (of_tasks if test is None else of_runs).items() if value]:
        raise InputError(f"{given[0]} goes {'only' if test is None else 'not'} with --test")
    if test is not None:
        _evaluate_task(model, test, columns, positive, predictions, step)
        return
    experiment = None
    if workdir is not None:
        _, experiment, _ = load_run(model)
    elif ":" in model and not is_remote(model):
        raise InputError(f"evaluate {model}: --workdir must be given, the directory of that experiment's run.")
    cache_compiled_programs()
    summary = pretraining.evaluate(workdir or model, corpus, step, experiment, sample, batch_size, devices)
    print_table(summary_table(summary))


def _evaluate_task(
    model: str, test: str, columns: Columns, positive: str | None, predictions: Path | None, step: Step
) -> None:
    from prelm_jax.finetuning.evaluation import evaluate
    from prelm_jax.finetuning.predictions import write_predictions
    from prelm_jax.finetuning.results import RESULTS, read_results, scores_table
    from prelm_jax.inference.heads import TaskPretrained
    from prelm_jax.report.summary import print_table
    from prelm_jax.storage import check_apart, output_file

    if (reachable(model) / RESULTS).is_file():
        model = f"{model}/seed-{read_results(model).median_seed().seed}"
    with contextlib.ExitStack() as stack:
        unfinished = None
        if predictions is not None:
            check_apart(predictions, test, model)
            unfinished = stack.enter_context(output_file(predictions))
        loaded = load_kind(model, step, TaskPretrained, "be evaluated with --test")
        found = evaluate(loaded, test, columns, positive)
        if unfinished is not None:
            write_predictions(unfinished, loaded.kind, found.examples, found.predictions, loaded.labels)
    print_table(scores_table(f"{model}, {len(found.examples):,} examples of {test}", found.scores, found.baselines))


def export(
    workdir: Positional[AnyPath],
    directory: Positional[Path],
    step: Step | None = None,
    seed: Seed | None = None,
    sentence_transformers: bool = False,
) -> None:
    """Write a trained model as a model directory, in the published format that other tools read.

    Args:
        workdir: Work directory of a run, or the directory above the seeds of a fine-tuning.
        directory: Directory to write; a model directory that is already there is replaced.
        seed: Seed of a fine-tuning; the median one if unset.
        step: Step of the checkpoint, best (lowest held-out loss) or newest; best if unset and any was evaluated.
        sentence_transformers: BERT: also write what sentence-transformers and text-embeddings-inference read; a text's
            vector is the mean of the last layer.
    """
    from prelm_jax import pretraining
    from prelm_jax.finetuning import finetune
    from prelm_jax.finetuning.results import RESULTS

    if (reachable(workdir) / RESULTS).is_file():
        if step is not None:
            raise InputError(f"--step {step}: of a fine-tuning the last step of a seed is exported; choose with --seed")
        if sentence_transformers:
            raise InputError(
                f"--sentence-transformers: {workdir} is a fine-tuning; only a pretrained BERT is exported so"
            )
        print(f"wrote {directory} (seed {finetune.export(workdir, directory, seed)})")
        return
    if seed is not None:
        raise InputError(f"--seed {seed}: {workdir} has no {RESULTS}, so it is not the directory of a fine-tuning")
    pretraining.export(workdir, directory, step, sentence_transformers)
    print(f"wrote {directory}")


def report(paths: Positional[tuple[AnyPath, ...]], output: Path = Path("report.html")) -> None:
    """Draw runs and studies in one HTML page: loss curves with baselines, samples, settings; scores with intervals.

    Args:
        paths: Work directories of runs, or of fine-tunings with all their seeds; directories of records (prelm study).
        output: HTML file to write; a study also writes tables and data next to it.
    """
    from prelm_jax.reporting import write_report

    folder = write_report(paths, output)
    print(f"wrote {output}: open it in a browser" + ("" if folder is None else f"; its data is in {folder}"))


def prepare(
    run: Annotated["Run", EXPERIMENT],
    beam: Annotated[tuple[str, ...] | None, Remainder(), tyro.conf.arg(metavar="OPTIONS …")] = None,
) -> None:
    """Prepare the corpus of an experiment (vocabulary and token store) without training; print its statistics.

    Args:
        beam: Tokenize with Apache Beam instead of local processes (extra beam). Everything after it goes to Beam, for
            example --beam --runner=FlinkRunner.
    """
    from prelm_jax import pretraining
    from prelm_jax.report.summary import corpus_table, print_table

    make_shards = None
    if beam is not None:
        from prelm_jax.corpus.beam import make_shards_with

        make_shards = make_shards_with(list(beam))
    prepared = pretraining.prepare(run, make_shards, print_new=False)
    print_table(corpus_table(prepared.corpus, prepared.training, prepared.held_out))


def batch(run: Annotated["Run", EXPERIMENT], step: NotNegative = 0, rows: Positive = 4) -> None:
    """Print a training batch as text, with a marker where a token was replaced or is predicted.

    Args:
        step: Training step whose batch is printed, counted from 0.
        rows: Number of rows of the batch to print.
    """
    from rich.console import Console
    from rich.text import Text

    from prelm_jax import pretraining
    from prelm_jax.data.show import MARKER

    console = Console()
    for row in itertools.islice(pretraining.show_batch(run, step), rows):
        text = Text(row)
        text.highlight_regex(MARKER, "bold green")
        console.print(text, soft_wrap=True)


def plan(
    run: Annotated["Run | FineTuning", EXPERIMENT_OR_TASK],
    topology: str,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Compile the train step for a TPU slice you don't have; report memory, bottleneck and time.

    A task is planned with its files (--train, --dev, --init-from), for its widest batches.

    Args:
        topology: TPU slice to compile for, v5e:4x4 for example (extra tpu); or local, the devices of this machine.
        as_json: Print one JSON object instead of a table.
    """
    import jax

    from prelm_jax.planning.plan import LOCAL, plan, plan_table
    from prelm_jax.report.summary import print_table

    if topology != LOCAL:
        jax.config.update("jax_platforms", "cpu")  # The TPU compiler would look for attached chips.
    planned = plan(run, topology, progress=lambda line: print(line, file=sys.stderr))
    if as_json:
        print(json.dumps(planned.as_json()))
    else:
        print_table(plan_table(planned))
