"""gpart_transform: W = W0 + P theta, its transpose, and what must not change either of them.

Most laws look at P theta alone (the transform of zeros), where equality is exact. To W0 + P theta the compiler may apply
one rounding or two, so those are compared to a unit in the last place.
"""

import dataclasses
import functools
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import equinox as eqx
import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

from gpart_jax import Layout, Leaf, canonical_layout, gpart_transform, make_partition
from gpart_jax.lowerings import elements
from gpart_jax.partition import SCHEMES, group_ids

ORACLE = runpy.run_path(Path(__file__).parent / "data" / "partition" / "make_golden.py")

# d and scheme that reach each way to compute P theta: chunk by chunk (balanced-v1, d >= 256), or element by element.
STREAM, GATHER, HASH = (300, "balanced-v1"), (97, "balanced-v1"), (97, "splitmix64")
LOWERINGS = pytest.mark.parametrize("d, scheme", [STREAM, GATHER, HASH], ids=["stream", "gather", "hash"])
BALANCED = pytest.mark.parametrize(
    "d, scheme", [STREAM, GATHER], ids=["stream", "gather"]
)  # hash lowers as gather does

SHAPES = {"bias": (20,), "layer_10": {"kernel": (20, 24)}, "layer_2": {"kernel": (24, 20)}}
N = 20 + 20 * 24 + 24 * 20

OPTIONS = ("targets", "scheme", "scope", "isometric", "dropout")
transform = jax.jit(gpart_transform, static_argnums=2, static_argnames=OPTIONS)


@functools.partial(jax.jit, static_argnums=2, static_argnames=OPTIONS)
def pull_back(cotangent, theta, seed, **options):
    """P^T cotangent."""
    params = jax.tree.map(jnp.zeros_like, cotangent)
    return jax.vjp(lambda theta: gpart_transform(params, theta, seed, **options), theta)[1](cotangent)[0]


def zeros(shapes=SHAPES, dtype=jnp.float32):
    return jax.tree.map(lambda shape: jnp.zeros(shape, dtype), shapes, is_leaf=lambda x: isinstance(x, tuple))


def normal(like, seed=0):
    """Random arrays of the shapes and dtypes of `like`."""
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape), leaf.dtype), like)


def normal_theta(d, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=d), jnp.float32)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))


