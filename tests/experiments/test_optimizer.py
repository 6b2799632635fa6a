import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.optimizer import make_optimizer


def updates(trainable, gradient, steps, **options):
    optimizer = make_optimizer(100, **{"lr": 1e-2, "head_lr": 1e-3} | options)
    state, update_of = optimizer.init(trainable), jax.jit(optimizer.update)
    taken = []
    for _ in range(steps):
        update, state = update_of(jax.tree.map(lambda x: gradient * jnp.ones_like(x), trainable), state, trainable)
        taken.append(update)
    return taken


TRAINABLE = {"theta": jnp.full(3, 2.0), "head": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full(2, 2.0)}}


def test_theta_and_head_have_their_own_rates():
    (update,) = updates(TRAINABLE, 1.0, 1, schedule="constant", warmup=0.0)
    np.testing.assert_allclose(update["theta"], -1e-2, rtol=1e-5)  # Adam's first step is the learning rate
    np.testing.assert_allclose(update["head"]["kernel"], -1e-3, rtol=1e-5)


def test_weight_decay_reaches_theta_and_matrices_not_biases():
    (update,) = updates(TRAINABLE, 0.0, 1, schedule="constant", warmup=0.0, weight_decay=0.1)
    np.testing.assert_allclose(update["theta"], -1e-2 * 0.1 * 2, rtol=1e-6)
    np.testing.assert_allclose(update["head"]["kernel"], -1e-3 * 0.1 * 2, rtol=1e-6)
    np.testing.assert_array_equal(update["head"]["bias"], 0)


def test_weight_decay_spares_the_norms_and_biases_of_stacked_layers():
    """Of layers that are stacked they are matrices too."""
    ones = {
        "params": {
            "layers/attention_norm/scale": jnp.ones((3, 4)), "layers/attention/query/bias": jnp.ones((3, 4)),
            "layers/attention/query/kernel": jnp.ones((3, 4, 4)), "embed/embedding": jnp.ones((5, 4)), "norm/scale": jnp.ones(4),
        },
        "vera": {"layers/attention/query/kernel": {"d": jnp.ones((3, 2)), "b": jnp.ones((3, 4))}},
        "lora": {"layers/attention/query/kernel": {"a": jnp.ones((3, 4, 2)), "b": jnp.ones((3, 2, 4))}},
    }  # fmt: skip
    (update,) = updates(ones, 0.0, 1, schedule="constant", warmup=0.0, weight_decay=0.1)
    moved = {jax.tree_util.keystr(path, simple=True, separator=" ") for path, x in jax.tree.leaves_with_path(update) if x.any()}
    kernel = "layers/attention/query/kernel"
    assert moved == {f"lora {kernel} a", f"lora {kernel} b", f"params {kernel}", "params embed/embedding"}


@pytest.mark.parametrize("schedule, middle, end", [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)])
def test_schedules_warm_up_and_decay(schedule, middle, end):
    rates = [-float(u["theta"][0]) / 1e-2 for u in updates(TRAINABLE, 1.0, 101, schedule=schedule, warmup=0.2)]
    np.testing.assert_allclose(rates[:21], np.arange(21) / 20, atol=1e-5)
    np.testing.assert_allclose([rates[60], rates[100]], [middle, end], atol=1e-5)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="Unknown schedule 'steep'. Choose one of linear, cosine, constant"):
        make_optimizer(10, lr=1, head_lr=1, schedule="steep")
    with pytest.raises(ValueError, match="warmup = 6 is a fraction"):
        make_optimizer(10, lr=1, head_lr=1, warmup=6)


def test_a_long_gradient_is_cut_to_the_clip():
    numbers = sum(leaf.size for leaf in jax.tree.leaves(TRAINABLE))
    clipped, plain = (make_optimizer(100, lr=1e-2, head_lr=1e-3, schedule="constant", clip=c) for c in (1.0, None))
    states = clipped.init(TRAINABLE), plain.init(TRAINABLE)
    for size in (100.0, 0.01):  # of each entry: the first gradient is too long, the second isn't
        long = jax.tree.map(lambda x: jnp.full_like(x, size), TRAINABLE)
        short = jax.tree.map(lambda x: jnp.full_like(x, min(size, numbers**-0.5)), TRAINABLE)
        one, first = clipped.update(long, states[0], TRAINABLE)
        other, second = plain.update(short, states[1], TRAINABLE)
        states = first, second
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, other)
