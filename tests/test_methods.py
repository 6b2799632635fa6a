import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.flatten_util import ravel_pytree

from gpart_jax import (
    Adapter,
    bitfit,
    chain,
    fastfood,
    full,
    gpart,
    gpart_transform,
    head,
    lora,
    uni_lora,
    vera,
)
from gpart_jax.methods import from_spec, trained_numbers
from gpart_jax.methods.fastfood import _hadamard, _permute
from gpart_jax.partition import group_ids
from gpart_jax.targets import named_leaves

KERNELS = r"query/kernel$"
HEAD = "^classifier/"


@pytest.fixture
def params():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    layers = {
        f"layer_{n}": {"query": {"kernel": jax.random.normal(next(keys), (6, 5)), "bias": jnp.ones(5)}}
        for n in range(2)
    }
    return layers | {"classifier": {"kernel": jax.random.normal(next(keys), (5, 3)), "bias": jnp.zeros(3)}}


def methods():
    return {
        "gpart": gpart(7, 3, targets=KERNELS),
        "lora": lora(2, targets=KERNELS),
        "vera": vera(4, 3, targets=KERNELS),
        "uni_lora": uni_lora(9, 2, 3, targets=KERNELS),
        "fastfood": fastfood(7, 3, targets=KERNELS),
        "bitfit": bitfit(),
        "head": head(HEAD),
        "full": full(),
        "gpart and head": chain(gpart(7, 3, targets=KERNELS), head(HEAD)),
        "lora and head": chain(lora(2, targets=KERNELS), head(HEAD)),
    }


@pytest.mark.parametrize("name", methods())
def test_starts_at_the_base_model(params, name):
    method = methods()[name]
    adapted = jax.jit(method.apply)(params, method.init(params, jax.random.key(1)))
    if name == "uni_lora":  # both factors start from theta: entries of A and B are within 0.02 / sqrt(4)
        off = max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(adapted), jax.tree.leaves(params)))
        assert 0 < off <= 2 * (0.02 / np.sqrt(44 // 9)) ** 2
        return
    jax.tree.map(np.testing.assert_array_equal, adapted, params)


@pytest.mark.parametrize("name", methods())
def test_gradient_against_finite_differences(params, name):
    method = methods()[name]
    trainable = method.init(params, jax.random.key(1))
    noise = iter(jax.random.split(jax.random.key(2), 99))
    trainable = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(noise), x.shape), trainable)

    @jax.jit
    def loss(trainable):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(method.apply(params, trainable)))

    direction = jax.tree.map(lambda x: jax.random.normal(next(noise), x.shape), trainable)
    slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.jit(jax.grad(loss))(trainable), direction)))
    step = 1e-2
    ahead, behind = (loss(jax.tree.map(lambda x, u: x + sign * step * u, trainable, direction)) for sign in (1, -1))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "name, count",
    {
        "gpart": 7,
        "lora": 2 * 2 * (6 + 5),
        "vera": 2 * (4 + 5),
        "uni_lora": 9,
        "fastfood": 7,
        "bitfit": 2 * 5 + 3,
        "head": 5 * 3 + 3,
        "full": 2 * (6 * 5 + 5) + 5 * 3 + 3,
        "gpart and head": 7 + 18,
        "lora and head": 44 + 18,
    }.items(),
)
def test_trains_as_many_numbers_as_the_formula_says(params, name, count):
    assert trained_numbers(methods()[name].init(params, jax.random.key(0))) == count


def test_gpart_is_gpart_transform(params):
    method = gpart(7, 3, targets=KERNELS, scheme="splitmix64", isometric=False, dropout=0.5)
    theta, key = jnp.arange(7.0), jax.random.key(5)
    options = dict(targets=KERNELS, scheme="splitmix64", isometric=False)
    expected = gpart_transform(params, theta, 3, **options, dropout=0.5, key=key)
    jax.tree.map(np.testing.assert_array_equal, method.apply(params, {"theta": theta}, key), expected)
    expected = gpart_transform(params, theta, 3, **options)
    jax.tree.map(np.testing.assert_array_equal, method.apply(params, {"theta": theta}), expected)


