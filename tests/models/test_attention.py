"""Attention: XLA's operations against JAX's own, and the TPU's kernel, in interpret mode, against those."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import Task
from experiments.step import make_loss, make_outputs
from gpart_jax import gpart, sharding
from gpart_jax.models import attention
from gpart_jax.models.attention import Pattern, attend, choose, share
from gpart_jax.models.decoder import Decoder, DecoderConfig
from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig
from gpart_jax.models.vit import ViTClassifier, ViTConfig

PADDED = "left and right"
KINDS = {  # pattern, (length, heads, key heads, size of a head), segments
    "causal": (Pattern(True), (130, 4, 2, 32), PADDED),
    "causal, several texts": (Pattern(True), (200, 2, 1, 64), "texts"),
    "window, several texts": (Pattern(True, 37), (150, 2, 2, 16), "texts"),
    "window of one block": (Pattern(True, 128), (256, 3, 1, 128), PADDED),
    "window longer than the text": (Pattern(True, 1000), (64, 2, 1, 32), PADDED),
    "soft cap": (Pattern(True, soft_cap=2.0), (100, 2, 1, 32), PADDED),
    "window and cap": (Pattern(True, 20, 3.0), (90, 4, 2, 80), "texts"),
    "bidirectional": (Pattern(False, packed=False), (197, 3, 3, 64), None),
    "bidirectional, padded": (Pattern(False, packed=False), (60, 2, 2, 32), PADDED),
    "bidirectional, several texts": (Pattern(False), (130, 2, 1, 32), "texts"),
    "bidirectional, window": (Pattern(False, 9), (140, 2, 2, 32), "texts"),
    "a single token": (Pattern(True), (1, 2, 1, 32), None),
}


@pytest.fixture
def interpreted():
    with mock.patch.object(attention, "_INTERPRET", True):
        yield


def case(kind, dtype=jnp.float32):
    pattern, (length, heads, key_heads, size), which = KINDS[kind]
    random = np.random.default_rng(length)
    arrays = [jnp.asarray(random.standard_normal((2, length, n, size)), dtype) for n in (heads, key_heads, key_heads, heads)]
    segments = np.sort(random.integers(1, 4, (2, length)), axis=1) if which == "texts" else np.ones((2, length), int)
    if which:
        segments[0, : length // 5] = segments[1, -(length // 4) :] = 0
    return pattern, arrays, None if which is None else jnp.asarray(segments, jnp.int32)


def run(implementation, pattern, arrays, segments):
    """The result where it means something, and the gradients."""
    *inputs, cotangent = arrays
    real = jnp.ones(inputs[0].shape[:2], bool) if segments is None else segments > 0

    def function(*inputs):
        return jnp.where(real[:, :, None, None], attend(*inputs, segments, pattern, implementation), 0)

    out, pull_back = jax.vjp(jax.jit(function), *inputs)
    return [np.asarray(x, np.float32) for x in (out, *pull_back(cotangent))]


@pytest.mark.parametrize("kind", KINDS)
def test_in_xla_it_is_what_jax_computes(kind):
    pattern, arrays, segments = case(kind)
    if pattern.soft_cap:
        pattern = pattern._replace(soft_cap=None)  # which JAX's own has not
    columns = np.arange(arrays[0].shape[1])
    ahead = columns[:, None] - columns
    mask = (ahead >= 0) | (not pattern.causal)
    if pattern.window:
        mask &= abs(ahead) < pattern.window
    mask = mask[None, None]
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None])
    expected = jax.nn.dot_product_attention(*arrays[:3], mask=jnp.broadcast_to(mask, (2, 1, *mask.shape[2:])))
    real = np.ones(expected.shape[:2], bool) if segments is None else np.asarray(segments) > 0
    found = attend(*arrays[:3], segments, pattern)
    np.testing.assert_allclose(found[real], expected[real], atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tpu_kernel_is_what_xla_computes(kind, interpreted):
    arguments = case(kind)
    for found, expected in zip(run("splash", *arguments), run("xla", *arguments), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["causal, several texts", "window and cap", "bidirectional, padded"])
def test_in_bfloat16_too(kind, interpreted):
    pattern, arrays, segments = case(kind, jnp.bfloat16)
    exact = run("xla", pattern, [x.astype(jnp.float32) for x in arrays], segments)
    for found, expected in zip(run("splash", pattern, arrays, segments), exact, strict=True):
        assert np.abs(found - expected).mean() < 2e-3 * np.abs(expected).max()


def test_a_soft_cap_bends_the_scores():
    pattern, arrays, segments = case("soft cap")
    query, key, value, _ = (np.asarray(x, np.float64) for x in arrays)
    scores = np.einsum("blhd,bsd->bhls", query, key[:, :, 0]) / np.sqrt(query.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[2:], bool)), 2 * np.tanh(scores / 2), -np.inf)
    own = np.asarray(segments)
    scores = np.where(own[:, None, :, None] == own[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhls,bsd->blhd", weights / weights.sum(-1, keepdims=True), value[:, :, 0])
    real = own > 0
    np.testing.assert_allclose(attend(*arrays[:3], segments, pattern)[real], expected[real], atol=2e-6, rtol=0)


def test_a_chosen_kernel_that_cannot_be_had_is_refused():
    cap = Pattern(True, soft_cap=30.0)
    for choice, platform, dtype, size, pattern, dropout, message in (
        ("flash", "tpu", "float32", 64, Pattern(True), 0.0, "'flash' must be one of auto, xla, splash, cudnn"),
        ("splash", "cpu", "float32", 64, Pattern(True), 0.0, "'splash' needs a TPU, but the devices are of platform 'cpu'"),
        ("cudnn", "tpu", "bfloat16", 64, Pattern(True), 0.0, "'cudnn' needs a GPU, but the devices are of platform 'tpu'"),
        ("splash", "tpu", "float32", 64, Pattern(False), 0.1, "has no dropout on attention weights, and this model's rate is 0.1"),
        ("cudnn", "gpu", "float32", 64, Pattern(True), 0.0, "computes in bfloat16 or float16, not in float32"),
        ("cudnn", "gpu", "bfloat16", 256, Pattern(True), 0.0, "takes heads of up to 128 numbers, a multiple of 8, not 256"),
        ("cudnn", "gpu", "bfloat16", 64, cap, 0.0, "has no soft cap"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(choice, platform, dtype, size, pattern, dropout)
        if choice != "flash":
            assert choose("auto", platform, dtype, size, pattern, dropout) in ("xla", "splash" if platform == "tpu" else "xla")
    assert choose("auto", "tpu", "float32", 80, cap) == "splash"
    assert choose("auto", "gpu", "bfloat16", 64, Pattern(True)) == choose("auto", "cuda", "bfloat16", 64, Pattern(True)) == "cudnn"
    assert {choose(choice, "cpu", "float32", 64, Pattern(True)) for choice in ("auto", "xla")} == {"xla"}


def test_the_share_of_blocks_is_that_of_the_kernels_own_list():
    for pattern in (Pattern(True), Pattern(False), Pattern(True, 512), Pattern(True, 513), Pattern(True, 514), Pattern(False, 600)):
        for length in (128, 700, 2048, 4096):
            block, padded = attention._blocks(length)
            mask = np.asarray(attention._seen(pattern, padded)[:, :])
            blocks = mask.reshape(padded // block, block, padded // block, block).any((1, 3))
            assert share(pattern, length) == blocks.mean(), (pattern, length)


DECODER = DecoderConfig(
    vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=48,
    max_positions=128, norm_eps=1e-6, rope_theta=1e4, family="mistral", tied=True, sliding_window=5,
)  # fmt: skip
MODELS = {
    "decoder": Decoder(DECODER),
    "decoder in bfloat16": Decoder(DECODER, jnp.bfloat16),
    "encoder": EncoderClassifier(EncoderConfig(40, 32, 2, 4, 48, 128, attention_dropout=0.0, hidden_dropout=0.0), 2),
    "vit": ViTClassifier(ViTConfig(32, 2, 4, 48, image_size=16, patch_size=4), 2),
}


def batch_of(name):
    random = np.random.default_rng(1)
    if name == "vit":
        return {"pixel_values": random.standard_normal((8, 16, 16, 3), np.float32), "label": np.arange(8) % 2}
    ids, mask = random.integers(1, 40, (8, 24)), np.ones((8, 24), np.int32)
    mask[0, 15:] = mask[1, :7] = 0
    batch = {"input_ids": ids.astype(np.int32), "attention_mask": mask}
    if name == "encoder":
        mask[1] = 1
        return batch | {"label": np.arange(8) % 2}
    return batch | {"loss_mask": mask, "weights": mask.astype(np.float32)}


@pytest.mark.parametrize("name, tensor", [("decoder", 4), ("decoder", 1), ("decoder in bfloat16", 4), ("encoder", 4), ("vit", 1)])
def test_models_have_the_same_loss_and_gradient_with_it_on_a_mesh(name, tensor, interpreted):
    batch, mesh = batch_of(name), sharding.make_mesh({"data": 2, "tensor": tensor}, jax.devices()[: 2 * tensor])
    language = name.startswith("decoder")
    task = Task([], [], [], None if language else ("0", "1"), ("loss",), ("input_ids", "attention_mask", "pixel_values"), None, language=language)
    example = [batch[key] for key in ("pixel_values", "input_ids", "attention_mask") if key in batch]
    params = jax.jit(MODELS[name].init)(jax.random.key(0), *example)["params"]
    method = gpart(100, 3, targets="(query|key|value|out)/kernel", stacked="^layers" if language else None)
    rules = sharding.DECODER_TIED if language else sharding.ENCODER if name == "encoder" else sharding.VIT
    shardings = sharding.param_shardings(params, mesh, rules)
    trainable = jax.tree.map(lambda x: x + 0.05, method.init(params, jax.random.key(1)))
    found = []
    for kernel in ("xla", "splash"):
        model = MODELS[name].clone(attention=kernel)
        with_gradient = jax.jit(sharding.value_and_grad(make_loss(model, task), method, shardings))
        value, gradient = with_gradient(trainable, params, batch)
        found.append((value, gradient["theta"], make_outputs(model, task, method, shardings)(trainable, params, batch)))
    exact = MODELS[name].dtype == jnp.float32
    for mine, expected in zip(*map(jax.tree.leaves, found[::-1])):
        np.testing.assert_allclose(mine, expected, atol=(2e-5 if exact else 2e-3) * max(1, np.abs(expected).max()), rtol=0)


def test_generation_and_dropout_take_xla(interpreted):
    """Nothing of a kernel is left in a program that reads a cache."""
    from gpart_jax.models.decoder import Cache

    model, ids = MODELS["decoder"].clone(attention="splash"), jnp.ones((1, 4), jnp.int32)
    params = model.init(jax.random.key(0), ids, ids)["params"]
    cache = Cache.empty(model.config, 1, 8, jnp.float32)
    program = jax.make_jaxpr(lambda: model.apply({"params": params}, ids, ids, cache=cache))()
    assert "pallas_call" not in str(program)
    assert "pallas_call" in str(jax.make_jaxpr(lambda: model.apply({"params": params}, ids, ids))())
    rate = dataclasses.replace(MODELS["encoder"].config, attention_dropout=0.1)
    assert choose("auto", "tpu", jnp.float32, rate.head_dim, rate.pattern, rate.attention_dropout) == "xla"