def assert_close(a, b, rtol=1e-6, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def indices(leaf):
    """The index of each element of a leaf, by the definition: offset + sum(strides[k] * x[k])."""
    grid = np.indices(leaf.shape, dtype=np.uint64)
    return leaf.offset + sum((g * np.uint64(s) for g, s in zip(grid, leaf.strides)), np.zeros(leaf.shape, np.uint64))


def groups_at(partition, index):
    seed = int(partition.seed[0]) << 32 | int(partition.seed[1])
    return group_ids(partition.scheme, partition.d, seed, index)


def reference(partition):
    """P of a global partition by the definition: path -> (group, non-zero) of each element."""
    scale = partition.scales[0]
    groups = {leaf.path: groups_at(partition, indices(leaf)) for leaf in partition.layout.leaves}
    return {path: (group, scale[group]) for path, group in groups.items()}


def leaves_by_path(tree, layout):
    """The targeted leaves of a tree of dicts and lists."""

    def get(path):
        node = tree
        for key in path.split("/"):
            node = node[int(key) if isinstance(node, list) else key]
        return node

    return {leaf.path: get(leaf.path) for leaf in layout.leaves}


# ------------------------------------------------------------------------------------------------- W0 + P theta, P^T g


def check_definition(params, d, seed, scheme, **numbering):
    """Forward and backward against NumPy: a gather, and a segment sum in float64."""
    layout = canonical_layout(params, **numbering)
    partition = make_partition(layout, d, seed, scheme=scheme)
    theta, cotangent = normal_theta(d), normal(params, seed=2)

    @jax.jit
    def both(params, theta, cotangent):
        out, pull = jax.vjp(lambda theta: gpart_transform(params, theta, seed, targets=layout, scheme=scheme), theta)
        return out, pull(cotangent)[0]

    delta, gradient = both(params, theta, cotangent)
    delta, cotangent = leaves_by_path(delta, layout), leaves_by_path(cotangent, layout)
    expected = np.zeros(d)
    for path, (group, scale) in reference(partition).items():
        assert np.array_equal(delta[path], np.asarray(theta)[group] * scale), path
        weights = np.float64(cotangent[path]) * scale
        expected += np.bincount(group.reshape(-1), weights.reshape(-1), minlength=d)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


DRAW_ONLY = [Phase.generate]  # to shrink a failing case would compile hundreds of programs
DIMENSIONS = st.lists(st.integers(1, 24), min_size=0, max_size=3).map(tuple)


@settings(max_examples=15, phases=DRAW_ONLY)
@given(st.lists(DIMENSIONS, min_size=1, max_size=3), st.sampled_from(SCHEMES), st.integers(0, 2**64 - 1), st.data())
def test_any_shapes_seed_and_d(shapes, scheme, seed, data):
    params = [jnp.zeros(shape) for shape in shapes]
    d = data.draw(st.integers(1, min(sum(leaf.size for leaf in params), 1000)))
    check_definition(params, d, seed, scheme)


@settings(max_examples=8, phases=DRAW_ONLY)
@given(st.integers(256, 700), st.integers(0, 2**64 - 1), st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_any_runs(d, seed, rows):
    """Leaves that begin and end anywhere in a chunk, within one and over several."""
    check_definition([jnp.zeros((n, 23)) for n in [*rows, 31]], d, seed, "balanced-v1")


@pytest.mark.parametrize("d", [256, 480, 500, N - 1, N])
def test_chunks_that_meet_the_edges_of_leaves(d):
    check_definition(zeros(), d, 7, "balanced-v1")


@pytest.mark.parametrize("d, scheme", [(1, "balanced-v1"), (1, "splitmix64"), (N, "splitmix64")])
def test_extreme_d(d, scheme):
    check_definition(zeros(), d, 7, scheme)


@pytest.mark.parametrize("seed", [2**32, 2**64 - 1])
@BALANCED
def test_extreme_seeds(d, scheme, seed):
    check_definition([jnp.zeros((40, 20))], d, seed, scheme)


@LOWERINGS
def test_stacked_and_transposed_leaves(d, scheme):
    layers = {"k": jnp.zeros((5, 12, 17)), "s": jnp.zeros(5), "v": jnp.zeros((5, 9, 11))}
    check_definition({"a": jnp.zeros(7), "layers": layers}, d, 7, scheme, stacked="^layers", transposed="k")


@pytest.fixture(scope="module", params=[STREAM, GATHER, HASH], ids=["stream", "gather", "hash"])
def dense(request):
    """(P as a matrix of shape (N, d), its partition, theta -> P theta of shape (N,))"""
    d, scheme = request.param
    partition = make_partition(canonical_layout(zeros()), d, 11, scheme=scheme)

    def flat(theta):
        delta = leaves_by_path(gpart_transform(zeros(), theta, partition=partition), partition.layout)
        return jnp.concatenate([delta[leaf.path].reshape(-1) for leaf in partition.layout.leaves])

    return np.asarray(jax.jit(jax.vmap(flat))(jnp.eye(d))).T, partition, jax.jit(flat)


def test_each_element_is_in_one_group(dense):
    matrix, partition, _ = dense
    assert np.all(np.sum(matrix != 0, axis=1) == 1)
    assert np.array_equal(np.argmax(matrix, axis=1), groups_at(partition, np.arange(N)))


def test_columns_are_orthonormal(dense):
    matrix, partition, _ = dense
    empty = ~np.any(matrix, axis=0)
    if partition.scheme == "balanced-v1":
        assert not empty.any()
    np.testing.assert_allclose(matrix.T @ matrix, np.diag(1.0 - empty), atol=1e-6)


def test_norm_is_kept(dense):
    _, partition, flat = dense
    theta = normal_theta(partition.d)
    np.testing.assert_allclose(np.linalg.norm(flat(theta)), np.linalg.norm(theta), rtol=1e-6)


def test_vjp_is_the_dense_product(dense):
    matrix, partition, flat = dense
    cotangent = normal_theta(N, seed=3)
    gradient = jax.vjp(flat, normal_theta(partition.d))[1](cotangent)[0]
    np.testing.assert_allclose(gradient, np.float64(matrix).T @ np.float64(cotangent), rtol=1e-5, atol=1e-6)


@LOWERINGS
def test_adds_to_the_frozen_weights(d, scheme):
    params, theta = normal(zeros()), normal_theta(d)
    delta = transform(zeros(), theta, 3, scheme=scheme)
    assert_close(transform(params, theta, 3, scheme=scheme), jax.tree.map(jnp.add, params, delta))


@LOWERINGS
def test_not_isometric_copies_theta(d, scheme):
    theta = jnp.arange(1.0, d + 1)
    delta = transform(zeros(), theta, 3, scheme=scheme, isometric=False)
    partition = make_partition(canonical_layout(zeros()), d, 3, scheme=scheme)
    for path, leaf in leaves_by_path(delta, partition.layout).items():
        assert np.array_equal(leaf, reference(partition)[path][0] + 1)


def test_second_derivative():
    """d^2/dtheta^2 of sum(W^3) is P^T diag(6 W) P."""
    partition = make_partition(canonical_layout([jnp.zeros((5, 4))]), 6, 2)
    params, theta = [jnp.full((5, 4), 2.0)], normal_theta(6)
    gradient = jax.grad(lambda theta: jnp.sum(gpart_transform(params, theta, 2)[0] ** 3))
    group, scale = reference(partition)["0"]
    weights = 6 * (2 + np.asarray(theta)[group] * scale) * scale**2
    expected = np.diag(np.bincount(group.reshape(-1), weights.reshape(-1)))
    np.testing.assert_allclose(jax.jit(jax.jacrev(gradient))(theta), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------- what doesn't change the result

W = (25, 30)  # shape of a weight that suffices for most laws


@pytest.mark.parametrize("d", [256, 300, 750])
def test_both_lowerings_agree(d):
    """A weight goes chunk by chunk, its twin that is stored transposed element by element: equal bits forward."""
    layout = canonical_layout([jnp.zeros(W[::-1])], transposed="0")
    theta, cotangent = normal_theta(d), normal(jnp.zeros(W))

    def streamed(theta):
        return gpart_transform([jnp.zeros(W)], theta, 3)[0]

    def gathered(theta):
        return gpart_transform([jnp.zeros(W[::-1])], theta, 3, targets=layout)[0].T

    pulled = [lambda t, g, f=f: jax.vjp(f, t)[1](g)[0] for f in (streamed, gathered)]
    for f, other in zip(pulled, ("gpart_jax.lowerings.elements.contract", "gpart_jax.lowerings.plain.contract")):
        with mock.patch(other, side_effect=AssertionError):
            jax.jit(f).lower(theta, cotangent)
    assert_equal(jax.jit(streamed)(theta), jax.jit(gathered)(theta))
    one, two = (jax.jit(f)(theta, cotangent) for f in pulled)
    assert_close(one, two, rtol=1e-5)


@LOWERINGS
def test_stacking_changes_nothing(d, scheme):
    theta = normal_theta(d)
    separate = zeros({"layers": [{"b": (9,), "k": (12, 17), "s": ()}] * 2, "z": (40,)})
    stacked = zeros({"layers": {"b": (2, 9), "k": (2, 12, 17), "s": (2,)}, "z": (40,)})
    layout = canonical_layout(stacked, stacked="^layers")
    one = transform(separate, theta, 3, scheme=scheme)
    two = transform(stacked, theta, 3, scheme=scheme, targets=layout)
    assert_equal(stack_layers(one), two)


def stack_layers(tree):
    return tree | {"layers": jax.tree.map(lambda *layers: jnp.stack(layers), *tree["layers"])}


@LOWERINGS
def test_jit_changes_nothing(d, scheme):
    params, theta = normal([jnp.zeros(W)]), normal_theta(d)
    for weights, check in ((zeros([W]), assert_equal), (params, assert_close)):
        check(transform(weights, theta, 3, scheme=scheme), gpart_transform(weights, theta, 3, scheme=scheme))


@LOWERINGS
def test_partition_as_argument_is_the_seed(d, scheme):
    theta, cotangent = normal_theta(d), normal([jnp.zeros(W)])
    partition = make_partition(canonical_layout(zeros([W])), d, 3, scheme=scheme)

    @jax.jit
    def both(theta, partition, cotangent):
        out, pull = jax.vjp(lambda theta: gpart_transform(zeros([W]), theta, partition=partition), theta)
        return out, pull(cotangent)[0]

    out, gradient = both(theta, partition, cotangent)
    assert_equal(out, transform(zeros([W]), theta, 3, scheme=scheme))
    assert_close(gradient, pull_back(cotangent, theta, 3, scheme=scheme), rtol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_key_as_seed(scheme):
    theta = normal_theta(7)
    expected = gpart_transform(zeros([(5, 4)]), theta, 42, scheme=scheme)
    assert_equal(gpart_transform(zeros([(5, 4)]), theta, jax.random.key(42), scheme=scheme), expected)


@LOWERINGS
def test_vmap_over_theta(d, scheme):
    thetas, cotangent = normal_theta((3, d)), normal([jnp.zeros(W)])
    found = jax.vmap(lambda theta: transform(zeros([W]), theta, 3, scheme=scheme))(thetas)
    for k, theta in enumerate(thetas):
        assert_equal([found[0][k]], transform(zeros([W]), theta, 3, scheme=scheme))
    cotangents = [cotangent[0] * jnp.arange(1.0, 4)[:, None, None]]
    gradients = jax.vmap(lambda g, theta: pull_back(g, theta, 3, scheme=scheme))(cotangents, thetas)
    expected = pull_back(cotangent, thetas[0], 3, scheme=scheme)
    assert_close(gradients, expected * jnp.arange(1.0, 4)[:, None], rtol=1e-5, atol=1e-5)


@BALANCED
def test_vmap_over_params(d, scheme):
    theta, weights = normal_theta(d), normal([jnp.zeros((3, *W))])
    delta = transform(zeros([W]), theta, 3, scheme=scheme)
    found = jax.vmap(lambda w: transform(w, theta, 3, scheme=scheme))(weights)
    assert_close(found, [weights[0] + delta[0]])


@BALANCED
def test_training_under_scan(d, scheme):
    params, x = normal([jnp.zeros(W)]), jnp.ones((4, W[0]))
    partition = make_partition(canonical_layout(params), d, 3, scheme=scheme)

    def loss(theta):
        return jnp.mean((x @ gpart_transform(params, theta, partition=partition)[0] - 1) ** 2)

    def step(theta, _):
        value, gradient = jax.value_and_grad(loss)(theta)
        return theta - gradient, value

    scanned, losses = jax.lax.scan(step, jnp.zeros(d), length=3)
    theta = jnp.zeros(d)
    for value in losses:
        theta, expected = jax.jit(step)(theta, None)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_close(scanned, theta, rtol=1e-4)
    assert losses[2] < losses[0]


@BALANCED
def test_remat(d, scheme):
    def loss(theta):
        return jnp.sum(jnp.sin(gpart_transform([jnp.ones(W)], theta, 3, scheme=scheme)[0]))

    one, two = jax.jit(jax.grad(jax.checkpoint(loss))), jax.jit(jax.grad(loss))
    assert_close(one(normal_theta(d)), two(normal_theta(d)), rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ sharding


SPECS = {"a": Spec(("x", "y")), "b": Spec(None, "y"), "c": Spec("y", "x")}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@BALANCED
def test_sharded_params(d, scheme, kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    params, theta = zeros(dict.fromkeys(SPECS, (16, 24))), normal_theta(d)

    @jax.jit
    def both(theta, params, cotangent):
        out, pull = jax.vjp(lambda theta: gpart_transform(params, theta, 3, scheme=scheme), theta)
        return out, pull(cotangent)[0]

    expected, expected_gradient = jax.device_get(both(theta, params, normal(params)))
    with jax.set_mesh(mesh):

        def shard(tree):
            return {name: jax.device_put(leaf, NamedSharding(mesh, SPECS[name])) for name, leaf in tree.items()}

        theta = jax.device_put(theta, NamedSharding(mesh, Spec()))
        sharded = shard(params)
        found, found_gradient = both(theta, sharded, shard(normal(params)))
    assert_equal(jax.device_get(found), expected)
    assert_close(found_gradient, expected_gradient, rtol=1e-5, atol=1e-5)
    for name, leaf in found.items():
        assert leaf.sharding.is_equivalent_to(sharded[name].sharding, 2), name


@pytest.mark.parametrize("d, scheme", [(300, "balanced-v1"), (96, "balanced-v1"), (96, "splitmix64")])
def test_sharded_theta(d, scheme):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    theta = jax.device_put(normal_theta(d), NamedSharding(mesh, Spec("x")))
    expected = transform(zeros([W]), normal_theta(d), 3, scheme=scheme)
    assert_equal(jax.device_get(transform(zeros([W]), theta, 3, scheme=scheme)), jax.device_get(expected))


def data_parallel(loss, varying):
    """theta, batch -> the gradient of the mean loss, each of 8 devices with its own eighth of the batch.

    theta is replicated, or marked as varying before it meets the weights.
    """

    def gradient(theta, batch):
        if varying:
            theta = jax.lax.pcast(theta, ("data",), to="varying")
            return jax.lax.pmean(jax.grad(loss)(theta, batch), "data")
        return jax.grad(lambda theta: jax.lax.pmean(loss(theta, batch), "data"))(theta)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(Spec(), Spec("data")), out_specs=Spec()))


VARYING = pytest.mark.parametrize("varying", [False, True], ids=["replicated", "varying"])


@VARYING
@BALANCED
def test_data_parallel_gradient(d, scheme, varying):
    params, theta, x = normal([jnp.zeros(W)]), normal_theta(d), normal(jnp.zeros((16, W[0])), seed=5)

    def loss(theta, x):
        return jnp.mean(jnp.sin(x @ gpart_transform(params, theta, 3, scheme=scheme)[0]) ** 2)

    assert_close(data_parallel(loss, varying)(theta, x), jax.jit(jax.grad(loss))(theta, x), rtol=1e-4, atol=1e-7)


@VARYING
@BALANCED
def test_data_parallel_dropout(d, scheme, varying):
    """Each device has a mask of its own."""
    keys, theta, weights = jax.random.split(jax.random.key(0), 8), normal_theta(d), normal(jnp.zeros(W))

    def loss(theta, keys):
        def one(key):
            return jnp.vdot(weights, gpart_transform([jnp.zeros(W)], theta, 3, scheme=scheme, dropout=0.5, key=key)[0])

        return jnp.mean(jax.vmap(one)(keys))

    assert_close(data_parallel(loss, varying)(theta, keys), jax.jit(jax.grad(loss))(theta, keys), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- indices beyond 2^32


FAR = [
    Leaf("w", (3, 170, 2), 2**32 - 300, (340, 2, 1)),
    Leaf("w", (3, 170, 2), 2**40 + 77, (340, 2, 1)),
    Leaf("w", (3, 170, 2), 2**64 - 1020, (340, 2, 1)),
    Leaf("w", (3, 170, 2), 2**33 + 5, (2**34 + 9, 2, 1), stacked=True),
    Leaf("w", (3, 170, 2), 2**33 + 5, (2**34 + 9, 2**32 + 1, 2**40 - 7)),
]


@pytest.mark.parametrize("leaf", FAR, ids=["over 2^32", "over 2^40", "up to 2^64", "stacked", "strided"])
@pytest.mark.parametrize("d, scheme", [STREAM, GATHER, HASH, (2, "balanced-v1")])
def test_indices_beyond_32_bits(d, scheme, leaf):
    """A leaf so far out has the groups that Python's integers give; without jax_enable_x64, in a compiled program."""
    assert not jax.config.jax_enable_x64
    seed, theta = 2**64 - 3, jnp.arange(float(d))
    find = ORACLE["Balanced"](d, seed).group if scheme == "balanced-v1" else lambda i: ORACLE["splitmix64"](i, d, seed)
    expected = [find(leaf.offset + sum(s * x for s, x in zip(leaf.strides, at))) for at in np.ndindex(leaf.shape)]
    options = {"targets": Layout((leaf,)), "scheme": scheme, "isometric": False}
    assert transform({"w": jnp.zeros(leaf.shape)}, theta, seed, **options)["w"].reshape(-1).tolist() == expected


# ------------------------------------------------------------------------------------------- nothing of N indices is kept


def largest_constant(function, *arguments):
    """Number of elements of the largest constant in the compiled program."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* constant\(", text)
    assert shapes
    return max(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes)


LARGE = pytest.mark.parametrize("shape", [(300, 200), (60, 10, 100), (60_000,)], ids=str)


@LARGE
@LOWERINGS
def test_no_constant_of_n_elements_in_the_program(d, scheme, shape):
    def loss(theta, params):
        return jnp.sum(jnp.sin(gpart_transform(params, theta, 5, scheme=scheme)[0]))

    assert largest_constant(jax.grad(loss), jnp.ones(d), [jnp.ones(shape)]) < 60_000 / 10


def test_largest_constant_sees_a_table():
    table = np.random.default_rng(0).integers(0, 50, 60_000)
    assert largest_constant(lambda t: t[table], jnp.ones(50)) == 60_000


@pytest.fixture
def in_pieces_of(monkeypatch):
    """Sets how many elements are looked at together. What was traced before is forgotten, and again afterwards."""

    def choose(size):
        monkeypatch.setattr(elements, "_PIECE", size)
        jax.clear_caches()

    yield choose
    jax.clear_caches()


def largest_positions(function, *arguments):
    """Number of elements of the largest integer array that the compiled program writes to memory."""
    sizes, fused = [0], False
    for line in jax.jit(function).lower(*arguments).compile().as_text().splitlines():
        if line.endswith("{") and " (" in line:  # what happens inside of a fusion stays in registers
            fused = "fused" in line or "wrapped" in line
        elif match := re.search(r"= [su]\d+\[([\d,]*)\]\S* (?!parameter|bitcast)", line):
            sizes += [] if fused else [int(np.prod([int(n) for n in match[1].split(",") if n]))]
    return max(sizes)


@LARGE
@LOWERINGS
def test_no_array_of_n_positions_in_the_program(d, scheme, shape, in_pieces_of):
    in_pieces_of(2**12)
    params = [jnp.zeros(shape)]

    def forward(theta):
        return gpart_transform(params, theta, 5, scheme=scheme)

    def backward(theta, cotangent):
        return jax.vjp(forward, theta)[1](cotangent)[0]

    assert largest_positions(forward, jnp.ones(d)) < 60_000 / 10
    assert largest_positions(backward, jnp.ones(d), params) < 60_000 / 10


def test_positions_of_n_elements_are_seen():
    table = jnp.asarray(np.random.default_rng(0).integers(0, 50, 60_000), jnp.int32)
    assert largest_positions(lambda t, shift: t.at[table + shift].add(jnp.ones(60_000)), jnp.ones(50), 1) == 60_000


@pytest.mark.parametrize("shape", [(300, 20), (3, 10, 100), (6000,), (5987,), (2, 2999), (997, 6)], ids=str)
@pytest.mark.parametrize("d, scheme", [GATHER, HASH], ids=["gather", "hash"])
def test_in_pieces_or_at_once_is_the_same(d, scheme, shape, in_pieces_of):
    cotangent = [jnp.asarray(np.random.default_rng(0).integers(-8, 8, shape), jnp.float32)]  # so that sums are exact

    def pulled(cotangent):
        return pull_back.__wrapped__(cotangent, jnp.zeros(d), 5, scheme=scheme, isometric=False)

    at_once = jax.jit(pulled).lower(cotangent)
    assert "stablehlo.while" not in at_once.as_text()
    in_pieces_of(500)
    in_pieces = jax.jit(lambda cotangent: pulled(cotangent)).lower(cotangent)
    assert "stablehlo.while" in in_pieces.as_text()
    assert_equal(in_pieces.compile()(cotangent), at_once.compile()(cotangent))


def residuals(function, theta):
    """Sizes of all that is kept from forward to backward."""
    pull = jax.eval_shape(lambda theta: jax.vjp(function, theta)[1], theta)
    return [leaf.size for leaf in jax.tree.leaves(pull)]


@LARGE
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@LOWERINGS
def test_no_residual_of_n_elements(d, scheme, dropout, shape):
    options = {"scheme": scheme, "dropout": dropout, "key": jax.random.key(0)}
    kept = residuals(lambda theta: gpart_transform([jnp.ones(shape)], theta, 5, **options)[0], jnp.ones(d))
    assert d in kept and max(kept) < 60_000 / 10


def test_a_residual_of_n_elements_is_seen():
    assert 60_000 in residuals(lambda t: jnp.sin(gpart_transform([jnp.ones((300, 200))], t, 5)[0]), jnp.ones(50))


# ------------------------------------------------------------------------------------------------------------- scopes


@LOWERINGS
def test_a_block_depends_on_its_slice_alone(d, scheme):
    params, theta = zeros({f"layer_{b}": {"k": (30, 40), "b": (7,)} for b in (3, 0, 11)}), normal_theta(3 * d + 1)
    base = transform(params, theta, 3, scheme=scheme, scope="block")
    edges = [0, d + 1, 2 * d + 1, 3 * d + 1]  # the first block has one more
    for number, (start, stop) in enumerate(zip(edges, edges[1:])):
        changed = transform(params, theta.at[start:stop].add(1), 3, scheme=scheme, scope="block")
        for name, block in enumerate(("layer_0", "layer_3", "layer_11")):
            for kind in ("k", "b"):
                moved = np.asarray(changed[block][kind] != base[block][kind])
                assert np.all(moved == (name == number)), (block, kind, number)


@LOWERINGS
def test_a_block_is_a_global_partition_of_its_own(d, scheme):
    params, theta = zeros({f"layer_{b}": {"k": (30, 40), "b": (7,)} for b in (2, 10)}), normal_theta(2 * d)
    both = transform(params, theta, 3, scheme=scheme, scope="block")
    for b, name in enumerate(("layer_2", "layer_10")):
        alone = transform(params[name], theta[b * d : (b + 1) * d], ORACLE["stream"](3, 9 + b), scheme=scheme)
        assert_equal(both[name], alone)


@BALANCED
def test_stacked_blocks_are_separate_ones(d, scheme):
    separate = zeros({"layers": [{"b": (9,), "k": (12, 40)}] * 2})
    stacked = zeros({"layers": {"b": (2, 9), "k": (2, 12, 40)}})
    cotangent = normal(separate)
    layout = canonical_layout(stacked, stacked="^layers")
    theta = normal_theta(2 * d)
    one = transform(separate, theta, 3, scheme=scheme, scope="block")
    two = transform(stacked, theta, 3, scheme=scheme, scope="block", targets=layout)
    assert_equal(stack_layers(one), two)
    options = {"scheme": scheme, "scope": "block"}
    gradient = pull_back(stack_layers(cotangent), theta, 3, targets=layout, **options)
    assert_close(gradient, pull_back(cotangent, theta, 3, **options), rtol=1e-5)


@LOWERINGS
def test_block_scope_is_isometric(d, scheme):
    params, theta = zeros({f"layer_{b}": (40, 50) for b in range(2)}), normal_theta(2 * d)
    if scheme == "splitmix64":
        sizes = make_partition(canonical_layout(params), 2 * d, 3, scheme=scheme, scope="block").scales
        assert np.all(np.concatenate(sizes) < 1)  # no empty group
    out = transform(params, theta, 3, scheme=scheme, scope="block")
    np.testing.assert_allclose(jnp.sqrt(sum(jnp.sum(w**2) for w in out.values())), jnp.linalg.norm(theta), rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ dropout


def mask_of(params, d, key, rate=0.5, scheme="balanced-v1"):
    """The mask with its factor, read off the transform of ones."""
    return transform(params, jnp.ones(d), 3, scheme=scheme, isometric=False, dropout=rate, key=key)


@BALANCED
def test_dropped_or_rescaled(d, scheme):
    mask = mask_of([jnp.zeros(W)], d, jax.random.key(0), 0.25, scheme)[0]
    assert set(np.unique(mask)) == {np.float32(0), np.float32(1 / 0.75)}


def test_dropout_keeps_the_expectation():
    """Mean of n draws of 0 or 1 / 0.75: one, with a standard deviation of sqrt(1 / 3 / n)."""
    mask = mask_of([jnp.zeros((250, 400))], 300, jax.random.key(0), 0.25)[0]
    assert abs(float(jnp.mean(mask)) - 1) < 4 * (1 / 3 / mask.size) ** 0.5


@BALANCED
def test_dropout_has_one_mask_forward_and_backward(d, scheme):
    key, theta, cotangent = jax.random.key(0), normal_theta(d), normal([jnp.zeros(W)])
    mask = mask_of([jnp.zeros(W)], d, key, 0.25, scheme)[0]
    options = {"scheme": scheme, "dropout": 0.25, "key": key}
    delta = transform([jnp.zeros(W)], theta, 3, scheme=scheme)[0]
    assert_close(transform([jnp.zeros(W)], theta, 3, **options)[0], delta * mask)
    expected = pull_back([cotangent[0] * mask], theta, 3, scheme=scheme)
    assert_close(pull_back(cotangent, theta, 3, **options), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"dropout": 0.0, "key": 0}, {"dropout": 0.5}, {"key": 0}], ids=str)
def test_nothing_is_dropped_without_rate_or_key(options):
    options = options | ({"key": jax.random.key(0)} if "key" in options else {})
    assert_equal(
        transform([jnp.zeros(W)], normal_theta(300), 3, **options), transform([jnp.zeros(W)], normal_theta(300), 3)
    )


def test_masks_differ_between_keys_leaves_and_layers():
    """Two fair masks of n = 4000 elements agree on half of them, within 5 * 0.5 / sqrt(n) = 0.04."""
    shapes = {"layers": {"a": (2, 40, 100), "b": (2, 40, 100)}}
    layout = canonical_layout(zeros(shapes), stacked="^layers")
    options = {"targets": layout, "isometric": False, "dropout": 0.5}
    for scope in ("global", "block"):
        one, other = (
            transform(zeros(shapes), jnp.ones(300), 3, scope=scope, key=jax.random.key(k), **options)["layers"]
            for k in (0, 1)
        )
        masks = [*one["a"], *one["b"], *other["a"]]
        for k, mask in enumerate(masks):
            assert all(abs(np.mean(mask == later) - 0.5) < 0.04 for later in masks[k + 1 :]), (scope, k)


def test_dropout_mask_is_that_of_its_key_under_jit_and_vmap():
    keys, params = jax.random.split(jax.random.key(0), 3), [jnp.zeros((5, 4))]

    def draw(key):
        return gpart_transform(params, jnp.ones(7), 3, dropout=0.5, key=key)[0]

    assert_equal(jax.jit(jax.vmap(draw))(keys), jnp.stack([draw(key) for key in keys]))


# ------------------------------------------------------------------------------------------------------ dtypes and trees


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@BALANCED
def test_narrow_params_are_rounded_once(d, scheme, dtype):
    params, theta = normal(zeros([W], dtype)), normal_theta(d)
    delta = transform(zeros([W]), theta, 3, scheme=scheme, isometric=False)
    expected = jax.tree.map(lambda w, x: (w.astype(jnp.float32) + x).astype(dtype), params, delta)
    assert_equal(transform(params, theta, 3, scheme=scheme, isometric=False), expected)


@BALANCED
def test_narrow_theta_is_widened(d, scheme):
    theta = normal_theta(d).astype(jnp.bfloat16)
    wide = transform(zeros(), theta.astype(jnp.float32), 3, scheme=scheme)
    assert_equal(transform(zeros(), theta, 3, scheme=scheme), wide)


@BALANCED
def test_narrow_gradient_is_summed_in_float32(d, scheme):
    """A sum of some 600 ones in bfloat16 would stop at 256."""
    params, theta = [jnp.zeros((600, d), jnp.bfloat16)], jnp.zeros(d, jnp.bfloat16)
    gradient = pull_back([jnp.ones((600, d), jnp.bfloat16)], theta, 3, scheme=scheme)
    sizes = make_partition(canonical_layout(params), d, 3, scheme=scheme).scales[0] ** -2.0
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(gradient), np.sqrt(sizes), rtol=2**-8)


def test_float64():
    with jax.enable_x64(True):
        theta = jnp.asarray(np.random.default_rng(0).normal(size=300))
        out = gpart_transform([jnp.zeros((25, 30), jnp.float64)], theta, 3, isometric=False)[0]
        assert out.dtype == jnp.float64 and set(np.asarray(out).flat) == set(np.asarray(theta))


def test_float32_of_leaves_is_kept_under_mixed_dtypes():
    params = {"a": jnp.ones((4, 5), jnp.bfloat16), "b": jnp.ones((4, 5)), "c": np.ones((4, 5), np.float32)}
    out = transform(params, jnp.ones(3), 3)
    assert [leaf.dtype for leaf in out.values()] == [jnp.bfloat16, jnp.float32, jnp.float32]


def test_untargeted_leaves_are_the_same_objects():
    params = {
        "q": jnp.ones((4, 5)),
        "other": jnp.ones(3),
        "steps": jnp.arange(3),
        "name": "text",
        "f": len,
        "none": None,
    }
    out = gpart_transform(params, jnp.ones(3), 3, targets="^q$")
    assert all(out[name] is params[name] for name in params if name != "q")
    assert np.all(out["q"] > params["q"])


def test_params_are_not_changed():
    params = {"q": np.ones((4, 5), np.float32)}
    gpart_transform(params, jnp.ones(3), 3)
    assert np.all(params["q"] == 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    left: jax.Array
    right: jax.Array


def test_containers_of_every_kind():
    """The same leaves in the same order give the same weights, whatever holds them."""
    a, b = jnp.zeros((4, 5)), jnp.zeros(7)
    expected = jax.tree.leaves(gpart_transform([a, b], jnp.arange(5.0), 3))
    for tree in ({"a": a, "b": b}, (a, b), [[a], [b]], {"x": (a, {"y": b})}, Pair(a, b), [Pair(a, b)]):
        out = gpart_transform(tree, jnp.arange(5.0), 3)
        assert jax.tree.structure(out) == jax.tree.structure(tree)
        assert_equal(jax.tree.leaves(out), expected)


def test_a_bare_array():
    one, two = (gpart_transform(tree, jnp.arange(5.0), 3) for tree in (jnp.zeros((4, 5)), [jnp.zeros((4, 5))]))
    assert_equal(one, two[0])


def test_leaves_without_axes_or_elements():
    params = {"a": jnp.zeros((0, 3)), "b": jnp.zeros(()), "c": jnp.zeros((4, 3))}
    partition = make_partition(canonical_layout(params), 5, 3)
    assert partition.layout.size == 13
    check_definition(params, 5, 3, "balanced-v1")


def test_linen():
    model = nn.Dense(5)
    x = jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    adapted = gpart_transform(params, normal_theta(6), 3, targets="kernel")
    delta = gpart_transform([jnp.zeros((4, 5))], normal_theta(6), 3)[0]
    assert adapted["bias"] is params["bias"]
    assert_close(model.apply({"params": adapted}, x), model.apply({"params": params}, x) + x @ delta, atol=1e-5)


def test_nnx():
    model = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    x, graph, state = jnp.ones((2, 4)), *nnx.split(model)
    adapted = gpart_transform(state, normal_theta(6), 3, targets="kernel")
    delta = gpart_transform([jnp.zeros((4, 5))], normal_theta(6), 3)[0]
    assert jax.tree.structure(adapted) == jax.tree.structure(state)
    assert_close(nnx.merge(graph, adapted)(x), model(x) + x @ delta, atol=1e-5)


def test_equinox():
    class Model(eqx.Module):
        layer: eqx.nn.Linear
        activation: Callable = jax.nn.relu

        def __call__(self, x):
            return self.activation(self.layer(x))

    model = Model(eqx.nn.Linear(4, 5, key=jax.random.key(0)))
    adapted = gpart_transform(model, normal_theta(6), 3, targets="weight")
    delta = gpart_transform([jnp.zeros((5, 4))], normal_theta(6), 3)[0]
    assert adapted.activation is model.activation and adapted.layer.bias is model.layer.bias
    expected = jax.nn.relu((model.layer.weight + delta) @ jnp.ones(4) + model.layer.bias)
    assert_close(adapted(jnp.ones(4)), expected, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- bad input


def run(theta=None, seed=3, params=None, **options):
    theta = jnp.ones(3) if theta is None else theta
    return gpart_transform(
        {"w": jnp.ones((4, 5)), "n": jnp.arange(3)} if params is None else params, theta, seed, **options
    )


PARTITION = make_partition(canonical_layout({"w": jnp.ones((4, 5))}), 3, 1)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"theta": np.zeros(0, np.float32)}, ValueError, "d = 0 must be between 1 and N = 20"),
        ({"theta": np.zeros(21, np.float32)}, ValueError, "d = 21 must be between 1 and N = 20"),
        ({"theta": np.zeros((2, 3), np.float32)}, ValueError, r"shape \(d,\), not \(2, 3\).*vmap"),
        ({"theta": np.float32(1)}, ValueError, r"shape \(d,\), not \(\)"),
        ({"theta": np.zeros(3, np.int32)}, TypeError, "theta must be floating-point, not int32"),
        ({"theta": np.zeros(3, np.complex64)}, TypeError, "theta must be floating-point, not complex64"),
        ({"targets": "nothing"}, ValueError, "'nothing' matches no leaf.*'w'"),
        ({"targets": "n"}, ValueError, "'n' is int32, not floating-point"),
        ({"scheme": "balanced"}, ValueError, "scheme 'balanced'.*balanced-v1, splitmix64"),
        ({"scope": "layer"}, ValueError, "scope 'layer'.*global, block"),
        ({"scope": "block"}, ValueError, "'w' has no number"),
        ({"seed": -3}, ValueError, r"-3 must be in \[0, 2\^64\)"),
        ({"seed": 2**64}, ValueError, r"must be in \[0, 2\^64\)"),
        ({"seed": 1.5}, TypeError, "seed must be an int.*1.5"),
        ({"dropout": 1.0}, ValueError, r"dropout = 1.0 must be in \[0, 1\)"),
        ({"dropout": -0.1}, ValueError, "dropout = -0.1"),
        ({"params": {"a": {"b": np.ones(3)}, "a/b": np.ones(3)}}, ValueError, "same path"),
        ({"seed": PARTITION, "params": {"w": np.ones((5, 4))}}, ValueError, r"'w' has shape \(5, 4\).*\(4, 5\)"),
        ({"seed": PARTITION, "params": {"v": np.ones((4, 5))}}, ValueError, "'w' is not a floating-point leaf"),
        ({"seed": PARTITION, "theta": np.ones(4, np.float32)}, ValueError, r"\(4,\), but the partition has d = 3"),
        ({"seed": PARTITION, "targets": "w"}, ValueError, "Partition already fixes.*Leave them out"),
        ({"seed": PARTITION, "scheme": "splitmix64"}, ValueError, "Partition already fixes"),
        ({"seed": PARTITION, "scope": "block"}, ValueError, "Partition already fixes"),
        ({"seed": PARTITION, "isometric": False}, ValueError, "Partition already fixes"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)


@pytest.mark.parametrize("seed", [1, jax.random.key(1)], ids=["int", "key"])
def test_traced_seed(seed):
    with pytest.raises(TypeError, match="seed is traced.*static.*Partition"):
        jax.jit(lambda seed: run(seed=seed))(seed)
