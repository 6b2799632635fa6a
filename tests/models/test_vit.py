"""The ViT computes what PyTorch computes: tests/data/vit/make_fixtures.py made the numbers."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gpart_jax.models import pretrained
from gpart_jax.models.vit import ViTClassifier, ViTConfig, normalisation, resize_positions

DATA = pathlib.Path(__file__).parents[1] / "data" / "vit"
KEY = jax.random.key(0)
NAMES = ("square", "grey")
HF_CONFIG = {
    "model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip


@functools.cache
def tiny(name, dtype=jnp.float32):
    return pretrained.load_vit(DATA / name, 5, key=KEY, dtype=dtype)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, pixels):
    return model.apply({"params": params}, pixels)


def cases(name):
    for case in json.loads((DATA / name / "expected.json").read_text()):
        yield np.array(case["pixels"], np.uint8), np.array(case["logits"])


@pytest.mark.parametrize("name", NAMES)
def test_logits_match_pytorch_with_and_without_interpolation(name):
    model, params = tiny(name)
    sizes = set()
    for pixels, expected in cases(name):
        sizes.add(pixels.shape[1:3])
        logits = run(model, params, pixels / np.float32(127.5) - 1)
        assert logits.dtype == jnp.float32 and logits.shape == expected.shape
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
        np.testing.assert_allclose(run(model, params, pixels), expected, atol=1e-4, rtol=0)  # normalised in the model
    assert (24, 24) in sizes and len(sizes) > 1


def test_bfloat16_compute_is_close_and_returns_float32():
    model, params = tiny("square", jnp.bfloat16)
    pixels, expected = next(cases("square"))
    logits = run(model, params, pixels)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=0.05 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_what_was_loaded(name, tmp_path):
    model, params = tiny(name)
    pretrained.save(tmp_path, model, params, labels=list("abcde"))
    expected, found = load_file(DATA / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    for tensor, array in expected.items():
        np.testing.assert_array_equal(found[tensor], array)
    theirs, ours = (json.loads((where / "config.json").read_text()) for where in (DATA / name, tmp_path))
    assert {key: ours[key] for key in ours.keys() & theirs.keys() - {"id2label", "label2id"}}.items() <= theirs.items()
    assert ours["id2label"]["4"] == "e"
    again, _ = pretrained.load_vit(tmp_path, 5, key=KEY)
    mean = {name: (0.5,) * model.config.channels for name in ("image_mean", "image_std")}
    assert again.config == dataclasses.replace(model.config, **mean)


def test_normalisation_is_the_checkpoints(tmp_path):
    model, params = tiny("square")
    pretrained.save(tmp_path, model, params)
    described = json.loads((tmp_path / "preprocessor_config.json").read_text())
    described |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    other, _ = pretrained.load_vit(tmp_path, 5, key=KEY)
    pixels, _ = next(cases("square"))
    normalised = (pixels / np.float32(255) - np.float32([0.1, 0.2, 0.3])) / np.float32([0.4, 0.5, 0.6])
    np.testing.assert_allclose(run(other, params, pixels), run(model, params, normalised), atol=1e-5)


def test_a_pooler_is_fresh_where_there_is_none(caplog):
    model, params = pretrained.load_vit(DATA / "square", 5, key=KEY, pooler=True)
    assert params["pooler"]["kernel"].shape == (24, 24) and "The pooler is fresh" in caplog.text
    pixels, expected = next(cases("square"))
    assert not np.allclose(run(model, params, pixels), expected, atol=0.1)


def test_positions_of_another_grid():
    position = jax.random.normal(KEY, (1, 1 + 9, 4))
    assert resize_positions(position, 3, (3, 3)) is position
    wide = resize_positions(jnp.ones((1, 10, 4)), 3, (5, 7))
    assert wide.shape == (1, 36, 4)
    np.testing.assert_allclose(wide, 1, rtol=1e-6)  # weights add up to one
    np.testing.assert_array_equal(resize_positions(position, 3, (5, 7))[:, 0], position[:, 0])


def test_dropout_acts_in_training_only():
    model, params = tiny("square")
    pixels, expected = next(cases("square"))
    config = ViTConfig(**(vars(model.config) | {"hidden_dropout": 0.5}))
    model = ViTClassifier(config, 5)
    first, other = (
        model.apply({"params": params}, pixels, train=True, rngs={"dropout": jax.random.key(n)}) for n in (0, 1)
    )
    assert not np.allclose(first, other, atol=1e-3)
    np.testing.assert_allclose(run(model, params, pixels), expected, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "deit"}, "model_type 'deit'; this ViT supports 'vit'"),
        ({"qkv_bias": False}, "qkv_bias False"),
        ({"hidden_act": "silu"}, "hidden_act 'silu'.*gelu"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
        ({"image_size": 225}, "image_size 225 is not a multiple of patch_size 16"),
        ({"hidden_size": None}, "config.json lacks hidden_size"),
    ],
)
def test_unsupported_configs(change, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig.from_hf(HF_CONFIG | change)


def test_null_is_no_value_and_a_pair_of_equal_sizes_is_a_square():
    absent = {name: None for name in ("layer_norm_eps", "hidden_act", "num_channels", "qkv_bias", "initializer_range")}
    config = ViTConfig.from_hf(HF_CONFIG | absent | {"image_size": [32, 32], "patch_size": [8, 8]})
    assert config == ViTConfig.from_hf(HF_CONFIG | {"image_size": 32, "patch_size": 8})
    with pytest.raises(ValueError, match=r"image_size \[32, 16\]; this ViT supports squares"):
        ViTConfig.from_hf(HF_CONFIG | {"image_size": [32, 16]})


@pytest.mark.parametrize("described", [
    {"do_normalize": False}, {"do_rescale": False}, {"do_normalize": False, "do_rescale": False}, {"rescale_factor": 1 / 127.5},
    {"image_mean": None, "do_rescale": None}, {"image_mean": 0.1, "image_std": 0.2}, {"image_mean": [0.1, 0.2, 0.3]},
])  # fmt: skip
def test_an_image_processors_flags_are_folded_into_mean_and_std(described):
    """By transformers' rule: pixels * rescale_factor, then (x - image_mean) / image_std, each if its flag is on."""
    found = normalisation(described)
    stated = {"do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "image_mean": 0.5, "image_std": 0.5} | {
        name: value for name, value in described.items() if value is not None
    }
    pixels = np.arange(256.0)[:, None]
    expected = pixels * (stated["rescale_factor"] if stated["do_rescale"] else 1)
    if stated["do_normalize"]:
        expected = (expected - np.array(stated["image_mean"])) / np.array(stated["image_std"])
    mean, std = (255 * np.array(found[name]) for name in ("image_mean", "image_std"))
    np.testing.assert_allclose((pixels - mean) / std, expected, atol=1e-9)
    assert ViTConfig.from_hf(HF_CONFIG) == ViTConfig(**vars(ViTConfig.from_hf(HF_CONFIG)) | normalisation({}))


@pytest.mark.parametrize("described", [
    {"do_rescale": "no"}, {"rescale_factor": 0}, {"rescale_factor": "1/255"}, {"image_std": 0}, {"image_mean": [0.5, 0.5]},
    {"image_mean": "0.5"}, {"image_std": [float("nan")]},
])  # fmt: skip
def test_a_damaged_image_processor_is_refused_by_name(described):
    (name,) = described
    with pytest.raises(ValueError, match=name):
        ViTConfig(**vars(ViTConfig.from_hf(HF_CONFIG)) | normalisation(described))


def test_images_of_the_wrong_size():
    model, params = tiny("square")
    with pytest.raises(ValueError, match="Images of 24 x 25 x 3 don't divide into patches of 8 x 8 x 3"):
        model.apply({"params": params}, jnp.zeros((1, 24, 25, 3)))
