"""Compiles and times the training step of a GLUE recipe at full size, on random weights and texts of one length.

  python -m benchmarks.glue_step --config=configs/glue.py:rte,base --config.train.accumulate=8 --length=512 --steps=2

Needs no download. Prints the compiled program's memory, and seconds a step.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from ml_collections import config_flags

from experiments.data import Task
from experiments.optimizer import make_optimizer
from experiments.step import make_loss, make_train_step
from gpart_jax import canonical_layout, sharding
from gpart_jax.methods import from_spec
from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig

ROBERTA = dict(
    vocab_size=50_265, max_positions=514, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1, family="roberta"
)
SHAPES = {  # as published in each model's config.json
    "FacebookAI/roberta-base": dict(hidden_size=768, num_layers=12, num_heads=12, intermediate_size=3072),
    "FacebookAI/roberta-large": dict(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096),
}


def describe(config, length: int):
    """The step of a config, and its arguments as shapes; nothing is allocated.

    Returns:
      (step, (trainable, optimizer_state, frozen, batch, key_data, number), canonical layout of the adapted weights).
    """
    if config.model.source not in SHAPES:
        raise ValueError(f"The shape of {config.model.source} isn't known here. Known: {', '.join(SHAPES)}.")
    model = EncoderClassifier(EncoderConfig(**SHAPES[config.model.source], **ROBERTA), 2, jnp.dtype(config.model.dtype))
    method = from_spec(config.method.to_dict(), config.head_targets)
    optimizer = make_optimizer(1000, **config.optimizer)
    key, size = jax.random.key(0), config.train.batch_size
    tokens = jax.ShapeDtypeStruct((size, length), jnp.int32)
    frozen = jax.eval_shape(model.init, key, tokens, tokens)["params"]
    trainable = jax.eval_shape(method.init, frozen, key)
    step = make_train_step(
        make_loss(model, Task([], [], [], ("0", "1"), ("accuracy",), length)),
        method,
        optimizer,
        sharding.param_shardings(frozen, sharding.make_mesh(devices=jax.devices()[:1])),
        config.train.accumulate,
    )
    batch = {"input_ids": tokens, "attention_mask": tokens, "label": jax.ShapeDtypeStruct((size,), jnp.int32)}
    key_data = jax.eval_shape(jax.random.key_data, key)
    arguments = (trainable, jax.eval_shape(optimizer.init, trainable), frozen, batch, key_data, 0)
    return step, arguments, canonical_layout(frozen, config.method.targets)


def draw(arguments):
    """Random weights, tokens and labels of those shapes; theta and the optimizer's state start at zero."""
    trainable, state, frozen, batch, key_data, number = arguments
    random = np.random.default_rng(0)

    def weights(tree):
        return jax.tree.map(lambda leaf: jnp.array(0.02 * random.standard_normal(leaf.shape, np.float32)), tree)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (trainable | {"head": {}}, state, key_data))
    trainable = zeros[0] | {"head": weights(trainable["head"])}
    batch = {
        "input_ids": random.integers(3, ROBERTA["vocab_size"], batch["input_ids"].shape, np.int32),
        "attention_mask": np.ones(batch["attention_mask"].shape, np.int32),
        "label": random.integers(0, 2, batch["label"].shape, np.int32),
    }
    return trainable, zeros[1], weights(frozen), batch, zeros[2], number


def main(_):
    config, steps = flags.FLAGS.config, flags.FLAGS.steps
    step, arguments, layout = describe(config, flags.FLAGS.length)
    print(f"{config.model.source}, {config.method.name}, N = {layout.size:,}, batch {config.train.batch_size} x "
        f"{flags.FLAGS.length} in {config.train.accumulate} parts, "
          f"{jax.devices()[0].device_kind}")  # fmt: skip
    start = time.perf_counter()
    compiled = step.lower(*arguments).compile()
    memory = compiled.memory_analysis()
    print(f"compiled in {time.perf_counter() - start:.1f} s; arguments {memory.argument_size_in_bytes / 2**30:.2f} GiB, "
          f"temporaries {memory.temp_size_in_bytes / 2**30:.2f} GiB", flush=True)  # fmt: skip
    trainable, state, *rest, number = draw(arguments)
    seconds = []
    for number in range(steps):
        start = time.perf_counter()
        trainable, state, loss = compiled(trainable, state, *rest, number)
        loss, norm = float(loss), float(optax.global_norm(trainable))
        seconds.append(time.perf_counter() - start)
        print(f"step {number}: loss {loss:.4f}, norm of what is trained {norm:.3e}, {seconds[-1]:.3f} s", flush=True)
    print(f"median {statistics.median(seconds):.3f} s a step")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/glue.py:rte,base", "The recipe: a config of configs/glue.py.")
    flags.DEFINE_integer("length", 512, "Tokens of every text.", lower_bound=2)
    flags.DEFINE_integer("steps", 3, "How many steps to take.", lower_bound=1)
    app.run(main)
