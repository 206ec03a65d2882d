"""Plans agree with the run, report bad input in one line, and compile for pods as intended."""

import dataclasses
import importlib.util
import math
import re

import jax
import pytest
from test_experiments import EXPERIMENTS
from tiny import FAMILIES

from prelm_jax.errors import InputError
from prelm_jax.planning import plan as planning
from prelm_jax.planning.hlo import COLLECTIVES, Collective, Program
from prelm_jax.planning.plan import compile_step, plan, plan_table, run_work
from prelm_jax.planning.topology import collective_seconds, compile_only_devices, link_bandwidth
from prelm_jax.training.chips import GiB, find_chip
from prelm_jax.training.memory import TooLarge
from prelm_jax.training.sharding import MeshConfig

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no compiler for TPUs: pip install libtpu"
)


def cells(planned):
    return [cell for column in plan_table(planned).columns for cell in column.cells]


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_for_this_machine(family):
    run = dataclasses.replace(
        FAMILIES[family](), loop=dataclasses.replace(FAMILIES[family]().loop, mesh=MeshConfig(devices=2))
    )
    planned = plan(run, "local")
    assert planned.fits and planned.chips == 2
    assert planned.tokens == run.batch_size * run.data.max_length
    assert planned.steps == run.loop.steps
    total, per_chip = planned.sizes["parameters"]
    # The softmax of ELMo is sharded, the rest replicated.
    assert total / 2 < per_chip < total if family == "elmo" else per_chip == total > 0
    total, per_chip = planned.sizes["batch"]
    assert per_chip < total  # Rows are sharded; ELMo's negatives are not.
    assert 0.5 < planned.compiled_flops / planned.model_flops < 4
    assert planned.seconds * planned.tokens_per_second == pytest.approx(planned.tokens)
    assert planned.collectives[0][0].kind == "all-reduce"
    assert f"{run.batch_size} rows, {planned.tokens} tokens" in cells(planned)
    assert planned.optimizer_flops == planned.padding_flops == 0
    # Forward and backward, two products of each step of an LSTM wait for each other.
    steps = run.model.num_layers * run.data.max_length if family == "elmo" else 0
    assert planned.serial_products == 2 * 2 * steps
    assert planned.vector_operations > sum(planned.sizes["parameters"]) / 8  # The optimizer's.
    muon = {"optimizer_flops": 2e12, "optimizer_seconds": 0.012, "seconds_by": {"compute": 0.048}}
    expected = "2.00 TFLOP, 12.0 ms: 25.0% of the time to compute"
    assert expected in cells(dataclasses.replace(planned, **muon))


def test_largest_batch_that_fits(monkeypatch):
    """On a chip with room for 100, a state of 20 and rows of 7: eleven rows fit, twelve do not."""
    analyzed = []

    def analyze(run, topology, mesh, progress, make_work):
        rows = run.batch_size // mesh.size
        analyzed.append(rows)
        if 20 + 7 * rows > 100:
            raise TooLarge((20 + 7 * rows) * GiB, 100 * GiB)
        return dataclasses.replace(fitting, batch_size=run.batch_size, memory_needed=(20 + 7 * rows) * GiB)

    fitting = plan(
        dataclasses.replace(
            FAMILIES["bert"](), loop=dataclasses.replace(FAMILIES["bert"]().loop, mesh=MeshConfig(devices=2))
        ),
        "local",
    )
    monkeypatch.setattr(planning, "analyze", analyze)
    run = dataclasses.replace(
        FAMILIES["bert"](),
        batch_size=128,
        loop=dataclasses.replace(FAMILIES["bert"]().loop, mesh=MeshConfig(devices=2)),
    )
    planned = plan(run, "local")
    assert not planned.fits
    assert planned.memory_needed == (20 + 7 * 64) * GiB
    assert planned.batch_size == 22
    for part in ("128 rows", "468.0 GiB of 100.0", "--batch-size 22", "--accumulate 8"):
        assert part in planned.advice
    assert len(analyzed) == 1 + 6  # 64 is refused, and bisected.


def test_state_that_does_not_fit(monkeypatch):
    def analyze(run, topology, mesh, progress, make_work):
        raise TooLarge(20 * GiB, 15 * GiB)

    monkeypatch.setattr(planning, "analyze", analyze)
    with pytest.raises(InputError, match=r"8 rows need 20.0 GiB of 15.0, .* --mesh.parameters fsdp"):
        plan(FAMILIES["bert"](), "local")


def test_bad_input():
    run = FAMILIES["bert"]()
    with pytest.raises(InputError, match=r"--topology v5e:3x3: not one of v4:\{2x2x1,.*v6e:\{2x2,.*, local"):
        plan(run, "v5e:3x3")
    with pytest.raises(InputError, match="--topology v9: not one of"):
        plan(run, "v9")
    with pytest.raises(InputError, match=r"--mesh.devices 9.* 8"):
        plan(dataclasses.replace(run, loop=dataclasses.replace(run.loop, mesh=MeshConfig(devices=9))), "local")
    with pytest.raises(InputError, match=r"--batch-size 8 .* 1 .* 3 devices"):
        plan(dataclasses.replace(run, loop=dataclasses.replace(run.loop, mesh=MeshConfig(devices=3))), "local")


