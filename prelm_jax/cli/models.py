"""Commands that use a pretrained model: embed, score, fill, generate."""

from pathlib import Path
from typing import Annotated, Literal, TypeVar

from prelm_jax.bounds import Bounds, Fraction, NotNegative, NotNegativeFloat, Positive, Seed, Size
from prelm_jax.cache import cache_compiled_programs
from prelm_jax.cli.options import Cased, ModelPath, Positional, Step, TextFile
from prelm_jax.errors import InputError

Kind = TypeVar("Kind")


def embed(
    model: ModelPath,
    input: TextFile,
    output: Positional[Path],
    truncate: bool = False,
    pooled: bool = False,
    prompt: str | None = None,
    tokenize: bool = False,
    state: Literal["zero", "warm", "carry"] | None = None,
    batch_size: Size | None = None,
    cased: Cased = False,
    step: Step = "newest",
) -> None:
    """Write the hidden states of each line of a text file to an HDF5 file, or one vector of each line.

    Dataset "i" is line i, from 0: float32 [layers + 1, tokens, width], its tokens in the attribute "tokens". With
    --pooled, dataset "vectors" is float32 [lines, width].

    Args:
        output: HDF5 file to write.
        pooled: BERT and GPT: one vector a line, as a sentence-transformers directory says; else the mean of the last
            layer.
        prompt: With --pooled, name of a prompt of the directory to put before each line ("query").
        truncate: Cut lines that are longer than the positions of the model, instead of refusing them.
        tokenize: ELMo: split lines into words as the training text was split, not at whitespace alone.
        state: ELMo: initial LSTM state of each line: zero (also if unset), warm (the state after an empty line), or
            carry (the final state of an earlier line, as in bilm-tf and AllenNLP).
        batch_size: ELMo with --state carry: line i continues from line i - BATCH_SIZE. Match the tool you compare with.
    """
    from prelm_jax.inference.base import Pretrained, write_embeddings, write_vectors
    from prelm_jax.inference.transformer import TransformerPretrained
    from prelm_jax.storage import check_apart, stream_lines

    check_apart(output, input, model)
    if pooled:
        if tokenize or state is not None or batch_size is not None:
            raise InputError("--pooled goes with --truncate and --prompt only; the other options are for ELMo")
        lines = stream_lines(input)
        transformer = load_kind(model, step, TransformerPretrained, "embed --pooled", cased)
        write_vectors(transformer.vectors(lines, truncate, prompt), len(lines), output)
        return
    if prompt is not None:
        raise InputError(f"--prompt {prompt}: prompts are for vectors of texts; add --pooled")
    options = {"truncate": truncate, "tokenize": tokenize, "state": state, "batch_size": batch_size}
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    write_embeddings(load_kind(model, step, Pretrained, "embed", cased), stream_lines(input), output, **given)


def score(model: ModelPath, input: TextFile, cased: Cased = False, step: Step = "newest") -> None:
    """Print the natural-log probability and the number of tokens of each line of a text file.

    BERT gives the pseudo-log-likelihood: each token is masked in turn. ELMo gives the mean of both directions.
    """
    from prelm_jax.inference.base import Pretrained
    from prelm_jax.storage import stream_lines

    for log_probability, tokens in load_kind(model, step, Pretrained, "score", cased).score(stream_lines(input)):
        print(f"{log_probability:.6f}\t{tokens}")


def fill(
    model: ModelPath, text: Positional[str], top_k: Positive = 5, cased: Cased = False, step: Step = "newest"
) -> None:
    """Print the likeliest tokens for each [MASK] of a text, with their probabilities (BERT).

    Args:
        text: Text with one [MASK] or more.
        top_k: Number of tokens to print for each [MASK].
    """
    from prelm_jax.inference.bert import BertPretrained

    for candidates in load_kind(model, step, BertPretrained, "fill", cased).fill(text, top_k):
        print("  ".join(f"{token} {probability:.3f}" for token, probability in candidates))


def generate(
    model: ModelPath,
    prompt: str,
    max_tokens: NotNegative = 100,
    temperature: NotNegativeFloat = 1.0,
    top_k: Positive | None = None,
    top_p: Annotated[Fraction, Bounds(above=0)] = 1.0,
    seed: Seed = 0,
    step: Step = "newest",
) -> None:
    """Continue a prompt, and print both (GPT).

    Args:
        prompt: Text to continue.
        max_tokens: Number of tokens to append.
        temperature: Divides the logits; below 1 the text is more predictable, and 0 is greedy decoding.
        top_k: Sample from this number of likeliest tokens only; if unset, from all.
        top_p: Sample from the likeliest tokens that together reach this probability (nucleus sampling); 1: from all.
        seed: Random seed of the sampling; change it for another continuation.
    """
    from prelm_jax.inference.gpt import GPTPretrained

    loaded = load_kind(model, step, GPTPretrained, "generate")
    print(loaded.generate(prompt, max_tokens, temperature, top_k, top_p, seed))


def load_kind(
    path: str | Path, step: int | Literal["best", "newest"], kind: type[Kind], command: str, cased: bool = False
) -> Kind:
    """The model at a path; InputError if it is not of the kind that the command needs.

    Without the head of a task, if the command needs none.
    """
    from prelm_jax.inference.heads import TaskPretrained
    from prelm_jax.loading import load

    cache_compiled_programs()
    model = load(path, step, not cased)
    if isinstance(model, TaskPretrained) and not isinstance(model, kind):
        model = model.pretrained
    if kind is TaskPretrained and not isinstance(model, kind):
        raise InputError(f"{path} has no head of a task, so it cannot {command}; prelm finetune trains one")
    if not isinstance(model, kind):
        raise InputError(f"{path} is a model of type {model.config.model_type}, which cannot {command}.")
    return model
