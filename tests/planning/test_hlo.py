"""Costs and collectives read from compiled programs agree with XLA's analysis of the same work without loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prelm_jax.models.lstm import lstm
from prelm_jax.planning.hlo import Collective, Program
from prelm_jax.training.sharding import MeshConfig


def multiplied(x, w, times, loop):
    """x after `times` products with w, in a loop or unrolled."""
    if loop:
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=times)[0]
    for _ in range(times):
        x = jnp.tanh(x @ w)
    return x


def test_loop_bodies_count_as_often_as_they_run():
    x, w = jnp.ones((64, 128)), jnp.ones((128, 128))
    compiled = jax.jit(multiplied, static_argnums=(2, 3)).lower(x, w, 7, True).compile()
    flops, bytes_ = Program(compiled.as_text()).repetition()
    assert flops == 7
    assert compiled.cost_analysis()["flops"] * flops == pytest.approx(7 * 2 * 64 * 128 * 128, rel=0.1)
    # Each iteration reads x and w and writes x, at least; XLA may write a temporary or two.
    least = 7 * 4 * (2 * 64 * 128 + 128 * 128)
    assert least <= compiled.cost_analysis()["bytes accessed"] * bytes_ <= 3 * least


def test_repetition_is_1_without_loops():
    compiled = jax.jit(multiplied, static_argnums=(2, 3)).lower(jnp.ones((8, 8)), jnp.ones((8, 8)), 3, False).compile()
    assert Program(compiled.as_text()).repetition() == (1, 1)


def test_loops_over_slices_read_only_the_slices():
    """Each iteration reads a row of x, not all of x: 8 kB before the loop, 12 kB in each of 100 iterations."""
    x = jnp.ones((100, 1000))
    compiled = jax.jit(lambda x: jax.lax.scan(lambda c, row: (c + jnp.sin(row), None), x[0], x)[0]).lower(x).compile()
    _, bytes_ = Program(compiled.as_text()).repetition()
    assert bytes_ == pytest.approx((8 + 100 * 12) / (8 + 12), rel=0.02)


@pytest.mark.parametrize("loop", [False, True])
def test_collectives(loop):
    mesh = MeshConfig(devices=4).build()
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=rows)

    def gathered(x):
        return jax.lax.with_sharding_constraint(jnp.cos(x), P()).T @ jnp.ones((8, 2))

    def function(x):
        if loop:
            return jax.lax.scan(lambda c, _: (c + gathered(x * c.sum()).sum(), None), 1.0, length=5)[0]
        return gathered(x)

    with jax.set_mesh(mesh):
        text = jax.jit(function, out_shardings=whole).lower(x).compile().as_text()
    times = 5 if loop else 1
    assert Program(text).collectives() == [Collective("all-gather", 4, times, times * 8 * 16 * 4)]


def test_replica_group_notations_and_asynchronous_collectives():
    text = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = f32[8]{0} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%add
  %b = (f32[8]{0}, f32[16]{0}) all-gather-start(%a), replica_groups=[2,2]<=[4], dimensions={0}
  %c = f32[16]{0} all-gather-done(%b)
  ROOT %d = f32[4]{0:T(128)} reduce-scatter(%c), replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={0}
}
"""
    assert Program(text).collectives() == [
        Collective("all-gather", 2, 1, 64),
        Collective("all-reduce", 2, 1, 32),
        Collective("reduce-scatter", 4, 1, 16),
    ]


def test_collectives_between_slices():
    """The compiler for TPUs writes them as one send and one receive of the hosts."""
    transfer = (
        'is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,3:5}x{0:15}",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    text = f"""
ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  %token = token[] after-all()
  %s = (f32[8]{{0}}, u32[], token[]) send(%p, %token), channel_id=3, {transfer}
  %r = (f32[8]{{0}}, u32[], token[]) recv(%token), channel_id=2, {transfer}
  %done = (f32[8]{{0}}, token[]) recv-done(%r)
  ROOT %d = f32[8]{{0}} get-tuple-element(%done), index=0
}}
"""
    assert Program(text).collectives() == [Collective("all-reduce", 4, 1, 32, between_slices=True)]


def test_arrays_on_the_chip_are_no_memory_traffic():
    """As the compiler for TPUs writes it: a copy from memory to the chip, a sine there, a sum to memory."""
    on_chip, in_memory = "f32[8,8]{1,0:T(8,128)S(1)}", "f32[8,8]{1,0:T(8,128)}"
    text = f"""
