"""gpart_transform: frozen params and theta to adapted params, W = W0 + P theta (GPart, arXiv 2605.14841).

P theta is one gather and P^T g one segment sum. For balanced-v1 a dense leaf never looks at single elements: each chunk
of d elements is a rotation of one of 8 tables of scaled theta, so both directions move contiguous runs (`_stream`). Any
other leaf, and splitmix64, computes positions element by element (`slots`) and computes them again on the way back, so
that nothing of N entries is kept from forward to backward.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gpart_jax import partition as partitions
from gpart_jax.partition import Partition, Region
from gpart_jax.targets import Layout, Leaf, Targets, canonical_layout, named_leaves, replace_leaves

_SHORTEST_RUN = 256  # the stream holds 2 N / d chunk constants in the program: from this d on, under 1 % of N


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
      scheme: "balanced-v1" or "splitmix64"; see `partition.py`.
      scope: "global", or "block" for a slice of theta for each numbered block.
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
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout} must be in [0, 1).")
    if isinstance(seed, Partition):
        if targets is not None or (scheme, scope, isometric) != ("balanced-v1", "global", True):
            raise ValueError("A Partition already fixes targets, scheme, scope and isometric. Leave them out.")
        partition = seed
        canonical_layout(params, partition.layout)
        if theta.shape != (partition.d,):
            raise ValueError(f"theta has shape {theta.shape}, but the partition has d = {partition.d}.")
    else:
        layout = canonical_layout(params, targets)
        partition = partitions.make_partition(
            layout, theta.shape[0], seed, scheme=scheme, scope=scope, isometric=isometric
        )

    frozen = dict(named_leaves(params))
    adapted = {}
    for path, delta in _deltas(partition, theta, dropout, key if dropout else None).items():
        adapted[path] = (frozen[path] + delta).astype(frozen[path].dtype)
    return replace_leaves(params, adapted)


def _deltas(partition: Partition, theta, dropout, key) -> dict[str, jax.Array]:
    """P theta, leaf by leaf, in float32 or wider."""
    if key is not None:  # in shard_map, a key that varies over mesh axes makes theta vary over them too
        theta += jnp.zeros_like(jax.random.key_data(key), shape=(), dtype=theta.dtype)
    whole, layers = {}, {}
    count = 0
    for region, rho, scale in zip(partition.regions, partition.permutations, partition.scales):
        table = _table(theta[region.start : region.start + region.d] * scale, rho)  # float32 or wider, as scale is
        for view in region.views:
            mask_key = None if key is None else jax.random.fold_in(key, count)
            delta = _expand(region, view.leaf, dropout, table, mask_key)
            count += 1
            if view.layer is None:
                whole[view.leaf.path] = delta
            else:
                layers.setdefault(view.leaf.path, {})[view.layer] = delta
    return whole | {path: jnp.stack([parts[n] for n in sorted(parts)]) for path, parts in layers.items()}


def _table(scaled, rho):
    """The 8 permutations of scaled theta, (8, d); or scaled theta itself as (1, d) where there are none."""
    if not len(rho):
        return scaled[None]
    # A copy of theta for each row makes every index of the transposed scatter unique, hence the sum reproducible.
    rows = jnp.broadcast_to(scaled, rho.shape)
    return jax.vmap(lambda row, order: row.at[order].get(unique_indices=True, mode="promise_in_bounds"))(rows, rho)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _expand(region: Region, leaf: Leaf, dropout: float, table, key):
    """The leaf's entries of P theta, shape `leaf.shape`, from the region's table; dropped out where there is a key."""
    runs = _runs(region, leaf)
    delta = _stream(region, runs, table) if runs else table.reshape(-1)[partitions.slots(region, leaf)]
    return _drop(delta.reshape(leaf.shape), dropout, key)


def _expand_forward(region, leaf, dropout, table, key):
    return _expand(region, leaf, dropout, table, key), key


def _expand_backward(region, leaf, dropout, key, cotangent):
    cotangent = _drop(cotangent, dropout, key)  # the same mask, drawn again
    runs = _runs(region, leaf)
    if runs:
        return _stream_transpose(region, runs, cotangent), None
    slots = partitions.slots(region, leaf).reshape(-1)
    rows = partitions.TABLES if region.scheme == "balanced-v1" else 1
    total = jnp.zeros_like(cotangent, shape=(rows * region.d,)).at[slots].add(cotangent.reshape(-1))
    return total.reshape(rows, region.d), None


_expand.defvjp(_expand_forward, _expand_backward)


def _drop(x, rate: float, key):
    return x if key is None else jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


@dataclasses.dataclass(frozen=True)
class _Runs:
    """Equally long runs of consecutive indices, as the chunks that cover them."""

    length: int  # elements in a run
    skips: tuple[int, ...]  # per run: elements of its first chunk that lie before it
    first: tuple[int, ...]  # per run: its first chunk
    chunks: int  # chunks taken for each run


def _runs(region: Region, leaf: Leaf) -> _Runs | None:
    """How to stream a leaf; None where its elements must be looked at one by one."""
    if region.scheme != "balanced-v1" or region.d < _SHORTEST_RUN or not leaf.size:
        return None
    layers = [leaf] if leaf.is_dense else leaf.layers()
    if not all(layer.is_dense for layer in layers):
        return None
    first, skips = zip(*(divmod(layer.offset, region.d) for layer in layers))
    length = layers[0].size
    return _Runs(length, skips, first, max(-(-(skip + length) // region.d) for skip in skips))


def _stream(region: Region, runs: _Runs, table):
    """Runs of P theta, shape (runs, length): slice after slice of the tables, each twice in a row to make rotation a slice."""
    doubled = jnp.concatenate([table, table], axis=1)

    def take(_, chunk):
        return None, jax.lax.dynamic_slice(doubled, chunk, (1, region.d))[0]

    _, rows = jax.lax.scan(take, None, _chunk_tables(region, runs))  # (runs * chunks, d)
    rows = rows.reshape(len(runs.skips), -1)
    return jnp.stack([row[skip : skip + runs.length] for row, skip in zip(rows, runs.skips)])


def _stream_transpose(region: Region, runs: _Runs, cotangent):
    """The transpose: each chunk of the cotangent is added to the slice of the table that it was read from."""
    d, width = region.d, runs.chunks * region.d
    rows = [
        jnp.pad(row, (skip, width - skip - runs.length))
        for row, skip in zip(cotangent.reshape(len(runs.skips), -1), runs.skips)
    ]

    def add(total, chunk_and_row):
        chunk, row = chunk_and_row
        part = jax.lax.dynamic_slice(total, chunk, (1, d))
        return jax.lax.dynamic_update_slice(total, part + row, chunk), None

    zeros = jnp.zeros_like(cotangent, shape=(partitions.TABLES, 2 * d))
    total, _ = jax.lax.scan(add, zeros, (_chunk_tables(region, runs), jnp.stack(rows).reshape(-1, d)))
    return total[:, :d] + total[:, d:]


def _chunk_tables(region: Region, runs: _Runs):
    numbers = np.array(runs.first, np.uint64)[:, None] + np.arange(runs.chunks, dtype=np.uint64)
    return partitions.chunks(region, numbers.reshape(-1))
