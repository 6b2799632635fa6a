"""Compiles a config's steps, of training, evaluation and generation, for a mesh that isn't here, and says what each costs a device.

  python -m launch.dryrun --config=configs/math.py:llama31_8b --mesh=data:16,tensor:4 --devices=64 --chip=v5e

Nothing is downloaded and no weight is allocated. For a TPU chip the step is compiled by the TPU's own compiler where the
package `libtpu` is installed; else, and for GPUs, for virtual CPU devices, which compute bfloat16 in float32 and so need up
to twice the temporaries. Only the TPU's compiler estimates the length of a step: see launch/cycles.py for what it leaves out.
"""

import collections
import importlib.util
import os
import re
import sys
import time

import jax
from absl import app, flags
from ml_collections import config_flags

from experiments.abstract import NEW_TOKENS, PARTS, Step, describe, device_bytes, model_flops
from experiments.command import run_command
from experiments.config import from_flags, parse_mesh
from experiments.flops import matmul_flops
from experiments.logger import quiet
from experiments.tasks.math import TRAINING_DATA
from gpart_jax import sharding
from gpart_jax.methods import trained_numbers
from launch import cycles, hlo

GIB = 2**30
CHIPS = {"v5e": 16, "v5p": 95, "v6e": 32, "h100": 80, "h200": 141}  # GB of memory, as they are sold
TOPOLOGIES = {  # of so many TPU chips
    "v5e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5p": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"},
    "v6e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
}


def use_no_device() -> None:
    """Programs are only compiled: JAX and libtpu are not to look for accelerators. To be called before either starts."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    jax.config.update("jax_platforms", "cpu")


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
    config, chip, count = from_flags(), flags.FLAGS.chip, flags.FLAGS.devices
    use_no_device()
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
