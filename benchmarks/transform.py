"""gpart_transform over a plain copy of the same weights (W + 1), and its VJP over a plain sum of them.

  python -m benchmarks.transform --sizes=14155776 --ds=23040

Weights are matrices of 768 x 768, or of 2,048 x 2,048 from 64 million on. Each row's calls take turns; ratios are of
neighbours in time: median (lowest ... highest). `stream` is balanced-v1's lowering of dense leaves, `elements` the one of
leaves that are stored transposed. signed_magnitude sorts all weights to begin with, and is left out above 20 million.
"""

import itertools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.measure import Table, in_turn, keep_freed_memory, ratios, save, spread
from experiments.command import run_command
from gpart_jax import canonical_layout, gpart_transform, make_partition

LOWERINGS = {
    "balanced-v1, stream": "balanced-v1",
    "balanced-v1, elements": "balanced-v1",
    "splitmix64": "splitmix64",
    "signed_magnitude": "signed_magnitude",
}


def weights(size: int, dtype) -> list[jax.Array]:
    """Square matrices of about so many numbers in all."""
    side = 768 if size < 64e6 else 2048
    count = max(1, round(size / side**2))
    # 16 million numbers, over and over: to draw 256 million takes longer than all the rest.
    drawn = np.random.default_rng(0).standard_normal(2**24, np.float32)
    return [jnp.asarray(np.resize(np.roll(drawn, n), (side, side)), dtype) for n in range(count)]


def programs(params, theta, partition, dropout):
    """The four compiled functions that are compared, of their arguments."""
    key = jax.random.key(0)

    def adapt(partition, theta, params):
        return gpart_transform(params, theta, partition=partition, dropout=dropout, key=key)

    def pull_back(partition, theta, cotangent):
        return jax.vjp(lambda theta: adapt(partition, theta, params), theta)[1](cotangent)[0]

    forward = jax.jit(adapt)
    backward = jax.jit(pull_back)
    copy = jax.jit(lambda params: [leaf + 1 for leaf in params])
    total = jax.jit(lambda params: sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in params))
    return {
        "copy": lambda: copy(params),
        "forward": lambda: forward(partition, theta, params),
        "sum": lambda: total(params),
        "vjp": lambda: backward(partition, theta, params),
    }


def kept(params, theta, partition) -> int:
    """Bytes that jax.vjp keeps from forward to backward, the partition's own tables included."""
    pull = jax.eval_shape(lambda theta, p: jax.vjp(lambda t: gpart_transform(params, t, partition=p), theta)[1], theta, partition)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))


def main(_):
    keep_freed_memory()
    options = flags.FLAGS
    print(f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s)\n")
    table = Table("lowering", "dtype", "dropout", "N", "d", "copy, ms", "forward / copy", "sum, ms", "VJP / sum", "kept, bytes")
    figures = []
    for size in map(int, options.sizes):
        for dtype in options.dtypes:
            params = weights(size, dtype)
            n = sum(leaf.size for leaf in params)
            for d, dropout in itertools.product(map(int, options.ds), map(float, options.dropouts)):
                for name in options.lowerings:
                    if d > n or (name == "signed_magnitude" and n > 20e6):
                        continue
                    theta = jnp.asarray(np.random.default_rng(1).standard_normal(d), jnp.float32)
                    layout = canonical_layout(params, transposed="." if name.endswith("elements") else None)
                    partition = jax.device_put(make_partition(layout, d, 42, scheme=LOWERINGS[name], params=params))
                    seconds = in_turn(programs(params, theta, partition, dropout), options.repeats)
                    forward = ratios(seconds["forward"], seconds["copy"])
                    backward = ratios(seconds["vjp"], seconds["sum"])
                    size_kept = kept(params, theta, partition)
                    table.add(
                        name, dtype, dropout, f"{n:,}", f"{d:,}", f"{1e3 * statistics.median(seconds['copy']):.2f}", spread(forward),
                        f"{1e3 * statistics.median(seconds['sum']):.2f}", spread(backward), f"{size_kept:,}",
                    )  # fmt: skip
                    figures.append(
                        {"lowering": name, "dtype": dtype, "dropout": dropout, "n": n, "d": d, "kept": size_kept, "seconds": seconds}
                    )
                    save(table, figures=figures)


if __name__ == "__main__":
    flags.DEFINE_list("sizes", [2**20, 14_155_776, 2**26, 2**28], "Numbers of adapted weights, N.")
    flags.DEFINE_list("ds", [256, 4096, 23_040, 2**20], "Lengths of theta.")
    flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of the weights.")
    flags.DEFINE_list("dropouts", [0.0, 0.1], "Rates of dropout on P theta.")
    flags.DEFINE_multi_enum("lowerings", list(LOWERINGS), list(LOWERINGS), "Which; repeat the flag for several.")
    flags.DEFINE_integer("repeats", 9, "How often each call is timed.", lower_bound=1)
    run_command(main)
