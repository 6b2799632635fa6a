import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tokenizers
from flax import traverse_util
from safetensors.numpy import save_file

from configs import quickstart
from gpart_jax.models import pretrained
from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A random BERT that reads letters, as a Hugging Face directory with a tokenizer."""
    directory = tmp_path_factory.mktemp("tiny_model")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = tokenizers.BertWordPieceTokenizer({token: n for n, token in enumerate(vocabulary)})
    tokenizer.save(str(directory / "tokenizer.json"))

    config = EncoderConfig(len(vocabulary), 32, 1, 2, 64, 64)
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = EncoderClassifier(config, 2).init(jax.random.key(7), tokens, tokens)["params"]
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        name = pretrained._names(path, "bert")[0]
        tensors[name] = np.ascontiguousarray(leaf.T if path.endswith("/kernel") else leaf)
    save_file(tensors, directory / "model.safetensors")
    described = dataclasses.asdict(config) | {"model_type": "bert"}
    for ours, theirs in {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "max_positions": "max_position_embeddings",
        "hidden_dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
    }.items():
        described[theirs] = described.pop(ours)
    (directory / "config.json").write_text(json.dumps(described))
    return directory


@pytest.fixture
def make_config(tiny_model):
    """method -> the quickstart on the tiny model: 2 x 160 quick steps."""

    def make(method: str) -> ml_collections.ConfigDict:
        config = quickstart.get_config(method)
        config.model.source = str(tiny_model)
        if method == "gpart":
            config.method.d = 256
            config.method.dropout = 0.1
        config.train.epochs = 2
        config.train.log_every = 10
        config.train.checkpoint_every = 30
        return config

    return make


@pytest.fixture
def config(make_config):
    return make_config("gpart")
