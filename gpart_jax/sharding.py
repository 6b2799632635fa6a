"""Meshes, where params and batches lie on them, and a gradient that costs one all-reduce of the trained numbers.

A mesh always has three axes: "data" (each device its own examples), "fsdp" (its own examples, and a shard of the frozen
weights) and "tensor" (the same examples, a part of each matrix). Left alone, jit reduces the gradient of every adapted
weight over the mesh before P^T sums it into d groups. In `value_and_grad` each device first sums its part of the weights'
gradient, for its own examples, into its own copy of the trained numbers; the copies' sum is the one all-reduce.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpart_jax.targets import Params, PyTree, named_leaves, replace_leaves

if TYPE_CHECKING:
    from gpart_jax.methods import Method  # which imports this module

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
LEAVES = "params"  # what a trainable calls leaves of the model that are trained whole, as many as there are

Rules = Sequence[tuple[str, P]]
VIT: Rules = (
    (r"/(query|key|value|intermediate)/kernel$", P("fsdp", "tensor")),
    (r"/(out|output)/kernel$", P("tensor", "fsdp")),
)
ENCODER: Rules = (*VIT, (r"embeddings/word/", P("tensor", "fsdp")))
DECODER_TIED: Rules = (  # layers are stacked along axis 0; the embedding is the output layer too
    (r"^layers/.*/(query|key|value|gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"^layers/.*/(out|down)/kernel$", P(None, "tensor", "fsdp")),
    (r"^embed/", P("tensor", "fsdp")),
)
DECODER: Rules = (*DECODER_TIED, (r"^lm_head/", P("fsdp", "tensor")))


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence | None = None) -> Mesh:
    """A mesh of the axes "data", "fsdp" and "tensor".

    Args:
      sizes: of the axes; an absent one is 1, and -1, for one axis, is all the devices that the others leave. None: all
        devices along "data".
      devices: all of them by default, of every process.

    Raises:
      ValueError: an unknown axis, or sizes whose product isn't the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": -1} if sizes is None else dict(sizes)
    if unknown := sizes.keys() - set(AXES):
        raise ValueError(f"Unknown mesh axis {sorted(unknown)[0]!r}. The axes are {', '.join(AXES)}.")
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    shown = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ValueError(f"Mesh sizes must be positive, and at most one of them -1 (the rest), not {shown}.")
    given = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % given or (-1 not in sizes.values() and given != len(devices)):
        raise ValueError(
            f"A mesh of {shown} doesn't divide {len(devices)} devices: the sizes' product must be their number. "
            f"Change one, or make it -1 (the rest)."
        )
    shape = tuple(len(devices) // given if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, AXES, (jax.sharding.AxisType.Auto,) * 3, devices=devices)


def param_shardings(params: PyTree, mesh: Mesh, rules: Rules = ()) -> PyTree:
    """A `NamedSharding` for each leaf of params: that of the first rule whose pattern is found in its path.

    An axis that doesn't divide a leaf's dimension is left out there; a leaf without a rule lies whole on every device.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s.
      rules: (pattern, spec) pairs such as `ENCODER`; a spec names "fsdp" and "tensor" at most once each.

    Raises:
      ValueError: a rule that matches no leaf, or one with more axes than its leaf.
    """
    leaves = dict(named_leaves(params))
    for pattern, _ in rules:
        if not any(re.search(pattern, path) for path in leaves):
            some = ", ".join(repr(path) for path in list(leaves)[:: max(1, len(leaves) // 4)][:4])
            raise ValueError(f"Sharding rule {pattern!r} matches no parameter. Paths look like: {some}.")

    def sharding_of(path, leaf):
        spec = next((spec for pattern, spec in rules if re.search(pattern, path)), P())
        if len(spec) > len(leaf.shape):
            raise ValueError(f"Sharding rule {spec} has more axes than {path!r}, of shape {leaf.shape}.")
        divides = [
            bool(axis) and mesh.shape[axis] > 1 and not n % mesh.shape[axis] for axis, n in zip(spec, leaf.shape)
        ]
        kept = [axis if divided else None for axis, divided in zip(spec, divides)]
        return NamedSharding(mesh, P(*kept))

    return replace_leaves(params, {path: sharding_of(path, leaf) for path, leaf in leaves.items()})


def of_trained(trainable: PyTree, shardings: PyTree) -> PyTree:
    """Where a trainable lies: whole leaves of the model, as `full` trains them, as those do; all else on every device.

    Args:
      trainable: of a `Method`, or what has its structure.
      shardings: of the frozen params.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    leaves = {path: sharding for path, sharding in named_leaves(shardings)}
    placed = jax.tree.map(lambda _: NamedSharding(mesh, P()), trainable)
    return placed | ({LEAVES: {path: leaves[path] for path in trainable[LEAVES]}} if LEAVES in trainable else {})


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Puts host arrays, of which every process holds the whole, onto the mesh. `shardings`: a tree, or one for all.

    What lies there already stays.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def put(x, sharding):
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """`place` with the whole on every device."""
    return place(tree, NamedSharding(mesh, P()))


def fetch(tree: PyTree) -> PyTree:
    """The whole of every leaf on the host, the inverse of `place`. Under several processes all call it, and all get it."""

    def get(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(get, tree)


def on_first_process(write: Callable[[], None]) -> None:
    """Calls `write` in the first process alone, and returns in all when it is done. All processes call it.

    Raises:
      RuntimeError: in the others, where it failed; the first raises what it raised.
    """
    error = None
    if jax.process_index() == 0:
        try:
            write()
        except Exception as raised:  # the others wait, and are told
            error = raised
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
        if failed and jax.process_index() != 0:
            raise RuntimeError("The first process could not write. Its log says why.")
    if error is not None:
        raise error


def data_part(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which of how many equal parts of every batch this process feeds.

    Processes whose devices hold the same rows ("tensor" reaches over them) have the same index.
    """
    owners = [{device.process_index for device in row} for row in mesh.devices.reshape(-1, mesh.shape["tensor"])]
    mine = [number for number, processes in enumerate(owners) if jax.process_index() in processes]
    index, count = mine[0] // len(mine), len(owners) // len(mine)
    if mine != list(range(index * len(mine), (index + 1) * len(mine))):
        raise ValueError("This process's devices hold no contiguous rows of a batch. Give make_mesh devices in order.")
    return index, count


def check_batch(name: str, rows: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises a ValueError if a batch of so many rows can't be divided evenly over "data" and "fsdp"."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (shards * accumulate):
        parts = f" times {accumulate} parts (accumulate)" if accumulate > 1 else ""
        raise ValueError(
            f"{name} = {rows} doesn't divide over the mesh: it must be a multiple of {shards * accumulate} "
            f"(data {mesh.shape['data']} times fsdp {mesh.shape['fsdp']}{parts})."
        )


def global_batch(batch: dict, mesh: Mesh) -> dict:
    """The global arrays of a batch of which each process holds its `data_part`: row-sharded over "data" and "fsdp"."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def value_and_grad(loss: Callable, method: "Method", shardings: PyTree, accumulate: int = 1) -> Callable:
    """As `jax.value_and_grad`, with respect to what a method trains, at the cost of one all-reduce of so many numbers.

    Weights that "fsdp" shards are gathered for use, layer by layer in a model that scans its layers, and never reduced;
    the adapted weights are formed where they lie.

    Args:
      loss: loss(adapt, frozen, batch, key) -> float32 (), the mean over the rows of a batch. `adapt(params)` gives the
        adapted whole of params, or of a part of them; `adapt({"layers": slices}, layer=index)` of one layer in a scan.
        `key` is None, or drives the model's own dropout.
      method: a `Method`, whose trainable lies as `of_trained` says: replicated, but for whole leaves of the model. The gradient
        of those is reduced to where they lie, as in any training under `jit`.
      shardings: of the frozen params, from `param_shardings`.
      accumulate: so many parts of each device's rows go through the model one after another, to need less memory.

    Returns:
      f(trainable, frozen, batch, key=None, tables=None) -> (value, gradient), for use under `jax.jit`. `batch` is a dict
      of arrays with the same rows first; the loss finds each row's number in the whole batch as `batch["row"]`, int (rows,),
      to draw its dropout by, whatever the mesh: yours, or else its place. `key` turns on dropout, the method's and the model's;
      `tables` are `method.tables(params)`, replicated, which are otherwise constants of the program.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    shards = mesh.shape["data"] * mesh.shape["fsdp"]

    def on_leaves(trainable, frozen, batch, key, tables):
        def plain_loss(trainable, batch, key):
            method_key, model_key = (None, None) if key is None else jax.random.split(key)
            return loss(method.bind(frozen, trainable, method_key, False, tables, batch["row"]), frozen, batch, model_key)

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            value, gradient = in_parts(plain_loss, accumulate, shards)(trainable, batch, key)
        return value, jax.lax.with_sharding_constraint(gradient, of_trained(gradient, shardings))

    def compute(trainable, frozen, batch, key=None, tables=None):
        rows = len(jax.tree.leaves(batch)[0])
        check_batch("The batch", rows, mesh, accumulate)
        batch = {"row": jnp.arange(rows)} | batch
        if LEAVES in trainable:
            return on_leaves(trainable, frozen, batch, key, tables)
        flat, unravel = ravel_pytree(trainable)

        def local(copies, bind, frozen, batch, key):  # copies: (T, n)
            def local_loss(copies, batch, key):
                method_key, model_key = (None, None) if key is None else jax.random.split(key)
                return loss(bind(jax.vmap(unravel)(copies), method_key, batch["row"]), frozen, batch, model_key)

            value, gradient = in_parts(local_loss, accumulate)(copies, batch, key)
            return value[None], gradient

        run = _on_own_rows(local, method, shardings)
        values, gradients = run(flat, frozen, tables, batch, key)
        return values.mean(), unravel(gradients.sum(0) / shards)

    return compute


def of_rows(function: Callable, method: "Method", shardings: PyTree) -> Callable:
    """What a model gives for each row of a batch, at the memory of `value_and_grad`: for evaluation.

    Args:
      function: function(adapt, frozen, batch) -> an array with the batch's rows first, or a tree of such; as a `loss`.
      method, shardings: as in `value_and_grad`.

    Returns:
      f(trainable, frozen, batch, tables=None) -> what function gives, its rows divided as the batch's. For use under `jax.jit`.
    """

    mesh = jax.tree.leaves(shardings)[0].mesh

    def compute(trainable, frozen, batch, tables=None):
        if LEAVES in trainable:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(method.bind(frozen, trainable, None, False, tables), frozen, batch)
        flat, unravel = ravel_pytree(trainable)

        def local(copies, bind, frozen, batch, key):
            return function(bind(jax.vmap(unravel)(copies), key), frozen, batch)

        return _on_own_rows(local, method, shardings)(flat, frozen, tables, batch, None)

    return compute


def _on_own_rows(local: Callable, method: "Method", shardings: PyTree) -> Callable:
    """`local` on each device along "data" and "fsdp", for its rows and with copies of the trained numbers that are its own."""
    mesh = jax.tree.leaves(shardings)[0].mesh
    gather, on_fsdp = gatherer(shardings), fsdp_specs(shardings)

    def run(flat, frozen, tables, batch, key):
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), frozen, shardings)
        copies = jnp.broadcast_to(flat, (mesh.size, flat.size))
        copies = jax.lax.with_sharding_constraint(copies, NamedSharding(mesh, P(AXES)))  # one for each device

        def on_device(copies, frozen, tables, batch, key):
            def bind(trainable, key, rows=None):
                bound = method.bind(like, trainable, key, True, tables, rows)
                return lambda params, layer=None: bound(gather(params, layer), layer)

            return local(copies, bind, frozen, batch, key)

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(BATCH, on_fsdp, P(), BATCH, P()),
            out_specs=BATCH,
            axis_names={"data", "fsdp"},
            check_vma=False,
        )(copies, frozen, tables, batch, key)

    return run


def in_parts(loss: Callable, accumulate: int, shards: int = 1) -> Callable:
    """f(trained, batch, key) -> (value, gradient) of loss(trained, batch, key), the mean over the rows of a batch.

    The batch goes through in so many equal parts, one after another, each with dropout of its own. A part has as many rows of
    each of the batch's `shards`.
    """

    def compute(trained, batch, key):
        if accumulate == 1:
            return jax.value_and_grad(loss)(trained, batch, key)

        def add(total, part):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(trained, *part)), None

        def part(x):
            by_shard = x.reshape(shards, accumulate, -1, *x.shape[1:])
            return by_shard.swapaxes(0, 1).reshape(accumulate, -1, *x.shape[1:])

        parts = jax.tree.map(part, batch)
        keys = None if key is None else jax.random.split(key, accumulate)
        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
        total, _ = jax.lax.scan(add, zeros, (parts, keys))
        return jax.tree.map(lambda x: x / accumulate, total)

    return compute


def over_tensor(function: Callable, out_specs: PyTree) -> Callable:
    """`function` on each device's part along "tensor", within `value_and_grad`. Takes (argument, spec) pairs.

    Not for AD, which doesn't pass through nested shard_maps under `jax.checkpoint`.
    """

    def call(*pairs):
        args, specs = zip(*pairs)
        return jax.shard_map(function, in_specs=specs, out_specs=out_specs, axis_names={"tensor"}, check_vma=False)(
            *args
        )

    return call


def undivided(x: jax.Array) -> jax.Array:
    """`x` with the hint that each device along "tensor" shall hold all of it; `x` itself where there is no such axis.

    For a model's residual stream. Without it XLA may divide that too, and then has to move weight gradients around.
    """
    axes = jax.sharding.get_abstract_mesh().auto_axes
    rows = tuple(axis for axis in ("data", "fsdp") if axis in axes)
    return jax.lax.with_sharding_constraint(x, P(rows or None)) if "tensor" in axes else x


def tensor_axis(leaf: Any) -> int | None:
    """The axis along which "tensor" divides a leaf with a NamedSharding."""
    spec = tuple(leaf.sharding.spec)
    return spec.index("tensor") if "tensor" in spec else None


@jax.custom_vjp
def one_copy(copies: Params) -> Params:
    """The trained numbers from their equal copies along "tensor", (T, ...). The first copy gets the whole gradient."""
    split = jax.tree.map(lambda _: P("tensor"), copies)
    return over_tensor(lambda x: jax.tree.map(lambda leaf: leaf[0], x), P())((copies, split))


def _one_copy_backward(count, cotangent):
    def local(cotangent, device):
        return jax.tree.map(lambda g: jnp.where(device == 0, g, 0)[None], cotangent)

    everywhere, split = (jax.tree.map(lambda _: spec, cotangent) for spec in (P(), P("tensor")))
    return (over_tensor(local, split)((cotangent, everywhere), (jnp.arange(count), P("tensor"))),)


one_copy.defvjp(lambda copies: (one_copy(copies), len(jax.tree.leaves(copies)[0])), _one_copy_backward)


def fsdp_specs(shardings: PyTree) -> PyTree:
    """Of each leaf, where "fsdp" divides it: for a shard_map over "data" and "fsdp"."""
    return jax.tree.map(lambda s: P(*[axis if axis == "fsdp" else None for axis in s.spec]), shardings)


def gatherer(shardings: PyTree) -> Callable:
    """gather(params, layer=None), within such a shard_map: the leaves that "fsdp" shards, whole along it. Without a derivative."""
    by_path = dict(named_leaves(shardings))

    def gather(params, layer=None):
        sharded = {}
        for path, leaf in named_leaves(params):
            spec = tuple(by_path[path].spec)[layer is not None :]
            if "fsdp" in spec:
                sharded[path] = leaf, spec.index("fsdp"), P(*[axis if axis == "tensor" else None for axis in spec])
        if not sharded:
            return params

        # Left to XLA alone, a gather in a region that is manual over some axes makes the others' parts whole too.
        def local(shards):
            return {
                path: jax.lax.all_gather(x, "fsdp", axis=sharded[path][1], tiled=True) for path, x in shards.items()
            }

        specs = {path: spec for path, (_, _, spec) in sharded.items()}
        leaves = {path: jax.lax.stop_gradient(leaf) for path, (leaf, _, _) in sharded.items()}
        return replace_leaves(params, over_tensor(local, specs)((leaves, specs)))

    return gather
