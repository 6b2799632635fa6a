"""The cycles of many configs' steps of training, each program compiled once for a TPU that isn't here and kept in a file."""

import importlib.metadata
import json
import math
import pathlib
import time

import jax
import ml_collections

from experiments.config import flatten, parse_mesh
from experiments.workdir import read_json, write_json
from gpart_jax import __version__, sharding
from launch import cycles, dryrun

# Of a config's keys those that decide how long a step takes; of texts the greatest length.
SHAPE = (
    "model.", "method.", "head_targets", "task.max_length", "task.image_size", "train.batch_size", "train.accumulate",
    "optimizer.name", "optimizer.clip",
)  # fmt: skip


def estimate(configs: list[ml_collections.ConfigDict], chip: str, mesh: str, cache: pathlib.Path) -> list[int | str]:
    """Of each config the cycles of its step on each chip of a mesh such as "data:4", or why there are none. It says how far it is.

    Args:
      cache: a JSON file of what was compiled before, by versions. Remove it after a change to the library.
    """
    dryrun.use_no_device()
    made = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")} | {"gpart_jax": __version__, "chip": chip, "mesh": mesh}
    keys, known = [json.dumps(_shape(config) | made, sort_keys=True) for config in configs], read_json(cache) if cache.exists() else {}
    todo = {key: config for key, config in zip(keys, configs) if key not in known}
    cache.parent.mkdir(parents=True, exist_ok=True)
    for number, (key, config) in enumerate(todo.items(), 1):
        print(f"[{number}/{len(todo)}] compiling {config.method.name}'s step of {config.model.source} for {mesh} of {chip}", flush=True)
        start = time.perf_counter()
        try:
            known[key] = step_cycles(config, chip, mesh)
        except ValueError as error:
            known[key] = str(error)
        print(f"  {known[key]}{' cycles' if isinstance(known[key], int) else ''}, {time.perf_counter() - start:.0f} s", flush=True)
        write_json(cache, known)
    return [known[key] for key in keys]


def _shape(config: ml_collections.ConfigDict) -> dict:
    flat = flatten(json.loads(config.to_json()))
    return {key: value for key, value in flat.items() if key.startswith(SHAPE) and key != "method.seed"}


def step_cycles(config: ml_collections.ConfigDict, chip: str, mesh: str) -> int:
    """The cycles of a config's step on each chip, as launch/cycles.py estimates them.

    Raises:
      ValueError: a mesh that is no slice, or doesn't divide the model or the batch; too little memory; a model of unknown shape.
    """
    sizes, known = parse_mesh(mesh), dryrun.TOPOLOGIES[chip]
    if (count := math.prod(sizes.values())) not in known:
        raise ValueError(f"--mesh={mesh} has {count} chips, but a slice of {chip} has one of {', '.join(map(str, known))}.")
    step = dryrun.describe(config, sharding.make_mesh(sizes, dryrun.tpu_devices(chip, count)))
    try:
        compiled, bundles = cycles.compile(step.function.trace(*step.arguments).lower())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(f"{config.method.name} on {config.model.source} doesn't fit {mesh} of {chip}. Divide it among more.") from error
    return cycles.estimate(compiled.as_text(), bundles, chip, {"splash": step.attended}).cycles
