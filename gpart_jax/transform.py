"""gpart_transform: frozen params and theta to adapted params, W = W0 + P theta (GPart, arXiv 2605.14841).

P theta is one gather and P^T g one segment sum. For balanced-v1, with d from 256 on, a dense leaf never looks at single
elements: each chunk of d elements is a rotation of one of 8 tables of scaled theta, so both directions move contiguous runs
(`stream.py`). Any other leaf, and splitmix64, computes positions element by element (`slots`) and computes them again on the
way back, so that nothing of N entries is kept from forward to backward. signed_magnitude alone holds N positions.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from gpart_jax import partition as partitions
from gpart_jax import stream
from gpart_jax.partition import Part, Partition, Region
from gpart_jax.sharding import over_tensor
from gpart_jax.targets import Array, Layout, Leaf, Params, Targets, canonical_layout, named_leaves, replace_leaves

_PIECE = 2**20  # so many positions of elements are held at once


def gpart_transform(
    params: Params,
    theta: ArrayLike,
    seed: int | jax.Array | Partition,
    *,
    targets: Targets | Layout = None,
    scheme: str = "balanced-v1",
    scope: str = "global",
    isometric: bool = True,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> Params:
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
    partition: Partition,
    theta: jax.Array,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    split: dict[str, int | None] | None = None,
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
    parts, number = [], 0
    for region, rho, scale, own in zip(partition.regions, partition.permutations, partition.scales, partition.keys):
        scaled = theta[..., region.start : region.start + region.d] * scale  # float32 or wider, as scale is
        table = _table(scaled, rho) if split is None else jax.vmap(_table, (0, None))(scaled, rho)
        mask_keys = {}
        for view in region.views:
            mask_keys[view] = None if key is None else jax.random.fold_in(key, number)
            number += 1
        parts.append((region, own, table, mask_keys))

    def adapt(params, layer=None):
        leaves = dict(named_leaves(params))
        deltas: dict[str, dict] = {}
        for region, own, table, mask_keys in parts:
            views = [view for view in region.views if view.leaf.path in leaves]
            for view in views:
                if layer is not None and not view.leaf.stacked:
                    raise ValueError(
                        f"{view.leaf.path!r} can't be adapted layer by layer: that takes scope='global' and a layout that numbers "
                        f"it as stacked (canonical_layout(..., stacked=...)). Otherwise adapt params before the scan."
                    )
            if not views:
                continue
            these = tuple(view.leaf for view in views)
            keys = tuple(own[leaf.path] if isinstance(own, dict) else own for leaf in these)
            if split is None:
                new = _deltas(region, these, keys, table, layer)
            else:  # a view that is one layer of a stacked leaf has an axis less
                along = (split[view.leaf.path] for view in views)
                axes = tuple(a if a is None else a - (v.layer is not None) for a, v in zip(along, views))
                new = _deltas_on_mesh(region, these, axes, keys, table, layer)
            for view, delta in zip(views, new):
                if key is not None:
                    delta = _drop_leaf(delta, dropout, mask_keys[view], view.leaf.stacked, layer)
                deltas.setdefault(view.leaf.path, {})[view.layer] = delta

        adapted = {}
        for path, of in deltas.items():
            leaf, delta = leaves[path], of[None] if None in of else jnp.stack([of[n] for n in sorted(of)])
            adapted[path] = (leaf + delta).astype(leaf.dtype)
            if split is not None:  # and so for its cotangent, which XLA may else make otherwise and then move
                adapted[path] = jax.lax.with_sharding_constraint(adapted[path], _split_spec(split[path], layer))
        return replace_leaves(params, adapted)

    return adapt


@jax.custom_vjp
def _table(scaled, rho):
    """The 8 permutations of scaled theta, each twice in a row: (8, 2 d). Scaled theta itself, (1, d), where there are none."""
    if not len(rho):
        return scaled[None]
    table = scaled.at[rho].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return jnp.concatenate([table, table], axis=1)  # a rotation of a row is a slice


def _table_backward(rho, cotangent):
    if not len(rho):
        return cotangent[0], None
    rows = cotangent[:, : rho.shape[1]] + cotangent[:, rho.shape[1] :]
    total = jnp.zeros_like(rows[0])
    for order, row in zip(rho, rows):  # in turn, each with unique indices: the sum is reproducible, and fast
        total = total.at[order].add(row, unique_indices=True, mode="promise_in_bounds", wrap_negative_indices=False)
    return total, None


_table.defvjp(lambda scaled, rho: (_table(scaled, rho), rho), _table_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _deltas(region: Region, leaves: tuple[Leaf, ...], keys, table, layer):
    """`expand` for each leaf, with its transpose, and nothing kept from forward to backward."""
    return tuple(expand(region, leaf, key, table, layer) for leaf, key in zip(leaves, keys))


def _deltas_forward(region, leaves, keys, table, layer):
    return _deltas(region, leaves, keys, table, layer), (keys, layer)


def _deltas_backward(region, leaves, residuals, cotangents):
    keys, layer = residuals
    return None, contract(region, leaves, keys, cotangents, layer), None


_deltas.defvjp(_deltas_forward, _deltas_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _deltas_on_mesh(region: Region, leaves, axes, keys, tables, layer):
    """`_deltas` where each device along "tensor" makes its part along `axes` from its own of the tables, (T, ...)."""

    def local(keys, table, device, layer):  # table: (1, ...), device: (1,)
        parts = _parts(leaves, layer, axes, device[0], len(tables))
        return tuple(expand(region, leaf, key, table[0], layer, part) for leaf, key, part in zip(leaves, keys, parts))

    return over_tensor(local, out_specs=_split_specs(axes, layer))(
        (keys, P()), (tables, P("tensor")), _devices(len(tables)), (layer, P())
    )


def _deltas_on_mesh_forward(region, leaves, axes, keys, tables, layer):
    return _deltas_on_mesh(region, leaves, axes, keys, tables, layer), (keys, layer, len(tables))


def _deltas_on_mesh_backward(region, leaves, axes, residuals, cotangents):
    keys, layer, count = residuals

    def local(keys, cotangents, device, layer):
        if count > 1:  # what all devices hold counts once
            cotangents = [jnp.where(device[0] == 0, g, 0) if a is None else g for g, a in zip(cotangents, axes)]
        parts = _parts(leaves, layer, axes, device[0], count)
        return contract(region, leaves, keys, cotangents, layer, parts)[None]

    args = (keys, P()), (cotangents, _split_specs(axes, layer)), _devices(count), (layer, P())
    return None, over_tensor(local, out_specs=P("tensor"))(*args), None


_deltas_on_mesh.defvjp(_deltas_on_mesh_forward, _deltas_on_mesh_backward)


def _devices(count):
    # Their numbers come as an argument: `axis_index` doesn't lower in a nested shard_map.
    return jnp.arange(count), P("tensor")


def _split_spec(axis, layer):
    return P() if axis is None else P(*[None] * (axis - (layer is not None)), "tensor")


def _split_specs(axes, layer):
    return tuple(_split_spec(axis, layer) for axis in axes)


def _parts(leaves, layer, axes, device, devices) -> list[Part | None]:
    def part(leaf, axis):
        if axis is None:
            return None
        size = leaf.shape[axis] // devices
        return axis - (layer is not None), device * size, size

    return [part(leaf, axis) for leaf, axis in zip(leaves, axes)]


def expand(
    region: Region,
    leaf: Leaf,
    key: Array,
    table: jax.Array,
    layer: int | jax.Array | None = None,
    part: Part | None = None,
) -> jax.Array:
    """The entries of P theta in a leaf, from its region's table. Not for AD: its transpose is `contract`.

    Args:
      key: the region's, from `Partition.keys`.
      table: (8, 2 d), see `_table`; or (1, d).
      layer: of a stacked leaf that layer alone, without the layer axis. May be traced.
      part: (axis, start, length): that slice alone, of the leaf or of its layer. The start may be traced.
    """
    runs = stream.runs_of(region, leaf, layer)
    if runs is None:
        slots = partitions.slots(region, leaf, layer, [part] if part else (), key)
        return table.reshape(-1).at[slots].get(mode="promise_in_bounds", wrap_negative_indices=False)
    shape = leaf.shape if layer is None else leaf.shape[1:]
    delta = stream.expand(region, runs, key, table, layer).reshape(shape)
    if part is None:
        return delta
    axis, start, length = part
    return jax.lax.dynamic_slice_in_dim(delta, start, length, axis)


def contract(
    region: Region,
    leaves: Sequence[Leaf],
    keys: Sequence[Array],
    cotangents: Sequence[jax.Array],
    layer: int | jax.Array | None = None,
    parts: Sequence[Part | None] = (),
) -> jax.Array:
    """The transpose of `expand`: one table's cotangent, from those of several leaves' entries."""
    shape = (partitions.TABLES, 2 * region.d) if region.scheme == "balanced-v1" else (1, region.d)
    total, streamed = None, []
    # The last comes first, as in the model's own backward pass.
    for leaf, key, cotangent, part in reversed(list(zip(leaves, keys, cotangents, parts or [None] * len(leaves)))):
        runs = stream.runs_of(region, leaf, layer)
        if runs is None:
            if total is None:
                total = jnp.zeros_like(cotangent, shape=math.prod(shape))  # varies over the mesh as it does
            total = _scatter(region, leaf, key, cotangent, layer, part, total)
            continue
        if part is not None:  # in its place among zeros: to stream those is cheaper than to look at elements
            axis, start, _ = part
            whole = jnp.zeros_like(cotangent, shape=leaf.shape if layer is None else leaf.shape[1:])
            cotangent = jax.lax.dynamic_update_slice_in_dim(whole, cotangent, start, axis)
        streamed.append((runs, cotangent))
    if streamed:
        every, cotangents = zip(*streamed)
        sums = stream.contract(region, every, keys[0], cotangents, layer)  # a hashed region has one key
        total = sums if total is None else total + sums
    assert total is not None  # there is a leaf
    return total.reshape(shape)


def _scatter(region: Region, leaf: Leaf, key, cotangent, layer, part: Part | None, total):
    """Adds a cotangent element by element, in pieces, so that no more positions than those of a piece are alive."""
    if (
        cotangent.ndim == 1
        and cotangent.size > _PIECE
        and leaf.shape == cotangent.shape
        and region.scheme in partitions.SCHEMES
    ):
        (n,), (stride,) = leaf.shape, leaf.strides  # a long vector, as a matrix and what is left
        columns = min(1024, _PIECE)
        rows, rest = divmod(n, columns)
        matrix = dataclasses.replace(leaf, shape=(rows, columns), strides=(columns * stride, stride))
        total = _scatter(region, matrix, key, cotangent[: n - rest].reshape(rows, columns), layer, None, total)
        last = dataclasses.replace(leaf, shape=(rest,), offset=leaf.offset + (n - rest) * stride)
        return _scatter(region, last, key, cotangent[n - rest :], layer, None, total)

    shape = cotangent.shape
    # Axes from this one on go whole, and of the one before as many rows as fit.
    axis = next(k for k in range(len(shape) + 1) if math.prod(shape[k:]) <= _PIECE)

    def add(total, starts, rows):
        parts = {k: (k, start, 1) for k, start in enumerate(starts)}
        if axis:
            parts[axis - 1] = (axis - 1, starts[-1], rows)
        if part is not None:
            on, start, length = part
            parts[on] = (on, start + parts[on][1], parts[on][2]) if on in parts else part
        slots = partitions.slots(region, leaf, layer, list(parts.values()), key)
        values = jax.lax.dynamic_slice(cotangent, [*starts, *[0] * (len(shape) - axis)], slots.shape)
        at = total.at[slots.reshape(-1)]
        return at.add(values.reshape(-1), mode="promise_in_bounds", wrap_negative_indices=False)

    if not axis:
        return add(total, [], None)
    most = _PIECE // math.prod(shape[axis:])
    whole, rest = divmod(shape[axis - 1], most)
    for count, rows, first in ((whole, most, 0), (1, rest, whole * most)):
        if count and rows:
            pieces = (*shape[: axis - 1], count)

            def step(total, number):
                *before, piece = jnp.unravel_index(number, pieces)
                return add(total, [*before, first + piece * rows], rows), None

            total, _ = jax.lax.scan(step, total, jnp.arange(math.prod(pieces), dtype=jnp.int32))
    return total


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
