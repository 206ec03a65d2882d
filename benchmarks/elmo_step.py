"""ELMo against PyTorch: a bidirectional LSTM layer of the original's size, a pretraining step of the small model.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/elmo_step.py [--parts layer step] [--json FILE]

layer   forward and backward of 4096 cells projected to 512, both directions
  ours       prelm_jax.models.lstm, cell and projection clipped
  nn.LSTM    torch.nn.LSTM(proj_size=512) for each direction, without clipping
step    encoder, both stacks, sampled softmax, clipping, Adagrad, as in `prelm pretrain`
  ours         the train step
  torch loop   torch_elmo.py: the same in PyTorch; with --compile also under torch.compile

They take turns with the same threads, in fp32. Needs the extra `test`; without PyTorch only ours is timed.
"""

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # Leaves room for PyTorch on a GPU.

import harness
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from prelm_jax.models.elmo import DIRECTIONS, ELMoConfig
from prelm_jax.models.lstm import lstm
from prelm_jax.training.optimizer import Adagrad
from prelm_jax.training.sharding import MeshConfig, shard_batch
from prelm_jax.training.step import Keys, abstract_state, make_train_step, new_state

FLOP = "layer: 3 · 2·B·T · 18·P·E; step: see ELMo.flops"
OURS = "ours"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes: a layer of the original, a step of the published small model with a smaller vocabulary."""

    parts: tuple[Literal["layer", "step"], ...] = ("layer", "step")
    hidden_size: int = 4096
    projection_size: int = 512
    batch_size: int = 32
    length: int = 20
    step_hidden_size: int = 1024
    step_projection_size: int = 128
    vocab_size: int = 50_000
    num_negatives: int = 8192
    distinct_words: int = 384
    compile: bool = False
    threads: int = 2
    rounds: int = 8
    steps: int = 3
    json: Path | None = None


def our_layer(s: Settings) -> Any:
    """Loss and gradients of both directions, from zero state."""
    rng, P, E = np.random.default_rng(0), s.projection_size, s.hidden_size

    def uniform(*shape: int) -> jax.Array:
        return jnp.asarray(rng.uniform(-(E**-0.5), E**-0.5, shape), jnp.float32)

    weights = [{"kernel": uniform(2 * P, 4 * E), "bias": uniform(4 * E), "projection": uniform(E, P)} for _ in "fb"]
    inputs = [jnp.asarray(rng.normal(size=(s.batch_size, s.length, P)), jnp.float32) for _ in "fb"]
    states = [{"cell": jnp.zeros((s.batch_size, E)), "hidden": jnp.zeros((s.batch_size, P))} for _ in "fb"]

    def loss(weights: list, inputs: list) -> jax.Array:
        hidden, _, _ = lstm(weights, inputs, states, 3.0, 3.0)
        return sum(0.5 * jnp.square(y).sum() for y in hidden)

    function = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return lambda: float(jax.block_until_ready(function(weights, inputs))[0])


def torch_layer(s: Settings, device: Any) -> Any:
    """The same with nn.LSTM."""
    import torch

    stacks = [torch.nn.LSTM(s.projection_size, s.hidden_size, proj_size=s.projection_size).to(device) for _ in "fb"]
    shape = (s.length, s.batch_size, s.projection_size)
    inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in "fb"]

    def step() -> float:
        total = 0.0
        for stack, x in zip(stacks, inputs, strict=True):
            stack.zero_grad(set_to_none=True)
            x.grad = None
            loss = 0.5 * stack(x)[0].square().sum()
            loss.backward()
            total += loss.item()
        return total

    return step


def random_batch(s: Settings) -> dict[str, np.ndarray]:
    """Words of 1 to 16 bytes, with the keys of ELMo's batches; targets and negatives log-uniform."""
    rng, shape = np.random.default_rng(0), (s.batch_size, s.length)

    def log_uniform(size: Any) -> np.ndarray:
        return np.exp(rng.random(size) * np.log(s.vocab_size + 1)).astype(np.int32) - 1

    characters = np.full((s.distinct_words, 24), 260, np.int32)
    for row, size in zip(characters, rng.integers(1, 17, s.distinct_words), strict=True):
        row[: size + 2] = [258, *rng.integers(97, 123, size), 259]
    batch = {"characters": characters}
    for d in DIRECTIONS:
        draws = log_uniform(100 * s.num_negatives)
        _, first = np.unique(draws, return_index=True)
        tries = np.sort(first)[s.num_negatives - 1] + 1
        batch |= {
            f"{d}_words": rng.integers(0, s.distinct_words, shape, np.int32),
            f"{d}_targets": log_uniform(shape),
            f"{d}_weights": np.ones(shape, np.float32),
            f"{d}_negatives": draws[np.sort(first)[: s.num_negatives]],
            f"{d}_tries": np.array(tries, np.int32),
        }
    return batch


