"""Is P theta right on this device? Every scheme and path against NumPy, in float32 and bfloat16.

  python -m benchmarks.check

Paths: `leaves`, dense leaves as they are; `elements`, leaves stored transposed, element by element; `layers`, stacked leaves layer
by layer in a scan; `mesh`, `sharding.value_and_grad` over all devices. For each, these checks:

  P theta       added to zeros: equal to NumPy's, to the bit
  W + P theta   within one rounding of the exact sum to the leaf's dtype
  P^T exact     of whole numbers, whose sums float32 holds exactly, without the scale: equal to NumPy's, to the bit
  P^T           of drawn numbers: the largest error, in millionths of the sum of the group's absolute values; at most 2
  kernels       on a TPU, paths `leaves` and `layers`, with dropout: the same as by XLA's own operations; P theta to the bit, the two
                sums within the same bound

Ends with code 1 if a check fails.
"""

import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import PartitionSpec as P

from benchmarks.measure import Table, save
from experiments.command import run_command
from gpart_jax import canonical_layout, gpart, gpart_transform, make_partition, sharding, transform
from gpart_jax.partition import SCHEMES, SIGNED_MAGNITUDE, group_ids

PATHS = ("leaves", "elements", "layers", "mesh")
RULES = [(r"query$", P(None, "fsdp", "tensor")), (r"value$", P(None, "tensor", "fsdp"))]
MOST = 2e-6  # of the sum of absolute values: float32's sums stay below, those of shortened numbers don't


