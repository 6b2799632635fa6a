"""What an H200 and a TPU v5e would run, read from programs compiled for them; neither need be here.

  pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12 libtpu  # of the versions that fit your jax
  python -m benchmarks.accelerators
  python -m benchmarks.accelerators --steps=roberta-base --ds=512,23040  # whole training steps, too: a minute each

Of P theta added to 24 matrices of 768 x 768, of its transpose, and of a plain copy and sum of the same. For a GPU: kernels
started, those in loops as often as the loop turns; for a TPU: its cycles, as launch/cycles.py estimates them. No time is measured
here, and memory is what the program needs beside arguments and results.
"""

import itertools
import math
import os
import re

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # nobody is to look for the devices themselves

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from benchmarks.measure import Table, save  # noqa: E402
from configs import glue  # noqa: E402
from experiments.abstract import describe  # noqa: E402
from experiments.command import run_command
from gpart_jax import canonical_layout, gpart_transform, make_partition, sharding  # noqa: E402
from gpart_jax.partition import SCHEMES  # noqa: E402
from launch.cycles import CHIPS, estimate  # noqa: E402
from launch.cycles import compile as compile_for_tpu  # noqa: E402
from launch.dryrun import tpu_devices  # noqa: E402
from launch.hlo import executed  # noqa: E402

DEVICES = ("h200", "v5e")
DTYPES = ("float32", "bfloat16")
STEPS = {"roberta-base": "sst2,base", "roberta-large": "sst2,large", "minilm": "sst2,minilm"}
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  device_memory_size: 151397597184  memory_bandwidth: 4800000000000  l2_cache_size: 52428800
}
"""
KERNEL = re.compile(r" (?:fusion|custom-call|copy|sort|scatter|dot|convolution)\(")


def device(name: str):
    try:
        if name == "v5e":
            return tpu_devices("v5e", 4)[0]
        return topologies.get_topology_desc("h200", "cuda", target_config=H200, topology="1x1x1").devices[0]
    except (NotImplementedError, RuntimeError) as error:
        raise app.UsageError(
            f"No compiler for {name} ({error}). Install its plugin (see --help), or leave it out."
        ) from error


def figures(name: str, function, *arguments) -> dict:
    """Of a function compiled for a device: kernels, estimated cycles (a TPU's alone), temporary bytes, longest integer array."""
    lowered, cycles, kernels, integers = function.lower(*arguments), 0, 0, 0
    if name in CHIPS:
        program, bundles = compile_for_tpu(lowered)
        cycles = estimate(program.as_text(), bundles, name).cycles
    else:
        program = lowered.compile()
    for line, times in executed(program.as_text()):
        kernels += times * bool(KERNEL.search(line))
        shapes = re.findall(r"\b[su]\d+\[([\d,]+)\]", line)
        integers = max([integers, *(math.prod(map(int, shape.split(","))) for shape in shapes)])
    memory = program.memory_analysis().temp_size_in_bytes
    return {"kernels": kernels, "cycles": cycles, "temporary": memory, "integers": integers}


def main(_):
    options, rows = flags.FLAGS, []
    for flag, known in (("devices", DEVICES), ("dtypes", DTYPES), ("schemes", SCHEMES), ("steps", STEPS)):
        if unknown := set(options[flag].value) - set(known):
            raise app.UsageError(f"--{flag}: {sorted(unknown)[0]!r} is none of {', '.join(known)}.")
    columns = "kernels", "estimated cycles, millions", "temporary, MB", "longest integer array"
    table = Table("device", "program", "dtype", "dropout", "d", *columns)

    def add(name, program, dtype, dropout, d, found):
        kernels, cycles = (f"{found['kernels']:,}", "") if name == "h200" else ("", f"{found['cycles'] / 1e6:,.2f}")
        memory, integers = f"{found['temporary'] / 1e6:,.1f}", f"{found['integers']:,}"
        table.add(name, program, dtype, dropout, f"{d:,}" if d else "", kernels, cycles, memory, integers)
        rows.append({"device": name, "program": program, "dtype": dtype, "dropout": dropout, "d": d} | found)
        save(table, figures=rows)

    for name in options.devices:
        chip = device(name)
        on_chip = jax.sharding.SingleDeviceSharding(chip)

        def shapes(tree, where=on_chip):
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

        for dtype in options.dtypes:
            params = shapes([np.zeros((768, 768), dtype)] * 24)
            add(name, "copy", dtype, "", None, figures(name, jax.jit(lambda params: [leaf + 1 for leaf in params]), params))
            add(name, "sum", dtype, "", None, figures(name, jax.jit(lambda params: sum(map(jnp.sum, params))), params))
            for scheme, rate, d in itertools.product(options.schemes, map(float, options.dropouts), map(int, options.ds)):
                theta, key = shapes((np.zeros(d, np.float32), np.zeros(2, np.uint32)))
                partition = shapes(make_partition(canonical_layout(params), d, 42, scheme=scheme))

                def forward(partition, theta, params, key, rate=rate):
                    key = jax.random.wrap_key_data(key)
                    return gpart_transform(params, theta, partition=partition, dropout=rate, key=key)

                def pull_back(partition, theta, params, key):
                    return jax.vjp(lambda theta: forward(partition, theta, params, key), theta)[1](params)

                arguments = partition, theta, params, key
                add(name, f"{scheme}, forward", dtype, rate, d, figures(name, jax.jit(forward), *arguments))
                add(name, f"{scheme}, VJP", dtype, rate, d, figures(name, jax.jit(pull_back), *arguments))
        for model in options.steps:
            for method, d in [("head", None), ("lora", None), *(("gpart", int(d)) for d in options.ds)]:
                config = glue.get_config(f"{STEPS[model]},{method}")
                if d:
                    config.method.d = d
                elif method == "lora":  # merged, as GPart is: W0 + A B
                    config.method.update(apply="sum", dropout=0.0)
                step = describe(config, sharding.make_mesh(devices=[chip]), 128)
                found = figures(name, step.function, *step.arguments)
                rate = config.method.get("dropout", "")  # the recipe's
                add(name, f"{model}'s step, {method}", config.model.dtype, rate, d, found)


if __name__ == "__main__":
    flags.DEFINE_list("devices", list(DEVICES), "Some of these.")
    flags.DEFINE_list("ds", [512, 4096, 23_040, 524_288], "Lengths of theta.")
    flags.DEFINE_list("dtypes", ["float32"], f"Of the matrices: {', '.join(DTYPES)}.")
    flags.DEFINE_list("dropouts", [0.0, 0.1], "Rates of dropout on P theta.")
    flags.DEFINE_list("schemes", list(SCHEMES), "Some of these.")
    flags.DEFINE_list("steps", [], f"Training steps with 128 tokens a text: {', '.join(STEPS)}.")
    run_command(main)
