import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from experiments.config import settle_length, settle_rate
from experiments.optimizer import make_optimizer, options_of
from gpart_jax.methods import from_spec


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


PARAMS = {"layer_0": {"attention": {"query": {"kernel": jnp.full((30, 40), 0.1)}}}}


def options(method, given, **changes):
    """`options_of` the quickstart, of which the command line sets `given`."""
    config = quickstart.get_config(method)
    config.method.update(changes)
    for key, value in given.items():
        config.optimizer[key] = value
    settle_rate(config, [f"optimizer.{key}" for key in given])
    return options_of(config, from_spec(config.method.to_dict()), PARAMS)


def test_a_step_is_a_rate_for_each_d():
    for d in (16, 256):
        assert options("gpart", {"step": 2.56}, d=d)["lr"] == pytest.approx(2.56 / d**0.5)
    assert options("fastfood", {"step": 2.0}, d=100)["lr"] == pytest.approx(0.2)
    assert options("gpart", {"lr": 0.3})["lr"] == 0.3
    assert options("lora", {})["lr"] == quickstart.LR["lora"]
    for given, other in (("step", "lr"), ("lr", "step")):  # what is set by hand takes the place of the recipe's
        config = quickstart.get_config()
        config.optimizer.update({other: 1.0, given: 2.0})
        settle_rate(config, [f"optimizer.{given}"])
        assert config.optimizer[given] == 2.0 and config.optimizer[other] is None


@pytest.mark.parametrize("given, other", [("steps", "epochs"), ("epochs", "steps")])
def test_a_length_set_by_hand_takes_the_place_of_the_recipes(given, other):
    config = quickstart.get_config()
    config.train.update({other: 3, given: 5})
    settle_length(config, ["train.batch_size"])
    assert config.train[other] == 3
    settle_length(config, [f"train.{given}"])
    assert config.train[given] == 5 and config.train[other] is None


@pytest.mark.parametrize(
    "method, given, changes, message",
    [
        ("gpart", {"lr": 1e-3, "step": 1.0}, {}, "Set one of config.optimizer.lr, .* Both are set"),
        ("gpart", {"lr": None, "step": None}, {}, "Neither is set"),
        ("lora", {"step": 1.0}, {}, "lora, whose map stretches lengths, has no one rate for it"),
        ("gpart", {"step": 1.0}, {"isometric": False}, "gpart, with isometric=False, has no one rate"),
        ("gpart", {"name": "prodigy", "lr": 1.0}, {}, "prodigy finds its own rate: leave out config.optimizer.lr"),
        ("gpart", {"name": "adam"}, {}, None),
    ],
)  # fmt: skip
def test_rates_that_say_too_much_or_too_little(method, given, changes, message):
    if message:
        with pytest.raises(ValueError, match=message):
            options(method, given, **changes)
    else:
        with pytest.raises(ValueError, match="Unknown optimizer 'adam'. Choose one of adamw, prodigy, dog"):
            make_optimizer(10, **options(method, given))


def test_a_rate_free_optimizer_starts_from_a_share_of_the_base():
    norm = 0.1 * 1200**0.5
    assert options("gpart", {"name": "prodigy"}, d=25)["start"] == pytest.approx(0.01 * norm / 5, rel=1e-5)
    assert options("gpart", {"name": "dog", "start": 0.1}, d=25)["start"] == pytest.approx(0.1 * norm, rel=1e-5)
    assert "start" not in options("lora", {"name": "prodigy"})


@pytest.mark.parametrize("name", ["prodigy", "dog"])
@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_a_rate_free_optimizer_finds_a_rate(name, warmup):
    """From theta = 0 to a least-squares solution at a distance of 8; the head is trained by AdamW beside it."""
    target = jnp.full(64, 1.0)
    optimizer = make_optimizer(400, lr=1.0, head_lr=1e-2, name=name, start=0.01, warmup=warmup)
    trainable = {"theta": jnp.zeros(64), "head": {"kernel": jnp.ones((2, 2))}}
    loss = lambda t: jnp.sum((t["theta"] - target) ** 2) + jnp.sum(t["head"]["kernel"] ** 2)  # noqa: E731

    @jax.jit
    def step(trainable, state):
        updates, state = optimizer.update(jax.grad(loss)(trainable), state, trainable)
        return jax.tree.map(jnp.add, trainable, updates), state

    state = optimizer.init(trainable)
    for _ in range(400):
        trainable, state = step(trainable, state)
    assert jnp.linalg.norm(trainable["theta"] - target) < 0.8 and jnp.abs(trainable["head"]["kernel"]).max() < 0.2
