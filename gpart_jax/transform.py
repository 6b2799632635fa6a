"""gpart_transform: frozen params and theta to adapted params, W = W0 + P theta (GPart, arXiv 2605.14841).

P theta is one gather and P^T g one segment sum. For balanced-v1 a dense leaf never looks at single elements: each chunk
of d elements is a rotation of one of 8 tables of scaled theta, so both directions move contiguous runs (`_stream`). Any
other leaf, and splitmix64, computes positions element by element (`slots`) and computes them again on the way back, so
that nothing of N entries is kept from forward to backward.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gpart_jax import partition as partitions
from gpart_jax import uint64
from gpart_jax.partition import Part, Partition, Region
from gpart_jax.sharding import over_tensor
from gpart_jax.targets import Layout, Leaf, Targets, canonical_layout, named_leaves, replace_leaves

_SHORTEST_RUN = 256  # the stream holds the numbers of N / d chunks in the program: from this d on, under 1 % of N


def gpart_transform(
    params,
    theta: jax.Array,
    seed,
    *,
    targets: Targets | Layout = None,
    scheme: str = "balanced-v1",
    scope: str = "global",
    isometric: bool = True,
    dropout: float = 0.0,
    key: jax.Array | None = None,
):
    """Adds P theta to the targeted leaves of a frozen model (arXiv 2605.14841).

    Pure; works under jit, grad (reverse mode), vmap, scan and shard_map. The gradient with respect to theta is P^T of the
    gradient with respect to the adapted weights. P theta has the same bits however it is compiled or sharded; in the sum
    with the frozen weights a compiler may round once instead of twice.

    Args:
      params: any pytree with the frozen weights: Flax Linen params, an NNX State, an Equinox module, plain containers.
      theta: the trained vector, floating-point, shape (d,).
      seed: an int in [0, 2^64) or a concrete two-word `jax.random` key; or a `Partition`, whose tables are then arguments
        of the compiled program instead of constants in it, and which fixes targets, scheme, scope and isometric.
      targets: which leaves to adapt: regular expression(s) searched for in the leaf's path, a predicate `(path, leaf)`,
        a `Layout`, or None for every floating-point leaf. See `canonical_layout`.
      scheme: "balanced-v1", "splitmix64" or "signed_magnitude"; see `partition.py`.
      scope: "global", or "block" for a slice of theta for each numbered block ("transformer_block": with the authors' seeds).
      isometric: scale the columns of P so that P^T P = I.
      dropout: probability with which each entry of P theta is zeroed (the others are divided by 1 - dropout). Needs `key`;
        without a key nothing is dropped.
      key: `jax.random` key of the dropout mask.

    Returns:
      A pytree like `params`. Targeted leaves keep their shape and dtype (the sum is taken in float32 or wider and then
      rounded); every other leaf is the same object.

    Raises:
      ValueError: theta not of shape (d,), d > N, targets that match nothing or something not floating-point, an unknown
        scheme or scope, a Partition made for other leaves, dropout outside [0, 1).
      TypeError: theta not floating-point; a traced seed.
    """
    theta = jnp.asarray(theta)
    if not jnp.issubdtype(theta.dtype, jnp.floating):
        raise TypeError(f"theta must be floating-point, not {theta.dtype}.")
    if theta.ndim != 1:
        raise ValueError(f"theta must have shape (d,), not {theta.shape}. For several thetas use jax.vmap.")
    if isinstance(seed, Partition):
        if targets is not None or (scheme, scope, isometric) != ("balanced-v1", "global", True):
            raise ValueError("A Partition already fixes targets, scheme, scope and isometric. Leave them out.")
        partition = seed
        canonical_layout(params, partition.layout)
    else:
        layout = canonical_layout(params, targets)
        partition = partitions.make_partition(
            layout, theta.shape[0], seed, scheme=scheme, scope=scope, isometric=isometric, params=params
        )

    return bind(partition, theta, dropout, key if dropout else None)(params)


def bind(
    partition: Partition, theta, dropout: float = 0.0, key=None, split: dict[str, int | None] | None = None
) -> Callable:
    """adapt(params, layer=None): `params`, or a part of the model such as one layer's, with P theta added where it belongs.

    Inside a scan over layers `adapt({"layers": slices}, layer=index)` adapts the slices that the body holds of stacked
    leaves, so that only one layer's deltas are alive; `index` may be traced. The tables of theta are made once, here.

    Args:
      partition: of the whole model.
      theta: (d,); with `split`, (T, d): a copy for each of the T devices along the mesh axis "tensor".
      dropout, key: as in `gpart_transform`. Each layer of a stacked leaf has a mask of its own.
      split: for each targeted path the axis along which "tensor" divides the leaf, or None. Each device then makes its own
        part from its own copy of theta, and its copy's gradient from its own part: nothing is communicated, and the copies'
        gradients are yet to be summed.
    """
    if theta.shape[-1] != partition.d:
        raise ValueError(f"theta has shape {theta.shape}, but the partition has d = {partition.d}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout} must be in [0, 1).")
    if key is not None:  # in shard_map, a key that varies over mesh axes makes theta vary over them too
        theta += jnp.zeros_like(jax.random.key_data(key), shape=(), dtype=theta.dtype)
    views: dict[str, list] = {}
    for region, rho, scale, own in zip(partition.regions, partition.permutations, partition.scales, partition.keys):
        scaled = theta[..., region.start : region.start + region.d] * scale  # float32 or wider, as scale is
        table = _table(scaled, rho) if split is None else jax.vmap(_table, (0, None))(scaled, rho)
        for view in region.views:
            key_of = own[view.leaf.path] if isinstance(own, dict) else own
            number = sum(map(len, views.values()))
            mask_key = None if key is None else jax.random.fold_in(key, number)
            views.setdefault(view.leaf.path, []).append((view, region, key_of, table, mask_key))

    def delta(path, layer):
        parts = {}
        for view, region, key_of, table, mask_key in views[path]:
            if layer is not None and not view.leaf.stacked:
                raise ValueError(
                    f"{path!r} can't be adapted layer by layer: that takes scope='global' and a layout that numbers it as "
                    f"stacked (canonical_layout(..., stacked=...)). Otherwise adapt params before the scan."
                )
            if split is None:
                part = _delta(region, view.leaf, key_of, table, layer)
            else:
                axis = split[path]
                if axis is not None and view.layer is not None:  # the view is one layer
                    axis -= 1
                part = _delta_on_mesh(region, view.leaf, axis, key_of, table, layer)
            if mask_key is not None:
                part = _drop_leaf(part, dropout, mask_key, view.leaf.stacked, layer)
            parts[view.layer] = part
        return parts[None] if None in parts else jnp.stack([parts[n] for n in sorted(parts)])

    def adapt(params, layer=None):
        adapted = {}
        for path, leaf in named_leaves(params):
            if path in views:
                adapted[path] = (leaf + delta(path, layer)).astype(leaf.dtype)
                if split is not None:  # and so for its cotangent, which XLA may else make otherwise and then move
                    adapted[path] = jax.lax.with_sharding_constraint(adapted[path], _split_spec(split[path], layer))
        return replace_leaves(params, adapted)

    return adapt


def _table(scaled, rho):
    """The 8 permutations of scaled theta, (8, d); or scaled theta itself as (1, d) where there are none."""
    if not len(rho):
        return scaled[None]
    # A copy of theta for each row makes every index of the transposed scatter unique, hence the sum reproducible.
    rows = jnp.broadcast_to(scaled, rho.shape)
    return jax.vmap(lambda row, order: row.at[order].get(unique_indices=True, mode="promise_in_bounds"))(rows, rho)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _delta(region: Region, leaf: Leaf, key, table, layer):
    """`expand` with its transpose, and nothing kept from forward to backward."""
    return expand(region, leaf, key, table, layer)


def _delta_forward(region, leaf, key, table, layer):
    return expand(region, leaf, key, table, layer), (key, layer)


def _delta_backward(region, leaf, residuals, cotangent):
    key, layer = residuals
    return None, contract(region, leaf, key, cotangent, layer), None


_delta.defvjp(_delta_forward, _delta_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _delta_on_mesh(region: Region, leaf: Leaf, axis: int | None, key, tables, layer):
    """`_delta` where each device along "tensor" makes its part along `axis` from its own of the tables, (T, 8, d)."""

    def local(key, table, device, layer):  # (2,), (1, 8, d), (1,)
        return expand(region, leaf, key, table[0], layer, _part(leaf, layer, axis, device[0], len(tables)))

    return over_tensor(local, out_specs=_split_spec(axis, layer))(
        (key, P()), (tables, P("tensor")), _devices(len(tables)), (layer, P())
    )


def _delta_on_mesh_forward(region, leaf, axis, key, tables, layer):
    return _delta_on_mesh(region, leaf, axis, key, tables, layer), (key, layer, len(tables))


def _delta_on_mesh_backward(region, leaf, axis, residuals, cotangent):
    key, layer, count = residuals

    def local(key, cotangent, device, layer):
        total = contract(region, leaf, key, cotangent, layer, _part(leaf, layer, axis, device[0], count))
        if axis is None:  # all devices hold the same: it counts once
            total = jnp.where(device[0] == 0, total, 0)
        return total[None]

    args = (key, P()), (cotangent, _split_spec(axis, layer)), _devices(count), (layer, P())
    return None, over_tensor(local, out_specs=P("tensor"))(*args), None


_delta_on_mesh.defvjp(_delta_on_mesh_forward, _delta_on_mesh_backward)


def _devices(count):
    # Their numbers come as an argument: `axis_index` doesn't lower in a nested shard_map.
    return jnp.arange(count), P("tensor")


def _split_spec(axis, layer):
    return P() if axis is None else P(*[None] * (axis - (layer is not None)), "tensor")


def _part(leaf: Leaf, layer, axis, device, devices) -> Part | None:
    if axis is None:
        return None
    size = leaf.shape[axis] // devices
    return axis - (layer is not None), device * size, size


def expand(region: Region, leaf: Leaf, key, table, layer=None, part: Part | None = None):
    """The entries of P theta in a leaf, from its region's table, (8, d) or (1, d). Not for AD: its transpose is `contract`.

    Args:
      key: the region's, from `Partition.keys`.
      layer: of a stacked leaf that layer alone, without the layer axis. May be traced.
      part: (axis, start, length): that slice alone, of the leaf or of its layer. The start may be traced.
    """
    runs = _runs(region, leaf, key, layer)
    if not runs:
        return table.reshape(-1)[partitions.slots(region, leaf, layer, part, key)]
    delta = _stream(region, runs, table).reshape(leaf.shape if layer is None else leaf.shape[1:])
    if part is None:
        return delta
    axis, start, length = part
    return jax.lax.dynamic_slice_in_dim(delta, start, length, axis)


def contract(region: Region, leaf: Leaf, key, cotangent, layer=None, part: Part | None = None):
    """The transpose of `expand`: adds up a cotangent of its result's shape in the slots of the table, (8, d) or (1, d)."""
    runs = _runs(region, leaf, key, layer)
    if not runs:
        slots = partitions.slots(region, leaf, layer, part, key).reshape(-1)
        rows = partitions.TABLES if region.scheme == "balanced-v1" else 1
        total = jnp.zeros_like(cotangent, shape=(rows * region.d,)).at[slots].add(cotangent.reshape(-1))
        return total.reshape(rows, region.d)
    if part is not None:  # in its place among zeros: to stream those is cheaper than to look at elements
        axis, start, _ = part
        whole = jnp.zeros_like(cotangent, shape=leaf.shape if layer is None else leaf.shape[1:])
        cotangent = jax.lax.dynamic_update_slice_in_dim(whole, cotangent, start, axis)
    return _stream_transpose(region, runs, cotangent)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _drop(x, rate: float, key):
    """Zeroes each entry with probability `rate` and divides the others by 1 - rate. Keeps no mask: it is drawn again."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


_drop.defvjp(lambda x, rate, key: (_drop(x, rate, key), key), lambda rate, key, g: (_drop(g, rate, key), None))


def _drop_leaf(x, rate, key, stacked, layer):
    """`_drop` of a leaf, or of one layer; a layer's mask is the same whether it comes alone or with the others."""
    if layer is not None:
        return _drop(x, rate, jax.random.fold_in(key, layer))
    if stacked:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(x)))
        return jax.vmap(_drop, (0, None, 0))(x, rate, keys)
    return _drop(x, rate, key)


