"""The rule of one step's length for every d: lengths in theta are lengths in weight space."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpart_jax import base_norm, canonical_layout, gpart_transform, learning_rate

PARAMS = {"a": jnp.linspace(-1, 1, 6000).reshape(60, 100), "b": {"kernel": jnp.ones((50, 80), jnp.bfloat16), "bias": jnp.ones(3)}}


@pytest.mark.parametrize("d", [4, 64, 1000])
def test_adams_step_moves_the_weights_by_that_length_whatever_d(d):
    params = {"a": PARAMS["a"]}
    optimizer = optax.adam(learning_rate(2.56, d))
    theta = jnp.zeros(d)
    gradient = jax.random.normal(jax.random.key(0), (d,))
    update, _ = optimizer.update(gradient, optimizer.init(theta), theta)
    moved = gpart_transform(params, theta + update, 3)["a"] - params["a"]
    np.testing.assert_allclose(jnp.linalg.norm(moved), 2.56, rtol=1e-3)


def test_base_norm_is_of_the_adapted_weights():
    everything = sum(np.square(np.asarray(x, np.float32)).sum() for x in jax.tree.leaves(PARAMS)) ** 0.5
    np.testing.assert_allclose(base_norm(PARAMS), everything, rtol=1e-6)
    np.testing.assert_allclose(base_norm(PARAMS, "kernel$"), 4000**0.5, rtol=1e-6)
    np.testing.assert_allclose(base_norm(PARAMS, canonical_layout(PARAMS, "kernel$")), 4000**0.5, rtol=1e-6)
