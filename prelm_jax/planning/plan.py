"""What a run would take on devices that need not be there: its real train step, compiled for them and weighed."""

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prelm_jax.corpus.store import Store
from prelm_jax.errors import InputError
from prelm_jax.planning.hlo import NETWORK, Collective, Program
from prelm_jax.pretrain import Run, check_batch_size
from prelm_jax.report import of_plan as plan_table  # noqa: F401
from prelm_jax.tokenizers import wordpiece, words
from prelm_jax.tokenizers.bpe import BPEConfig
from prelm_jax.training import chips, loop
from prelm_jax.training.metrics import peak_flops
from prelm_jax.training.sharding import batch_sharding

LOCAL = "local"
# How the compiler for TPUs says that it needs more than there is; the second before it has tried to place anything.
NO_ROOM = (
    r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm",
    r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)",
)
GPT1_ALPHABET = 478  # Entries of GPT-1's vocabulary that are no merges.
SYNTHETIC_TOKENS = (10_000, 1_000_000)  # At least, for some documents; at most: more than a batch has, in a second.
ZIPF = 1.2  # The exponent with which random words are as often different as those of Simple English Wikipedia.


@dataclasses.dataclass(frozen=True)
class Plan:
    """A train step on each chip: bytes, operations (FLOP), seconds. Its batch is the run's, or the largest that fits.

    compiled_flops, bytes: as XLA counts them, loops as often as they run; it does not look into kernels. memory_bytes:
    of these, those that go to and from the chip's memory, without what stays on the chip from use to use.
    seconds_by: the least time by the chip's operations ("compute"), its memory and its links, as far as they are known.
    collectives: each with its least time, if that is known. shares: the bytes of parameters, optimizer state, carry and
    batch, in all and on a chip. advice: what makes the run fit, where it does not.
    """

    topology: str
    device: str
    chips: int
    batch_size: int
    fits: bool
    advice: str
    memory_needed: float
    memory_available: float
    compile_seconds: float
    model_flops: float
    compiled_flops: float
    bytes: float
    memory_bytes: float
    collectives: tuple[tuple[Collective, float | None], ...]
    seconds_by: dict[str, float]
    peak_flops: float
    tokens: int
    steps: int
    shares: dict[str, tuple[int, int]]

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds_by, key=self.seconds_by.get)

    @property
    def seconds(self) -> float:
        """The least time of a step, if compute, memory and links overlap."""
        return self.seconds_by[self.bound]

    @property
    def mfu(self) -> float:
        """The most that a step can use of the chip's operations for what the model needs."""
        return self.model_flops / self.peak_flops / self.seconds

    @property
    def mfu_by_all_bytes(self) -> float | None:
        """The same, if the memory had to bring all bytes that XLA counts: the figure that published rooflines give."""
        if "memory" not in self.seconds_by:
            return None
        slower = self.seconds_by | {"memory": self.seconds_by["memory"] * self.bytes / self.memory_bytes}
        return self.model_flops / self.peak_flops / max(slower.values())

    @property
    def tokens_per_second(self) -> float:
        """At most, on all chips together."""
        return self.tokens / self.seconds

    @property
    def days(self) -> float:
        """At least, for all steps."""
        return self.steps * self.seconds / 86400

    def as_json(self) -> dict[str, Any]:
        """Fields and what follows from them."""
        derived = ("bound", "seconds", "mfu", "mfu_by_all_bytes", "tokens_per_second", "days")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


class _TooLarge(Exception):
    """The compiler found no room; bytes."""

    def __init__(self, needed: float, available: float):
        super().__init__(needed, available)
        self.needed, self.available = needed, available