def test_lora_adds_its_scaled_product_to_the_targets_alone(params):
    method = lora(2, alpha=6, targets=KERNELS)
    trainable = jax.tree.map(lambda x: x + 1, method.init(params, jax.random.key(1)))
    adapted, before = dict(named_leaves(method.apply(params, trainable))), dict(named_leaves(params))
    for path, leaf in before.items():
        factors = trainable["lora"].get(path)
        expected = leaf if factors is None else leaf + 6 / 2 * np.asarray(factors["a"]) @ np.asarray(factors["b"])
        np.testing.assert_allclose(adapted[path], expected, rtol=1e-6)
    assert len(trainable["lora"]) == 2


def test_lora_on_stacked_layers_is_lora_on_each(params):
    stacked = {
        "query": {"kernel": jnp.stack([params["layer_0"]["query"]["kernel"], params["layer_1"]["query"]["kernel"]])}
    }
    method = lora(2, targets="kernel")
    trainable = jax.tree.map(lambda x: x + 1, method.init(stacked, jax.random.key(1)))
    adapted = method.apply(stacked, trainable)["query"]["kernel"]
    for n in range(2):
        factors = trainable["lora"]["query/kernel"]
        np.testing.assert_allclose(
            adapted[n], stacked["query"]["kernel"][n] + factors["a"][n] @ factors["b"][n], rtol=1e-6
        )


def test_uni_lora_is_a_partition_of_the_factors(params):
    """A and B from the definition, the one of each matrix after the other, A before B."""
    method = uni_lora(9, 2, 3, alpha=6, targets=KERNELS)
    theta = np.random.default_rng(0).standard_normal(9).astype(np.float32)
    shapes = [(6, 2), (2, 5)] * 2
    groups = group_ids("balanced-v1", 9, 3, np.arange(44))
    entries = (theta / np.sqrt(np.bincount(groups)))[groups]
    a0, b0, a1, b1 = (part.reshape(shape) for part, shape in zip(np.split(entries, [12, 22, 34]), shapes))
    adapted = method.apply(params, {"theta": jnp.asarray(theta)})
    for layer, a, b in (("layer_0", a0, b0), ("layer_1", a1, b1)):
        expected = params[layer]["query"]["kernel"] + 3 * a @ b
        np.testing.assert_allclose(adapted[layer]["query"]["kernel"], expected, rtol=1e-5, atol=1e-6)


def test_vera_shares_two_random_matrices(params):
    method = vera(4, 3, targets=[KERNELS, "classifier/kernel"])
    trainable = jax.tree.map(lambda x: x + 1, method.init(params, jax.random.key(1)))
    a, b = method.tables(params)["a"], method.tables(params)["b"]
    assert a.shape == (6, 4) and b.shape == (4, 5)
    adapted = method.apply(params, trainable)
    for path, leaf in named_leaves(params):
        if path in trainable["vera"]:
            d, own = (np.asarray(trainable["vera"][path][name]) for name in "db")
            leaf = leaf + (a[: len(leaf)] * d) @ (b[:, : leaf.shape[1]] * own)
        np.testing.assert_allclose(dict(named_leaves(adapted))[path], leaf, rtol=1e-5, atol=1e-6)
    wide = vera(64, 8, targets="w").tables({"w": np.zeros((500, 300), np.float32)})
    for table, fan in ((wide["a"], 500), (wide["b"], 64)):  # Kaiming-uniform
        bound = np.sqrt(6 / fan)
        assert 0.999 * bound < np.abs(table).max() <= bound
        assert abs(table.std() / (bound / np.sqrt(3)) - 1) < 0.01 and abs(table.mean()) < 0.02 * bound
    np.testing.assert_allclose(wide["a"][0, :2], [-0.05112537, 0.00656345], rtol=1e-5)  # worked out in Python integers


