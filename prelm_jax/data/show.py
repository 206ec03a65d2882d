"""Batches as text for people: each row in a few lines, ⟦x → y⟧ where the model reads x and is to predict y."""

from collections.abc import Iterator, Sequence

import numpy as np

from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.tokenizers.characters import spelled
from prelm_jax.training.contract import HostBatch

MARKER = r"⟦.*?⟧"  # a regular expression


def show_pairs(batch: HostBatch, tokenizer: Tokenizer) -> Iterator[str]:
    """Each row of `pairs`: how much is filled and masked, the label if there is one; then A and B."""
    T = batch["tokens"].shape[1]
    for row, tokens in enumerate(batch["tokens"]):
        length, second = batch["segments"][row].sum(), batch["token_types"][row].sum()
        used = batch["masked_weights"][row] > 0
        positions, targets = batch["masked_positions"][row, used], batch["masked_targets"][row, used]
        texts = [tokenizer.tokens[id] for id in tokens[:length]]
        for position, target in zip(positions, targets, strict=True):
            texts[position] = _marked(texts[position], tokenizer.tokens[target])
        lines = [
            f"row {row}: {length} of {T} positions, {len(targets)} to predict",
            f"  A {' '.join(texts[: length - second])}",
        ]
        if "next_sentence_labels" in batch:
            lines[0] += ", B is random" if batch["next_sentence_labels"][row, 0] else ", B follows A"
            lines.append(f"  B {' '.join(texts[length - second :])}")
        yield "\n".join(lines)


def show_windows(batch: HostBatch, tokenizer: Tokenizer) -> Iterator[str]:
    """Each row of `windows`: how much is filled; then its segments."""
    for row, segments in enumerate(batch["segments"]):
        lines = [f"row {row}: {np.count_nonzero(segments)} of {len(segments)} positions"]
        for number in range(1, segments.max() + 1):
            here = segments == number
            tokens, targets, weights = (batch[name][row, here] for name in ("tokens", "targets", "weights"))
            inputs = [tokenizer.tokens[id] for id in tokens]
            lines.append(f"  {number} {format_targets(inputs, targets, weights, tokenizer)}")
        yield "\n".join(lines)


def show_streams(batch: HostBatch, tokenizer: Tokenizer) -> Iterator[str]:
    """Each row of `streams`: what each direction reads. A word before an unknown word is to predict <UNK>."""
    directions = [name.removesuffix("_words") for name in batch if name.endswith("_words")]
    for row in range(len(batch[f"{directions[0]}_words"])):
        lines = [f"row {row}"]
        for direction in directions:
            words, targets, weights = (batch[f"{direction}_{name}"][row] for name in ("words", "targets", "weights"))
            inputs = spelled(batch["characters"][words])
            lines.append(f"  {direction:8} {format_targets(inputs, targets, weights, tokenizer)}")
        yield "\n".join(lines)


def format_targets(inputs: Sequence[str], targets: np.ndarray, weights: np.ndarray, tokenizer: Tokenizer) -> str:
    """One line for a model that predicts the next token: the inputs, each marked unless the next input is its target.

    The inputs a b c with the targets b x y and the weights 1 1 0 are "a ⟦b → x⟧ ⟦c → ⟧": without weight nothing is to
    be predicted.
    """
    predicted = [tokenizer.tokens[id] if weight else "" for id, weight in zip(targets, weights, strict=True)]
    columns = zip(inputs, predicted, [*inputs[1:], None], strict=True)
    return " ".join(token if target == following else _marked(token, target) for token, target, following in columns)


def _marked(token: str, target: str) -> str:
    return f"⟦{token} → {target}⟧"
