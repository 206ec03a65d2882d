"""seed-N/predictions.jsonl: the predictions of a seed for the dev examples after its last step, one object a line."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from prelm_jax.data.examples import Answers, Example, Kind
from prelm_jax.errors import InputError
from prelm_jax.inference.decoding import Prediction
from prelm_jax.storage import prefix_errors, reachable, read_lines, write_file
from prelm_jax.validation import read

PREDICTIONS = "predictions.jsonl"
SHOWN = 200  # Characters of an example's text that its prediction quotes.


@dataclass(frozen=True)
class PredictionLine:
    """A line of predictions.jsonl.

    `gold` and `prediction` are in the form of `Example.label`, except for `spans`: the texts of all accepted answers,
    and the predicted text, "" for no answer.
    """

    id: str
    text: str  # The first SHOWN characters of the example's text.
    gold: object
    prediction: object
    probabilities: dict[str, float] | None = None  # By label or number of the choice; None where the head has none.


def write_predictions(
    path: str | os.PathLike,
    kind: Kind,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    labels: Sequence[str] = (),
) -> None:
    """Writes the predictions in the order of the examples; replaces a file that is there.

    labels: the names that the model knows, for kinds that have names.
    """
    lines = []
    for example, found in zip(examples, predictions, strict=True):
        predicted = found.label
        parts = [part if isinstance(part, str) else " ".join(part) for parts in example.sequences for part in parts]
        gold = list(example.label.texts) if isinstance(example.label, Answers) else example.label
        if isinstance(predicted, Answers):
            predicted = predicted.texts[0] if predicted.texts else ""
        rounded = None
        if found.probabilities and kind != "tags":
            names = labels or map(str, range(len(found.probabilities)))
            rounded = {name: round(x, 6) for name, x in zip(names, found.probabilities, strict=True)}
        line = PredictionLine(example.id, " | ".join(dict.fromkeys(parts))[:SHOWN], gold, predicted, rounded)
        lines.append(json.dumps(dataclasses.asdict(line), ensure_ascii=False) + "\n")
    write_file(reachable(path), "".join(lines).encode())


def read_predictions(path: str | os.PathLike) -> list[PredictionLine]:
    """The lines of predictions.jsonl. Raises InputError for a line that is no prediction."""
    predictions = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number} is not JSON: {error}") from None
        with prefix_errors(f"{path}:{number}"):
            predictions.append(read(PredictionLine, value, "prediction"))
    return predictions
