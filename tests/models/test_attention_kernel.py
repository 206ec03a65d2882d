"""The attention kernel of TPUs, interpreted, against the plain code path; and compiled for TPUs."""

import collections
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractMesh, NamedSharding

from prelm_jax.models import attention_kernel
from prelm_jax.models.attention import attention, attention_mask
from prelm_jax.models.attention_kernel import Settings, cost, kernel_attention, make_settings
from prelm_jax.models.layers import kept, random_bits
from prelm_jax.planning.topology import compile_only_devices
from prelm_jax.training.sharding import ROWS, MeshConfig

RATE = 0.1
NO_OPERATION = ("broadcast_in_dim", "dot_general", "get", "swap")  # Of those that the vector unit computes.
KEY = jax.random.key(7)


def kernel(q, k, v, num_heads, mask, rate, key):
    """The signature of `attention`, by the kernel."""
    settings = make_settings(q, num_heads, mask.causal, rate)
    assert settings is not None
    return kernel_attention(settings, q / math.sqrt(settings.head_size), k, v, mask.segments_BT, key)


def uniform(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)


def packed_segments(B, T):
    """Two texts and padding in the first row, all padding in the second, one text in the others."""
    segments = np.ones((B, T), np.int32)
    segments[0, T // 3 :], segments[0, -T // 8 :], segments[1] = 2, 0, 0
    return jnp.asarray(segments)


def value_and_gradients(attend, q, k, v, num_heads, mask, rate, key):
    """Of a loss over the real positions, as of a model: the output there, and the gradients of q, k and v."""
    real = (mask.segments_BT != 0)[..., None]

    def output(q, k, v):
        return jnp.where(real, attend(q, k, v, num_heads, mask, rate, key), 0)

    def both(q, k, v):
        value, gradients = jax.vjp(output, q, k, v)
        return value, *gradients(uniform(*q.shape, seed=1))

    return jax.jit(both)(q, k, v)


@pytest.mark.parametrize(
    ("T", "D", "num_heads", "causal", "rate"),
    [(264, 128, 2, True, RATE), (72, 256, 4, False, RATE), (8, 512, 2, True, 0.0)],
)
def test_outputs_and_gradients(T, D, num_heads, causal, rate):
    """Several blocks of queries and groups of heads; heads narrower and wider than 128; no multiples of 128 tokens."""
    q, k, v = (uniform(3, T, D, seed=seed) for seed in range(3))
    arguments = (q, k, v, num_heads, attention_mask(packed_segments(3, T), causal), rate, KEY if rate else None)
    found, expected = value_and_gradients(kernel, *arguments), value_and_gradients(attention, *arguments)
    for a, b in zip(found, expected, strict=True):
        # Of the largest element, which is 1 to 2: the sums are in another order.
        np.testing.assert_allclose(a, b, atol=1e-6 * max(1, abs(b).max()), rtol=0)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_dropout_mask_is_that_of_the_plain_path(devices):
    """Uniform weights and the unit matrix as values show the mask, of several steps of several rows on one device."""
    B, T, N = 16, 64, 4
    q, v = jnp.zeros((B, T, N * T)), jnp.tile(jnp.eye(T), (B, 1, N))
    mask = attention_mask(jnp.ones((B, T), jnp.int32))
    with jax.set_mesh(MeshConfig(devices=devices).build()):
        found = jax.jit(lambda q, v: kernel(q, q, v, N, mask, RATE, KEY))(q, v)
    weights_BNTS = np.asarray(found).reshape(B, T, N, T).swapaxes(1, 2)
    expected = np.asarray(kept(random_bits(KEY, (B, N, T, T)), RATE))
    np.testing.assert_array_equal(weights_BNTS > 0, expected)
    np.testing.assert_allclose(weights_BNTS[expected], 1 / T / (1 - RATE), rtol=1e-6)


def test_gradients_on_eight_devices():
    q, k, v = (uniform(16, 16, 128, seed=seed) for seed in range(3))
    arguments = (q, k, v, 2, attention_mask(packed_segments(16, 16)), RATE, KEY)
    mesh = MeshConfig().build()
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, NamedSharding(mesh, ROWS)) for x in arguments[:3]]
        found = value_and_gradients(kernel, *sharded, *arguments[3:])
    for a, b in zip(found, value_and_gradients(attention, *arguments), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=0)


def test_bfloat16():
    """Rounded inputs, then sums in fp32: no further from fp32 than the plain path in bf16."""
    q, k, v = (uniform(2, 64, 128, seed=seed).astype(jnp.bfloat16) for seed in range(3))
    rest = (2, attention_mask(packed_segments(2, 64), True), RATE, KEY)
    exact = value_and_gradients(attention, *(x.astype(jnp.float32) for x in (q, k, v)), *rest)

    def distances(attend):
        found = value_and_gradients(lambda *x: attend(*x).astype(jnp.float32), q, k, v, *rest)
        return [np.abs(np.asarray(a, np.float32) - b).mean() for a, b in zip(found, exact, strict=True)]

    assert np.less_equal(distances(kernel), 1.1 * np.array(distances(attention))).all()


