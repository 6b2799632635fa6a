"""Twenty steps of LoRA, VeRA and Uni-LoRA that PEFT and we take alike: a small BERT, batches, and where training begins."""

import jax
import jax.numpy as jnp
import numpy as np

from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig
from gpart_jax.targets import named_leaves, replace_leaves

TARGETS, SEED, D, STEPS, LR = r"attention/(query|value)/kernel$", 7, 96, 20, 1e-2
SPECS = {
    "lora": dict(name="lora", rank=4, alpha=8, targets=TARGETS, apply="factors"),
    "vera": dict(name="vera", rank=8, seed=SEED, targets=TARGETS, apply="factors"),
    "uni_lora": dict(name="uni_lora", d=D, rank=4, seed=SEED, targets=TARGETS, apply="factors"),
}


def case():
    """(model, params, batches)"""
    random = np.random.default_rng(0)
    model = EncoderClassifier(EncoderConfig(64, 32, 2, 4, 64, 16, hidden_dropout=0.0, attention_dropout=0.0), 3)
    token = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), token, token)["params"]

    def leaf(path, like):
        drawn = 0.2 * random.standard_normal(like.shape, np.float32)
        return 1 + drawn if path.endswith("scale") else drawn

    params = replace_leaves(shapes, {path: leaf(path, like) for path, like in named_leaves(shapes)})
    batches = []
    for _ in range(STEPS):
        length = random.integers(3, 9, (8, 1))
        mask = (np.arange(8) < length).astype(np.int32)
        ids = random.integers(1, 64, (8, 8)).astype(np.int32) * mask
        batches.append({"input_ids": ids, "attention_mask": mask, "label": random.integers(0, 3, 8)})
    return model, params, batches


def start(name, method, params):
    """The method's trainable with numbers of NumPy's, so that it begins alike whatever JAX draws."""
    random = np.random.default_rng(1)
    trainable = method.init(params, jax.random.key(0))
    if name == "uni_lora":
        return {"theta": random.uniform(-0.2, 0.2, D).astype(np.float32)}
    if name == "lora":
        return {
            "lora": {
                path: {"a": random.uniform(-0.2, 0.2, pair["a"].shape).astype(np.float32), "b": pair["b"]}
                for path, pair in trainable["lora"].items()
            }
        }
    return trainable
