"""BERT, GPT-1 and ELMo at equal words and at equal FLOPs: from text to one page (docs/study.md).

Prints each `prelm` command before it runs it. The same command resumes.

    python examples/comparison.py --corpus simplewiki.txt.xz --data data/study --output runs/study --seeds 0 1 2

The trunk, one for each family and seed, is a run with a constant learning rate. At four fifths of each budget a branch
leaves it: a copy whose learning rate falls to zero over the last fifth. So each compared model has a whole schedule,
and all budgets share most of the work.
"""

import argparse
import dataclasses
import json
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from prelm_jax import pretraining
from prelm_jax.cli.experiments import load_run
from prelm_jax.errors import InputError
from prelm_jax.planning.plan import plan
from prelm_jax.report.summary import LOSS
from prelm_jax.run import Run
from prelm_jax.study.base import Settings
from prelm_jax.study.exclusion import data_files, exclude
from prelm_jax.study.opening import PLAN
from prelm_jax.study.tests import make_test
from prelm_jax.workdir import WorkDir

FAMILIES = ("bert", "gpt1", "elmo")
COOLED = 0.2  # The fraction of a budget over which the rate falls, as the trapezoid of the optimizer has it.
TRIED = 0.25  # The fraction of a budget that is trained to choose a learning rate.
MEASURED = 20  # Batches whose tokens are counted.
# BabyLM's checkpoints, in millions of words seen; of a budget below five millions, its tenths.
MARKS = (*range(1, 11), *range(20, 101, 10), *range(200, 1001, 100))

# Tests of what they need: probabilities of sentences; vectors of words; vectors of a model that reads context.
PAIRS = ("blimp", "zorro")
VECTORS = ("upos", "deprel", "coarsewsd", "wic", "ws353", "simlex")
CONTEXT = ("selfsim", "cka", "neighbors", "replacement")


@dataclasses.dataclass(frozen=True)
class Family:
    """An experiment on the text of the comparison, and what a step of it takes."""

    name: str
    experiment: str
    options: tuple[str, ...]  # Of `prelm pretrain`, the same for all of its runs.
    plan: dict[str, object]
    words_per_step: float
    flops_per_step: float
    steps: dict[str, int]  # By budget: words, flops, or both if that is the same.


def main() -> None:
    args = parse_arguments()
    # This process counts words and FLOPs; the accelerator is for the commands. FLOPs are those of a CPU's program.
    jax.config.update("jax_platforms", "cpu")
    if args.data:
        for name in args.tests:  # What is missing should be known before the training.
            make_test(name, Settings(args.data, args.pairs))
    check_settings(args)
    text = args.output / "corpus.txt"
    if not text.exists():
        tests = [*data_files(args.data), *data_files(args.data.parent / "tasks")] if args.data else []
        found = exclude(args.corpus, tests, text, args.corpus_words)
        print(f"{text}: {found.words:,} words; {found.left_out:,} sentences that are in test sets were left out")
    families = budget(args, f"{text},sentences=line")
    for family in families:
        rates = best_rates(args, family) if len(args.rates) > 1 else []
        for seed in args.seeds:
            train(args, family, seed, rates)
    if args.data:
        measure(args, families, text)
        prelm("report", f"{args.output}/records", "--output", f"{args.output}/report.html")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--corpus", nargs="+", default=["python-docs"], help="text to train on, as prelm pretrain takes it")
    add("--corpus-words", type=int, help="use the documents up to this number of words; all if unset")
    add("--data", type=Path, help="folder of the test sets; if unset, models are only trained")
    add(
        "--output", type=Path, default=Path("runs/study"), help="folder of the text, the runs, the records and the page"
    )
    add("--words", type=int, default=10_000_000, help="words seen at the first budget, all passes counted")
    add("--seeds", nargs="+", type=int, default=[0], help="seeds of the models; each may be on another machine")
    add("--small", action="store_true", help="models of 0.4 million parameters instead of 3.2")
    add("--rates", nargs="+", type=float, default=[1.0], help="factors of the learning rate to choose from")
    add("--pairs", type=int, default=100, help="minimal pairs per paradigm; 0: all")
    add("--tests", nargs="+", default=[*PAIRS, *VECTORS, *CONTEXT], help="tests of the models")
    add("--options", nargs="*", default=[], help="more options of prelm pretrain without dashes: precision=bfloat16")
    return parser.parse_args()


def check_settings(args: argparse.Namespace) -> None:
    """Raises InputError if the output is that of another text or of other budgets."""
    names = ("corpus", "corpus_words", "words", "small", "options")
    path, asked = args.output / "settings.json", {name: getattr(args, name) for name in names}
    found = json.loads(path.read_text()) if path.exists() else asked
    if differing := [name for name in names if found[name] != asked[name]]:
        there = ", ".join(f"--{name.replace('_', '-')} {found[name]}" for name in differing)
        raise InputError(f"{args.output} was begun with {there}: repeat that, or choose another --output")
    args.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asked))


