"""The command line, `prelm VERB …`: one short function per verb. Exit codes: 0 done, 1 user error, 75 preempted."""

import contextlib
import difflib
import errno
import functools
import importlib.util
import inspect
import io
import itertools
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.text import Text

from prelm_jax.errors import InputError, Preempted
from prelm_jax.report import of_plan, of_summary, of_tokenizer, print_table
from prelm_jax.storage import is_remote

USER_ERROR = 1
PREEMPTED = 75

# What the system says of a disk that is full or a place that is not the user's; reading has its own complaints.
UNWRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
}

# What one does with a trained model, by the first of these verbs that it has.
EXAMPLES = {"fill": '"The [MASK] is returned."', "generate": '--prompt "The"', "embed": "LINES.txt VECTORS.hdf5"}

Positional = tyro.conf.Positional

# A path as it was typed: pathlib would make gs:/bucket of gs://bucket.
Place = Annotated[
    str | Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: words[0] if is_remote(words[0]) else Path(words[0]),
        is_instance=lambda value: isinstance(value, str | Path),
        str_from_instance=lambda value: [str(value)],
    ),
]


def pretrain(experiment: str, arguments: list[str]) -> None:
    """Train an experiment, FILE.py:FUNCTION, or go on with it where it stopped."""
    name, run = _experiment(experiment)

    run_type = Annotated[type(run), tyro.conf.arg(name="")]

    def command(run: run_type = run, workdir: Place = Path("runs") / name) -> None:
        import jax

        from prelm_jax import pretrain
        from prelm_jax.formats.model import family
        from prelm_jax.training import processes

        _configure_jax()
        processes.join()
        summary = pretrain.pretrain(run, workdir)
        if jax.process_index() != 0:
            return
        print_table(of_summary(summary))
        print(f"\nThe run is in {workdir}. Next:")
        print(f"  prelm export {workdir} DIRECTORY")
        verb = next(verb for verb in EXAMPLES if hasattr(family(run.model.model_type, workdir), verb))
        print(f"  prelm {verb} {workdir} {EXAMPLES[verb]}")

    _call(command, arguments, f"prelm pretrain {experiment}")


def batch(experiment: str, arguments: list[str]) -> None:
    """Print a batch of an experiment, FILE.py:FUNCTION, as the text that the model sees."""
    _, run = _experiment(experiment)

    run_type = Annotated[type(run), tyro.conf.arg(name="")]

    def command(run: run_type = run, step: int = 0, rows: int = 4) -> None:
        from prelm_jax import pretrain
        from prelm_jax.data.show import MARK

        console = Console()
        for shown in itertools.islice(pretrain.show_batch(run, step), rows):
            text = Text(shown)
            text.highlight_regex(MARK, "bold green")
            console.print(text, soft_wrap=True)

    _call(command, arguments, f"prelm batch {experiment}")


def prepare(experiment: str, arguments: list[str]) -> None:
    """Prepare the corpus of an experiment, FILE.py:FUNCTION: vocabulary and token store, without training."""
    _, run = _experiment(experiment)
    run_type = Annotated[type(run), tyro.conf.arg(name="")]
    beam = arguments.index("--beam") if "--beam" in arguments else None

    def command(run: run_type = run) -> None:
        from prelm_jax import pretrain

        make_shards = None
        if beam is not None:
            from prelm_jax.corpus.beam import make_shards_with

            make_shards = make_shards_with(arguments[beam + 1 :])
        prepared = pretrain.prepare(run, make_shards, verify=True)
        print(pretrain.figures(prepared))

    _call(command, arguments[:beam], f"prelm prepare {experiment} [--beam RUNNER-OPTIONS …]")


def plan(experiment: str, arguments: list[str]) -> None:
    """Compile an experiment's train step for a TPU slice that need not be there; say what it would take."""
    _, run = _experiment(experiment)

    run_type = Annotated[type(run), tyro.conf.arg(name="")]

    def command(
        topology: str, run: run_type = run, as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    ) -> None:
        """Compile the train step for chips that need not be there; with the options of `prelm pretrain`.

        Args:
            topology: What to compile for: a slice like v5e:4x4, or `local`, the devices of this machine.
            as_json: Print one JSON object.
        """
        import jax

        from prelm_jax.planning.plan import LOCAL, plan

        if topology != LOCAL:
            jax.config.update("jax_platforms", "cpu")  # The compiler's library would look for chips to use.
        planned = plan(run, topology, progress=lambda line: print(line, file=sys.stderr))
        if as_json:
            print(json.dumps(planned.as_json()))
        else:
            print_table(of_plan(planned))

    _call(command, arguments, f"prelm plan {experiment}")


