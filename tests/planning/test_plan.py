"""What a run would take: figures that agree with the run, a line for bad input, and what is compiled for pods."""

import dataclasses
import importlib.util
import re

import jax
import pytest
from test_experiments import EXPERIMENTS
from tiny import FAMILIES

from prelm_jax.errors import InputError
from prelm_jax.planning import plan as planning
from prelm_jax.planning.hlo import COLLECTIVES, Program
from prelm_jax.planning.plan import compile_step, plan
from prelm_jax.training import chips
from prelm_jax.training.sharding import MeshConfig

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no compiler for TPUs: pip install libtpu"
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_for_this_machine(family):
    run = dataclasses.replace(FAMILIES[family](), mesh=MeshConfig(devices=2))
    planned = plan(run, "local")
    assert planned.fits and planned.chips == 2
    assert planned.tokens == run.batch_size * run.data.max_length
    assert planned.steps == run.steps
    whole, share = planned.shares["parameters"]
    assert whole == share > 0
    whole, share = planned.shares["batch"]
    assert share < whole  # Rows are shared; ELMo's negatives are not.
    assert 0.5 < planned.compiled_flops / planned.model_flops < 4
    assert planned.seconds * planned.tokens_per_second == pytest.approx(planned.tokens)
    assert planned.collectives[0][0].kind == "all-reduce"


def test_a_batch_that_does_not_fit(monkeypatch):
    """A chip with room for 100, of which the state takes 20 and a row 7: eleven rows fit, twelve do not."""
    weighed = []

    def weigh(run, topology, mesh, progress):
        rows = run.batch_size // mesh.size
        weighed.append(rows)
        if 20 + 7 * rows > 100:
            raise planning._TooLarge((20 + 7 * rows) * 2**30, 100 * 2**30)
        return dataclasses.replace(fitting, batch_size=run.batch_size, memory_needed=(20 + 7 * rows) * 2**30)

    fitting = plan(dataclasses.replace(FAMILIES["bert"](), mesh=MeshConfig(devices=2)), "local")
    monkeypatch.setattr(planning, "_weigh", weigh)
    run = dataclasses.replace(FAMILIES["bert"](), batch_size=128, mesh=MeshConfig(devices=2))
    planned = plan(run, "local")
    assert not planned.fits
    assert planned.memory_needed == (20 + 7 * 64) * 2**30
    assert planned.batch_size == 22
    assert planned.advice == "128 rows need 468.0 GiB of 100.0; --batch-size 22 fits, or --accumulate 8"
    assert len(weighed) <= 6


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 41.90G of "
        "15.75G hbm. Exceeded hbm capacity by 26.15G.",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (41.90G) exceeds "
        "available HBM (15.75G).",
    ],
)
def test_what_the_compiler_says_when_there_is_no_room(message):
    too_large = planning._too_large(jax.errors.JaxRuntimeError(message))
    assert too_large.needed == pytest.approx(41.9 * 2**30)
    assert too_large.available == 15.75 * 2**30
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    assert planning._too_large(other) is other


def test_a_state_that_does_not_fit(monkeypatch):
    def weigh(run, topology, mesh, progress):
        raise planning._TooLarge(20 * 2**30, 15 * 2**30)

    monkeypatch.setattr(planning, "_weigh", weigh)
    with pytest.raises(InputError, match=r"one row a chip does not fit either: try --mesh.parameters fsdp or a larger"):
        plan(FAMILIES["bert"](), "local")


def test_bad_input():
    run = FAMILIES["bert"]()
    with pytest.raises(InputError, match=r"--topology v5e:3x3: not one of v4:\{2x2x1,.*v6e:\{2x2,.*, local"):
        plan(run, "v5e:3x3")
    with pytest.raises(InputError, match="--topology v9: not one of"):
        plan(run, "v9")
    with pytest.raises(InputError, match=r"--mesh.devices 9: there are 8"):
        plan(dataclasses.replace(run, mesh=MeshConfig(devices=9)), "local")
    with pytest.raises(InputError, match=r"--batch-size 8 cannot be divided into 1 micro-batches .* for 3 devices"):
        plan(dataclasses.replace(run, mesh=MeshConfig(devices=3)), "local")


@pytest.fixture
def quick_compiler():
    """The compiler for TPUs at half of its effort: placement and memory hardly change."""
    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O0")
    yield
    jax.config.update("jax_optimization_level", before)


SMALLER = {
    "bert-base_512": {"num_layers": 2, "attention_dropout": 0.0},
    "gpt1-base": {"num_layers": 2, "attention_dropout": 0.0},
    "elmo-original": {},
}


COLLECTIVE = rf" ({'|'.join(COLLECTIVES)})(-start)?\("


@needs_compiler
@pytest.mark.parametrize("name", SMALLER)
def test_compiled_for_a_pod(name, quick_compiler):
    """Devices hand each other gradients and no activations; the state is updated in place."""
    run = EXPERIMENTS[name]()
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, **SMALLER[name]))
    step = compile_step(run, MeshConfig().build(chips.compile_only_devices("v5e:4x4", 1)))
    text, memory = step.compiled.as_text(), step.compiled.memory_analysis()
    sizes_of_parameters = [leaf.size for leaf in jax.tree.leaves(step.state.params)]
    collectives = Program(text).collectives()
    assert {each.devices for each in collectives} == {16}
    sizes = {kind: sum(each.bytes for each in collectives if each.kind == kind) for kind in COLLECTIVES}
    tied = name != "elmo-original"
    if tied:
        assert {each.kind for each in collectives} == {"all-reduce"}
    # Each gradient once, but for a tied table: its two uses, as input and as output, travel apart.
    assert sizes["all-reduce"] < 4.01 * (sum(sizes_of_parameters) + tied * max(sizes_of_parameters))
    forward = [line for line in text.splitlines() if re.search(COLLECTIVE, line) and "/jvp(" in line]
    assert not [line for line in forward if re.search(r"(embeddings|encoder|decoder)/", line)]
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((step.state.params, step.state.opt_state)))
    assert memory.alias_size_in_bytes >= state
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert needed < 0.85 * chips.find_chip("TPU v5 lite").memory


@needs_compiler
@pytest.mark.parametrize("parameters", ["replicated", "fsdp"])
def test_slices_exchange_gradients_over_the_network_between_them(parameters, quick_compiler):
    run = dataclasses.replace(FAMILIES["bert"](), batch_size=32, mesh=MeshConfig(slices=2, parameters=parameters))
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, hidden_size=256, intermediate_size=1024))
    planned = plan(run, "v5e:4x4")
    assert planned.chips == 32
    (network,) = (pair for pair in planned.collectives if pair[0].kind == "network all-reduce")
    assert network[0].devices == 2
    # Each chip sends a sixteenth; small arrays are padded.
    parameter_bytes, _ = planned.shares["parameters"]
    assert parameter_bytes / 16 <= network[0].bytes <= 2 * parameter_bytes / 16
    assert network[1] == pytest.approx(network[0].bytes / chips.find_chip("TPU v5 lite").network)
    assert planned.seconds_by["links"] > network[1]
