"""Evaluation of a fine-tuned model on a labeled file: the metrics of its task with their trivial baselines."""

from typing import NamedTuple

from prelm_jax.data.examples import Columns, Example
from prelm_jax.data.tags import bio_names
from prelm_jax.finetuning import metrics
from prelm_jax.finetuning.files import check_labels, print_counts, read_examples
from prelm_jax.inference.decoding import Prediction
from prelm_jax.inference.heads import TaskPretrained


class Evaluated(NamedTuple):
    """The examples of a file with their predictions, the metrics by name, and metric -> trivial baseline -> value."""

    examples: list[Example]
    predictions: list[Prediction]
    scores: dict[str, metrics.Score]
    baselines: dict[str, dict[str, float]]


def evaluate(
    model: TaskPretrained, spec: str, columns: Columns | None = None, positive: str | None = None
) -> Evaluated:
    """Scores a model on the examples of a labeled file, each of them once; prints what was left out or cut.

    positive: the label whose F1 is asked for. Raises InputError for what the user can mend in the file: labels that
    the model does not know, a column that is not there.

        evaluate(load("my-classifier"), "test.tsv").scores["accuracy"].value
    """
    kind = model.kind
    labels = bio_names(model.labels) if kind == "tags" else model.labels
    data = read_examples(spec, kind, columns)
    check_labels(spec, data, kind, labels)
    metrics.check_positive(kind, positive, labels)
    predictions, num_cut = model.predict(data.examples, metrics.null_threshold(data.examples), progress="evaluate")
    print_counts(spec, data.counts, num_cut, len(data.examples), kind, model.frame.max_length)
    scores = metrics.scores(kind, data.examples, [each.label for each in predictions], labels, positive)
    return Evaluated(data.examples, predictions, scores, metrics.baselines(kind, data.examples, labels, positive))