def plan(run: Run, topology: str, progress: Callable[[str], None] = lambda line: None) -> Plan:
    """Compiles the train step of a run for a slice like "v5e:4x4", or for the devices of this machine ("local").

    Nothing is read, trained or allocated; a vocabulary has the size that its configuration asks for. `run.mesh.slices`
    such slices are joined. Where the batch does not fit, the largest that does is looked for: a compile for each try.
    """
    devices = jax.devices() if topology == LOCAL else chips.compile_only_devices(topology, run.mesh.slices)
    mesh = run.mesh.build(devices)
    check_batch_size(run, mesh.size)
    try:
        return _weigh(run, topology, mesh, progress)
    except _TooLarge as too_large:
        refusal = too_large
    asked = f"{run.batch_size} rows need {refusal.needed / chips.GiB:.1f} GiB of {refusal.available / chips.GiB:.1f}"
    progress(f"{asked}: looking for the largest batch that fits")
    fitting, largest = _largest(run, topology, mesh, refusal, progress)
    if fitting is None:
        switch = "" if run.mesh.parameters == "fsdp" else "--mesh.parameters fsdp or "
        raise InputError(f"{asked}, and one row a chip does not fit either: try {switch}a larger slice")
    pieces = _pieces(run, mesh.size, largest)
    advice = f"{asked}; --batch-size {largest} fits, or --accumulate {pieces}"
    return dataclasses.replace(fitting, fits=False, advice=advice, memory_needed=refusal.needed)


def _largest(run: Run, topology: str, mesh: Any, refusal: _TooLarge, progress: Callable) -> tuple[Plan | None, int]:
    """The plan of the largest batch that fits and its rows; memory grows in line with the rows, nearly."""
    unit = run.accumulate * mesh.size
    low, high, best = 0, run.batch_size // unit, None
    needed, tries = refusal.needed, 0
    state = 0.0
    while high - low > 1 and (tries < 4 or best is None):
        guess = int(low + (high - low) * (refusal.available - state) / (needed - state)) if needed > state else low + 1
        guess = min(max(guess, low + 1), high - 1)
        tries += 1
        try:
            best = _weigh(dataclasses.replace(run, batch_size=guess * unit), topology, mesh, progress)
            low, state = guess, best.memory_needed
        except _TooLarge as too_large:
            high, needed = guess, too_large.needed
    return best, low * unit


