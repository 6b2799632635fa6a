"""Compiles a config's steps, of training, evaluation and generation, for a mesh that isn't here, and says what each costs a device.

  python -m launch.dryrun --config=configs/math.py:llama31_8b --mesh=data:16,tensor:4 --devices=64 --chip=v5e

Nothing is downloaded and no weight is allocated. For a TPU chip the step is compiled by the TPU's own compiler where the
package `libtpu` is installed; else, and for GPUs, for virtual CPU devices, which compute bfloat16 in float32 and so need up
to twice the temporaries. Only the TPU's compiler estimates the length of a step: see launch/cycles.py for what it leaves out.
"""

import collections
import importlib.util
import math
import os
import pathlib
import re
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import config_flags

from experiments.build import fitted
from experiments.command import run_command
from experiments.config import parse_mesh
from experiments.data import Task
from experiments.flops import matmul_flops
from experiments.logger import quiet
from experiments.optimizer import make_optimizer
from experiments.step import make_loss, make_outputs, make_train_step, trained_shardings
from experiments.tasks.math import TRAINING_DATA
from experiments.text import INPUTS
from gpart_jax import sharding
from gpart_jax.methods import from_spec, trained_numbers
from gpart_jax.models import decoder, generate, published
from gpart_jax.models.attention import share
from gpart_jax.models.decoder import Decoder, DecoderConfig
from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig
from gpart_jax.models.storage import read_config
from gpart_jax.models.vit import ViTClassifier, ViTConfig
from launch import cycles, hlo

GIB = 2**30
CHIPS = {"v5e": 16, "v5p": 95, "v6e": 32, "h100": 80, "h200": 141}  # GB of memory, as they are sold
TOPOLOGIES = {  # of so many TPU chips
    "v5e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5p": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"},
    "v6e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
}


PARTS = {"train": "training", "evaluate": "evaluation", "generate": "generation"}  # the last of decoders alone
NEW_TOKENS = 32  # in a step of generation, which are as many between looks of the host


class Step(NamedTuple):
    """A step of training, evaluation or generation, and the shapes of its arguments, laid out on a mesh."""

    function: Any  # jitted
    arguments: tuple  # jax.ShapeDtypeStructs, after those that are static; of training: trainable, optimizer state, frozen, batch, key data, number, tables
    params: int  # numbers of the whole model
    held: dict[str, Any]  # the arguments by what they are: trees
    attended: float  # the share of its blocks of scores that a TPU's attention kernel makes
    divided: int  # among how many devices the matrix products are, whose shapes the program has