def test_fastfood_is_an_isometry_on_the_average():
    """|P theta|^2 over 64 seeds: its mean is |theta|^2; P has rank d, and rows of two blocks are unrelated."""
    params, d = {"a": jnp.zeros((40, 30)), "b": jnp.zeros((37, 11))}, 20
    n, theta = 40 * 30 + 37 * 11, np.random.default_rng(0).standard_normal(20)
    method, ratios = fastfood(d), []

    @jax.jit
    def columns(tables):
        return jax.vmap(lambda unit: ravel_pytree(method.apply(params, {"theta": unit}, None, tables))[0])(jnp.eye(d))

    for seed in range(64):
        p = np.asarray(columns(fastfood(d, seed).tables(params))).T
        assert p.shape == (n, d) and np.linalg.matrix_rank(p) == d
        ratios.append(np.sum((p @ theta) ** 2) / np.sum(theta**2))
    # A block's |.|^2 has variance at most 2 (sum x^4 / (sum x^2)^2) of its squared mean, about 6 / 32; there are 51.
    spread = np.sqrt(6 / 32 / 51)
    assert abs(np.mean(ratios) - 1) < 4 * spread / np.sqrt(64)
    assert np.std(ratios) < 2 * spread
    rows = p * np.sqrt(n)  # entries are N(0, 1)
    assert abs(rows.std() - 1) < 0.05 and abs(np.mean(rows**4) - 3) < 0.5
    between = rows[:32] @ rows[32:64].T / np.sqrt(d)
    assert abs(between.std() - 1) < 0.2


@pytest.mark.parametrize("length", [1, 2, 8, 64, 128, 4096])
def test_hadamard(length):
    rows = np.random.default_rng(0).standard_normal((3, length)).astype(np.float32)
    np.testing.assert_allclose(_hadamard(jnp.asarray(rows)), rows @ scipy.linalg.hadamard(length), atol=2e-4)


@pytest.mark.parametrize("bits", range(11))
def test_permutations_meet_every_position_once(bits):
    words = np.random.default_rng(bits).integers(0, 2**32, (2, 50, 1), np.uint32)
    orders = np.asarray(_permute(jnp.arange(2**bits, dtype=jnp.uint32), tuple(words), bits))
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(2**bits), (50, 1)))
    if bits > 5:  # and are not all alike: two agree in one position on the average
        agree = np.mean([np.sum(orders[i] == orders[j]) for i in range(50) for j in range(i)])
        assert 0.5 < agree < 2


STACKED = {
    "gpart": gpart(300, 3, stacked="^layers"),
    "gpart, elements": gpart(40, 3, stacked="^layers"),
    "signed_magnitude": gpart(40, targets="layers", scheme="signed_magnitude", stacked="^layers"),
    "lora": lora(2),
    "uni_lora": uni_lora(90, 2, 3, stacked="^layers"),
    "vera": vera(4, 3),
    "fastfood": fastfood(300, 3, stacked="^layers"),
    "full": full(),
}


@pytest.mark.parametrize("name", STACKED)
def test_layers_one_by_one_are_the_whole_and_tables_may_be_arguments(name):
    method, shape = STACKED[name], (3, 20, 24)
    keys = iter(jax.random.split(jax.random.key(0), 9))
    params = {"layers": {part: jax.random.normal(next(keys), shape) for part in ("q", "v")}}
    trainable = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), method.init(params, jax.random.key(1))
    )
    whole = method.apply(params, trainable)
    tables = method.tables(params)
    again = jax.jit(method.apply)(params, trainable, None, tables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), again, whole)

    @jax.jit
    def one_by_one(params, trainable):
        adapt = method.bind(params, trainable, tables=tables)
        body = lambda _, slices: (None, adapt({"layers": slices[1]}, layer=slices[0])["layers"])  # noqa: E731
        return jax.lax.scan(body, None, (jnp.arange(3), params["layers"]))[1]

    found = one_by_one(params, trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, whole["layers"])


@pytest.mark.parametrize(
    "make",
    [lambda seed: gpart(40, seed, targets=KERNELS), lambda seed: gpart(40, seed, targets=KERNELS, scheme="splitmix64"),
     lambda seed: uni_lora(9, 2, seed, targets=KERNELS), lambda seed: vera(4, seed, targets=KERNELS),
     lambda seed: fastfood(7, seed, targets=KERNELS)],
)  # fmt: skip
def test_the_seed_is_in_the_tables(params, make):
    one, other = make(1), make(2)
    trainable = jax.tree.map(lambda x: x + 1, one.init(params, jax.random.key(0)))
    expected = other.apply(params, trainable)
    found = one.apply(params, trainable, None, other.tables(params))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    kernels = [tree["layer_0"]["query"]["kernel"] for tree in (one.apply(params, trainable), expected)]
    assert not np.array_equal(*kernels)


def test_theta_may_start_at_random(params):
    theta = gpart(60, 3, targets=KERNELS, init_bound=0.5).init(params, jax.random.key(0))["theta"]
    assert 0.4 < np.abs(theta).max() <= 0.5 and np.abs(theta.mean()) < 0.2


