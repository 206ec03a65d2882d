"""Shared by the comparisons with peers: interleaved timing, matmul peaks, a table for people, JSON for machines.

A contender is a function without arguments that runs one step, waits until it is done, and returns the loss.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # Leaves room for PyTorch on a GPU.

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from prelm_jax.training.optimizer import AdamW
from prelm_jax.training.sharding import MeshConfig, shard_batch
from prelm_jax.training.step import Keys, abstract_state, make_train_step, new_state

try:
    import torch
except ImportError:
    torch = None

Contenders = dict[str, Callable[[], float]]
Times = dict[str, np.ndarray]
OURS, COMPILED = "ours", ", compiled"
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.01, 1.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes and conditions of all train steps; each hidden size is measured separately."""

    hidden_size: tuple[int, ...]
    vocab_size: int
    batch_size: int
    length: int
    num_layers: int = 4
    dropout: float = 0.1
    precision: Literal["float32", "bfloat16"] = "float32"
    threads: int = 2
    compile: bool = True
    rounds: int = 8
    steps: int = 3
    json: Path | None = None


def limit_threads(threads: int) -> None:
    """Gives all contenders the same threads. Call before JAX starts: XLA has a thread per core that it may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if torch is not None:
        torch.set_num_threads(threads)


def torch_device() -> Any:
    """The device of JAX for PyTorch; if PyTorch cannot use it, prints the reason and returns None."""
    wanted = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if torch is None or (wanted == "cuda" and not torch.cuda.is_available()):
        print(f"PyTorch {'is not installed' if torch is None else 'has no GPU here'}: only ours is timed")
        return None
    torch.set_float32_matmul_precision("highest" if wanted == "cpu" else "high")  # JAX takes TF32 on a GPU too.
    return torch.device(wanted)


class OurStep:
    """The compiled step of `prelm pretrain`, a contender. `temporaries`: bytes of temporary arrays."""

    def __init__(self, model: Any, batch: dict[str, np.ndarray]):
        optimizer = AdamW(LEARNING_RATE, 0, 10**6, weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM)
        layout, rows = dict.fromkeys(batch, "rows"), len(batch["tokens"])
        self._mesh, self._key = MeshConfig(devices=1).build(), Keys.from_seed(0).dropout
        with jax.set_mesh(self._mesh):
            abstract = abstract_state(model, optimizer, rows, self._mesh, "replicated")
            self.state = new_state(model, optimizer, rows, 0, abstract)
            self._batch = shard_batch(batch, layout, self._mesh)
            train_step = make_train_step(model, optimizer, 1, layout, abstract)
            self._step = train_step.lower(self.state, self._batch, self._key).compile()
        self.temporaries = self._step.memory_analysis().temp_size_in_bytes
        self.flops, self.tokens = model.flops(batch), batch["tokens"].size
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def __call__(self) -> float:
        self.state, metrics = jax.block_until_ready(self._step(self.state, self._batch, self._key))
        return float(metrics["loss"])


class TorchStep:
    """A contender in PyTorch: the loss in the precision of the settings, gradients, clipping, the optimizer."""

    def __init__(self, s: Settings, model: Any, optimizer: Any, loss_of_batch: Callable[[], Any]):
        self._model, self._optimizer, self._loss = model, optimizer, loss_of_batch
        self.parameters = sum(p.numel() for p in model.parameters())
        self._kind = next(model.parameters()).device.type
        mixed = s.precision == "bfloat16"
        self._precision = torch.autocast(self._kind, torch.bfloat16) if mixed else contextlib.nullcontext()

    def __call__(self) -> float:
        self._optimizer.zero_grad(set_to_none=True)
        with self._precision:
            loss = self._loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_NORM)
        self._optimizer.step()
        if self._kind == "cuda":
            torch.cuda.synchronize()
        return loss.item()


def torch_adamw(model: Any) -> Any:
    """The fastest AdamW of PyTorch, without decay on biases and norms."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    try:
        return torch.optim.AdamW(groups, LEARNING_RATE, fused=True)
    except RuntimeError:
        return torch.optim.AdamW(groups, LEARNING_RATE, foreach=True)


def to_torch(arrays: dict[str, np.ndarray], device: Any) -> dict[str, Any]:
    """The integer arrays as tensors on the device."""
    return {k: torch.from_numpy(x.astype(np.int64)).to(device) for k, x in arrays.items() if x.dtype == np.int32}


def matmuls(dtype: str, device: Any) -> tuple[float, Contenders]:
    """Square matrix products that show the peak: the FLOPs of one, and the contenders that compute it."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    # Random operands: on a GPU, a product of constants draws less power and shows a peak that no model reaches.
    x = jax.random.normal(jax.random.key(0), (n, n), dtype)
    # On a CPU sums in fp32, as in its models: it has no fast product of bf16 whose result is rounded.
    matmul = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32 if n == 2048 else None))
    contenders = {"matmul, JAX": lambda: float(matmul(x, x)[0, 0])}
    if device is not None:
        y = torch.randn((n, n), dtype=getattr(torch, dtype), device=device)
        contenders["matmul, PyTorch"] = lambda: (y @ y)[0, 0].item()
    return 2.0 * n**3, contenders


def warm_up(contenders: Contenders, optional: set[str], steps: int = 3) -> dict[str, float]:
    """The loss of each contender's first step. Removes and reports an optional contender that cannot run."""
    losses = {}
    for name, step in list(contenders.items()):
        try:
            losses[name] = step()
        except Exception as error:  # torch.compile without a C++ compiler, say.
            if name not in optional:
                raise
            print(f"{name} is left out: {(str(error) or type(error).__name__).strip().splitlines()[0]}")
            del contenders[name]
            continue
        for _ in range(steps - 1):
            step()
    return losses