def _pieces(run: Run, devices: int, largest: int) -> int:
    """The fewest micro-batches into which the batch can be cut so that each has room."""
    rows = run.batch_size // devices
    return next(n for n in range(run.accumulate, rows + 1) if rows % n == 0 and rows // n <= largest // devices)


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled train step, what it was compiled for (arrays without values), and how long that took, in seconds."""

    compiled: Any
    model: Any
    state: loop.TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    tokens: int
    seconds: float


def compile_step(run: Run, mesh: jax.sharding.Mesh) -> Step:
    """The train step of `prelm pretrain`, for the devices of a mesh; nothing of it is allocated."""
    vocab_size = run.model.vocab_size or vocab_size_of(run.tokenizer)
    model = dataclasses.replace(run.model, vocab_size=vocab_size).build(jnp.dtype(run.precision))
    batches = _synthetic_batches(run, vocab_size)
    example = batches[0]
    model.check(example)
    batch = {
        key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(batches.layout[key], x.shape, mesh))
        for key, x in example.items()
    }
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        state = loop.abstract_state(model, run.optimizer, run.batch_size, mesh, run.mesh.parameters)
        step = loop.make_train_step(model, run.optimizer, run.accumulate, batches.layout, state)
        lowered = step.lower(state, batch, jax.eval_shape(lambda: jax.random.key(0)))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise _too_large(error) from None
    return Step(compiled, model, state, batch, int(model.tokens(example)[1]), time.perf_counter() - start)


def _weigh(run: Run, topology: str, mesh: jax.sharding.Mesh, progress: Callable[[str], None]) -> Plan:
    """The plan of a run whose step has room; raises _TooLarge."""
    device = mesh.devices.flat[0].device_kind
    progress(f"compiling a step of {run.batch_size} rows for {mesh.size} × {device}")
    step = compile_step(run, mesh)
    chip = chips.find_chip(device)
    costs, memory = step.compiled.cost_analysis(), step.compiled.memory_analysis()
    program = Program(step.compiled.as_text())
    flops, bytes_ = np.multiply((costs["flops"], costs["bytes accessed"]), program.repetition()).tolist()
    model_flops = step.model.flops(step.batch) / mesh.size
    peak = chip.flops if chip else peak_flops(jnp.dtype(run.precision), 1)
    memory_bytes = program.memory_bytes()
    seconds_by, collectives = {"compute": max(flops, model_flops) / peak}, program.collectives()
    times = [None] * len(collectives)
    if chip is not None:
        times = [_collective_seconds(collective, chip, topology, mesh) for collective in collectives]
        seconds_by |= {"memory": memory_bytes / chip.bandwidth, "links": sum(times)}
    state = step.state
    parts = {"parameters": state.params, "optimizer state": state.opt_state, "carry": state.carry, "batch": step.batch}
    return Plan(
        topology=topology,
        device=device,
        chips=mesh.size,
        batch_size=run.batch_size,
        fits=True,
        advice="",
        memory_needed=(
            memory.argument_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        ),
        memory_available=chip.memory if chip else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / mesh.size,
        compile_seconds=step.seconds,
        model_flops=model_flops,
        compiled_flops=flops,
        bytes=bytes_,
        memory_bytes=memory_bytes,
        collectives=tuple(zip(collectives, times, strict=True)),
        seconds_by=seconds_by,
        peak_flops=peak,
        tokens=step.tokens,
        steps=run.steps,
        shares={name: _share(tree) for name, tree in parts.items()},
    )


def _too_large(error: jax.errors.JaxRuntimeError) -> Exception:
    """What the compiler says when it finds no room; else the error itself."""
    found = next((match for form in NO_ROOM if (match := re.search(form, str(error)))), None)
    if not found:
        return error
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return _TooLarge(float(found[1]) * units[found[2]], float(found[3]) * units[found[4]])


def _collective_seconds(collective: Collective, chip: chips.Chip, topology: str, mesh: Any) -> float:
    """Over the links of a slice, or between slices over their network."""
    bandwidth = chip.network
    if not collective.between_slices:
        bandwidth = chips.link_bandwidth(chip, (mesh.size,) if topology == LOCAL else chips.shape_of(topology))
    kind = collective.kind.removeprefix(NETWORK)
    return chips.collective_seconds(kind, collective.bytes, collective.devices, bandwidth)


def _share(tree: Any) -> tuple[int, int]:
    """The bytes of all arrays of a tree, and of what one device has of them."""
    leaves = jax.tree.leaves(tree)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return whole, sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def vocab_size_of(tokenizer: Any) -> int:
    """Of a vocabulary that has not been trained; for BPE that of GPT-1's alphabet."""
    return tokenizer.num_merges + GPT1_ALPHABET if isinstance(tokenizer, BPEConfig) else tokenizer.vocab_size


class TokenizerOfSize:
    """As much of a tokenizer as batches need."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        specials = (*wordpiece.SPECIAL_TOKENS, *words.SPECIAL_TOKENS)
        self.special_ids = {token: i for i, token in enumerate(specials)}
        self.unknown_id = self.special_ids["<UNK>"]
        self.tokens = [*specials, *map(str, range(len(specials), vocab_size))]
        self.continuation = np.arange(vocab_size) % 3 == 2  # one piece of three, as in a text


def _synthetic_batches(run: Run, vocab_size: int) -> Any:
    """The run's batches, of random words that follow Zipf's law: as many different ones as a text has."""
    tokenizer = TokenizerOfSize(vocab_size)
    first = len(tokenizer.special_ids)
    wanted = int(np.clip(4 * run.batch_size * run.data.max_length, *SYNTHETIC_TOKENS))
    ids = first + (np.random.default_rng(0).zipf(ZIPF, wanted) - 1) % (vocab_size - first)
    sentences = np.array_split(ids, wanted // 25)
    documents = [sentences[i : i + 20] for i in range(0, len(sentences), 20)]
    return run.data.build(Store.from_documents(documents, tokenizer.tokens), tokenizer, run.batch_size, run.seed)