def test_bfloat16_params_stay_bfloat16(params):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for method in methods().values():
        adapted = method.apply(params, method.init(params, jax.random.key(0)))
        assert {leaf.dtype for leaf in jax.tree.leaves(adapted)} == {jnp.dtype(jnp.bfloat16)}


def test_a_spec_names_a_method_and_the_head_beside_it(params):
    method = from_spec({"name": "gpart", "d": 7, "seed": 3, "targets": KERNELS}, HEAD)
    trainable = method.init(params, jax.random.key(0))
    assert set(trainable) == {"theta", "head"}
    assert set(trainable["head"]) == {"classifier/kernel", "classifier/bias"}
    assert set(from_spec({"name": "head"}, HEAD).init(params, jax.random.key(0))) == {"head"}
    biases = from_spec({"name": "bitfit"}, HEAD).init(params, jax.random.key(0))
    assert set(biases["bias"]) == {"layer_0/query/bias", "layer_1/query/bias"}  # the head's are the head's
    assert set(biases["head"]) == set(trainable["head"])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: lora(0), "rank must be at least 1, not 0"),
        (lambda p: vera(0), "VeRA's rank must be at least 1"),
        (lambda p: uni_lora(5, 0), "Uni-LoRA's rank must be at least 1"),
        (lambda p: uni_lora(45, 2, targets=KERNELS).init(p, jax.random.key(0)), "d = 45 must be between 1 and N = 44"),
        (lambda p: fastfood(61, targets=KERNELS).init(p, jax.random.key(0)), "d = 61 must be between 1 and N = 60"),
        (lambda p: gpart(7, init_bound=-1.0), "init_bound = -1.0 must not be negative"),
        (lambda p: lora(2).init(p, jax.random.key(0)), "LoRA adapts matrices, but 'classifier/bias' has shape"),
        (lambda p: gpart(0, targets=KERNELS).init(p, jax.random.key(0)), "d = 0 must be between 1 and N = 60"),
        (lambda p: gpart(61, targets=KERNELS).init(p, jax.random.key(0)), "d = 61 must be between 1 and N = 60"),
        (lambda p: chain(head(HEAD), head("bias")).init(p, jax.random.key(0)), r"both train \['head'\]"),
        (lambda p: from_spec({"name": "gpart"}), "missing 1 required positional argument: 'd'"),
        (lambda p: from_spec({"name": "dora"}), "Unknown method 'dora'. Choose one of bitfit, fastfood, full, gpart, head"),
    ],
)
def test_bad_options_are_named(params, make, message):
    with pytest.raises(ValueError, match=message):
        make(params)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("method", [
    gpart(8, 1), gpart(8, 1, scheme="splitmix64"), gpart(8, 1, scheme="signed_magnitude"), gpart(8, 1, apply="split"), lora(2),
    lora(2, apply="factors"), vera(2), uni_lora(8, 2), fastfood(8), bitfit("kernel"), full(),
], ids=lambda method: f"{method.name}-{method.options.get('scheme', '')}{method.options.get('apply', '')}")  # fmt: skip
def test_float8_is_adapted_in_float32_and_rounded_back(method, dtype):
    narrow = {"some/kernel": jnp.linspace(-1, 1, 64).reshape(8, 8).astype(dtype)}
    wide = {"some/kernel": narrow["some/kernel"].astype(jnp.float32)}
    trainable = jax.tree.map(lambda x: x + jnp.linspace(0, 1, x.size).reshape(x.shape), method.init(wide, jax.random.key(0)))
    assert jax.tree.map(jnp.dtype, method.init(narrow, jax.random.key(0))) == jax.tree.map(jnp.dtype, trainable)
    expected = method.apply(wide, trainable)["some/kernel"].astype(dtype)
    found = Adapter.of(method, trainable, narrow).merge(narrow).params["some/kernel"]
    for adapted in (method.apply(narrow, trainable)["some/kernel"], found):
        assert adapted.dtype == dtype
        np.testing.assert_array_equal(adapted.astype(jnp.float32), expected.astype(jnp.float32))
    assert jnp.isfinite(jax.tree.leaves(jax.grad(lambda t: method.apply(narrow, t)["some/kernel"].astype("f").sum())(trainable))[0]).all()
