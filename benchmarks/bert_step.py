"""One pretraining step of BERT beside its peers: forward, backward, clipping, AdamW; tokens per second and MFU.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/bert_step.py [--hidden-size 256 768] [--json FILE]

ours           the train step of `prelm pretrain`
transformers   BertForPreTraining as it comes: logits at all positions, its default attention, torch.optim.AdamW
strong torch   torch_bert.py: masked positions only, fused attention and optimizer

Each in turn on the same random batch without padding, on the same threads, in the same precision; both of the peers
also under torch.compile. Needs the extra `test`; without PyTorch ours is timed alone.
"""

import contextlib
import dataclasses
import math
import os
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # On a GPU, to leave room for PyTorch.

import harness
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from prelm_jax.models.bert import BertConfig
from prelm_jax.training import loop
from prelm_jax.training.optimizer import AdamW
from prelm_jax.training.sharding import MeshConfig, place

FLOP = "3 · (B·T·L·(8·D² + 4·D·F + 4·D·T) + B·M·(2·D² + 2·D·V))"
OURS, COMPILED = "ours", ", compiled"
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.01, 1.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes; each hidden size is a measurement of its own."""

    hidden_size: tuple[int, ...] = (256, 768)
    num_layers: int = 4
    vocab_size: int = 30522
    batch_size: int = 16
    length: int = 128
    masked: int = 20
    dropout: float = 0.1
    precision: Literal["float32", "bfloat16"] = "float32"
    threads: int = 2
    peers: tuple[Literal["transformers", "strong torch"], ...] = ("transformers", "strong torch")
    compile: bool = True
    rounds: int = 8
    steps: int = 3
    json: Path | None = None


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


def ours(s: Settings, width: int, batch: dict[str, np.ndarray]) -> tuple[Any, int, float]:
    """The step as `prelm_jax.pretrain` makes it; parameters beside the vocabulary's padding; FLOP."""
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
    optimizer = AdamW(LEARNING_RATE, 0, 10**6, weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM)
    model, mesh, layout = (
        config.build(jnp.dtype(s.precision)),
        MeshConfig(devices=1).build(),
        dict.fromkeys(batch, "rows"),
    )
    with jax.set_mesh(mesh):
        abstract = loop.abstract_state(model, optimizer, s.batch_size, mesh, "replicated")
        state = loop.new_state(model, optimizer, s.batch_size, 0, abstract)
        placed = place(batch, layout, mesh)
    train_step, key = loop.make_train_step(model, optimizer, 1, layout), loop.Keys.of(0).dropout
    padding = (len(state.params["masked_lm_bias"]) - s.vocab_size) * (width + 1)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params)) - padding

    def step() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = jax.block_until_ready(train_step(state, placed, key))
        return float(metrics["loss"])

    return step, parameters, model.flops(batch)


def strong_torch(s: Settings, width: int, batch: dict[str, np.ndarray], device: Any, compiled: bool):
    """The step of torch_bert.py, and its number of parameters."""
    import torch
    from torch_bert import TorchBert

    model = TorchBert(s.vocab_size, width, s.num_layers, max(512, s.length), s.dropout).to(device)
    inputs = _to_torch(batch, device)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    try:
        optimizer = torch.optim.AdamW(groups, LEARNING_RATE, fused=True)
    except RuntimeError:
        optimizer = torch.optim.AdamW(groups, LEARNING_RATE, foreach=True)
    run = torch.compile(model) if compiled else model
    return _torch_step(s, model, optimizer, lambda: run(inputs)), _count(model)


def transformers(s: Settings, width: int, batch: dict[str, np.ndarray], device: Any, compiled: bool):
    """The step of `transformers`, and its number of parameters."""
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
    inputs = _to_torch(inputs, device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    run = torch.compile(model) if compiled else model
    return _torch_step(s, model, optimizer, lambda: run(**inputs).loss), _count(model)


def _torch_step(s: Settings, model: Any, optimizer: Any, loss_of_batch: Any):
    import torch

    kind = next(model.parameters()).device.type
    mixed = s.precision == "bfloat16"
    precision = torch.autocast(kind, torch.bfloat16) if mixed else contextlib.nullcontext()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with precision:
            loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        if kind == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    return step


def _to_torch(arrays: dict[str, np.ndarray], device: Any) -> dict[str, Any]:
    import torch

    return {k: torch.from_numpy(x.astype(np.int64)).to(device) for k, x in arrays.items() if x.dtype == np.int32}


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def measure(s: Settings, width: int, device: Any) -> dict[str, Any]:
    """The figures at one hidden size."""
    batch = random_batch(s)
    step, parameters, flops = ours(s, width, batch)
    matmul_flops, contenders = harness.matmuls(s.precision, device)
    contenders[OURS] = step
    for peer in s.peers if device is not None else ():
        for compiled in (False, True) if s.compile else (False,):
            build = {"transformers": transformers, "strong torch": strong_torch}[peer]
            name = peer + COMPILED if compiled else peer
            contenders[name], peer_parameters = build(s, width, batch, device, compiled)
            if peer_parameters != parameters:
                raise SystemExit(f"{name} has {peer_parameters:,} parameters, ours {parameters:,}: not the same model")
    losses = harness.warm_up(contenders, {name for name in contenders if name.endswith(COMPILED)})
    expected = math.log(s.vocab_size) + math.log(2)
    for name in contenders:
        if not name.startswith("matmul") and abs(losses[name] - expected) > 0.5:
            raise SystemExit(f"{name} starts at a loss of {losses[name]:.2f}, not near ln V + ln 2 = {expected:.2f}")
    times = harness.take_turns(contenders, s.rounds, s.steps)
    result = harness.results(times, OURS, s.batch_size * s.length, flops, matmul_flops)
    result |= {"hidden_size": width, "parameters": parameters, "first_losses": losses}
    first = ", ".join(f"{losses[name]:.3f}" for name in contenders if not name.startswith("matmul"))
    print(f"\n{s.num_layers} × {width}: {parameters:,} parameters each; losses of the first step {first}")
    print(f"a step is {FLOP} = {flops / 1e9:,.1f} GFLOP, a product {matmul_flops / 1e9:,.1f} GFLOP")
    harness.show(f"batch {s.batch_size} × {s.length}, {s.masked} masked, dropout {s.dropout}, {s.precision}", result)
    return result


def main(settings: Settings) -> None:
    harness.limit_threads(settings.threads)
    record = {"machine": harness.machine(), "settings": dataclasses.asdict(settings) | {"json": None}, "flop": FLOP}
    harness.introduce(record["machine"])
    device = harness.torch_device()
    record["results"] = [measure(settings, width, device) for width in settings.hidden_size]
    harness.write_json(settings.json, record)


if __name__ == "__main__":
    main(tyro.cli(Settings))
