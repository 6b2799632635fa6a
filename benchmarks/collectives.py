"""Bytes that a step communicates on 8 virtual devices: as jit alone has it, and with `sharding.value_and_grad`.

  python -m benchmarks.collectives

RoBERTa-base with its recipe (N = 14,155,776, d = 23,040), 32 x 128 tokens; compiled from shapes, nothing is run. For each
device: the size of each collective's result, times its executions.
"""

import collections

import jax
import optax

from benchmarks.measure import Table, save
from configs import glue
from experiments.abstract import describe
from experiments.command import run_command
from experiments.data import Task
from experiments.step import make_loss
from experiments.text import INPUTS
from gpart_jax import sharding
from gpart_jax.methods import from_spec
from gpart_jax.models import published
from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig
from launch.hlo import collectives

MESHES = ({"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2})
LENGTH = 128


def left_alone(config, arguments) -> jax.stages.Compiled:
    """The same step through plain `jax.value_and_grad` under jit, the batch divided over the mesh."""
    model = EncoderClassifier(EncoderConfig.from_hf(published.CONFIGS[config.model.source]), 2)
    loss = make_loss(model, Task([], [], [], ("0", "1"), ("accuracy",), INPUTS, None))
    method = from_spec(config.method.to_dict(), config.head_targets)

    def value(trainable, frozen, batch, key):
        method_key, model_key = jax.random.split(key)
        return loss(method.bind(frozen, trainable, method_key), frozen, batch, model_key)

    def step(trainable, frozen, batch, key_data):
        value_, gradient = jax.value_and_grad(value)(trainable, frozen, batch, jax.random.wrap_key_data(key_data))
        return value_, optax.apply_updates(trainable, gradient)

    trainable, _, frozen, batch, key_data, *_ = arguments
    everywhere = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    return jax.jit(step, out_shardings=(None, everywhere)).lower(trainable, frozen, batch, key_data).compile()


def main(_):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    config = glue.get_config("rte,base")
    table = Table("mesh", "step", "all-reduce, MB", "all-gather, MB", "others, MB")
    for sizes in MESHES:
        step = describe(config, sharding.make_mesh(sizes), LENGTH)
        programs = {
            "left to jit": left_alone(config, step.arguments),
            "ours": step.function.lower(*step.arguments).compile(),
        }
        for name, compiled in programs.items():
            size = collections.Counter()
            for one in collectives(compiled.as_text()):
                size[one.kind if one.kind in ("all-reduce", "all-gather") else "others"] += one.bytes / 1e6
            row = (f"{size[kind]:,.3f}" for kind in ("all-reduce", "all-gather", "others"))
            table.add(", ".join(f"{axis} {n}" for axis, n in sizes.items()), name, *row)
    save(table)


if __name__ == "__main__":
    run_command(main)
