"""How a batch is shown to people: its tokens in a line, and ⟦x → y⟧ where x stands and y is to be predicted."""

from collections.abc import Sequence

import numpy as np

MARKER = r"⟦.*?⟧"  # a regular expression


def mark(standing: str, predicted: str) -> str:
    """What stands at a place, and what is to be predicted there."""
    return f"⟦{standing} → {predicted}⟧"


def read_on(read: Sequence[str], targets: np.ndarray, weights: np.ndarray, tokenizer) -> str:
    """A line for models that predict the next token: what is read at places, their targets and weights.

    A place is marked unless the next one reads what it is to predict; without weight, nothing is to be predicted.
    """
    predicted = [tokenizer.tokens[id] if weight else "" for id, weight in zip(targets, weights, strict=True)]
    places = zip(read, predicted, [*read[1:], None], strict=True)
    return " ".join(here if target == following else mark(here, target) for here, target, following in places)
