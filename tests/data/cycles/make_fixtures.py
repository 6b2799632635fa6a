"""Compiles two toy kernels for a v5e that isn't there, and keeps what launch/cycles.py reads of them. Needs the package libtpu.

  python -m tests.data.cycles.make_fixtures [FOLDER]  # this one, when none is named

program.txt is the HLO, <name of a kernel>.bundles.txt the compiler's final bundles, both without what isn't read of them.
"""

import os
import pathlib
import re
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # libtpu is not to look for TPUs

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402

from launch import cycles  # noqa: E402
from launch.dryrun import tpu_devices  # noqa: E402

TURNS = 2, 37, 3, 5  # of nested's grid, and of its loops from the outside in


def nested(count, out, buffer, semaphore):
    def block(b, _):
        def piece(p, _):
            def row(r, _):
                at = pl.ds(pl.multiple_of(8 * r, 8), 8)
                buffer[at] = buffer[at] * 3 + 1
                return 0

            @pl.when(count[p] > 3)
            def _():
                buffer[pl.ds(0, 8)] = buffer[pl.ds(8, 8)]

            return jax.lax.fori_loop(0, TURNS[3], row, 0)

        jax.lax.fori_loop(0, TURNS[2], piece, 0)
        copy = pltpu.make_async_copy(buffer, out.at[pl.ds(64 * b, 64)], semaphore)
        copy.start()
        copy.wait()
        return 0

    pl.program_id(0)
    jax.lax.fori_loop(0, TURNS[1], block, 0)


def unknown(count, out, buffer, semaphore):
    def row(r, _):
        buffer[pl.ds(0, 8)] = buffer[pl.ds(0, 8)] * 3
        return 0

    jax.lax.fori_loop(0, count[0], row, 0)
    copy = pltpu.make_async_copy(buffer, out.at[pl.ds(0, 64)], semaphore)
    copy.start()
    copy.wait()


def call(kernel, grid, count, **options):
    shape = jax.ShapeDtypeStruct((2**20, 128), jnp.float32)  # too large for the chip's own memory
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=grid, in_specs=[], out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=[pltpu.VMEM((64, 128), jnp.float32), pltpu.SemaphoreType.DMA],
    )  # fmt: skip
    return pl.pallas_call(kernel, grid_spec=spec, out_shape=shape, name=kernel.__name__, **options)(count)


def main(folder):
    on_chip = jax.sharding.SingleDeviceSharding(tpu_devices("v5e", 1)[0])
    count = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=on_chip)

    def program(count):  # nested thirteen times, and once more with a word on its bytes; unknown once
        def again(total, i):
            return total + call(nested, TURNS[:1], count + i)[0, 0], None

        total = jax.lax.scan(again, 0.0, jnp.arange(13))[0] + call(unknown, (), count)[0, 0]
        stated = pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=10**9)
        return total + call(nested, TURNS[:1], count, cost_estimate=stated)[0, 0]

    compiled, bundles = cycles.compile(jax.jit(program).lower(count))
    lines = [line for line in compiled.as_text().splitlines() if re.match(r"HloModule|\S.*\{$|\}|  ", line)]
    bodies = {}
    for at, line in enumerate(lines):
        if body := re.search(r'"body":"([^"]*)"', line):
            lines[at] = line.replace(body[1], f"BODY{bodies.setdefault(body[1], len(bodies))}")
    text = "\n".join(lines)
    text = re.sub(r', metadata=\{[^}]*\}|, "?sharding=\{[^ ]*\}|"debug_locations":"[^"]*",?', "", text)
    (folder / "program.txt").write_text(text + "\n")
    for name, found in bundles.items():
        (folder / f"{name}.bundles.txt").write_text(found.split("= control target key end\n")[1])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if sys.argv[1:] else pathlib.Path(__file__).parent)
