import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpart_jax import chain, full, gpart, gpart_transform, head, lora
from gpart_jax.methods import from_spec, trained_numbers
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
        "head": head(HEAD),
        "full": full(),
        "gpart and head": chain(gpart(7, 3, targets=KERNELS), head(HEAD)),
        "lora and head": chain(lora(2, targets=KERNELS), head(HEAD)),
    }


@pytest.mark.parametrize("name", methods())
def test_starts_at_the_base_model(params, name):
    method = methods()[name]
    adapted = method.apply(params, method.init(params, jax.random.key(1)))
    jax.tree.map(np.testing.assert_array_equal, adapted, params)


@pytest.mark.parametrize("name", methods())
def test_gradient_against_finite_differences(params, name):
    method = methods()[name]
    trainable = method.init(params, jax.random.key(1))
    noise = iter(jax.random.split(jax.random.key(2), 99))
    trainable = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(noise), x.shape), trainable)

    def loss(trainable):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(method.apply(params, trainable)))

    direction = jax.tree.map(lambda x: jax.random.normal(next(noise), x.shape), trainable)
    slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(loss)(trainable), direction)))
    step = 1e-2
    ahead, behind = (loss(jax.tree.map(lambda x, u: x + sign * step * u, trainable, direction)) for sign in (1, -1))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "name, count",
    {
        "gpart": 7,
        "lora": 2 * 2 * (6 + 5),
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


def test_bfloat16_params_stay_bfloat16(params):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for method in (gpart(7, targets=KERNELS), lora(2, targets=KERNELS)):
        adapted = method.apply(params, method.init(params, jax.random.key(0)))
        assert {leaf.dtype for leaf in jax.tree.leaves(adapted)} == {jnp.dtype(jnp.bfloat16)}


def test_a_spec_names_a_method_and_the_head_beside_it(params):
    method = from_spec({"name": "gpart", "d": 7, "seed": 3, "targets": KERNELS}, HEAD)
    trainable = method.init(params, jax.random.key(0))
    assert set(trainable) == {"theta", "head"}
    assert set(trainable["head"]) == {"classifier/kernel", "classifier/bias"}
    assert set(from_spec({"name": "head"}, HEAD).init(params, jax.random.key(0))) == {"head"}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: lora(0), "rank must be at least 1, not 0"),
        (lambda p: lora(2).init(p, jax.random.key(0)), "LoRA adapts matrices, but 'classifier/bias' has shape"),
        (lambda p: gpart(0, targets=KERNELS).init(p, jax.random.key(0)), "d = 0 must be between 1 and N = 60"),
        (lambda p: gpart(61, targets=KERNELS).init(p, jax.random.key(0)), "d = 61 must be between 1 and N = 60"),
        (lambda p: chain(head(HEAD), head("bias")).init(p, jax.random.key(0)), r"both train \['head'\]"),
        (lambda p: from_spec({"name": "gpart"}), "missing 1 required positional argument: 'd'"),
        (lambda p: from_spec({"name": "dora"}), "Unknown method 'dora'. Choose one of gpart, lora, head, full"),
    ],
)
def test_bad_options_are_named(params, make, message):
    with pytest.raises(ValueError, match=message):
        make(params)
