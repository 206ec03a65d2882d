"""Commands that use a fine-tuned model: classify, tag, answer, choose."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import tyro

from prelm_jax.bounds import Size
from prelm_jax.cli.models import load_kind
from prelm_jax.cli.options import ModelPath, Positional, Step
from prelm_jax.corpus.readers import extension
from prelm_jax.data.examples import Answers, Columns, Example
from prelm_jax.errors import InputError
from prelm_jax.storage import check_apart, output_directory

if TYPE_CHECKING:
    from prelm_jax.inference.decoding import Prediction
    from prelm_jax.inference.heads import TaskPretrained

Input = Annotated[
    str,
    Positional,
    tyro.conf.arg(help="File of examples as SPEC (docs/finetuning.md), labels not needed; or .txt, one text per line."),
]
Json = Annotated[bool, tyro.conf.arg(help="Print one JSON object per line: id, prediction, and probabilities by name.")]

ALL_USUAL = Columns()

# Larger than any difference that JSON's readers are sure to take for a number.
GREATEST = sys.float_info.max


def classify(
    model: ModelPath, input: Input, columns: Columns = ALL_USUAL, json: Json = False, step: Step = "newest"
) -> None:
    """Print the label of each text or pair of texts with its probability, several labels, or a number.

    Several labels are separated by tabs. Texts that are too long are cut, and counted.
    """
    loaded = _load(model, step, "classify")
    examples, predictions = _predict(loaded, input, columns)
    for example, prediction in zip(examples, predictions, strict=True):
        if json:
            _print_json(example, prediction, loaded.labels)
        elif loaded.kind == "label":
            print(f"{prediction.label}\t{max(prediction.probabilities):.4f}")
        elif loaded.kind == "number":
            print(f"{prediction.label:.4f}")
        else:
            print("\t".join(cast(tuple[str, ...], prediction.label)))


def tag(
    model: ModelPath, input: Input, columns: Columns = ALL_USUAL, json: Json = False, step: Step = "newest"
) -> None:
    """Print each word with its tag, and a blank line after each sentence, of any length.

    Lines of a .txt file are split at white space.
    """
    loaded = _load(model, step, "tag")
    examples, predictions = _predict(loaded, input, columns)
    for example, prediction in zip(examples, predictions, strict=True):
        if json:
            _print_json(example, prediction, loaded.labels)
            continue
        words, tags = example.sequences[0][0], cast(tuple[str, ...], prediction.label)
        print("".join(f"{word}\t{found}\n" for word, found in zip(words, tags, strict=True)))


def choose(
    model: ModelPath, input: Input, columns: Columns = ALL_USUAL, json: Json = False, step: Step = "newest"
) -> None:
    """Print the number (from 0) of the best option of each example, and its probability."""
    loaded = _load(model, step, "choose")
    examples, predictions = _predict(loaded, input, columns)
    for example, prediction in zip(examples, predictions, strict=True):
        if json:
            _print_json(example, prediction, loaded.labels)
        else:
            print(f"{prediction.label}\t{max(prediction.probabilities):.4f}")


def answer(
    model: ModelPath,
    input: Input,
    output: Positional[Path],
    columns: Columns = ALL_USUAL,
    null_threshold: float = 0.0,
    stride: Size = 128,
    step: Step = "newest",
) -> None:
    """Write the answers to questions as the three files that SQuAD's scorer reads.

    predictions.json has the answer to each question, nbest_predictions.json the 20 best with probabilities, and
    null_odds.json the score of no answer minus the score of the best answer.

    Args:
        output: Directory to write; it must be empty or new.
        null_threshold: A question has no answer if its null_odds exceed this; 1e9 answers all, as SQuAD 1.1 asks.
        stride: Tokens between starts of the windows of a long passage.
    """
    check_apart(output, input, model)
    loaded = _load(model, step, "answer")
    with output_directory(output) as directory:
        examples, predictions = _predict(loaded, input, columns, null_threshold, stride)
        for name, content in squad_files(examples, predictions).items():
            (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def squad_files(examples: Sequence[Example], predictions: "Sequence[Prediction]") -> dict[str, dict[str, object]]:
    """The contents of the files that google-research/bert's run_squad.py writes and SQuAD's scorer reads, by name."""
    found: dict[str, dict[str, object]] = {"predictions.json": {}, "nbest_predictions.json": {}, "null_odds.json": {}}
    for example, prediction in zip(examples, predictions, strict=True):
        answers = prediction.label
        found["predictions.json"][example.id] = next(iter(answers.texts), "") if isinstance(answers, Answers) else ""
        found["nbest_predictions.json"][example.id] = [
            {"text": x.text, "probability": x.probability, "start_logit": x.start_score, "end_logit": x.end_score}
            for x in prediction.candidates
        ]
        difference = prediction.null_difference
        found["null_odds.json"][example.id] = difference if math.isfinite(difference) else GREATEST
    return found


def _load(path: str, step: Step, command: str) -> "TaskPretrained":
    from prelm_jax.inference.heads import TaskPretrained

    model = load_kind(path, step, TaskPretrained, command)
    model.require(command)
    return model


def _predict(
    model: "TaskPretrained", spec: str, columns: Columns, null_threshold: float = 0.0, stride: int | None = None
) -> "tuple[list[Example], list[Prediction]]":
    """The examples of a file and their predictions; says on the standard error what was left out or cut."""
    from prelm_jax.finetuning.files import print_counts, read_examples
    from prelm_jax.finetuning.records import text_lines

    if extension(spec) == ".txt" and columns == ALL_USUAL and model.kind in ("label", "labels", "number", "tags"):
        lines = [line.rstrip("\r\n") for _, line in text_lines(spec)]
        parts = [(tuple(line.split()),) if model.kind == "tags" else (line,) for line in lines]
        examples = [Example(str(i), (each,)) for i, each in enumerate(parts) if each != ((),)]
        counts = {"blank lines": len(lines) - len(examples)} if len(examples) < len(lines) else {}
    else:
        examples, counts = read_examples(spec, model.kind, columns, labelled=False)
    if not examples:
        raise InputError(f"{spec} has no texts")
    predictions, num_cut = model.predict(examples, null_threshold, stride, progress="predict")
    print_counts(spec, counts, num_cut, len(examples), model.kind, model.frame.max_length)
    return examples, predictions


def _print_json(example: Example, prediction: "Prediction", labels: Sequence[str]) -> None:
    probabilities: object = prediction.probabilities
    if len(labels) == len(prediction.probabilities) and not isinstance(example.sequences[0][0], tuple):
        probabilities = dict(zip(labels, prediction.probabilities, strict=True))
    record: dict[str, object] = {"id": example.id, "prediction": prediction.label}
    if prediction.probabilities:
        record["probabilities"] = probabilities
    print(json.dumps(record, ensure_ascii=False))