def test_collective_seconds():
    v5e, v4, h100 = (find_chip(kind) for kind in ("TPU v5 lite", "TPU v4", "NVIDIA H100 80GB HBM3"))
    # An axis of 16 is a ring on v5e, one of 4 is not; on v4 both 4 and 8 are. Half of `links` goes out.
    assert link_bandwidth(v5e, (16, 16)) == 2 * link_bandwidth(v5e, (4, 4)) == 200e9
    assert link_bandwidth(v4, (4, 4, 8)) == 300e9 and link_bandwidth(v4, (2, 2, 1)) == 100e9
    assert link_bandwidth(h100, (8,)) == 450e9
    # Of 16 MB on 16 devices each sends 15 MB, for an all-reduce twice.
    gather, reduce = (Collective(kind, 16, 1, 16_000_000) for kind in ("all-gather", "all-reduce"))
    assert collective_seconds(gather, v5e, (4, 4)) == pytest.approx(15e6 / 100e9)
    assert collective_seconds(reduce, v5e, (4, 4)) == pytest.approx(30e6 / 100e9)
    scattered = dataclasses.replace(gather, kind="reduce-scatter", bytes=1_000_000)  # The result on one device.
    assert collective_seconds(scattered, v5e, (4, 4)) == collective_seconds(gather, v5e, (4, 4))
    between = Collective("all-reduce", 2, 1, 1_000_000, between_slices=True)
    assert collective_seconds(between, v5e, (4, 4)) == pytest.approx(1e6 / 3.125e9)
    assert collective_seconds(dataclasses.replace(reduce, devices=1), v5e, (4, 4)) == 0


@pytest.fixture
def quick_compiler():
    """The compiler for TPUs at half of its effort: placement and memory hardly change."""
    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O0")
    yield
    jax.config.update("jax_optimization_level", before)


SMALLER = {
    "bert:base_512": {"num_layers": 2},
    "gpt1:base": {"num_layers": 2},
    "elmo:original": {},
}


@needs_compiler
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_device_is_a_chip(topology):
    """Also where a chip has two cores."""
    assert len(compile_only_devices(topology, 1)) == 4


COLLECTIVE = rf" ({'|'.join(COLLECTIVES)})(-start)?\("


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", SMALLER)
def test_compiled_for_a_pod(name, quick_compiler):
    """Devices exchange gradients and no activations; the state is updated in place."""
    run = EXPERIMENTS[name]()
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, **SMALLER[name]))
    mesh = MeshConfig().build(compile_only_devices("v5e:4x4", 1))
    step = compile_step(run, mesh, run_work(run)(run.batch_size))
    text, memory = step.compiled.as_text(), step.compiled.memory_analysis()
    sizes_of_parameters = [leaf.size for leaf in jax.tree.leaves(step.state.params)]
    collectives = Program(text).collectives()
    assert {each.devices for each in collectives} == {16}
    sizes = {kind: sum(each.bytes for each in collectives if each.kind == kind) for kind in COLLECTIVES}
    tied = name != "elmo:original"
    if tied:
        assert {each.kind for each in collectives} == {"all-reduce"}
    # Each gradient once, but for a tied table: its two uses, as input and as output, are reduced separately.
    assert sizes["all-reduce"] < 4.01 * (sum(sizes_of_parameters) + tied * max(sizes_of_parameters))
    forward = [line for line in text.splitlines() if re.search(COLLECTIVE, line) and "/jvp(" in line]
    assert not [line for line in forward if re.search(r"(embeddings|encoder|decoder)/", line)]
    state = sum(  # Of a device: ELMo's softmax is sharded.
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((step.state.params, step.state.opt_state))
    )
    assert memory.alias_size_in_bytes >= state > 4 * sum(sizes_of_parameters) / 16
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert needed < 0.85 * find_chip("TPU v5 lite").memory


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("parameters", ["zero1", "fsdp"])
def test_sharded_states_leave_activations_where_they_are(parameters, quick_compiler):
    """Devices exchange gradients and parameters alone, whatever the shards of the moments are."""
    run = EXPERIMENTS["bert:base"]()
    mesh = MeshConfig(parameters=parameters)
    loop = dataclasses.replace(run.loop, mesh=mesh)
    run = dataclasses.replace(run, loop=loop, model=dataclasses.replace(run.model, num_layers=1))
    step = compile_step(run, mesh.build(compile_only_devices("v5e:4x4", 1)), run_work(run)(run.batch_size))
    sizes = [leaf.size for leaf in jax.tree.leaves(step.state.params)]
    exchanged = sum(each.bytes for each in Program(step.compiled.as_text()).collectives())
    # Gradients are summed in f32, the tied table's twice; parameters are gathered once.
    assert exchanged < 4.01 * (2 * sum(sizes) + max(sizes))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("parameters", ["replicated", "fsdp"])
def test_slices_exchange_gradients_over_their_network(parameters, quick_compiler):
    run = dataclasses.replace(
        FAMILIES["bert"](),
        batch_size=32,
        loop=dataclasses.replace(FAMILIES["bert"]().loop, mesh=MeshConfig(slices=2, parameters=parameters)),
    )
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, hidden_size=256, intermediate_size=1024))
    planned = plan(run, "v5e:4x4")
    assert planned.chips == 32
    ((network, seconds),) = (pair for pair in planned.collectives if pair[0].between_slices)
    assert network.kind == "all-reduce" and network.devices == 2
    # Each chip sends a sixteenth; small arrays are padded.
    total, _ = planned.sizes["parameters"]
    assert total / 16 <= network.bytes <= 2 * total / 16
    assert seconds == pytest.approx(network.bytes / find_chip("TPU v5 lite").network)
    assert planned.seconds_by["links"] > seconds
