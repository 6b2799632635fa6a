"""The plain lowering, a CPU's and that of other devices, for leaves of any shape: held to the laws of test_transform.py."""

import re
from unittest import mock

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpart_jax import canonical_layout, gpart_transform, make_partition
from gpart_jax.lowerings import plain
from gpart_jax.transform import bind
from tests.test_transform import (
    DRAW_ONLY,
    VARYING,
    assert_close,
    check_definition,
    data_parallel,
    normal,
    normal_theta,
    reference,
)

D = 300


PLATFORM_DEPENDENT = jax.lax.platform_dependent


@pytest.fixture(autouse=True, params=["cpu", "cpu, cut windows", "elsewhere"])
def lowering(request):
    """Programs traced meanwhile take this branch of `platform_dependent`; yields what they should have added chunks with."""

    def chosen(*args, default=None, **of):
        return of.get(request.param[:3], default)(*args)

    name = "_add_as_rows" if request.param == "elsewhere" else "_add_windows"
    added = mock.Mock(wraps=getattr(plain, name))
    with (
        mock.patch.object(jax.lax, "platform_dependent", chosen),
        mock.patch.object(plain, name, added),
        mock.patch.object(plain, "_WINDOW", 64 if "cut" in request.param else 1),  # a chunk begins in some, or in none
        mock.patch.object(plain, "_FEW", 2),
        mock.patch.object(plain, "_LONG", 1),
    ):
        yield added


@settings(max_examples=8, phases=DRAW_ONLY)
@given(st.integers(256, 700), st.integers(0, 2**64 - 1), st.lists(st.integers(1, 400), max_size=2))
def test_any_runs(d, seed, rows):
    """Leaves that begin and end anywhere in a chunk; the last always has more than 8."""
    check_definition([jnp.zeros((n, 23)) for n in [*rows, 300]], d, seed, "balanced-v1")


def test_stacked_and_transposed_leaves(lowering):
    layers = {"k": jnp.zeros((5, 12, 170)), "s": jnp.zeros(5), "v": jnp.zeros((5, 90, 11))}
    check_definition({"a": jnp.zeros(7), "layers": layers}, D, 7, "balanced-v1", stacked="^layers", transposed="k")
    assert lowering.called


def test_runs_shorter_than_d(lowering):
    check_definition({"layers": [jnp.zeros((9, 80)), jnp.zeros((9, 100))]}, D, 7, "balanced-v1", stacked="^layers")
    assert lowering.called


@pytest.mark.parametrize("lowering", ["elsewhere"], indirect=True)
@pytest.mark.parametrize("piece, pieces", [(1, 4), (9 * D, 4), (10 * D, 3)])
def test_in_pieces_or_at_once_is_the_same(piece, pieces):
    """30 chunks: 8 at a time, which are the fewest, 9, and 10."""
    cotangent = normal(jnp.zeros((30, D)))

    def gradient(theta):
        return jax.vjp(lambda theta: gpart_transform([jnp.zeros((30, D))], theta, 3), theta)[1]([cotangent])[0]

    whole = jax.jit(gradient)(normal_theta(D))
    with mock.patch.object(plain, "_PIECE", piece):
        lowered = jax.jit(lambda theta: gradient(theta)).lower(normal_theta(D))
        (loop,) = re.findall(r"dense<(\d+)> : tensor<i32>\n.*stablehlo.compare LT", lowered.as_text())
        assert int(loop) == pieces
        parts = lowered.compile()(normal_theta(D))
    assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_layer_by_layer(lowering):
    """A scan over layers, whose number is traced, and the stacked leaf as a whole."""
    params = {"layers": {"w": normal(jnp.zeros((4, 61, 50)))}}
    partition = make_partition(canonical_layout(params, stacked="^layers"), D, 5)

    def whole(theta):
        return jnp.sum(jnp.sin(bind(partition, theta)(params)["layers"]["w"]))

    def by_layer(theta):
        adapt = bind(partition, theta)

        def layer(total, index_and_params):
            index, params = index_and_params
            return total + jnp.sum(jnp.sin(adapt({"layers": params}, layer=index)["layers"]["w"])), None

        return jax.lax.scan(layer, 0.0, (jnp.arange(4), params["layers"]))[0]

    theta = normal_theta(D)
    assert_close(jax.jit(jax.grad(by_layer))(theta), jax.jit(jax.grad(whole))(theta), rtol=1e-4, atol=1e-5)
    assert lowering.call_count == 2


