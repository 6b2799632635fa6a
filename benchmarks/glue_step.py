"""Compiles and times the training step of a GLUE recipe at full size, on random weights and texts of one length.

  python -m benchmarks.glue_step --config=configs/glue.py:rte,base --config.train.accumulate=8 --length=512 --steps=2

Needs no download. Prints the compiled program's memory, and seconds a step.
"""

import statistics
import time

import jax
import numpy as np
import optax
from absl import flags
from ml_collections import config_flags

from experiments.abstract import describe
from experiments.command import run_command
from experiments.config import from_flags
from gpart_jax import canonical_layout, sharding
from gpart_jax.methods import from_spec
from gpart_jax.models import published


def draw(arguments, vocab_size=None):
    """Random weights, tokens or images, and labels of those shapes; theta and the optimizer's state start at zero."""
    trainable, state, frozen, batch, key_data, _, _ = arguments
    random = np.random.default_rng(0)

    def zeros(tree):
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)

    def weights(tree):
        return jax.tree.map(lambda leaf: 0.02 * random.standard_normal(leaf.shape, np.float32), tree)

    if "pixel_values" in batch:
        inputs = {"pixel_values": random.integers(0, 256, batch["pixel_values"].shape, np.uint8)}
    else:
        inputs = {
            "input_ids": random.integers(3, vocab_size, batch["input_ids"].shape, np.int32),
            "attention_mask": np.ones(batch["attention_mask"].shape, np.int32),
        }
    batch = inputs | {"label": random.integers(0, 2, batch["label"].shape, np.int32)}
    trainable = zeros(trainable) | {"head": weights(trainable["head"])}
    drawn = trainable, zeros(state), weights(frozen), batch, zeros(key_data)
    return sharding.place(drawn, jax.tree.map(lambda leaf: leaf.sharding, arguments[:5]))


def main(_):
    config, steps = from_flags(), flags.FLAGS.steps
    step, arguments, *_ = describe(config, sharding.make_mesh(devices=jax.devices()[:1]), flags.FLAGS.length)
    layout = canonical_layout(arguments[2], config.method.targets)
    print(f"{config.model.source}, {config.method.name}, N = {layout.size:,}, batch {config.train.batch_size} x "
        f"{flags.FLAGS.length} in {config.train.accumulate} parts, "
          f"{jax.devices()[0].device_kind}")  # fmt: skip
    start = time.perf_counter()
    compiled = step.lower(*arguments).compile()
    memory = compiled.memory_analysis()
    print(f"compiled in {time.perf_counter() - start:.1f} s; arguments {memory.argument_size_in_bytes / 2**30:.2f} GiB, "
          f"temporaries {memory.temp_size_in_bytes / 2**30:.2f} GiB", flush=True)  # fmt: skip
    method = from_spec(config.method.to_dict(), config.head_targets)
    tables = sharding.replicate(method.tables(arguments[2]), jax.tree.leaves(arguments[2])[0].sharding.mesh)
    trainable, state, *rest = draw(arguments, published.CONFIGS[config.model.source]["vocab_size"])
    seconds = []
    for number in range(steps):
        start = time.perf_counter()
        trainable, state, numbers = compiled(trainable, state, *rest, number, tables)
        loss, norm = float(numbers["loss"]), float(optax.global_norm(trainable))
        seconds.append(time.perf_counter() - start)
        print(f"step {number}: loss {loss:.4f}, norm of what is trained {norm:.3e}, {seconds[-1]:.3f} s", flush=True)
    print(f"median {statistics.median(seconds):.3f} s a step")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/glue.py:rte,base", "The recipe: a config of configs/glue.py.")
    flags.DEFINE_integer("length", 512, "Tokens of every text.", lower_bound=2)
    flags.DEFINE_integer("steps", 3, "How many steps to take.", lower_bound=1)
    run_command(main)
