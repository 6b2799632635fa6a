"""The loss over blocks of tokens: that of all logits at once, and what a program of it holds."""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpart_jax import sharding
from gpart_jax.models import cross_entropy
from gpart_jax.models.cross_entropy import token_losses
from launch.hlo import collectives


def at_once(hidden, head, labels, weights, cap=None):
    logits = (hidden @ head).astype(jnp.float32)
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    return (optax.softmax_cross_entropy_with_integer_labels(logits, labels) * weights).sum(1)


def arrays(rows, length, size, vocabulary, dtype=jnp.float32):
    random = np.random.default_rng([rows, length, vocabulary])
    hidden, head = (jnp.asarray(random.standard_normal(shape), dtype) for shape in ((rows, length, size), (size, vocabulary)))
    labels = jnp.asarray(random.integers(0, vocabulary, (rows, length)))
    weights = jnp.asarray(random.random((rows, length)) * random.integers(0, 2, (rows, length)), jnp.float32)
    return hidden, head, labels, weights, jnp.asarray(random.random(rows), jnp.float32)


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 33), st.integers(2, 50), st.sampled_from([1, 60, 10**6]), st.sampled_from([None, 2.0]))
def test_value_and_gradients_are_those_of_all_logits(rows, length, vocabulary, numbers, cap):
    *inputs, cotangent = arrays(rows, length, 8, vocabulary)
    with mock.patch.object(cross_entropy, "NUMBERS", numbers):
        for trained in ((0,), (1,), (0, 1)):  # the head is frozen, or not

            def scalar(losses, *trained_values, trained=trained):
                values = list(inputs)
                for place, value in zip(trained, trained_values):
                    values[place] = value
                return (losses(*values, cap) * cotangent).sum()

            of = [inputs[place] for place in trained]
            found, expected = (
                jax.value_and_grad(lambda *x, losses=losses: scalar(losses, *x), tuple(range(len(of))))(*of)
                for losses in (token_losses, at_once)
            )
            for mine, other in zip(*map(jax.tree.leaves, (found, expected))):
                np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-6 * max(1e-6, np.abs(other).max()) * 4)


def test_in_bfloat16_the_logits_stay_float32():
    *inputs, _ = arrays(2, 40, 64, 500, jnp.bfloat16)
    exact = at_once(*(x.astype(jnp.float32) for x in inputs[:2]), *inputs[2:])
    np.testing.assert_allclose(token_losses(*inputs), exact, rtol=1e-5)
    assert np.abs(at_once(*inputs) / exact - 1).max() > 1e-4  # rounded logits


def test_tensor_divides_the_vocabulary_and_nothing_of_it_is_gathered():
    mesh = sharding.make_mesh({"tensor": 8})
    *inputs, _ = arrays(2, 32, 16, 512)
    specs = P(), P(None, "tensor"), P(), P()
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(inputs, specs)]

    def mean(*arrays):
        return token_losses(*arrays).mean()

    with mock.patch.object(cross_entropy, "NUMBERS", 2 * 8 * 512):
        step = jax.jit(jax.value_and_grad(mean)).lower(*placed).compile()
    value, gradient = step(*placed)
    expected = jax.value_and_grad(lambda *x: at_once(*x).mean())(*inputs)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, expected[1], atol=1e-6)
    text = step.as_text()
    assert {one.kind for one in collectives(text)} == {"all-reduce"}
    # Of a block of 2 x 8 tokens: two or three numbers each, and the gradient of the hidden states.
    assert max(one.elements for one in collectives(text)) <= 2 * 8 * 16 + 2 * 8 * 3
    assert not re.search(r"f32\[2,\d+,512\]", text) and not re.search(r"f32\[2,32,\d\d+\]\{", text.replace("f32[2,32,16]", ""))


def test_no_array_holds_all_logits():
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(4, 256, 16, 1000)[:4]]
    with mock.patch.object(cross_entropy, "NUMBERS", 64 * 1000):
        text = jax.jit(jax.grad(lambda *x: token_losses(*x).mean())).lower(*shapes).compile().as_text()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) <= 64 * 1000


@pytest.mark.parametrize("numbers", [1, 10**9])
def test_weights_of_zero_give_no_loss_and_no_gradient(numbers):
    hidden, head, labels, weights, _ = arrays(2, 7, 4, 11)
    with mock.patch.object(cross_entropy, "NUMBERS", numbers):
        value, gradient = jax.value_and_grad(lambda x: token_losses(x, head, labels, weights.at[:, 2].set(0)).sum())(hidden)
    assert np.isfinite(value) and not gradient[:, 2].any()