def draw(layers: int, width: int, dtype) -> dict:
    random = np.random.default_rng(0)
    shapes = {"layers": {"query": (layers, width, width // 2), "value": (layers, width // 2, width)}, "last": (width, 130)}
    return jax.tree.map(lambda s: jnp.asarray(random.standard_normal(s), dtype), shapes, is_leaf=lambda s: type(s) is tuple)


def groups_of(partition) -> dict[str, np.ndarray]:
    """The group of each element, by NumPy, from the definition."""
    (region,), found = partition.regions, {}
    for leaf in partition.layout.leaves:
        steps = (np.arange(n).reshape([-1] + [1] * (len(leaf.shape) - 1 - k)) * s for k, (n, s) in enumerate(zip(leaf.shape, leaf.strides)))  # fmt: skip
        index = leaf.offset + functools.reduce(np.add, steps)
        held = region.scheme == SIGNED_MAGNITUDE
        found[leaf.path] = partition.keys[0][leaf.path] if held else group_ids(region.scheme, region.d, 42, index, partition.permutations[0])
    return found


def by_path(tree) -> dict[str, np.ndarray]:
    return {"/".join(str(key.key) for key in keys): np.asarray(x) for keys, x in jax.tree_util.tree_leaves_with_path(tree)}


def adapter(path: str, **options):
    """adapt(partition, theta, params) -> adapted params, by one of the first three paths."""

    def adapt(partition, theta, params):
        if path != "layers":
            return gpart_transform(params, theta, partition=partition, **options)
        bound = transform.bind(partition, theta, **options)

        def one(_, numbered):
            number, slices = numbered
            return None, bound({"layers": slices}, layer=number)["layers"]

        count = len(params["layers"]["query"])
        layers = jax.lax.scan(one, None, (jnp.arange(count), params["layers"]))[1]
        return bound({"last": params["last"]}) | {"layers": layers}

    return adapt


def run(path: str, partition, theta, params, integers, drawn, options: dict):
    """(P theta, W + P theta, P^T of integers without the scale, P^T of drawn) on the device."""
    unscaled = dataclasses.replace(partition, scales=(np.ones_like(partition.scales[0]),))
    zeros = jax.tree.map(jnp.zeros_like, params)
    if path != "mesh":
        adapt = adapter(path)

        def transpose(partition, cotangent):
            return jax.vjp(lambda theta: adapt(partition, theta, zeros), theta)[1](cotangent)[0]

        def all_four(partition, unscaled):
            forward = adapt(partition, theta, zeros), adapt(partition, theta, params)
            return *forward, transpose(unscaled, integers), transpose(partition, drawn)

        return jax.jit(all_four)(partition, unscaled)

    count = jax.device_count()
    mesh = sharding.make_mesh({"data": -1, "tensor": 1 if count % 2 else 2})
    shardings = sharding.param_shardings(params, mesh, RULES)
    method = gpart(theta.size, 42, **options)

    def gradient(cotangent, partition):
        def loss(adapt, frozen, batch, key):
            weights = adapt(frozen)
            products = jax.tree.map(lambda w, g: jnp.sum(w.astype(jnp.float32) * g.astype(jnp.float32)), weights, cotangent)
            return sum(jax.tree.leaves(products)) + 0 * batch["x"].mean()

        step = jax.jit(sharding.value_and_grad(loss, method, shardings))
        batch = sharding.global_batch({"x": np.zeros(count, np.float32)}, mesh)
        trainable, tables = sharding.replicate(({"theta": theta}, partition.tables), mesh)
        return step(trainable, sharding.place(params, shardings), batch, None, tables)[1]["theta"]

    apply = jax.jit(method.apply, out_shardings=shardings)
    trainable, tables = sharding.replicate(({"theta": theta}, partition.tables), mesh)
    forward = [apply(sharding.place(tree, shardings), trainable, None, tables) for tree in (zeros, params)]
    return *forward, gradient(integers, unscaled), gradient(drawn, partition)


def kernels(path: str, partition, theta, zeros, drawn, magnitude) -> str:
    """The last cell of a row."""
    if jax.default_backend() != "tpu" or path not in ("leaves", "layers"):
        return "none here"

    def both(kernels):
        adapt = adapter(path, dropout=0.25, key=jax.random.key(5), kernels=kernels)

        @jax.jit
        def run(theta, drawn):
            adapted, pull = jax.vjp(lambda theta: adapt(partition, theta, zeros), theta)
            return adapted, pull(drawn)[0]

        adapted, sums = run(theta, drawn)
        return by_path(adapted), np.asarray(sums, np.float64)

    (ours, sums), (theirs, others) = both(True), both(False)
    unequal = verdict({name: ours[name] != theirs[name] for name in ours})
    far = float(np.max(abs(sums - others) / np.maximum(magnitude, 1e-30)))
    return f"{unequal}; wrong: {1e6 * far:.3f}" if far > MOST else f"{unequal}; {1e6 * far:.3f}"


def verdict(wrong: dict[str, np.ndarray]) -> str:
    count, size = sum(int(x.sum()) for x in wrong.values()), sum(x.size for x in wrong.values())
    return f"wrong in {count:,} of {size:,}" if count else "equal"


def check(path: str, scheme: str, dtype: str, d: int, layers: int, width: int) -> list[str]:
    """The cells of a row."""
    params = draw(layers, width, dtype)
    options = {"scheme": scheme, "stacked": "^layers" if path in ("layers", "mesh") else None}
    layout = canonical_layout(params, stacked=options["stacked"], transposed="." if path == "elements" else None)
    partition = make_partition(layout, d, 42, scheme=scheme, params=params)
    random = np.random.default_rng(1)
    theta = random.standard_normal(d).astype(np.float32)
    integers = jax.tree.map(lambda x: jnp.asarray(random.integers(-8, 9, x.shape), dtype), params)
    drawn = jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), dtype), params)
    added, adapted, exact, contracted = run(path, partition, jnp.asarray(theta), params, integers, drawn, options)

    groups, scale = groups_of(partition), np.asarray(partition.scales[0])
    delta = {name: (theta * scale)[ids] for name, ids in groups.items()}
    added, adapted, weights = by_path(added), by_path(adapted), by_path(params)
    rounded = {name: x.astype(added[name].dtype) for name, x in delta.items()}
    unequal = {name: added[name] != rounded[name] for name in delta}
    eps, eps32 = float(jnp.finfo(dtype).eps), float(np.finfo(np.float32).eps)
    far = {}
    for name, x in delta.items():
        true = weights[name].astype(np.float64) + x
        room = 0.505 * ((eps + eps32) * abs(true) + eps32 * abs(x))  # a compiler may leave out the product's own rounding
        far[name] = ~(abs(adapted[name].astype(np.float64) - true) <= room)

    def sums(tree, of=lambda x: x):
        total = np.zeros(d)
        for name, x in by_path(tree).items():
            total += np.bincount(groups[name].ravel(), of(x.astype(np.float64)).ravel(), d)
        return total

    error = abs(np.asarray(contracted) - sums(drawn) * scale) / np.maximum(sums(drawn, abs) * scale, 1e-30)
    largest = float(np.max(np.where(np.isfinite(error), error, np.inf)))
    last = f"{1e6 * largest:.3f}" if largest <= MOST else f"wrong: {1e6 * largest:.3f}"
    zeros = jax.tree.map(jnp.zeros_like, params)
    own = kernels(path, partition, jnp.asarray(theta), zeros, drawn, sums(drawn, abs) * scale / 0.75)
    return [verdict(unequal), verdict(far).replace("equal", "within"), verdict({"": np.asarray(exact) != sums(integers)}), last, own]


def main(_):
    options = flags.FLAGS
    print(f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s)\n")
    columns = "P theta", "W + P theta", "P^T exact", "P^T, error in millionths", "kernels"
    table, failed = Table("scheme", "path", "dtype", "d", *columns), 0
    schemes = (*SCHEMES, SIGNED_MAGNITUDE)
    for scheme, path, dtype, d in itertools.product(schemes, PATHS, options.dtypes, map(int, options.ds)):
        cells = check(path, scheme, dtype, d, options.layers, options.width)
        table.add(scheme, path, dtype, f"{d:,}", *cells)
        failed += any("wrong" in cell for cell in cells)
        save(table, failed=failed)
    if failed:
        sys.exit(f"{failed} of {len(table.rows)} rows are wrong on this device.")
    print(f"\nAll {len(table.rows)} rows are right.")


if __name__ == "__main__":
    flags.DEFINE_list("ds", [512, 23_040], "Lengths of theta.")
    flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of the weights.")
    flags.DEFINE_integer("layers", 6, "Layers of the stacked leaves.", lower_bound=1)
    flags.DEFINE_integer("width", 512, "Of the matrices; even.", lower_bound=2)
    run_command(main)
