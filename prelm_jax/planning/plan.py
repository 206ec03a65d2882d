"""Cost of a run on devices that you may not have: its train step, compiled for them and analyzed."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from prelm_jax.corpus.store import Store
from prelm_jax.errors import InputError
from prelm_jax.finetuning.config import FineTuning
from prelm_jax.finetuning.task import prepare_task
from prelm_jax.planning.hlo import Collective, Program
from prelm_jax.planning.topology import collective_seconds, compile_only_devices, shape_of
from prelm_jax.run import Run, check_batch_size
from prelm_jax.tokenizers import wordpiece, words
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training import memory
from prelm_jax.training.chips import GiB, find_chip
from prelm_jax.training.contract import Batch, Batches, HostBatch, Layout, Model
from prelm_jax.training.memory import TooLarge
from prelm_jax.training.metrics import peak_flops
from prelm_jax.training.sharding import abstract_batch
from prelm_jax.training.step import TrainState, abstract_state, make_train_step

LOCAL = "local"
SYNTHETIC_TOKENS = (10_000, 1_000_000)  # At least some documents; at most what a second generates.
SPECIAL_TOKENS = (*wordpiece.SPECIAL_TOKENS, *words.SPECIAL_TOKENS)
ZIPF = 1.2  # The exponent at which random words repeat as often as in Simple English Wikipedia.


class Work(NamedTuple):
    """What a step works on: a model, and the largest of the batches that it is trained on."""

    model: Model
    batch: HostBatch
    layout: Mapping[str, Layout]
    fill: float = 1.0  # Tokens of an average batch over tokens of the largest, padding included.


MakeWork = Callable[[int], Work]  # of a batch size


@dataclasses.dataclass(frozen=True)
class Plan:
    """A train step, per chip, at the batch size of the run or, if that does not fit, the largest that does."""

    topology: str
    device: str
    chips: int
    batch_size: int
    fits: bool
    advice: str  # The options that make the run fit, if it does not.
    memory_needed: float  # Bytes, at the batch size of the run.
    memory_available: float
    compile_seconds: float
    model_flops: float  # Matmul FLOPs by the formula of the model.
    optimizer_flops: float  # Matmul FLOPs by the formula of the optimizer, in fp32; zero for most.
    optimizer_seconds: float  # A part of the compute in `seconds_by`.
    compiled_flops: float  # By XLA, each loop counted as often as it runs; of kernels what they state.
    padding_flops: float  # Matmul FLOPs of axes shorter than the chip's matrix unit, as much work as if they filled it.
    vector_operations: float  # Elementwise, of XLA's fusions and of kernels.
    serial_products: int  # Products in loops that wait for each other.
    bytes_accessed: float  # By XLA, like compiled_flops.
    memory_traffic: float  # The bytes of these that go to and from HBM; the rest stays on the chip between uses.
    collectives: tuple[tuple[Collective, float | None], ...]  # With a lower bound in seconds, if the chip is known.
    seconds_by: dict[str, float]  # Lower bounds by "compute"; if known, by "memory", "links", "vector", "recurrence".
    peak_flops: float
    tokens: int  # Per step, padding included; of a task, in its widest batches.
    fill: float  # Tokens of a step on average, as a fraction of these.
    steps: int
    sizes: dict[str, tuple[int, int]]  # (total bytes, bytes per chip) of parameters, optimizer state, carry and batch.

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds_by, key=lambda resource: self.seconds_by[resource])

    @property
    def seconds(self) -> float:
        """Lower bound on the time of a step: products, memory traffic, collectives and vector operations overlap."""
        return self.seconds_by[self.bound]

    @property
    def mfu(self) -> float:
        """Upper bound on the model FLOPs utilization."""
        return self.model_flops / self.peak_flops / self.seconds

    @property
    def mfu_by_all_bytes(self) -> float | None:
        """The same if all bytes that XLA counts were memory traffic, as published rooflines assume."""
        if "memory" not in self.seconds_by:
            return None
        slower = self.seconds_by | {"memory": self.seconds_by["memory"] * self.bytes_accessed / self.memory_traffic}
        return self.model_flops / self.peak_flops / max(slower.values())

    @property
    def tokens_per_second(self) -> float:
        """Upper bound, on all chips together."""
        return self.tokens / self.seconds

    @property
    def days(self) -> float:
        """Lower bound on the time of all steps."""
        return self.steps * self.fill * self.seconds / 86400

    def as_json(self) -> dict[str, object]:
        """The fields and properties."""
        derived = ("bound", "seconds", "mfu", "mfu_by_all_bytes", "tokens_per_second", "days")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


def plan(run: Run | FineTuning, topology: str, progress: Callable[[str], None] = lambda line: None) -> Plan:
    """Compiles the train step of a run for a slice such as "v5e:4x4", or for the devices of this machine ("local").

    With `run.loop.mesh.slices` > 1, for that many slices. Trains nothing. Of an experiment it reads no corpus and
    allocates no arrays; an untrained vocabulary has its expected size. Of a task it reads the files and the model to
    start from, and compiles the step of the widest batches. If the batch does not fit, bisects for the largest that
    does, a compile each.

        print_table(plan_table(plan(run, "v5e:4x4")))

    Raises InputError for an unknown slice, a batch size that the devices do not divide, or a model too large for them.
    """
    devices = jax.devices() if topology == LOCAL else compile_only_devices(topology, run.loop.mesh.slices)
    mesh = run.loop.mesh.build(devices)
    check_batch_size(run, mesh.size)
    run, make_work = task_work(run, mesh.size) if isinstance(run, FineTuning) else (run, run_work(run))
    try:
        return analyze(run, topology, mesh, progress, make_work)
    except TooLarge as error:
        refused = error
    asked = f"{run.batch_size} rows need {refused.needed / GiB:.1f} GiB of {refused.available / GiB:.1f}"
    progress(f"{asked}: searching for the largest batch that fits")
    fitting = _largest(run, topology, mesh, progress, make_work)
    if fitting is None:
        switch = "" if run.loop.mesh.parameters == "fsdp" else "--mesh.parameters fsdp or "
        raise InputError(f"{asked}, and one row per chip does not fit either: try {switch}a larger slice")
    # The fewest micro-batches that are no larger than the batch that fits.
    rows, largest = run.batch_size // mesh.size, fitting.batch_size // mesh.size
    micro_batches = next(n for n in range(run.accumulate, rows + 1) if rows % n == 0 and rows // n <= largest)
    advice = f"{asked}; --batch-size {fitting.batch_size} fits, or --accumulate {micro_batches}"
    return dataclasses.replace(fitting, fits=False, advice=advice, memory_needed=refused.needed)


def _largest(
    run: Run | FineTuning,
    topology: str,
    mesh: jax.sharding.Mesh,
    progress: Callable[[str], None],
    make_work: MakeWork,
) -> Plan | None:
    """The plan of the largest batch that fits, if any; the batch of the run does not."""
    unit = run.accumulate * mesh.size
    low, high, fitting = 0, run.batch_size // unit, None
    while high - low > 1:
        middle = (low + high) // 2
        try:
            fitting = analyze(dataclasses.replace(run, batch_size=middle * unit), topology, mesh, progress, make_work)
            low = middle
        except TooLarge:
            high = middle
    return fitting


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled train step and the shapes that it was compiled for."""

    compiled: jax.stages.Compiled
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    tokens: int  # Padding included.
    flops: float  # By the formula of the model.
    optimizer_flops: float  # By the formula of the optimizer, on one device.
    compile_seconds: float


