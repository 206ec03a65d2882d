"""The model card of a fine-tuned model, README.md of its directory."""

import json
import os

from prelm_jax.data.examples import Kind
from prelm_jax.finetuning.files import FileSpec
from prelm_jax.finetuning.results import Results, SeedResult, spread_rows
from prelm_jax.hub import PREFIX, is_hub_name
from prelm_jax.report.summary import words

# Kinds, by the names that hubs have for tasks.
PIPELINES: dict[Kind, str] = {
    "label": "text-classification",
    "labels": "text-classification",
    "number": "text-classification",
    "choice": "multiple-choice",
    "tags": "token-classification",
    "spans": "question-answering",
}
# How a model of a kind is used in Python; what it prints is in the form of `Example.label`.
_CLASSIFY = 'classify(["A text.", ("A text", "and the other of a pair.")])'
USES: dict[Kind, str] = {
    "label": _CLASSIFY,
    "labels": _CLASSIFY,
    "number": _CLASSIFY,
    "choice": 'choose([("A text.", ["An option.", "Another."])])',
    "tags": 'tag(["Words with spaces between them ."])',
    "spans": 'answer([("A question?", "The passage that may answer it.")])',
}
# Metrics, by the names that hubs have for them; the others have the same name.
METRIC_TYPES = {
    **dict.fromkeys(("f1", "macro_f1", "micro_f1", "span_f1", "has_answer_f1", "no_answer_f1"), "f1"),
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "span_precision": "precision",
    "span_recall": "recall",
}


def task_card(results: Results, seed: int, name: str, library: str, command: str) -> str:
    """README.md of an exported seed: usage, data, results of all seeds with baselines, and a model-index.

    name: of the model. library: that reads the directory. command: that trained it.
    """
    own = results.of_seed(seed)
    data = _yaml(os.path.basename(FileSpec.parse(results.dev).location))
    origin = f"fine-tuned from `{results.init_from}`" if results.init_from else "trained from scratch"
    header, rows = spread_rows(results)
    table = "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])
    return f"""---
library_name: {library}
license: # the license of your data and weights, for example apache-2.0{_base_model(results)}
pipeline_tag: {PIPELINES[results.kind]}
tags:
- {results.model_type}
- prelm_jax
model-index:
- name: {_yaml(name)}
  results:
  - task:
      type: {PIPELINES[results.kind]}
      name: {_yaml(results.task)}
    dataset:
      type: {data}
      name: {data}
    metrics:
{_metric_entries(results, own)}
---

# {name}

{results.model_type}, {origin} with prelm_jax for the task {results.task}.

```python
import prelm_jax

for prediction in prelm_jax.load({_yaml(name)}).{USES[results.kind]}:
    print(prediction.label)
```

- Weights: step {own.step:,} of {_choice(results, own)}. {_evaluations(own)} of this seed on the held-out examples.
- Training data: {results.train_examples:,} examples of `{results.train}`.
- Held-out data: {results.dev_examples:,} examples of `{results.dev}`.
{_labels(results)}

{table}

The model-index has the values of this seed. The sampling error is the standard error that comes from the size of the \
held-out data; differences below three of them say little.

Command: `prelm {command}`
"""


def _base_model(results: Results) -> str:
    """A line of metadata with the pretrained model, if it is one of a hub."""
    if results.init_from is None or not is_hub_name(results.init_from):
        return ""
    return f"\nbase_model: {results.init_from.removeprefix(PREFIX).partition('@')[0]}"


def _choice(results: Results, own: SeedResult) -> str:
    """Which seed it is, and why: `seed 3, the median of 5 seeds by accuracy`."""
    if len(results.seeds) == 1:
        return f"seed {own.seed}"
    which = "the median" if own == results.median_seed() else "chosen by hand"
    return f"seed {own.seed}, {which} of {len(results.seeds)} seeds by {words(results.metric)}"


def _evaluations(own: SeedResult) -> str:
    return f"{own.evaluations} evaluation{'' if own.evaluations == 1 else 's'}"


def _labels(results: Results) -> str:
    """A line with the first fifty labels; empty for tasks without names."""
    if not results.labels:
        return ""
    more = f" and {len(results.labels) - 50} more" if len(results.labels) > 50 else ""
    return f"- Labels: {', '.join(f'`{label}`' for label in results.labels[:50])}{more}."


def _metric_entries(results: Results, own: SeedResult) -> str:
    entries = []
    for name in results.metrics():
        value = round(own.scores[name].value, 6)
        entries.append(f"    - type: {METRIC_TYPES.get(name, name)}\n      name: {words(name)}\n      value: {value}")
    return "\n".join(entries)


def _yaml(text: str) -> str:
    """A string as YAML: quoted as in JSON, of which YAML is a superset."""
    return json.dumps(text, ensure_ascii=False)