def tpu(kind):
    """The context of a program that is traced for one chip of this kind."""
    device = jax.sharding.AbstractDevice(kind, 1, "tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device))


def kernels(*shape, num_heads=12):
    """The kernels in the program of `attention` on q, k and v of this shape."""
    x, segments = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    traced = jax.make_jaxpr(lambda x, s: attention(x, x, x, num_heads, attention_mask(s), RATE, KEY))(x, segments)
    return re.findall(r"attention_(?:forward|backward)", str(traced))


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"])
def test_the_kernel_is_the_default_where_it_fits(kind):
    """v4 has too little memory for 1,024 tokens; no chip has a kernel for other shapes, such as symbolic ones."""
    with tpu(kind):
        assert all(kernels(4, T, 768) for T in (8, 128, 512))
        assert bool(kernels(4, 1024, 768)) == (kind != "TPU v4")
        assert not kernels(4, 1032, 768) and not kernels(4, 60, 768)
        assert not kernels(4, 128, 768, num_heads=8) and not kernels(4, 128, 400, num_heads=2)
        symbolic = jax.ShapeDtypeStruct(export.symbolic_shape("b, t, 768"), jnp.float32)
        assert make_settings(symbolic, 12, False, 0.0) is None
    assert not kernels(4, 128, 768)


def test_costs():
    """FLOPs and bytes counted with NumPy, elementwise operations in the program of a kernel."""
    causal, full = Settings(3, 520, 768, 2, 12, True, 0.0), Settings(3, 520, 768, 2, 12, False, 0.0)
    keys = sum(min(520, 256 * (t // 256 + 1)) for t in range(520))
    assert [cost(s, False).transcendentals for s in (causal, full)] == [3 * 12 * keys, 3 * 12 * 520**2]
    assert [cost(causal, b).flops for b in (False, True)] == [2 * n * 3 * 12 * keys * 128 for n in (2, 5)]
    arrays, segments = np.zeros((3, 520, 768), np.float16).nbytes, 6 * np.zeros((3, 520), np.int32).nbytes
    assert [cost(causal, b).bytes for b in (False, True)] == [n * arrays + segments + 16 for n in (4, 7)]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("causal", "rate", "dtype"), [(False, RATE, jnp.bfloat16), (True, 0.0, jnp.float32)])
def test_vector_operations(backward, causal, rate, dtype):
    """Counted in the program of a kernel: operations on arrays of a weight each, by the size of these."""
    settings = Settings(1, 72, 128, jnp.dtype(dtype).itemsize, 1, causal, rate)
    x = jnp.zeros((1, 72, 128), dtype)
    inputs = (jnp.zeros(1, jnp.uint32), jnp.zeros(1, jnp.uint32), jnp.ones((1, 1, 72), jnp.int32), x, x, x)
    call = jax.make_jaxpr(lambda *x: attention_kernel._call(settings, backward, *x))(*inputs, *[x] * backward)
    counts = collections.Counter()

    def count(jaxpr):
        for equation in jaxpr.eqns:
            name, parameters = equation.primitive.name, equation.params.values()
            inner = [getattr(x, "jaxpr", x) for x in jax.tree.leaves(list(parameters)) if hasattr(x, "eqns")]
            for each in inner:
                count(each)
            shapes = [getattr(x.aval, "shape", None) for x in (*equation.invars, *equation.outvars)]
            same_type = name == "convert_element_type" and dtype == jnp.float32
            if (72, 72) in shapes and not inner and name not in NO_OPERATION and not same_type:
                counts[name] += 1

    count(call.jaxpr)
    assert counts.total() == cost(settings, backward).vector_operations / 72**2, counts


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no compiler for TPUs: pip install libtpu")
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiled_for_a_tpu(topology):
    """Both kernels, within the memory that `Settings.vmem` expects; causal, with dropout, in bf16 and fp32."""
    mesh = MeshConfig().build(compile_only_devices(topology, 1))
    with jax.set_mesh(mesh):
        for T, dtype in ((128, jnp.bfloat16), (264, jnp.float32)):
            x = jax.ShapeDtypeStruct((4 * mesh.size, T, 128), dtype, sharding=NamedSharding(mesh, ROWS))
            segments = jax.ShapeDtypeStruct(x.shape[:2], jnp.int32, sharding=NamedSharding(mesh, ROWS))

            def loss(q, k, v, segments):
                y = attention(q, k, v, 2, attention_mask(segments, True), RATE, KEY)
                return (y.astype(jnp.float32) ** 2).sum()

            compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, segments).compile()
            calls = compiled.as_text().split('custom_call_target="tpu_custom_call"')[1:]
            used = [int(re.search(r'used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', call)[1]) for call in calls]
            settings = make_settings(x, 2, True, RATE)
            assert len(used) == 2 and max(used) <= settings.vmem <= attention_kernel.vmem_capacity()