ENTRY %main (x: f32[8,8]) -> f32[8,8] {{
  %x = {in_memory} parameter(0)
  %copy = ({on_chip}, {in_memory}, u32[]{{:S(2)}}) copy-start(%x)
  %copied = {on_chip} copy-done(%copy)
  %sine = {on_chip} sine(%copied)
  ROOT %sum = {in_memory} add(%sine, %x)
}}
"""
    # The copy reads x (and a word of context); the sum reads x again and writes its result.
    assert Program(text).memory_traffic() == 3 * 8 * 8 * 4 + 4


@pytest.mark.parametrize(("direction", "known", "runs"), [("LT", "", 20), ("NE", "", 1), ("NE", '{"n":"7"}', 7)])
def test_trip_counts_from_loop_conditions(direction, known, runs):
    """The compiler for TPUs does not state them."""
    stated = f', backend_config={{"known_trip_count":{known}}}' if known else ""
    text = f"""
%body (a: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %a = (s32[], f32[8]{{0}}) parameter(0)
  %x = f32[8]{{0}} get-tuple-element(%a), index=1
  %sum = f32[8]{{0}} all-reduce(%x), replica_groups={{{{0,1}}}}, to_apply=%add
}}

%condition (b: (s32[], f32[8])) -> pred[] {{
  %b = (s32[], f32[8]{{0}}) parameter(0)
  %limit = s32[]{{:T(128)}} constant(20)
  %counter = s32[]{{:T(128)}} get-tuple-element(%b), index=0
  ROOT %less = pred[]{{:T(512)}} compare(%counter, %limit), direction={direction}
}}

ENTRY %main (c: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %c = (s32[], f32[8]{{0}}) parameter(0)
  ROOT %loop = (s32[], f32[8]{{0}}) while(%c), condition=%condition, body=%body{stated}
}}
"""
    assert Program(text).collectives() == [Collective("all-reduce", 2, runs, runs * 8 * 4)]


class Counting(np.ndarray):
    """An array that counts the elements that NumPy computes."""

    count = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        plain = [np.asarray(x) for x in inputs]
        options.pop("out", None)
        result = np.asarray(getattr(ufunc, method)(*plain, **options))
        Counting.count += plain[0].size if method == "reduce" else result.size
        return result.view(Counting)

    def __array_function__(self, function, types, arguments, options):
        assert function is np.where
        Counting.count += arguments[0].size
        return np.where(*(np.asarray(x) for x in arguments)).view(Counting)


def dropped(xp, x, index, times):
    """Exponentials of x, normalized and then dropped by a hash of their indices; `times` times."""
    for _ in range(times):
        weights = xp.exp(x - x.max(-1, keepdims=True))
        bits = index * xp.uint32(0x9E3779B1)
        bits = (bits ^ (bits >> xp.uint32(15))) * xp.uint32(0x85EBCA6B)
        x = xp.where(bits < xp.uint32(0x80000000), weights / weights.sum(-1, keepdims=True), 0)
    return x


@pytest.mark.parametrize("loop", [False, True])
def test_vector_operations_are_those_of_numpy(loop):
    x, index = np.random.default_rng(0).normal(size=(16, 128)).astype(np.float32), np.arange(16 * 128, dtype=np.uint32)
    index, times = index.reshape(x.shape), 3 if loop else 1
    Counting.count = 0
    expected = np.asarray(dropped(np, x.view(Counting), index.view(Counting), times))
    assert Counting.count > 10 * times * x.size

    @jax.jit
    def function(x, index):
        if loop:  # The index changes, so that its hash is no constant of the loop.
            return jax.lax.scan(lambda x, row: (dropped(jnp, x, row, 1), None), x, jnp.stack([index] * times))[0]
        return dropped(jnp, x, index, times)

    compiled = function.lower(x, index).compile()
    np.testing.assert_allclose(compiled(x, index), expected, rtol=1e-5)
    # XLA also counts the trips of a loop, and adds parts of a row up in two stages.
    assert Program(compiled.as_text()).vector_operations() == pytest.approx(Counting.count, rel=0.01)


def test_kernels_state_their_vector_operations():
    """As XLA for TPUs writes it, in a loop: of a kernel it knows nothing."""
    text = """
