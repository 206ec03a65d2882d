"""A pretraining step of BERT against its peers: forward, backward, clipping, AdamW; tokens per second and MFU.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/bert_step.py [--hidden-size 256 768] [--json FILE]

ours           the train step of `prelm pretrain`
transformers   BertForPreTraining with its defaults: logits at all positions, its attention, torch.optim.AdamW
strong torch   torch_bert.py: masked positions only, fused attention and optimizer

They take turns on the same random batch without padding, with the same threads and precision; both peers also under
torch.compile. With `--precision bfloat16` on a CPU, the strong peer is timed in fp32 too. Needs the extra `test`;
without PyTorch only ours is timed.
"""

import dataclasses
import math
from typing import Any, Literal

import harness
import jax.numpy as jnp
import numpy as np
import tyro
from harness import COMPILED, LEARNING_RATE, OURS, WEIGHT_DECAY

from prelm_jax.models.bert import BertConfig

FLOP = "3 · (B·T·L·(8·D² + 4·D·F + 4·D·T) + B·M·(2·D² + 2·D·V))"


@dataclasses.dataclass(frozen=True)
class Settings(harness.Settings):
    """Sizes; each hidden size is measured separately."""

    hidden_size: tuple[int, ...] = (256, 768)
    vocab_size: int = 30522
    batch_size: int = 16
    length: int = 128
    masked: int = 20
    peers: tuple[Literal["transformers", "strong torch"], ...] = ("transformers", "strong torch")


def random_batch(s: Settings) -> dict[str, np.ndarray]:
    """Full rows of two sentences, with the keys of `prelm_jax.data.pairs`."""
    rng, B, T = np.random.default_rng(0), s.batch_size, s.length
    positions_BT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return {
        "tokens": rng.integers(0, s.vocab_size, (B, T), np.int32),
        "token_types": (positions_BT >= T // 2).astype(np.int32),
        "positions": positions_BT,
        "segments": np.ones((B, T), np.int32),
        "masked_positions": np.sort(rng.permuted(positions_BT, axis=1)[:, : s.masked], 1),
        "masked_targets": rng.integers(0, s.vocab_size, (B, s.masked), np.int32),
        "masked_weights": np.ones((B, s.masked), np.float32),
        "next_sentence_positions": np.zeros((B, 1), np.int32),
        "next_sentence_labels": rng.integers(0, 2, (B, 1), np.int32),
        "next_sentence_weights": np.ones((B, 1), np.float32),
    }


def ours(s: Settings, width: int, batch: dict[str, np.ndarray]) -> harness.OurStep:
    """The step of `prelm pretrain`."""
    config = BertConfig(
        vocab_size=s.vocab_size,
        hidden_size=width,
        num_layers=s.num_layers,
        num_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=max(512, s.length),
        hidden_dropout=s.dropout,
        attention_dropout=s.dropout,
    )
    step = harness.OurStep(config.build(jnp.dtype(s.precision)), batch)
    # The peers' vocabularies are not padded.
    step.parameters -= (len(step.state.params["masked_lm_bias"]) - s.vocab_size) * (width + 1)
    return step


def strong_torch(s: Settings, width: int, batch: dict[str, np.ndarray], device: Any, compiled: bool):
    """The step of torch_bert.py."""
    import torch
    from torch_bert import TorchBert

    model = TorchBert(s.vocab_size, width, s.num_layers, max(512, s.length), s.dropout).to(device)
    inputs = harness.to_torch(batch, device)
    run = torch.compile(model) if compiled else model
    return harness.TorchStep(s, model, harness.torch_adamw(model), lambda: run(inputs))


def transformers(s: Settings, width: int, batch: dict[str, np.ndarray], device: Any, compiled: bool):
    """The step of `transformers`."""
    import torch
    from transformers import BertConfig, BertForPreTraining

    config = BertConfig(
        vocab_size=s.vocab_size,
        hidden_size=width,
        num_hidden_layers=s.num_layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=max(512, s.length),
        hidden_dropout_prob=s.dropout,
        attention_probs_dropout_prob=s.dropout,
    )
    model = BertForPreTraining(config).to(device).train()
    labels_BT = np.full_like(batch["tokens"], -100)
    np.put_along_axis(labels_BT, batch["masked_positions"], batch["masked_targets"], 1)
    inputs = {
        "input_ids": batch["tokens"],
        "token_type_ids": batch["token_types"],
        "attention_mask": batch["segments"],
        "labels": labels_BT,
        "next_sentence_label": batch["next_sentence_labels"][:, 0],
    }
    inputs = harness.to_torch(inputs, device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    run = torch.compile(model) if compiled else model
    return harness.TorchStep(s, model, optimizer, lambda: run(**inputs).loss)


def measure(s: Settings, width: int, device: Any) -> dict[str, Any]:
    """The results at one hidden size."""
    batch = random_batch(s)
    steps = {OURS: ours(s, width, batch)}
    for peer in s.peers if device is not None else ():
        for compiled in (False, True) if s.compile else (False,):
            build = {"transformers": transformers, "strong torch": strong_torch}[peer]
            steps[peer + COMPILED if compiled else peer] = build(s, width, batch, device, compiled)
    if "strong torch" in s.peers and s.precision == "bfloat16" and device is not None and device.type == "cpu":
        full = dataclasses.replace(s, precision="float32")
        steps["strong torch, float32"] = strong_torch(full, width, batch, device, False)
    chance = (math.log(s.vocab_size) + math.log(2), "ln V + ln 2")
    return harness.compare(s, FLOP, steps, device, chance, f"{s.num_layers} × {width}, {s.masked} masked")


if __name__ == "__main__":
    harness.run(tyro.cli(Settings), FLOP, measure)
