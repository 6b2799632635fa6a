"""What is kept for the way back changes memory, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from configs import glue
from experiments.build import fitted
from experiments.data import Task
from experiments.step import make_loss
from gpart_jax import chain, gpart, head, sharding
from gpart_jax.models import remat
from gpart_jax.models.decoder import Decoder, DecoderConfig
from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig
from gpart_jax.models.vit import ViTClassifier, ViTConfig

DECODER = DecoderConfig(
    vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
    max_positions=32, norm_eps=1e-6, rope_theta=1e4, family="llama", tied=False,
)  # fmt: skip
MODELS = {
    "decoder": Decoder(DECODER),
    "encoder": EncoderClassifier(EncoderConfig(40, 32, 2, 4, 48, 32), 2),  # with dropout of 0.1
    "vit": ViTClassifier(ViTConfig(32, 2, 4, 48, image_size=16, patch_size=4, hidden_dropout=0.1, attention_dropout=0.1), 2),
}


def case(name):
    """(task, params, method, trainable, batch)"""
    random = np.random.default_rng(0)
    ids = jnp.asarray(random.integers(1, 40, (4, 12)), jnp.int32)
    batch = {"input_ids": ids, "attention_mask": jnp.ones_like(ids).at[1, 7:].set(0), "label": jnp.arange(4) % 2}
    batch["weights"] = batch["attention_mask"].astype(jnp.float32)
    if name == "vit":
        batch = {"pixel_values": jnp.asarray(random.standard_normal((4, 16, 16, 3)), jnp.float32), "label": jnp.arange(4) % 2}
    example = [batch[key] for key in ("pixel_values", "input_ids", "attention_mask") if key in batch]
    params = jax.jit(MODELS[name].init)(jax.random.key(0), *example)["params"]
    method = gpart(60, 3, targets="(query|out)/kernel", stacked="^layers" if name == "decoder" else None, dropout=0.1)
    if name != "decoder":
        method = chain(method, head("^classifier/"))
    trainable = jax.tree.map(lambda x: x + 0.05, method.init(params, jax.random.key(1)))
    labels, metrics = (None, ("loss",)) if name == "decoder" else (("0", "1"), ("accuracy",))
    task = Task([], [], [], labels, metrics, ("input_ids", "attention_mask", "pixel_values"), None, language=name == "decoder")
    return task, params, method, trainable, batch


MESHED = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("name, sizes", [("decoder", {}), ("encoder", {}), ("vit", {}), ("decoder", MESHED), ("encoder", MESHED)])
def test_every_choice_gives_the_same_gradient(name, sizes):
    task, params, method, trainable, batch = case(name)
    mesh = sharding.make_mesh(sizes, jax.devices()[: 8 if sizes else 1])
    rules = {"decoder": sharding.DECODER, "encoder": sharding.ENCODER, "vit": sharding.VIT}[name]
    shardings = sharding.param_shardings(params, mesh, rules)
    found = {}
    for choice in remat.CHOICES[: None if not sizes else 3]:  # virtual devices have no memory of a host beside their own
        loss = make_loss(MODELS[name].clone(remat=choice), task)
        run = jax.jit(sharding.value_and_grad(loss, method, shardings))
        found[choice] = jax.tree.leaves(run(trainable, params, batch, jax.random.key(4)))
    for choice, leaves in found.items():
        for mine, expected in zip(leaves, found["none"]):
            np.testing.assert_allclose(mine, expected, atol=1e-6, err_msg=choice)


@pytest.mark.parametrize("name", MODELS)
def test_less_is_kept(name, capsys):
    task, params, method, trainable, batch = case(name)
    kept = {}
    for choice in ("none", "dots", "full"):
        loss = make_loss(MODELS[name].clone(remat=choice), task)
        print_saved_residuals(lambda t, loss=loss: loss(method.bind(params, t), params, batch, jax.random.key(0)), trainable)
        kept[choice] = sum(
            np.prod([int(n) for n in line.split("[")[1].split("]")[0].split(",") if n] or [1])
            for line in capsys.readouterr().out.splitlines()
            if line.startswith("f32[") and "argument" not in line
        )
    assert kept["full"] < kept["dots"] < kept["none"], kept


def test_with_fsdp_an_encoder_makes_its_layers_again_and_unknown_choices_are_refused():
    config, model = glue.get_config("rte,base").model, MODELS["encoder"]
    one, several = (sharding.make_mesh(sizes, jax.devices()[:n]) for sizes, n in (({}, 1), ({"fsdp": 2}, 2)))
    assert fitted(model, config, one).remat == "none" and fitted(model, config, several).remat == "full"
    config.remat = "dots"
    assert fitted(model, config, several).remat == "dots"
    ids = jnp.ones((1, 4), jnp.int32)
    for name in ("decoder", "encoder"):
        with pytest.raises(ValueError, match="config.model.remat = 'some' must be one of none, full, dots, offload"):
            MODELS[name].clone(remat="some").init(jax.random.key(0), ids, ids)
