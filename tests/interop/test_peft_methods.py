"""LoRA, VeRA and Uni-LoRA lose what PEFT's do, step by step (tests/data/peft_methods/make_fixtures.py)."""

import json
import pathlib

import jax
import numpy as np
import optax
import pytest

from experiments.data import Task
from experiments.step import make_loss, make_train_step
from experiments.text import INPUTS
from gpart_jax import sharding
from gpart_jax.methods import from_spec
from tests.interop.peft_methods import LR, SPECS, case, start

LOSSES = json.loads((pathlib.Path(__file__).parents[1] / "data" / "peft_methods" / "losses.json").read_text())


@pytest.mark.parametrize("apply", ["factors", "sum"])
@pytest.mark.parametrize("name", SPECS)
def test_twenty_steps_are_those_of_peft(name, apply):
    model, params, batches = case()
    method = from_spec(SPECS[name] | {"apply": apply})
    loss = make_loss(model, Task([], [], [], ("0", "1", "2"), ("accuracy",), INPUTS, None))
    shardings = sharding.param_shardings(params, sharding.make_mesh(devices=jax.devices()[:1]))
    optimizer = optax.adamw(LR, weight_decay=0.0)
    step = make_train_step(lambda adapt, frozen, batch, key: loss(adapt, frozen, batch), method, optimizer, shardings)
    trainable = start(name, method, params)
    state, key_data, losses = optimizer.init(trainable), jax.random.key_data(jax.random.key(0)), []
    for number, batch in enumerate(batches):
        trainable, state, numbers = step(trainable, state, params, batch, key_data, number)
        losses.append(float(numbers["loss"]))
    np.testing.assert_allclose(losses, LOSSES[name], rtol=0, atol=1e-5)
    assert np.ptp(LOSSES[name]) > 0.05