def our_step(s: Settings, config: ELMoConfig, batch: dict[str, np.ndarray]) -> tuple[Any, int, float]:
    """The train step of `prelm pretrain`, its parameters without the padding of the vocabulary, its FLOPs."""
    model, mesh, optimizer = config.build(), MeshConfig(devices=1).build(), Adagrad(0.2, unroll_steps=s.length)
    layout = {name: "replicated" if name.endswith(("characters", "negatives", "tries")) else "rows" for name in batch}
    with jax.set_mesh(mesh):
        abstract = abstract_state(model, optimizer, s.batch_size, mesh, "replicated")
        state = new_state(model, optimizer, s.batch_size, 0, abstract)
        placed = shard_batch(batch, layout, mesh)
    train_step, key = make_train_step(model, optimizer, 1, layout, abstract), Keys.from_seed(0).dropout
    padding = (len(state.params["softmax"]["bias"]) - s.vocab_size) * (config.projection_size + 1)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params)) - padding

    def step() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = jax.block_until_ready(train_step(state, placed, key))
        return float(metrics["loss"])

    return step, parameters, model.flops(batch)


def torch_step(s: Settings, config: ELMoConfig, batch: dict[str, np.ndarray], device: Any, compiled: bool):
    """The step of torch_elmo.py, and its number of parameters."""
    import torch
    from torch_elmo import TorchELMo

    model = TorchELMo(config, s.batch_size).to(device)
    model.states = [[tuple(x.to(device) for x in state) for state in stack] for stack in model.states]
    columns = 50 - batch["characters"].shape[1]  # of padding, which bilm-tf encodes and ours leaves away
    batch = batch | {"characters": np.pad(batch["characters"], ((0, 0), (0, columns)), constant_values=260)}
    inputs = {
        name: torch.from_numpy(x.astype(np.int64) if x.dtype == np.int32 else x).to(device) for name, x in batch.items()
    }
    optimizer = torch.optim.Adagrad(model.parameters(), 0.2, initial_accumulator_value=1.0, eps=0.0, foreach=True)
    run = torch.compile(model) if compiled else model

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = run(inputs)
        (s.length * loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        return loss.item()

    return step, sum(p.numel() for p in model.parameters())


def measure_layer(s: Settings, device: Any) -> dict[str, Any]:
    """The figures of one layer."""
    matmul_flops, contenders = harness.matmuls("float32", device)
    contenders[OURS] = our_layer(s)
    if device is not None:
        contenders["nn.LSTM"] = torch_layer(s, device)
    harness.warm_up(contenders, set())
    tokens = s.batch_size * s.length
    times = harness.take_turns(contenders, s.rounds, s.steps)
    flops = 3.0 * 2 * tokens * 18 * s.projection_size * s.hidden_size
    result = harness.results(times, OURS, tokens, flops, matmul_flops)
    harness.show(
        f"a layer of {s.hidden_size}/{s.projection_size}, both directions, {s.batch_size} × {s.length}", result
    )
    return result


def measure_step(s: Settings, device: Any) -> dict[str, Any]:
    """The results for a training step."""
    config = ELMoConfig(
        vocab_size=s.vocab_size,
        num_highways=1,
        projection_size=s.step_projection_size,
        hidden_size=s.step_hidden_size,
    )
    batch = random_batch(s)
    step, parameters, flops = our_step(s, config, batch)
    matmul_flops, contenders = harness.matmuls("float32", device)
    contenders[OURS] = step
    names = ["torch loop", "torch loop, compiled"] if s.compile else ["torch loop"]
    for name in names if device is not None else ():
        contenders[name], theirs = torch_step(s, config, batch, device, name.endswith("compiled"))
        if theirs != parameters:
            raise SystemExit(f"{name} has {theirs:,} parameters, ours {parameters:,}: not the same model")
    losses = harness.warm_up(contenders, {"torch loop, compiled"})
    for name in set(names) & set(contenders):
        if abs(losses[name] - losses[OURS]) > 0.1:
            raise SystemExit(f"{name} starts at a loss of {losses[name]:.3f}, ours at {losses[OURS]:.3f}")
    times = harness.take_turns(contenders, s.rounds, s.steps)
    result = harness.results(times, OURS, s.batch_size * s.length, flops, matmul_flops)
    result |= {"parameters": parameters, "first_losses": losses}
    size = f"{s.step_hidden_size}/{s.step_projection_size}, {parameters:,} parameters"
    title = f"a step of {size}, {s.batch_size} × {s.length}, {s.distinct_words} distinct words"
    harness.show(title, result)
    return result


def main(settings: Settings) -> None:
    harness.limit_threads(settings.threads)
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
    record = {"machine": harness.machine(), "settings": dataclasses.asdict(settings) | {"json": None}, "flop": FLOP}
    harness.print_machine(record["machine"])
    device = harness.torch_device()
    measures = {"layer": measure_layer, "step": measure_step}
    record["results"] = {part: measures[part](settings, device) for part in settings.parts}
    harness.write_json(settings.json, record)


if __name__ == "__main__":
    main(tyro.cli(Settings))
