"""A pretraining step of GPT-1 against its peer: forward, backward, clipping, AdamW; tokens per second, MFU, memory.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/gpt_step.py [--hidden-size 256] [--json FILE]

ours               the train step of `prelm pretrain`
ours, plain loss   the same with the logits of all tokens at once, and their gradient by JAX
strong torch       torch_gpt.py: fused attention, softmax and optimizer; also under torch.compile

They take turns on the same random batch without padding, with the same threads and precision. Without PyTorch only
ours is timed. GPT-1's own size, on a GPU, with and without dropout:

    python benchmarks/gpt_step.py --hidden-size 768 --num-layers 12 --length 512 --batch-size 64 --precision bfloat16
    python benchmarks/gpt_step.py … --dropout 0
"""

import dataclasses
import math
from typing import Any

import harness
import jax.numpy as jnp
import numpy as np
import tyro
from harness import COMPILED, OURS
from jax import Array

from prelm_jax.models import gpt
from prelm_jax.models.cross_entropy import cross_entropy, tied_logits

FLOP = "3 · B·T·(L·(24·D² + 4·D·T) + 2·D·V)"
PLAIN, TORCH = "ours, plain loss", "strong torch"


@dataclasses.dataclass(frozen=True)
class Settings(harness.Settings):
    """Sizes; each hidden size is measured separately."""

    hidden_size: tuple[int, ...] = (256,)
    vocab_size: int = 40478
    batch_size: int = 8
    length: int = 256


def random_batch(s: Settings) -> dict[str, np.ndarray]:
    """Full windows of one document each, with the keys of `prelm_jax.data.windows`."""
    shape = (s.batch_size, s.length)
    windows = np.random.default_rng(0).integers(0, s.vocab_size, (s.batch_size, s.length + 1), np.int32)
    return {
        "tokens": windows[:, :-1],
        "targets": windows[:, 1:],
        "positions": np.tile(np.arange(s.length, dtype=np.int32), (s.batch_size, 1)),
        "segments": np.ones(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }


def plain_loss(
    x_BTD: Array, table_VD: Array, targets_BT: Array, weights_BT: Array, vocab_size: int
) -> tuple[Array, Array]:
    """The sums that `tied_cross_entropy` computes in chunks."""
    logits_GV = tied_logits(x_BTD.reshape(-1, x_BTD.shape[-1]), table_VD, vocab_size)
    nll_G, correct_G = cross_entropy(logits_GV, targets_BT.reshape(-1))
    return (nll_G * weights_BT.reshape(-1)).sum(), (correct_G * weights_BT.reshape(-1)).sum()


def ours(s: Settings, width: int, batch: dict[str, np.ndarray]) -> harness.OurStep:
    """The step of `prelm pretrain`."""
    config = gpt.GPTConfig(
        vocab_size=s.vocab_size,
        hidden_size=width,
        num_layers=s.num_layers,
        num_heads=width // 64,
        max_position_embeddings=max(512, s.length),
        embedding_dropout=s.dropout,
        hidden_dropout=s.dropout,
        attention_dropout=s.dropout,
    )
    return harness.OurStep(config.build(jnp.dtype(s.precision)), batch)


def with_plain_loss(s: Settings, width: int, batch: dict[str, np.ndarray]) -> harness.OurStep:
    """The step of `prelm pretrain` with the plain loss."""
    in_chunks, gpt.tied_cross_entropy = gpt.tied_cross_entropy, plain_loss
    try:
        return ours(s, width, batch)
    finally:
        gpt.tied_cross_entropy = in_chunks


def strong_torch(s: Settings, width: int, batch: dict[str, np.ndarray], device: Any, compiled: bool):
    """The step of torch_gpt.py."""
    import torch
    from torch_gpt import TorchGPT

    model = TorchGPT(s.vocab_size, width, s.num_layers, max(512, s.length), s.dropout).to(device)
    inputs = harness.to_torch(batch, device)
    run = torch.compile(model) if compiled else model
    return harness.TorchStep(s, model, harness.torch_adamw(model), lambda: run(inputs["tokens"], inputs["targets"]))


def measure(s: Settings, width: int, device: Any) -> dict[str, Any]:
    """The results at one hidden size."""
    batch = random_batch(s)
    steps = {OURS: ours(s, width, batch), PLAIN: with_plain_loss(s, width, batch)}
    if device is not None:
        steps[TORCH] = strong_torch(s, width, batch, device, compiled=False)
        if s.compile:
            steps[TORCH + COMPILED] = strong_torch(s, width, batch, device, compiled=True)
    title = f"{s.num_layers} × {width}"
    result = harness.compare(s, FLOP, steps, device, (math.log(s.vocab_size), "ln V"), title)
    for name in (OURS, PLAIN):
        result["rows"][name]["temporary_bytes"] = steps[name].temporaries
        print(f"{name}: {steps[name].temporaries / 1e6:,.0f} MB of temporary arrays, as counted by XLA")
    return result


if __name__ == "__main__":
    harness.run(tyro.cli(Settings), FLOP, measure)
