"""Every transformation of JAX through gpart_transform, against a plain gather of the definition's groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gpart_jax import canonical_layout, gpart, gpart_transform, make_partition, sharding
from tests.test_transform import reference

D, SEEDS = 300, (3, 5, 8)
SHAPES = {"a": (20, 40), "b": (7,), "c": (30, 12)}
KINDS = {"plain": ("balanced-v1", None), "elements": ("balanced-v1", "a|c"), "hash": ("splitmix64", None)}  # stored transposed


def drawn(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(params=KINDS)
def pair(request):
    """(ours, gathered): each f(theta, params, number of a partition) -> adapted params; and three partitions, stacked."""
    scheme, transposed = KINDS[request.param]
    params = {name: drawn(7, shape) for name, shape in SHAPES.items()}
    layout = canonical_layout(params, transposed=transposed)
    partitions = [make_partition(layout, D, seed, scheme=scheme) for seed in SEEDS]
    stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *partitions)
    tables = [reference(partition) for partition in partitions]
    groups, scales = ({name: jnp.asarray(np.stack([np.asarray(t[name][k]) for t in tables])) for name in SHAPES} for k in (0, 1))

    def ours(theta, params, number):
        return gpart_transform(params, theta, partition=jax.tree.map(lambda x: x[number], stacked))

    def gathered(theta, params, number):
        return {name: w + theta[groups[name][number]] * scales[name][number] for name, w in params.items()}

    return ours, gathered, params


def loss(transform, theta, params, number=0):
    return sum(jnp.sum(jnp.sin(2 * w) * (1 + n)) for n, w in enumerate(jax.tree.leaves(transform(theta, params, number))))


def jvp(transform, theta, params):
    tangents = drawn(2, D), jax.tree.map(lambda x: 0.5 * x, params)
    return jax.jvp(lambda theta, params: transform(theta, params, 0), (theta, params), tangents)


def jvp_of_theta_alone(transform, theta, params):
    return jax.jvp(lambda theta: transform(theta, params, 1), (theta,), (drawn(2, D),))


def jvp_of_weights_alone(transform, theta, params):
    return jax.jvp(lambda params: transform(theta, params, 1), (params,), (jax.tree.map(jnp.cos, params),))


def gradient_of_both(transform, theta, params):
    return jax.grad(functools.partial(loss, transform), (0, 1))(theta, params)


def gradient_through_one_leaf(transform, theta, params):
    return jax.grad(lambda theta: jnp.sum(jnp.sin(transform(theta, params, 0)["c"])))(theta)


def hessian(transform, theta, params):
    return jax.hessian(functools.partial(loss, transform))(theta, params)


def hessian_vector_products(transform, theta, params):
    gradient = jax.grad(functools.partial(loss, transform))
    forward_over_reverse = jax.jvp(lambda theta: gradient(theta, params), (theta,), (drawn(3, D),))[1]
    reverse_over_reverse = jax.vjp(lambda theta: gradient(theta, params), theta)[1](drawn(3, D))[0]
    reverse_over_forward = jax.grad(lambda t: jax.jvp(lambda t: loss(transform, t, params), (t,), (drawn(3, D),))[1])(theta)
    return forward_over_reverse, reverse_over_reverse, reverse_over_forward


def jacobians(transform, theta, params):
    last = lambda theta: transform(theta, params, 0)["b"]  # noqa: E731
    return jax.jacfwd(last)(theta), jax.jacrev(last)(theta)


def linearize(transform, theta, params):
    value, along = jax.linearize(lambda theta: transform(theta, params, 2), theta)
    return value, along(drawn(4, D)), jax.linear_transpose(along, theta)(value)


def vmap_over_thetas(transform, theta, params):
    thetas = jnp.stack([theta, 2 * theta])
    one = jax.value_and_grad(functools.partial(loss, transform))
    return jax.vmap(lambda t: transform(t, params, 0))(thetas), jax.vmap(one, (0, None))(thetas, params)


def vmap_over_partitions(transform, theta, params):
    one = jax.value_and_grad(functools.partial(loss, transform))
    return jax.vmap(one, (None, None, 0))(theta, params, jnp.arange(3))


def vmap_over_weights(transform, theta, params):
    several = jax.tree.map(lambda x: jnp.stack([x, x + 1]), params)
    return jax.vmap(jax.grad(functools.partial(loss, transform), (0, 1)), (None, 0))(theta, several)


def vmap_of_vmap(transform, theta, params):
    thetas = jnp.stack([theta, 2 * theta])
    inner = jax.vmap(jax.grad(functools.partial(loss, transform)), (0, None, None))
    return jax.vmap(inner, (None, None, 0), 1)(thetas, params, jnp.arange(3))


def vmap_of_jvp_and_jvp_of_vmap(transform, theta, params):
    thetas, tangents = jnp.stack([theta, 2 * theta]), jnp.stack([drawn(2, D), drawn(3, D)])
    inside = jax.vmap(lambda t, dot: jax.jvp(lambda t: transform(t, params, 0), (t,), (dot,)))(thetas, tangents)
    weights = jax.tree.map(jnp.sin, params)
    several = lambda thetas, params: jax.vmap(lambda t: transform(t, params, 0))(thetas)  # noqa: E731
    return inside, jax.jvp(several, (thetas, params), (tangents, weights))


def checkpoint(transform, theta, params):
    return jax.grad(jax.checkpoint(functools.partial(loss, transform)))(theta, params)


def scan(transform, theta, params):
    def step(theta, number):
        value, gradient = jax.value_and_grad(functools.partial(loss, transform))(theta, params, number)
        return theta - 0.1 * gradient, value

    return jax.lax.scan(step, theta, jnp.array([0, 1, 2, 0]))


def shard_map(transform, theta, params):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))

    def local(theta, params, numbers):
        one = jax.value_and_grad(lambda theta: jax.lax.pmean(loss(transform, theta, params, numbers[0]), "x"))
        tangent = jax.jvp(lambda theta: loss(transform, theta, params, numbers[0]), (theta,), (jnp.ones(D),))[1]
        return *one(theta), tangent[None]

    return jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("x")), out_specs=(P(), P(), P("x")))(
        theta, params, jnp.array([0, 1, 2, 1])
    )


TRANSFORMATIONS = (
    jvp, jvp_of_theta_alone, jvp_of_weights_alone, gradient_of_both, gradient_through_one_leaf, hessian, hessian_vector_products,
    jacobians, linearize, vmap_over_thetas, vmap_over_partitions, vmap_over_weights, vmap_of_vmap, vmap_of_jvp_and_jvp_of_vmap,
    checkpoint, scan, shard_map,
)  # fmt: skip


@pytest.mark.parametrize("transformation", TRANSFORMATIONS, ids=lambda f: f.__name__)
def test_as_a_gather(transformation, pair):
    ours, gathered, params = pair
    theta = drawn(1, D)
    found, expected = (jax.jit(lambda t, p, f=f: transformation(f, t, p))(theta, params) for f in (ours, gathered))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)


def test_without_jit(pair):
    ours, gathered, params = pair
    theta = drawn(1, D)
    for transformation in (jvp, gradient_of_both, vmap_over_thetas):
        found, expected = transformation(ours, theta, params), transformation(gathered, theta, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)


def test_hessian_vector_product_on_a_mesh():
    """Through `sharding.value_and_grad`, under "tensor"."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    params = {"w": drawn(7, (16, 24))}
    shardings = sharding.param_shardings(params, mesh, [("w", P("fsdp", "tensor"))])
    method = gpart(50, 3)
    compute = sharding.value_and_grad(lambda adapt, p, batch, key: jnp.mean(jnp.sin(batch["x"] @ adapt(p)["w"]) ** 2), method, shardings)
    theta, x = drawn(1, 50), drawn(5, (8, 16))
    on_mesh = sharding.place(params, shardings), sharding.global_batch({"x": np.asarray(x)}, mesh)

    def gradient(theta, params, batch):
        return compute({"theta": theta}, params, batch)[1]["theta"]

    hvp = jax.jit(lambda t, *a: jax.jvp(lambda t: gradient(t, *a), (t,), (jnp.ones(50),))[1])
    found = hvp(sharding.replicate(theta, mesh), *on_mesh)
    expected = jax.jvp(jax.grad(lambda t: jnp.mean(jnp.sin(x @ gpart_transform(params, t, 3)["w"]) ** 2)), (theta,), (jnp.ones(50),))[1]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_vmap_and_gradient_over_explicit_axes():
    """Where each device makes its own part of the weights, of which some are divided along two axes, and some along none."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    specs = {"a": P("x"), "b": P(), "c": P(None, "y"), "e": P("x", "y")}
    params = {name: drawn(7, shape) for name, shape in {"a": (20, 40), "b": (7,), "c": (30, 12), "e": (8, 10)}.items()}
    thetas = jnp.stack([drawn(1, D), drawn(2, D)])

    def both(thetas, params):
        one = lambda theta: sum(jnp.sum(jnp.sin(x)) for x in gpart_transform(params, theta, 3).values())  # noqa: E731
        inside = jax.vmap(jax.value_and_grad(one))(thetas)
        return inside, jax.grad(lambda thetas: jnp.sum(jax.vmap(one)(thetas) ** 2))(thetas)

    expected = jax.jit(both)(thetas, params)
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in params.items()}
        found = jax.jit(both)(jax.device_put(thetas, NamedSharding(mesh, P())), placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_three_partitions_are_one_trace():
    params, theta, traces = {"w": drawn(7, (20, 30))}, drawn(1, D), []

    @jax.jit
    def run(partition, theta):
        traces.append(1)
        return gpart_transform(params, theta, partition=partition)

    layout = canonical_layout(params)
    for seed in SEEDS:
        found = run(make_partition(layout, D, seed), theta)
        np.testing.assert_array_equal(found["w"], jax.jit(lambda t, seed=seed: gpart_transform(params, t, seed))(theta)["w"])
    assert len(traces) == 1


def test_a_partition_as_the_seed_is_taken_for_now():
    params, theta = {"w": drawn(7, (20, 30))}, drawn(1, D)
    partition = make_partition(canonical_layout(params), D, 3)
    with pytest.warns(DeprecationWarning, match="partition=..."):
        found = gpart_transform(params, theta, partition)
    np.testing.assert_array_equal(found["w"], gpart_transform(params, theta, partition=partition)["w"])
    with pytest.raises(TypeError, match="a seed or a partition, not both"):
        gpart_transform(params, theta, 3, partition=partition)
    with pytest.raises(TypeError, match="needs a seed or a partition"):
        gpart_transform(params, theta)