def take_turns(contenders: Contenders, rounds: int, steps: int) -> Times:
    """Seconds [rounds, steps] of each. A round is A A … B B …, so that disturbances hit all contenders alike."""
    times = {name: np.zeros((rounds, steps)) for name in contenders}
    for r in range(rounds):
        for name, step in contenders.items():
            for s in range(steps):
                start = time.perf_counter()
                step()
                times[name][r, s] = time.perf_counter() - start
    return times


def ratio(times: Times, ours: str, peer: str) -> np.ndarray:
    """Speed of ours relative to the peer: quartiles and median over the rounds."""
    return np.percentile(np.median(times[peer], 1) / np.median(times[ours], 1), (25, 50, 75))


def results(times: Times, ours: str, tokens: int, flops: float, matmul_flops: float) -> dict[str, Any]:
    """The results of one setting. The peak is the fastest product of either library; MFU is relative to it."""
    peak = max(matmul_flops / t.min() for name, t in times.items() if name.startswith("matmul"))
    rows = {}
    for name, t in times.items():
        low, median, high = np.percentile(t, (25, 50, 75)).tolist()
        is_step = not name.startswith("matmul")
        rate = (flops if is_step else matmul_flops) / median
        rows[name] = {"seconds": median, "quartiles": [low, high], "flops_per_second": rate, "mfu": rate / peak}
        if is_step:
            rows[name]["tokens_per_second"] = tokens / median
            rows[name]["ours_is_times_as_fast"] = ratio(times, ours, name).tolist()
    return {"peak": peak, "flops_per_step": flops, "rows": rows}


def show(title: str, result: dict[str, Any]) -> None:
    """Prints the results as a table."""
    columns = ("", "ms, median", "quartiles", "tokens/s", "GFLOP/s", "of peak", "speed of ours, ×")
    table = Table(*columns, title=title, title_justify="left")
    for name, row in result["rows"].items():
        low, high = (f"{1e3 * x:.4g}" for x in row["quartiles"])
        cells = [name, f"{1e3 * row['seconds']:.4g}", f"{low} to {high}", "", f"{row['flops_per_second'] / 1e9:,.0f}"]
        cells += [f"{row['mfu']:.0%}", ""]
        if "tokens_per_second" in row:
            cells[3] = f"{row['tokens_per_second']:,.0f}"
            low, median, high = row["ours_is_times_as_fast"]
            cells[6] = f"{median:.2f} ({low:.2f} to {high:.2f})"
        table.add_row(*cells)
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)


def machine() -> dict[str, Any]:
    """The machine, versions and environment of a measurement."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    versions = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "libtpu", "flax", "torch", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "versions": versions,
        "environment": {name: os.environ.get(name) for name in ("GLIBC_TUNABLES", "XLA_FLAGS")},
    }


def compare(
    s: Settings, flop: str, steps: Contenders, device: Any, expected: tuple[float, str], title: str
) -> dict[str, Any]:
    """Times the steps (`ours` first) and matrix products; prints and returns the results.

    `expected`: (loss at chance, its formula). Ends the program if the steps differ in parameters or start far from it.
    """
    matmul_flops, contenders = matmuls(s.precision, device)
    contenders |= steps
    ours = steps[OURS]
    for name, step in steps.items():
        if step.parameters != ours.parameters:
            raise SystemExit(f"{name} has {step.parameters:,} parameters, ours {ours.parameters:,}: not the same model")
    losses = warm_up(contenders, {name for name in contenders if name.endswith(COMPILED)})
    losses = {name: loss for name, loss in losses.items() if name in steps}
    for name, loss in losses.items():
        if abs(loss - expected[0]) > 0.5:
            raise SystemExit(f"{name} starts at a loss of {loss:.2f}, not near {expected[1]} = {expected[0]:.2f}")
    times = take_turns(contenders, s.rounds, s.steps)
    result = results(times, OURS, ours.tokens, ours.flops, matmul_flops)
    result |= {"parameters": ours.parameters, "first_losses": losses}
    first = ", ".join(f"{loss:.3f}" for loss in losses.values())
    print(f"\n{title}: {ours.parameters:,} parameters each; losses of the first step {first}")
    print(f"a step is {flop} = {ours.flops / 1e9:,.1f} GFLOP, a product {matmul_flops / 1e9:,.1f} GFLOP")
    show(f"batch {s.batch_size} × {s.length}, dropout {s.dropout}, {s.precision}", result)
    return result


def run(settings: Settings, flop: str, measure: Callable[[Settings, int, Any], dict[str, Any]]) -> None:
    """Runs `measure(settings, hidden size, PyTorch's device)` for each hidden size; writes JSON if asked."""
    limit_threads(settings.threads)
    record = {"machine": machine(), "settings": dataclasses.asdict(settings) | {"json": None}, "flop": flop}
    print_machine(record["machine"])
    device = torch_device()
    record["results"] = [{"hidden_size": n} | measure(settings, n, device) for n in settings.hidden_size]
    write_json(settings.json, record)


def print_machine(record: dict[str, Any]) -> None:
    """Prints the machine, versions and environment."""
    print(f"{record['cpu']}, {record['cores']} cores, device {record['device']}")
    print(", ".join(f"{name} {version}" for name, version in record["versions"].items() if version))
    print(", ".join(f"{name}={value}" for name, value in record["environment"].items() if value) or "plain environment")


def write_json(path: Path | None, record: dict[str, Any]) -> None:
    """Writes the record as JSON, if a path is given."""
    if path is not None:
        path.write_text(json.dumps(record, indent=1) + "\n")