def budget(args: argparse.Namespace, corpus: str) -> list[Family]:
    """The families with their steps for each budget; equal FLOPs are the median at equal words, as compiled."""
    path = args.output / "budgets.json"
    if path.exists():
        return [Family(**fields) for fields in json.loads(path.read_text())]
    families = []
    for name in FAMILIES:
        experiment = f"study:{name}{'_small' if args.small else ''}"
        run = dataclasses.replace(load_run(experiment)[1], corpus=(corpus,))
        prepared = pretraining.prepare(run)
        run = dataclasses.replace(run, model=pretraining.with_vocabulary(run.model, prepared.tokenizer))
        planned = plan(run, "local", progress=lambda line: print(line, file=sys.stderr))
        words = words_per_step(run, prepared)
        given = [part for option in args.options for part in f"--{option}".split("=", 1)]
        options = ("--corpus", corpus, "--keep-at-words", *map(str, marks(args.words)), *given)
        flops = planned.compiled_flops * planned.chips
        families.append(Family(name, experiment, options, planned.as_json(), words, flops, {}))
    steps = {family.name: args.words / family.words_per_step for family in families}
    flops = statistics.median(steps[family.name] * family.flops_per_step for family in families)
    for family in families:
        by_words, by_flops = round(steps[family.name]), round(flops / family.flops_per_step)
        family.steps.update({"both": by_words} if by_words == by_flops else {"words": by_words, "flops": by_flops})
    path.write_text(json.dumps([dataclasses.asdict(family) for family in families], indent=1))
    return families


def words_per_step(run: Run, prepared: pretraining.Prepared) -> float:
    """The tokens of a batch without its padding, on average, divided by the tokens of a word."""
    batches, model = run.data.build(prepared.training, prepared.tokenizer, run.batch_size, run.seed), run.model.build()
    tokens = statistics.fmean(int(model.tokens(batches[step])[0]) for step in range(MEASURED))
    return tokens / prepared.training.tokens_per_word


def marks(words: int) -> list[int]:
    """Words seen at which a checkpoint is kept."""
    if words < 5_000_000:
        return [words * tenth // 10 for tenth in range(1, 11)]
    return [mark * 1_000_000 for mark in MARKS if mark * 1_000_000 <= 2 * words]


def best_rates(args: argparse.Namespace, family: Family) -> list[str]:
    """The options of the learning rates with the lowest held-out loss, of some multiples of the experiment's."""
    optimizer, losses = load_run(family.experiment)[1].optimizer, {}
    names, steps = ("learning_rate", "matrix_learning_rate"), round(TRIED * min(family.steps.values()))
    choices = {
        factor: [
            x
            for name in names
            for x in (f"--optimizer.{name.replace('_', '-')}", f"{factor * getattr(optimizer, name):g}")
        ]
        for factor in args.rates
    }
    for factor, rates in choices.items():
        workdir = args.output / "rates" / f"{family.name}-{factor:g}"
        schedule = ("--optimizer.decay", "trapezoid", "--optimizer.decay-steps", str(steps), "--steps", str(steps))
        prelm("pretrain", family.experiment, *family.options, *rates, *schedule, "--workdir", str(workdir))
        losses[factor] = [line[LOSS] for line in WorkDir(workdir).read_metrics() if LOSS in line][-1]
    best = min(losses, key=losses.__getitem__)
    print(f"{family.name}: held-out losses by factor of the rates {losses}: {best:g}")
    return choices[best]


def train(args: argparse.Namespace, family: Family, seed: int, rates: Sequence[str]) -> None:
    """The trunk of a family and seed, and its branches, the shortest first."""
    trunk = args.output / f"seed-{seed}" / family.name
    command = ("pretrain", family.experiment, *family.options, *rates, "--seed", str(seed), "--workdir")
    for name, steps in sorted(family.steps.items(), key=lambda item: item[1]):
        branch = trunk.with_name(f"{family.name}-{name}")
        if not branch.exists():
            prelm(*command, str(trunk), "--steps", str(round((1 - COOLED) * steps)))
            (trunk / PLAN).write_text(json.dumps(family.plan))
            copy_run(trunk, branch)
        prelm(*command, str(branch), "--optimizer.decay", "trapezoid", "--extend-to", str(steps))


def copy_run(trunk: Path, branch: Path) -> None:
    """Copies a run, but for the checkpoints of its learning curve. The copy is complete or absent."""
    unfinished = branch.with_name(f".{branch.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(trunk, unfinished, ignore=shutil.ignore_patterns("lock", "lease", "report.html", "*.kept"))
    unfinished.rename(branch)


def measure(args: argparse.Namespace, families: Sequence[Family], text: Path) -> None:
    """Models with all tests, baselines with those that they can do, checkpoints with minimal pairs.

    Only the first seed has learning curves, because measuring them takes longer than training.
    """
    seeds = [args.output / f"seed-{seed}" for seed in args.seeds]
    branches = [f"{seed}/{each.name}-{name}" for seed in seeds for each in families for name in each.steps]
    study(args, branches, args.tests)
    if "cka" in args.tests:
        equal = [f"{seeds[0]}/{each.name}-{'words' if 'words' in each.steps else 'both'}" for each in families]
        for number, other in enumerate(equal, 1):
            study(args, equal[number:], [f"cka:{other}"])
    trunks = [seeds[0] / family.name for family in families]
    study(args, [f"untrained:{trunk}" for trunk in trunks], args.tests)
    pairs = [name for name in args.tests if name in PAIRS]
    study(args, [f"{kind}:{trunks[0]}" for kind in ("unigram", "trigram")], pairs)
    study(args, [f"word2vec:{text},sentences=line"], [name for name in args.tests if name in VECTORS])
    kept = {trunk: sorted(int(path.name) for path in trunk.glob("checkpoints.kept/*")) for trunk in trunks}
    study(args, [f"{trunk}@{step}" for trunk, steps in kept.items() for step in steps], pairs)


def study(args: argparse.Namespace, subjects: Sequence[str], tests: Sequence[str]) -> None:
    if subjects and tests:
        options = ("--output", f"{args.output}/records", "--data", str(args.data), "--pairs", str(args.pairs))
        prelm("study", *subjects, "--tests", *tests, *options)


def prelm(*arguments: str) -> None:
    """Prints and runs a command; ends this script where it fails."""
    print(f"\n$ prelm {shlex.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "prelm_jax", *arguments]).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"comparison: {error}")