%body (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%a), index=1
  %y = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"vector_operations":"123"
}}, metadata={op_name="attention_forward"}
  ROOT %b = (s32[], f32[8]{0}) tuple(%x, %y)
}

%more (d: (s32[], f32[8])) -> pred[] {
  %d = (s32[], f32[8]{0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[], f32[8]{0}) parameter(0)
  ROOT %loop = (s32[], f32[8]{0}) while(%c), condition=%more, body=%body, backend_config={"known_trip_count":{"n":"7"}}
}
"""
    program = Program(text)
    assert (program.vector_operations(), program.serial_products()) == (7 * 123, 7)


def test_products_in_turn_are_those_of_a_loop_in_numpy():
    """Forward and backward, a step of an LSTM with projection waits for two products; both directions run at once."""
    B, T, P, E, rng = 2, 7, 4, 8, np.random.default_rng(0)

    def array(*shape):
        return rng.normal(size=shape).astype(np.float32)

    weights = [{"kernel": array(2 * P, 4 * E), "bias": array(4 * E), "projection": array(E, P)} for _ in range(2)]
    x, states = [array(B, T, P)] * 2, [{"cell": array(B, E), "hidden": array(B, P)}] * 2
    expected, hidden, cell, w = 0, states[0]["hidden"], states[0]["cell"], weights[0]
    for t in range(T):
        i, j, f, o = np.split(x[0][:, t] @ w["kernel"][:P] + hidden @ w["kernel"][P:] + w["bias"], 4, axis=1)
        cell = np.clip(cell / (1 + np.exp(-f - 1)) + np.tanh(j) / (1 + np.exp(-i)), -3, 3)
        hidden = np.clip(np.tanh(cell) / (1 + np.exp(-o)) @ w["projection"], -3, 3)
        expected += 2  # With the hidden state, and with its projection; that of x waits for nothing.

    forward = jax.jit(partial(lstm, cell_clip=3.0, projection_clip=3.0))
    np.testing.assert_allclose(forward(weights, x, states)[1][0]["hidden"], hidden, atol=1e-5)
    assert Program(forward.lower(weights, x, states).compile().as_text()).serial_products() == expected
    both = jax.jit(jax.grad(lambda *arguments: sum(y.sum() for y in lstm(*arguments, 3.0, 3.0)[0])))
    assert Program(both.lower(weights, x, states).compile().as_text()).serial_products() == 2 * expected


def test_products_of_few_rows_fill_a_matrix_unit_as_many_would():
    """24 rows take as long as 128, and a head of 64 as one of 128."""
    rows, weights = jnp.ones((24, 256)), jnp.ones((256, 512))
    heads = jnp.ones((6, 200, 64))

    def compiled(function, *arguments):
        return Program(jax.jit(function).lower(*arguments).compile().as_text())

    assert compiled(jnp.matmul, rows, weights).padding(128) == 2 * (128 - 24) * 256 * 512
    scores = compiled(lambda x: jnp.einsum("NTH,NSH->NTS", x, x), heads)
    assert scores.padding(128) == 2 * 6 * 200 * 200 * (128 - 64)
    assert compiled(jnp.matmul, rows, weights).padding(1) == 0
