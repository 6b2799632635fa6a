"""Kernels that are applied: an array, W0 and a delta apart, low rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import Task
from experiments.step import make_loss
from experiments.text import INPUTS
from gpart_jax import chain, gpart, head, linear, lora, sharding, uni_lora, vera
from gpart_jax.models.decoder import Decoder, DecoderConfig
from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig
from gpart_jax.targets import named_leaves

DECODER = DecoderConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=64,
    max_positions=16, norm_eps=1e-6, rope_theta=1e4, family="qwen2", tied=False,
)  # fmt: skip
ALL = r"(query|key|value|out|gate|up|down|lm_head)/kernel$"


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def test_each_form_is_the_product_with_its_sum():
    x, kernel, delta, a, b = random(2, 3, 8), random(8, 6), random(8, 6), random(8, 2), random(2, 6)
    for form in (jnp.array(kernel), linear.Split(kernel, delta), linear.LowRank(kernel, a, b)):
        whole = linear.merged({"kernel": form})["kernel"]
        assert isinstance(whole, jax.Array | np.ndarray)
        np.testing.assert_allclose(linear.apply(form, x, jnp.float32), x @ np.asarray(whole), rtol=1e-5, atol=1e-5)


def test_apart_nothing_of_a_small_delta_is_lost_in_bfloat16():
    kernel = jnp.asarray(random(64, 64), jnp.bfloat16)
    delta = 1e-4 * random(64, 64)
    assert jnp.abs(linear.merged(linear.Split(kernel, delta)) - kernel).astype(bool).mean() < 0.05  # rounded away
    x = np.eye(64, dtype=np.float32)
    moved = linear.apply(linear.Split(jnp.zeros_like(kernel), delta), x, jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(moved, delta, rtol=2**-8)


def test_dropout_is_of_what_goes_into_the_factors_and_goes_by_the_row():
    x, kernel, a, b = random(5, 4, 8), random(8, 6), random(8, 2), random(2, 6)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 5))
    form = linear.LowRank(kernel, a, b, keys, 0.5)
    whole = linear.apply(form, x, jnp.float32)
    part = linear.apply(form._replace(keys=keys[3:]), x[3:], jnp.float32)
    np.testing.assert_allclose(part, whole[3:], rtol=1e-6)
    longer = np.concatenate([x, x], axis=1)  # padding changes no mask
    np.testing.assert_allclose(linear.apply(form, longer, jnp.float32)[:, :4], whole, rtol=1e-6)
    through = np.linalg.lstsq(b.T, (whole - x @ kernel).reshape(-1, 6).T, rcond=None)[0]  # dropout(x) A
    assert np.abs(through.T.reshape(5, 4, 2) - x @ a).max() > 0.1
    mean = np.mean([linear.apply(form._replace(keys=keys + n), x, jnp.float32) for n in np.arange(400, dtype=np.uint32)], axis=0)
    np.testing.assert_allclose(mean, x @ kernel + x @ a @ b, atol=1.2)


METHODS = {
    "gpart": lambda apply: gpart(50, 3, targets=ALL, stacked="^layers", apply=apply),
    "lora": lambda apply: lora(2, targets=ALL, apply=apply),
    "vera": lambda apply: vera(2, 3, targets=ALL, apply=apply, d_initial=0.5),
    "uni_lora": lambda apply: uni_lora(40, 2, 3, targets=ALL, apply=apply, init_bound=0.5, stacked="^layers"),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_decoder_has_the_same_loss_and_gradient_either_way(name, sizes):
    model, ids = Decoder(DECODER), np.random.default_rng(0).integers(1, 64, (8, 12)).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids, ids)["params"]
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "weights": np.ones(ids.shape, np.float32)}
    loss = make_loss(model, Task([], [], [], None, ("loss",), INPUTS, None, language=True))
    mesh = sharding.make_mesh(sizes, jax.devices()[: 8 if sizes else 1])
    shardings = sharding.param_shardings(params, mesh, sharding.DECODER)
    found = []
    for apply in ("sum", "split" if name == "gpart" else "factors"):
        method = METHODS[name](apply)
        noise = np.random.default_rng(1)
        trainable = jax.tree.map(
            lambda x: x + 0.1 * noise.standard_normal(x.shape, np.float32), method.init(params, jax.random.key(0))
        )
        compute = jax.jit(sharding.value_and_grad(loss, method, shardings))
        found.append(compute(trainable, sharding.place(params, shardings), sharding.global_batch(batch, mesh)))
        plain = method.apply(params, trainable)
        assert all(isinstance(leaf, jax.Array) for _, leaf in named_leaves(plain))
        assert jax.tree.structure(plain) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), *found)


def test_an_encoders_pairs_train_in_bfloat16_where_sums_stand_still():
    """The gradient of both is that of the weights; what an update of theta changes is not."""
    config = EncoderConfig(64, 32, 2, 4, 64, 16, hidden_dropout=0.0, attention_dropout=0.0)
    model, ids = EncoderClassifier(config, 2, jnp.bfloat16), np.random.default_rng(0).integers(1, 64, (8, 12)).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids, np.ones_like(ids))["params"]
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    targets = r"attention/(query|value)/kernel$"
    theta = {"theta": 3e-4 * jnp.ones(16)}
    outputs = {}
    for apply in ("sum", "split"):
        method = gpart(16, 3, targets=targets, isometric=False, apply=apply)
        adapted = method.bind(params, theta)(params)
        outputs[apply] = np.asarray(model.apply({"params": adapted}, ids, np.ones_like(ids)), np.float32)
        assert isinstance(adapted["layer_0"]["attention"]["query"]["kernel"], linear.Split) == (apply == "split")
        assert method.apply(params, theta)["layer_0"]["attention"]["query"]["kernel"].dtype == jnp.bfloat16
    assert not np.array_equal(outputs["sum"], outputs["split"])


def test_options_that_do_not_go_together_are_named():
    with pytest.raises(ValueError, match="apply = 'both' must be one of sum, dither, split"):
        gpart(4, apply="both")
    with pytest.raises(ValueError, match="apply = 'split' must be one of sum, factors"):
        lora(2, apply="split")
    with pytest.raises(ValueError, match="dropout = 0.1 is of what goes into the factors, and needs apply='factors'"):
        lora(2, dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout = 1 must be in \[0, 1\)"):
        vera(2, dropout=1, apply="factors")


def test_only_the_rounding_differs_on_another_mesh_with_dropout_before_the_factors():
    config = EncoderConfig(64, 32, 2, 4, 64, 16, hidden_dropout=0.1, attention_dropout=0.1)
    model, ids = EncoderClassifier(config, 2), np.random.default_rng(0).integers(1, 64, (8, 12)).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids, np.ones_like(ids))["params"]
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "label": ids[:, 0] % 2}
    loss = make_loss(model, Task([], [], [], ("0", "1"), ("accuracy",), INPUTS, None))
    method = chain(lora(2, targets="(query|value)/kernel", dropout=0.3, apply="factors"), head("^classifier/"))
    trainable = jax.tree.map(lambda x: x + 0.1, method.init(params, jax.random.key(1)))
    found = []
    for count in (1, 2, 8):
        mesh = sharding.make_mesh({"data": count}, jax.devices()[:count])
        shardings = sharding.param_shardings(params, mesh, sharding.ENCODER)
        compute = jax.jit(sharding.value_and_grad(loss, method, shardings))
        frozen, whole = sharding.place(params, shardings), sharding.global_batch(batch, mesh)
        found.append(compute(trainable, frozen, whole, jax.random.key(3)))
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found[0], other)
    without = compute(trainable, frozen, whole)
    assert abs(float(without[0]) - float(found[-1][0])) > 1e-4