def run_work(run: Run) -> MakeWork:
    """The work of a run, on random words."""
    vocab_size = run.model.vocab_size or run.tokenizer.expected_vocab_size
    model = dataclasses.replace(run.model, vocab_size=vocab_size).build(jnp.dtype(run.precision))

    def make(batch_size: int) -> Work:
        batches = _synthetic_batches(dataclasses.replace(run, batch_size=batch_size), vocab_size)
        return Work(model, batches[0], batches.layout)

    return make


def task_work(run: FineTuning, devices: int) -> tuple[FineTuning, MakeWork]:
    """A task with the steps that follow from its files, and its work."""
    task = prepare_task(run)
    model = task.config.build(jnp.dtype(run.precision))

    def make(batch_size: int) -> Work:
        batches = task.batches(devices, batch_size)
        largest = batches.largest()
        widths = [batches.width(step) for step in range(-(-len(task.train_rows) // batch_size))]
        return Work(model, largest, batches.layout, float(np.mean(widths)) / largest["segments"].shape[-1])

    return task.run, make


def compile_step(run: Run | FineTuning, mesh: jax.sharding.Mesh, work: Work) -> Step:
    """Compiles the train step of a run for the devices of a mesh; allocates nothing. Raises TooLarge."""
    model, example, layout, _ = work
    model.check(example)
    batch = abstract_batch(example, layout, mesh)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        state = abstract_state(model, run.optimizer, run.batch_size, mesh, run.loop.mesh.parameters)
        step = make_train_step(model, run.optimizer, run.accumulate, layout, state)
        compiled = memory.compile_program(step.lower(state, batch, jax.eval_shape(lambda: jax.random.key(0))))
    seconds = time.perf_counter() - start
    optimizer_flops = run.optimizer.flops(state.params, model.matrices, mesh.shape["data"])
    shapes = cast(Batch, example)
    return Step(compiled, state, batch, int(model.tokens(shapes)[1]), model.flops(shapes), optimizer_flops, seconds)


def analyze(
    run: Run | FineTuning,
    topology: str,
    mesh: jax.sharding.Mesh,
    progress: Callable[[str], None],
    make_work: MakeWork,
) -> Plan:
    """The plan of a run at its own batch size. Raises TooLarge if that does not fit."""
    device = mesh.devices.flat[0].device_kind
    progress(f"compiling a step of {run.batch_size} rows for {mesh.size} × {device}")
    work = make_work(run.batch_size)
    step = compile_step(run, mesh, work)
    chip = find_chip(device)
    text, costs = step.compiled.as_text(), step.compiled.cost_analysis()
    assert text and costs, f"the compiler for {device} tells nothing about its program"
    program = Program(text)
    # XLA counts the body of a loop once.
    flops, bytes_accessed = np.multiply((costs["flops"], costs["bytes accessed"]), program.repetition()).tolist()
    model_flops = step.flops / mesh.size
    peak = chip.flops if chip else peak_flops(jnp.dtype(run.precision), 1)
    memory_traffic = program.memory_traffic()
    optimizer_flops = step.optimizer_flops  # XLA counts a product in fp32 like one in bf16.
    optimizer_seconds = optimizer_flops / (chip.fp32_flops if chip else peak)
    padding = program.padding(chip.tile) if chip else 0.0
    seconds_by = {"compute": max(flops + padding - optimizer_flops, model_flops) / peak + optimizer_seconds}
    vector_operations, serial_products = program.vector_operations(), program.serial_products()
    collectives = program.collectives()
    timed: list[tuple[Collective, float | None]] = [(collective, None) for collective in collectives]
    if chip is not None:
        shape = (mesh.size,) if topology == LOCAL else shape_of(topology)
        times = [collective_seconds(collective, chip, shape) for collective in collectives]
        timed = list(zip(collectives, times, strict=True))
        seconds_by |= {"memory": memory_traffic / chip.bandwidth, "links": sum(times)}
        seconds_by |= {"vector": vector_operations / chip.vector, "recurrence": serial_products * chip.latency}
    state = step.state
    trees = {"parameters": state.params, "optimizer state": state.opt_state, "carry": state.carry, "batch": step.batch}
    return Plan(
        topology=topology,
        device=device,
        chips=mesh.size,
        batch_size=run.batch_size,
        fits=True,
        advice="",
        memory_needed=memory.needed(step.compiled),
        memory_available=chip.memory if chip else memory.host_memory() / mesh.size,
        compile_seconds=step.compile_seconds,
        model_flops=model_flops,
        optimizer_flops=optimizer_flops,
        optimizer_seconds=optimizer_seconds,
        compiled_flops=flops,
        padding_flops=padding,
        vector_operations=vector_operations,
        serial_products=serial_products,
        bytes_accessed=bytes_accessed,
        memory_traffic=memory_traffic,
        collectives=tuple(timed),
        seconds_by=seconds_by,
        peak_flops=peak,
        tokens=step.tokens,
        fill=work.fill,
        steps=run.loop.steps,
        sizes={name: _sizes(tree) for name, tree in trees.items()},
    )


def _sizes(tree: object) -> tuple[int, int]:
    """The bytes of all arrays of a tree: in total, and of the shards on one device."""
    leaves = jax.tree.leaves(tree)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return total, sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


class TokenizerOfSize(Tokenizer):
    """The parts of a tokenizer that batches need: a vocabulary of a given size, with every special token."""

    def __init__(self, vocab_size: int):
        tokens = [*SPECIAL_TOKENS, *map(str, range(len(SPECIAL_TOKENS), vocab_size))]
        super().__init__(tokens, wordpiece.ROLES | words.ROLES)
        self.continuation = np.arange(vocab_size) % 3 == 2  # One subword in three continues a word, as in real text.


def _synthetic_batches(run: Run, vocab_size: int) -> Batches:
    """Batches of random words, by Zipf's law, so that there are as many distinct words as in a text."""
    tokenizer = TokenizerOfSize(vocab_size)
    first = len(SPECIAL_TOKENS)
    size = int(np.clip(4 * run.batch_size * run.data.max_length, *SYNTHETIC_TOKENS))
    ids = first + (np.random.default_rng(0).zipf(ZIPF, size) - 1) % (vocab_size - first)
    sentences = [sentence.tolist() for sentence in np.array_split(ids, size // 25)]
    documents = [sentences[i : i + 20] for i in range(0, len(sentences), 20)]
    return run.data.build(Store.from_documents(documents, tokenizer.tokens), tokenizer, run.batch_size, run.seed)


def plan_table(plan: Plan) -> Table:
    """Memory, work and time of a step, for a person who decides which slice to rent."""
    table = Table("", f"per chip, {plan.chips} × {plan.device}")
    fits = "fits" if plan.fits else f"DOES NOT FIT: {plan.advice}. The rest is for the largest batch that fits"
    table.add_row("memory", f"{plan.memory_needed / GiB:.2f} of {plan.memory_available / GiB:.2f} GiB: {fits}")
    for name, (total, per_chip) in plan.sizes.items():
        if total:
            table.add_row(f"  {name}", f"{total / 1e6:,.1f} MB in total, {per_chip / 1e6:,.1f} MB per chip")
    share = "" if plan.fill == 1 else f"; {plan.fill:.0%} of them on average"
    table.add_row("global batch", f"{plan.batch_size} rows, {plan.tokens:,} tokens{share}")
    table.add_section()
    flops = f"{plan.model_flops / 1e12:.2f} TFLOP by the model, {plan.compiled_flops / 1e12:.2f} as compiled"
    padding = f", {plan.padding_flops / 1e12:.2f} more in a matrix unit that is not filled" * (plan.padding_flops > 0)
    table.add_row("compute", flops + padding)
    if plan.optimizer_flops:
        share = plan.optimizer_seconds / plan.seconds_by["compute"]
        work = f"{plan.optimizer_flops / 1e12:.2f} TFLOP, {plan.optimizer_seconds * 1e3:.1f} ms"
        table.add_row("  optimizer, in fp32", f"{work}: {share:.1%} of the time to compute")
    table.add_row("bytes accessed", f"{plan.bytes_accessed / 1e9:.1f} GB")
    table.add_row("memory traffic (HBM)", f"{plan.memory_traffic / 1e9:.1f} GB")
    table.add_row("vector operations", f"{plan.vector_operations / 1e9:.1f} billion")
    if plan.serial_products:
        table.add_row("products in turn", f"{plan.serial_products:,}, each waiting for the one before, in loops")
    for collective, seconds in plan.collectives:
        members = "slices" if collective.between_slices else "chips"
        size = f"{collective.count} × {collective.devices} {members}, {collective.bytes / 1e6:,.2f} MB"
        table.add_row(f"  {collective.kind}", size if seconds is None else f"{size}: {seconds * 1e3:.3f} ms")
    table.add_section()
    times = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in plan.seconds_by.items())
    table.add_row("ms per step, at least", f"{times}: bound by {plan.bound}")
    by_all_bytes = plan.mfu_by_all_bytes
    note = "" if by_all_bytes is None else f"; {by_all_bytes:.1%} if all bytes accessed were memory traffic"
    table.add_row("MFU, at most", f"{plan.mfu:.1%}{note}")
    table.add_row("tokens/s, at most", f"{plan.tokens_per_second:,.0f}")
    table.add_row("days, at least", f"{plan.days:.2f} for {plan.steps:,} steps")
    table.add_row("compiled in", f"{plan.compile_seconds:.0f} s")
    return table