def describe(config, mesh, length: int | None = None, part: str = "train") -> Step:
    """A config's step on a mesh, of PARTS, for texts of `length` tokens (None: the longest that the task has)."""
    described, dtype = published.CONFIGS.get(config.model.source), jnp.dtype(config.model.dtype)
    folder = pathlib.Path(config.model.source or "").expanduser()
    if config.model.source and (folder / "config.json").is_file():
        described = read_config(folder)
    if described is None:
        raise app.UsageError(
            f"The shape of {config.model.source} isn't known: it is no directory with a config.json, and none of "
            f"{', '.join(published.CONFIGS)}."
        )
    rows = config.train.batch_size
    sharding.check_batch("config.train.batch_size", rows, mesh, config.train.accumulate)
    if part != "train":
        rows = config.train.eval_batch_size
        rows += -rows % (mesh.shape["data"] * mesh.shape["fsdp"])
    label = jax.ShapeDtypeStruct((rows,), jnp.int32)
    if described["model_type"] == "vit":
        model, size = ViTClassifier(ViTConfig.from_hf(described), 2, dtype), config.task.image_size
        rules, length = sharding.VIT, (size // model.config.patch_size) ** 2 + 1
        task = Task([], [], [], ("0", "1"), ("accuracy",), ("pixel_values",), None)
        pixels = jax.ShapeDtypeStruct((rows, size, size, model.config.channels), jnp.uint8)
        batch, example = {"pixel_values": pixels, "label": label}, (pixels,)
    else:
        length = config.task.max_length if length is None else length
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        batch, example = {"input_ids": tokens, "attention_mask": tokens}, (tokens, tokens)
        if described["model_type"] in decoder.FAMILIES:
            model = Decoder(DecoderConfig.from_hf(described), dtype, dtype)
            rules = sharding.DECODER_TIED if model.config.tied else sharding.DECODER
            task = Task([], [], [], None, ("loss",), INPUTS, None)
            batch["loss_mask"] = tokens
        else:
            model = EncoderClassifier(EncoderConfig.from_hf(described), 2, dtype)
            rules = sharding.ENCODER
            task = Task([], [], [], ("0", "1"), ("accuracy",), INPUTS, None)
            batch["label"] = label
    if part == "generate" and not isinstance(model, Decoder):
        raise app.UsageError(f"{config.model.source} is no decoder, and generates nothing: leave generate out of --parts.")
    model = fitted(model, config.model, mesh)
    frozen = jax.eval_shape(model.init, jax.random.key(0), *example)["params"]
    shardings = sharding.param_shardings(frozen, mesh, rules)
    method = from_spec(config.method.to_dict(), config.head_targets)
    trainable = jax.eval_shape(method.init, frozen, jax.random.key(0))
    everywhere = NamedSharding(mesh, P())
    optimizer = make_optimizer(1000, **config.optimizer)
    state = jax.eval_shape(optimizer.init, trainable)
    own = trained_shardings(trainable, state, shardings)
    trainable, state = jax.tree.map(_as_struct, (trainable, state), own)
    tables = _on(everywhere, jax.eval_shape(lambda: method.tables(frozen)))
    held = {
        "frozen weights": jax.tree.map(_as_struct, frozen, shardings),
        "trained numbers": trainable,
        "the method's tables": tables,
        "batch": _on(NamedSharding(mesh, sharding.BATCH), batch),
    }
    size, attended = sum(leaf.size for leaf in jax.tree.leaves(frozen)), share(model.config.pattern, length)
    divided = mesh.size if sharding.LEAVES in trainable else mesh.shape["tensor"]
    frozen, batch = held["frozen weights"], held["batch"]
    if part == "generate":
        return _generation(model, mesh, frozen, rows, length, size)
    if part == "evaluate":
        function = make_outputs(model, task, method, shardings)
        return Step(function, (trainable, frozen, batch, tables), size, held, attended, divided)
    held["optimizer"] = state
    key = _on(everywhere, jax.eval_shape(jax.random.key_data, jax.random.key(0)))
    function = make_train_step(make_loss(model, task), method, optimizer, shardings, config.train.accumulate)
    return Step(function, (trainable, held["optimizer"], frozen, batch, key, 0, tables), size, held, attended, divided)


def _generation(model, mesh, params, rows: int, columns: int, size: int) -> Step:
    """`NEW_TOKENS` new tokens of each row, with a cache of so many columns."""
    program = generate.Programs(model, mesh, params)
    state = jax.eval_shape(lambda: program.empty(rows, columns))
    by_row = NamedSharding(mesh, generate.ROWS)
    cache = state.cache._replace(
        key=_on(program.by_head, state.cache.key), value=_on(program.by_head, state.cache.value), filled=_on(by_row, state.cache.filled)
    )
    state = state._replace(logits=_on(by_row, state.logits), cache=cache)
    held = _on(by_row, jax.ShapeDtypeStruct((rows,), jnp.int32))
    key = _on(NamedSharding(mesh, P()), jax.eval_shape(jax.random.key_data, jax.random.key(0)))
    arguments = *program.static, NEW_TOKENS, 0.0, 1.0, params, held, key, state
    return Step(generate.write, arguments, size, {"weights": params, "cache": cache, "logits": state.logits}, 1.0, mesh.shape["tensor"])


def _on(sharding, tree):
    return jax.tree.map(lambda x: _as_struct(x, sharding), tree)


def _as_struct(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def device_bytes(tree) -> int:
    """Bytes on each device of a tree of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def model_flops(config, mesh, length: int | None = None, part: str = "train") -> float:
    """`matmul_flops` of the config's step, less those that rematerialisation makes twice: what the model itself needs."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.update(remat="none", attention="xla")  # whose products are counted
    step = describe(config, mesh, length, part)
    return matmul_flops(step.function.trace(*step.arguments).jaxpr, step.divided)


def tpu_devices(chip: str, count: int):
    """Descriptions of so many TPU chips, from libtpu, which is to dump kernels; none of the chips need be here."""
    from jax.experimental import topologies  # only where libtpu is installed

    if count not in TOPOLOGIES[chip]:
        known = ", ".join(map(str, TOPOLOGIES[chip]))
        raise app.UsageError(f"--devices={count} is no slice of {chip}. Choose one of {known}.")
    cycles.dump()
    name = f"{chip}:{TOPOLOGIES[chip][count]}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def report(step: Step, compiled, jaxpr, mesh, chip: str | None) -> str:
    """The table of a compiled step, per device and per step."""
    memory = compiled.memory_analysis()
    sizes = {name: device_bytes(tree) for name, tree in step.held.items()} | {
        # Outputs that don't take the place of an argument are for a moment beside it.
        "activations and temporaries": memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
    }
    total = sum(sizes.values())
    rows = [
        *((name, f"{size / GIB:.3f} GiB") for name, size in sizes.items()),
        ("in all", f"{total / GIB:.3f} GiB"),
        ("matrix products", f"{matmul_flops(jaxpr, step.divided) / 1e12:.2f} TFLOP"),
    ]
    by_kind = collections.defaultdict(lambda: [0, 0])
    for one in hlo.collectives(compiled.as_text()):
        by_kind[one.kind][0] += one.bytes
        by_kind[one.kind][1] += one.times
    for kind, (size, times) in sorted(by_kind.items()):
        rows.append((f"{kind} ({times:,} times)", f"{size / 1e6:,.3f} MB"))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {value:>14}" for name, value in rows]
    for name in [chip] if chip else CHIPS:
        room = CHIPS[name] * 1e9
        verdict = "fits" if total <= room else "does not fit"
        lines.append(f"  {verdict} {name} ({CHIPS[name]} GB): {total / room:.0%} of its memory")
    return "\n".join(lines)


def length_of_step(step: Step, compiled, bundles, chip: str, flops: float) -> str:
    """The estimate of a compiled step, and the share of the chip's FLOP/s that its `flops` of the model would be (MFU)."""
    found = cycles.estimate(compiled.as_text(), bundles, chip, {"splash": step.attended})
    limits = cycles.CHIPS[chip]
    mfu = flops / (found.cycles / limits.clock * limits.flops)
    million = f"{found.cycles / 1e6:,.1f} M cycles (kernels {found.kernels / 1e6:,.1f} M)"
    return f"  estimated step: {million}, MFU {mfu:.1%}"


def main(_):
    quiet()
    config, chip, count = flags.FLAGS.config, flags.FLAGS.chip, flags.FLAGS.devices
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # libtpu is not to look for TPUs
    jax.config.update("jax_platforms", "cpu")
    on_tpu = chip in TOPOLOGIES and importlib.util.find_spec("libtpu") is not None
    if not on_tpu:
        jax.config.update("jax_num_cpu_devices", count)
    devices = tpu_devices(chip, count) if on_tpu else jax.devices()
    parts = flags.FLAGS.parts or list(PARTS)[: 3 if config.task.name in TRAINING_DATA else 2]
    if unknown := set(parts) - set(PARTS):
        raise app.UsageError(f"--parts: {sorted(unknown)[0]!r} is none of {', '.join(PARTS)}.")
    try:
        mesh = sharding.make_mesh(parse_mesh(flags.FLAGS.mesh), devices)
        steps = {part: describe(config, mesh, flags.FLAGS.length, part) for part in parts}
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    first = steps[parts[0]]
    trained = trained_numbers(first.held["trained numbers"]) if "trained numbers" in first.held else 0
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"{config.model.source}: {first.params:,} numbers, {trained:,} trained ({config.method.name})")
    print(f"{count} devices: {shape}; compiled for {chip if on_tpu else 'virtual CPU devices'}", flush=True)
    fits = [_report_part(part, step, config, mesh, chip, on_tpu) for part, step in steps.items()]
    if not all(fits):
        sys.exit(1)


def _report_part(part: str, step: Step, config, mesh, chip: str | None, on_tpu: bool) -> bool:
    """Prints what a step costs; whether it could be compiled."""
    if part == "generate":
        _, rows, columns, *_ = step.held["cache"].key.shape
        shape = f"{NEW_TOKENS} tokens of each of {rows} rows, in a cache of {columns:,} columns"
    elif "input_ids" in (batch := step.held["batch"]):
        shape = "{} x {} tokens".format(*batch["input_ids"].shape)
    else:
        shape = "{} images of {} x {} x {}".format(*batch["pixel_values"].shape)
    print(f"{PARTS[part]}, {shape}:")
    start = time.perf_counter()
    traced = step.function.trace(*step.arguments)
    try:
        compiled, bundles = cycles.compile(traced.lower()) if on_tpu else (traced.lower().compile(), None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used \S+ of \S+ \S+", str(error))
        print(f"  does not fit {chip}: {used[0] if used else str(error).splitlines()[0]}")
        return False
    print(report(step, compiled, traced.jaxpr, mesh, chip))
    if on_tpu:
        print(length_of_step(step, compiled, bundles, chip, model_flops(config, mesh, flags.FLAGS.length, part)))
    print(f"  compiled in {time.perf_counter() - start:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "What to train: a file of configs/.")
    flags.mark_flag_as_required("config")
    flags.DEFINE_string("mesh", "data:-1", "Sizes of the axes data, fsdp and tensor; -1: the rest of the devices.")
    flags.DEFINE_integer("devices", 64, "How many devices.", lower_bound=1)
    flags.DEFINE_enum("chip", None, list(CHIPS), "Which chip; none: say of each whether it has the memory.")
    flags.DEFINE_list("parts", None, f"Some of {', '.join(PARTS)}; none: all that the model has.")
    flags.DEFINE_integer("length", None, "Tokens of every text; none: config.task.max_length.", lower_bound=2)
    run_command(main)