def evaluate(workdir: Positional[Place], corpus: tuple[str, ...] = ()) -> None:
    """Evaluate the newest checkpoint of a work directory on its held-out text, or on another corpus."""
    from prelm_jax import pretrain

    _configure_jax()
    print_table(of_summary(pretrain.evaluate(workdir, corpus)))


def export(workdir: Positional[Place], directory: Positional[Path]) -> None:
    """Write the newest checkpoint of a work directory as a model directory that other tools read."""
    from prelm_jax import pretrain

    pretrain.export(workdir, directory)
    print(f"wrote {directory}")


def tokenize(tokenizer: Positional[Path], input: Positional[Path], cased: bool = False) -> None:
    """Print the ids of each line of a text file as a JSON list, without special tokens."""
    from prelm_jax.storage import read_lines
    from prelm_jax.tokenizers import load as tokenizers

    loaded = tokenizers.load(tokenizer, lowercase=not cased)
    for ids in loaded.encode_batch(read_lines(input)):
        print(json.dumps(ids))


def embed(
    model: Positional[Place],
    input: Positional[Path],
    output: Positional[Path],
    truncate: bool = False,
    tokenize: bool = False,
    state: Literal["zero", "warm", "carry"] | None = None,
    batch_size: int | None = None,
) -> None:
    """Write the hidden states of each line of a text file to an HDF5 file, dataset "i" for line i.

    Args:
        truncate: Cut lines that are too long for the model.
        tokenize: ELMo: split the lines into words as the training text was; without it, at white space alone.
        state: ELMo: what its LSTMs start a line from: zeros; the state after an empty line; what the line before left.
        batch_size: ELMo, --state carry: line i goes on from line i - BATCH_SIZE, as in bilm-tf and AllenNLP.
    """
    from prelm_jax.formats.model import load, write_embeddings
    from prelm_jax.storage import read_lines

    _configure_jax()
    options = {"truncate": truncate, "tokenize": tokenize, "state": state, "batch_size": batch_size}
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    write_embeddings(load(model), read_lines(input), output, **given)


def score(model: Positional[Place], input: Positional[Path]) -> None:
    """Print the log-probability (natural) and the number of tokens of each line of a text file."""
    from prelm_jax.formats.model import load
    from prelm_jax.storage import read_lines

    _configure_jax()
    for log_probability, tokens in load(model).score(read_lines(input)):
        print(f"{log_probability:.6f}\t{tokens}")


def fill(model: Positional[Place], text: Positional[str], top_k: int = 5) -> None:
    """Print the likeliest tokens for each [MASK] of a text."""
    _configure_jax()
    for candidates in _load(model, "fill").fill(text, top_k):
        print("  ".join(f"{token} {probability:.3f}" for token, probability in candidates))