@VARYING
def test_data_parallel_gradient(varying, lowering):
    params, theta, x = normal([jnp.zeros((60, 50))]), normal_theta(D), normal(jnp.zeros((16, 60)), seed=5)

    def loss(theta, x):
        return jnp.mean(jnp.sin(x @ gpart_transform(params, theta, 3)[0]) ** 2)

    assert_close(data_parallel(loss, varying)(theta, x), jax.jit(jax.grad(loss))(theta, x), rtol=1e-4, atol=1e-7)
    assert lowering.called


def test_vmap_over_theta(lowering):
    params, thetas = normal([jnp.zeros((60, 50))]), jnp.stack([normal_theta(D, seed) for seed in range(3)])
    gradient = jax.grad(lambda theta: jnp.sum(gpart_transform(params, theta, 3)[0] ** 3))
    together = jax.jit(jax.vmap(gradient))(thetas)
    assert_close(together, jnp.stack([jax.jit(gradient)(theta) for theta in thetas]), rtol=1e-5)
    assert lowering.called


def test_second_derivative(lowering):
    """d^2/dtheta^2 of sum(W^3) is P^T diag(6 W) P."""
    partition = make_partition(canonical_layout([jnp.zeros((60, 50))]), D, 2)
    params, theta = [jnp.full((60, 50), 2.0)], normal_theta(D)
    gradient = jax.grad(lambda theta: jnp.sum(gpart_transform(params, theta, 2)[0] ** 3))
    group, scale = reference(partition)["0"]
    weights = 6 * (2 + np.asarray(theta)[group] * scale) * scale**2
    expected = np.diag(np.bincount(group.reshape(-1), weights.reshape(-1)))
    np.testing.assert_allclose(jax.jit(jax.jacrev(gradient))(theta), expected, rtol=1e-4, atol=1e-5)
    assert lowering.called


@pytest.mark.parametrize("rows, columns", [(95, 800), (395, 32)])
def test_leaves_of_whole_windows(rows, columns, lowering):
    """A part of a row and five rows."""
    check_definition([jnp.zeros((rows, columns)), jnp.zeros((rows // 4, columns))], 320, 7, "balanced-v1")
    assert lowering.call_count == 2


PLATFORMS = [
    ("cuda", 59, "float32", 0),
    ("rocm", 59, "bfloat16", 0),
    ("tpu", 59, "float32", 0),
    ("cpu", 60, "float32", 0),
    ("cpu", 59, "float32", 2),
    ("cpu", 60, "bfloat16", 1),
]


@pytest.mark.parametrize("lowering", ["cpu"], indirect=True)
@pytest.mark.parametrize("platform, rows, dtype, loops", PLATFORMS)
def test_no_loop_over_chunks_but_on_a_cpu(platform, rows, dtype, loops):
    """There, for short windows and narrow numbers: one loop for whole chunks and one for edges where there are any."""
    params, theta = [jnp.zeros((rows, 100), dtype)], normal_theta(D)
    pull = jax.jit(lambda g: jax.vjp(lambda theta: gpart_transform(params, theta, 3), theta)[1](g))
    with (
        mock.patch.object(jax.lax, "platform_dependent", PLATFORM_DEPENDENT),
        mock.patch.object(plain, "_WINDOW", 256),
        mock.patch.object(plain, "_FEW", 32),
    ):
        exported = jax.export.export(pull, platforms=[platform])(params)
    assert str(exported.mlir_module()).count("stablehlo.while") == loops


@pytest.mark.parametrize("lowering", ["cpu"], indirect=True)
def test_narrow_leaves_are_not_widened_as_a_whole():
    """XLA would convert all of a leaf before a loop over its chunks, or before a scatter, to 4 N bytes."""
    params, theta = [jnp.zeros((400, D), jnp.bfloat16)], normal_theta(D)
    pull = jax.jit(lambda g: jax.vjp(lambda theta: gpart_transform(params, theta, 3), theta)[1](g))
    assert pull.lower(params).compile().memory_analysis().temp_size_in_bytes < 2 * 400 * D


def test_narrow_cotangents_are_summed_in_float32(lowering):
    """Of leaves of three dtypes: as if each had been converted first."""
    like = [jnp.zeros((n, D), dtype) for n, dtype in ((40, jnp.bfloat16), (30, jnp.float16), (20, jnp.float32))]

    def pulled(cotangents):
        frozen = jax.tree.map(jnp.zeros_like, cotangents)
        return jax.vjp(lambda theta: gpart_transform(frozen, theta, 3), normal_theta(D))[1](cotangents)[0]

    narrow = normal(like)
    wide = [leaf.astype(jnp.float32) for leaf in narrow]
    assert_close(jax.jit(pulled)(narrow), jax.jit(pulled)(wide), rtol=1e-5, atol=1e-5)
    assert lowering.called
