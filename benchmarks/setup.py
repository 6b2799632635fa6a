"""Seconds to make the partition of a model's attention matrices from shapes alone; no weight is at hand.

  python -m benchmarks.setup --model=meta-llama/Llama-3.1-8B

Tables are what is kept of a partition, and passed to compiled programs.
"""

import time

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks.measure import Table, save
from experiments.command import run_command
from gpart_jax import canonical_layout, make_partition
from gpart_jax.models import published
from gpart_jax.models.decoder import Decoder, DecoderConfig

ATTENTION = r"attention/(query|key|value|out)/kernel$"


def main(_):
    model = Decoder(DecoderConfig.from_hf(published.CONFIGS[flags.FLAGS.model]))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    start = time.perf_counter()
    params = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)["params"]
    shapes = time.perf_counter() - start
    start = time.perf_counter()
    layout = canonical_layout(params, ATTENTION, stacked="^layers")
    print(f"{flags.FLAGS.model}, {ATTENTION}: N = {layout.size:,}; shapes {shapes:.1f} s, layout "
          f"{time.perf_counter() - start:.3f} s\n")  # fmt: skip
    table = Table("scheme", "d", "seconds", "tables, bytes")
    for scheme, ds in (("balanced-v1", flags.FLAGS.ds), ("splitmix64", flags.FLAGS.ds[:1])):
        for d in map(int, ds):
            start = time.perf_counter()
            partition = make_partition(layout, d, 42, scheme=scheme)
            seconds = time.perf_counter() - start
            table.add(scheme, f"{d:,}", f"{seconds:.3f}", f"{sum(x.nbytes for x in jax.tree.leaves(partition)):,}")
    save(table, n=layout.size)


if __name__ == "__main__":
    flags.DEFINE_enum("model", "meta-llama/Llama-3.1-8B", [k for k, c in published.CONFIGS.items()
                      if c["model_type"] not in ("vit", "roberta", "bert")], "Whose shapes.")  # fmt: skip
    flags.DEFINE_list(
        "ds", [23_040, 256, 524_288], "Lengths of theta; splitmix64, which counts all N, has the first alone."
    )
    run_command(main)
