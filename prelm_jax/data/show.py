"""Batches as text for people: each row in a few lines, ⟦x → y⟧ where the model reads x and is to predict y."""

from collections.abc import Iterator, Sequence

import numpy as np

from prelm_jax.corpus.store import Store
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.tokenizers.characters import spelled
from prelm_jax.training.contract import HostBatch

LOOKED_AT = 1000  # Sentences of a store from which some are chosen.
MARKER = r"⟦.*?⟧"  # a regular expression


def show_pairs(batch: HostBatch, tokenizer: Tokenizer) -> Iterator[str]:
    """Each row of `pairs`: how much is filled and masked, the label if there is one; then A and B.

    Of a packed row, first how much is filled and masked in all, then each example like a row.
    """
    T = batch["tokens"].shape[1]
    for row, segments in enumerate(batch["segments"]):
        used = batch["masked_weights"][row] > 0
        positions, targets = batch["masked_positions"][row, used], batch["masked_targets"][row, used]
        texts = [tokenizer.tokens[id] for id in batch["tokens"][row]]
        for position, target in zip(positions, targets, strict=True):
            texts[position] = _marked(texts[position], tokenizer.tokens[target])
        examples = []
        for number in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == number)
            second = here[-1] + 1 - batch["token_types"][row, here].sum()
            head = f"{len(here)} of {T} positions, {np.isin(positions, here).sum()} to predict"
            lines = [f"  A {' '.join(texts[here[0] : second])}"]
            if "next_sentence_labels" in batch:
                head += ", B is random" if batch["next_sentence_labels"][row, number - 1] else ", B follows A"
                lines.append(f"  B {' '.join(texts[second : here[-1] + 1])}")
            examples.append("\n".join([head, *lines]))
        if len(examples) > 1:
            filled = f"{np.count_nonzero(segments)} of {T} positions, {len(targets)} to predict"
            heads = [f" {number}: {example}" for number, example in enumerate(examples, 1)]
            examples = ["\n".join([f"{filled}, {len(examples)} examples", *heads])]
        yield f"row {row}: {examples[0]}"


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


def sentences(store: Store, tokenizer: Tokenizer, count: int) -> list[str]:
    """Up to `count` sentences of 6 to 24 known tokens, spread evenly over a store; the same each time."""
    starts = np.unique(np.linspace(0, store.num_sentences - 1, LOOKED_AT).astype(np.int64))
    bounds = zip(store.sentence_offsets[starts].tolist(), store.sentence_offsets[starts + 1].tolist(), strict=True)
    found = [store.gather(np.arange(start, end)) for start, end in bounds if 6 <= end - start <= 24]
    known = [ids for ids in found if tokenizer.unknown_id not in ids]
    chosen = [known[i] for i in np.unique(np.linspace(0, len(known) - 1, min(count, len(known))).astype(np.int64))]
    if store.spellings is not None:
        return [" ".join(spelled(store.spellings.characters(ids))) for ids in chosen]
    return [tokenizer.decode(ids) for ids in chosen]


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