class _Runs(NamedTuple):
    """Equally long runs of consecutive indices, as the chunks that cover them."""

    length: int  # elements in a run
    skips: Sequence  # per run: elements of its first chunk that lie before it
    tables: tuple  # per chunk, run after run: table number and rotation, int32
    chunks: int  # chunks taken for each run


def _runs(region: Region, leaf: Leaf, key, layer) -> _Runs | None:
    """How to stream a leaf, or one of its layers; None where its elements must be looked at one by one."""
    if region.scheme != "balanced-v1" or region.d < _SHORTEST_RUN or not leaf.size:
        return None
    pieces = [leaf] if leaf.is_dense and layer is None else leaf.layers()
    if not all(piece.is_dense for piece in pieces):
        return None
    first, skips = np.divmod(np.array([piece.offset for piece in pieces], np.uint64), np.uint64(region.d))
    skips = skips.astype(np.int32)
    length = pieces[0].size
    chunks = -(-(int(skips.max()) + length) // region.d)
    numbers = first[:, None] + np.arange(chunks, dtype=np.uint64)
    numbers = uint64.split(numbers)  # (runs, chunks) each
    if layer is not None:
        numbers = tuple(jax.lax.dynamic_index_in_dim(half, layer) for half in numbers)
        skips = jax.lax.dynamic_index_in_dim(skips, layer)
    tables = partitions.chunks_in_program(region, key, numbers)
    return _Runs(length, skips, tuple(table.reshape(-1) for table in tables), chunks)


def _stream(region: Region, runs: _Runs, table):
    """Runs of P theta, shape (runs, length): slice after slice of the tables, each twice in a row to make rotation a slice."""
    doubled = jnp.concatenate([table, table], axis=1)

    def take(_, chunk):
        return None, jax.lax.dynamic_slice(doubled, chunk, (1, region.d))[0]

    _, rows = jax.lax.scan(take, None, runs.tables)  # (runs * chunks, d)
    rows = rows.reshape(len(runs.skips), -1)
    return jnp.stack([jax.lax.dynamic_slice(row, (skip,), (runs.length,)) for row, skip in zip(rows, runs.skips)])


def _stream_transpose(region: Region, runs: _Runs, cotangent):
    """The transpose: each chunk of the cotangent is added to the slice of the table that it was read from."""
    d = region.d
    zeros = jnp.zeros_like(cotangent, shape=(runs.chunks * d,))
    rows = [
        jax.lax.dynamic_update_slice(zeros, row, (skip,))
        for row, skip in zip(cotangent.reshape(len(runs.skips), -1), runs.skips)
    ]

    def add(total, chunk_and_row):
        chunk, row = chunk_and_row
        part = jax.lax.dynamic_slice(total, chunk, (1, d))
        return jax.lax.dynamic_update_slice(total, part + row, chunk), None

    zeros = jnp.zeros_like(cotangent, shape=(partitions.TABLES, 2 * d))
    total, _ = jax.lax.scan(add, zeros, (runs.tables, jnp.stack(rows).reshape(-1, d)))
    return total[:, :d] + total[:, d:]