def generate(
    model: Positional[Place],
    prompt: str,
    max_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Print a prompt and what the model goes on to write; temperature 0 takes the likeliest tokens."""
    _configure_jax()
    print(_load(model, "generate").generate(prompt, max_tokens, temperature, top_k, top_p, seed))


def train_tokenizer(kind: str, arguments: list[str]) -> None:
    """Learn a vocabulary from a corpus: wordpiece, bpe, sentencepiece or words."""
    from prelm_jax.corpus.documents import Corpus
    from prelm_jax.tokenizers.bpe import BPEConfig
    from prelm_jax.tokenizers.sentencepiece import SentencePieceConfig
    from prelm_jax.tokenizers.wordpiece import WordPieceConfig
    from prelm_jax.tokenizers.words import WordVocabularyConfig

    kinds = {
        "wordpiece": WordPieceConfig,
        "bpe": BPEConfig,
        "sentencepiece": SentencePieceConfig,
        "words": WordVocabularyConfig,
    }
    if kind not in kinds:
        raise InputError(f"there is no tokenizer {kind!r}{_suggestion(kind, kinds)}; there are {', '.join(kinds)}")
    config_type = Annotated[kinds[kind], tyro.conf.arg(name="")]

    def command(directory: Positional[Path], corpus: tuple[str, ...], config: config_type = kinds[kind]()) -> None:  # noqa: B008
        tokenizer = config.build(Corpus(corpus))
        tokenizer.save(directory)
        print(f"wrote {directory}: {tokenizer.vocab_size:,} entries")

    _call(command, arguments, f"prelm tokenizer train {kind}")


def inspect_tokenizer(tokenizer: Positional[Path], input: Positional[Path | None] = None, cased: bool = False) -> None:
    """Describe a tokenizer, and with a text file what it makes of the text and which lines it knows least of."""
    from prelm_jax.storage import read_lines
    from prelm_jax.tokenizers import load as tokenizers

    lines = None if input is None else list(read_lines(input))
    print_table(of_tokenizer(tokenizers.load(tokenizer, lowercase=not cased), lines))


OF_EXPERIMENTS = (prepare, plan, pretrain, batch)
VERBS = {
    verb.__name__: verb for verb in (*OF_EXPERIMENTS, evaluate, export, tokenize, embed, score, fill, generate)
} | {"tokenizer train": train_tokenizer, "tokenizer inspect": inspect_tokenizer}

# The verbs whose first argument says which options there are.
EXPECTED = {
    **{verb.__name__: "FILE.py:FUNCTION [options]; examples are in experiments/" for verb in OF_EXPERIMENTS},
    "tokenizer train": "KIND DIRECTORY --corpus SPEC …; KIND is wordpiece, bpe, sentencepiece or words",
}


def main(arguments: list[str] | None = None) -> None:
    """The console script."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: prelm VERB … (--help after a verb says more)\n")
        for name, verb in VERBS.items():
            print(f"  {name:18} {inspect.getdoc(verb).splitlines()[0]}")
        return
    words = 2 if arguments[0] == "tokenizer" else 1
    verb, rest = " ".join(arguments[:words]), arguments[words:]
    _hush_orbax()
    try:
        if verb not in VERBS:
            raise InputError(f"prelm has no {verb!r}{_suggestion(verb, VERBS)}; prelm --help lists the verbs")
        if verb not in EXPECTED:
            _call(VERBS[verb], rest, f"prelm {verb}")
        elif not rest or rest[0].startswith("-"):
            raise InputError(f"usage: prelm {verb} {EXPECTED[verb]}")
        else:
            VERBS[verb](rest[0], rest[1:])
    except InputError as error:
        print(f"prelm: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except Preempted as stop:
        print(f"prelm: {stop}", file=sys.stderr)
        sys.exit(PREEMPTED)
    except BrokenPipeError:  # `prelm … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        print(f"prelm: cannot write {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        print("prelm: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _call(command: Callable[..., None], arguments: list[str], program: str) -> None:
    """Parses the arguments by the command's signature, and calls it; tyro's complaints become one line."""

    @functools.wraps(command)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            bound = tyro.cli(bind, args=arguments, prog=program)
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip(" │╭╮╰╯─\t") for line in complaint.getvalue().splitlines()[1:]]
        raise InputError(" ".join(line for line in lines if line)) from None
    bound()


def _experiment(reference: str) -> tuple[str, Any]:
    """The name of a work directory and the Run, of `experiments/bert.py:demo`."""
    file, _, function = reference.partition(":")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{file}: no such experiment file{_suggestion(file, map(str, path.parent.glob('*.py')))}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    experiments = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == path.stem and not name.startswith("_")
    }
    if function not in experiments:
        known = ", ".join(experiments)
        raise InputError(f"{file} has no {function!r}{_suggestion(function, experiments)}; it has {known}")
    return f"{path.stem}-{function}".replace("_", "-"), experiments[function]()


def _load(path: str | Path, verb: str) -> Any:
    """The model at a path; InputError for one of a family without that verb."""
    from prelm_jax.formats.model import load

    model = load(path)
    if not hasattr(model, verb):
        raise InputError(f"{path} is a model of type {model.config.model_type}, which cannot {verb}")
    return model


def _suggestion(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _configure_jax() -> None:
    """Compiled programs are kept between runs, so that the second start is quick."""
    import jax

    from prelm_jax.cache import cache_directory

    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _hush_orbax() -> None:
    """What its threads tell of a save or a restore that fails, pages of tracebacks, also comes as one exception."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")

    # TensorStore finishes what Orbax no longer waits for, in threads whose exceptions Python hands to this hook.
    usual = sys.unraisablehook

    def unraisablehook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = unraisablehook
