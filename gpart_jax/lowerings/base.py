"""What a call of `adapt` or `contract` is about, for all lowerings; and the tables that it reads or adds to.

A table is scaled theta in the order of one of the region's permutations. balanced-v1 has 8, the other schemes 1, in the order of
theta. They are one array, (8, rows, 128) or (1, rows, 128): the d numbers of a table and zeros, to a multiple of 8 rows. Those of
balanced-v1 hold them twice in a row up to a certain d, so that any rotation of a table is one slice of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpart_jax import uint64
from gpart_jax.partition import TABLES
from gpart_jax.targets import Array, Leaf

LANES = 128  # of a TPU's vectors
_DOUBLED = 2**16  # 4 MB


class Cut(NamedTuple):
    """A leaf, or the part of it that one device holds."""

    leaf: Leaf  # as numbered in its region
    parts: tuple[tuple[int, int], ...] = ()  # (axis of the leaf, length) for each axis that devices divide


class Call(NamedTuple):
    """All of a call that isn't an array."""

    scheme: str
    d: int  # of the region
    cuts: tuple[Cut, ...]
    layered: bool = False  # one layer of each leaf, which is stacked, without the layer axis
    rate: float = 0.0  # of dropout
    dither: bool = False  # sums are rounded to bfloat16 up or down by chance, else to the nearest
    split: bool = False  # within `sharding.value_and_grad`: whole leaves come, and "tensor" is yet to divide them


class Where(NamedTuple):
    """The rest of a call, arrays that may be traced."""

    keys: tuple  # of each cut, uint32 (2,), with which chunks or elements are hashed; signed_magnitude: its group ids
    layer: Array | None = None  # int32 (); None unless `layered`
    starts: Array | None = None  # where each cut's part begins along each of its axes, int32 (cuts, most axes); None: no parts
    drop: Array | None = None  # uint32 (2,), the key of the dropout mask and of the dither; None: neither


def is_doubled(scheme: str, d: int) -> bool:
    """Whether the tables hold their numbers twice: for longer d it would cost memory, and few slices reach over a table's end."""
    return scheme == "balanced-v1" and d <= _DOUBLED


def row_length(scheme: str, d: int) -> int:
    """The numbers of a table with its zeros."""
    return -(-d * (1 + is_doubled(scheme, d)) // (8 * LANES)) * 8 * LANES


def as_table(rows: jax.Array, scheme: str) -> jax.Array:
    """(K, d) -> the tables, (K, rows, 128)."""
    count, d = rows.shape
    rows = jnp.concatenate([rows, rows], 1) if is_doubled(scheme, d) else rows
    return jnp.pad(rows, ((0, 0), (0, row_length(scheme, d) - rows.shape[1]))).reshape(count, -1, LANES)


def table_shape(call: Call) -> tuple[int, int, int]:
    return TABLES if call.scheme == "balanced-v1" else 1, row_length(call.scheme, call.d) // LANES, LANES


def chunks_of(d: int, key: Array, c: tuple) -> tuple[jax.Array, jax.Array]:
    """balanced-v1's table and rotation of the chunks c, a pair of uint32 arrays: `partition.chunks` in a program. int32."""
    step = uint64.multiply(uint64.add(c, uint64.split(1)), uint64.GAMMA)
    high, low = uint64.mix(uint64.add(step, (key[0], key[1])))
    return (low % np.uint32(TABLES)).astype(jnp.int32), (high % np.uint32(d)).astype(jnp.int32)


def of_layer(layer: Array | None, tree: Any) -> Any:
    """The row of one layer, (1, ...), or all rows, of arrays with a row for each layer."""
    if layer is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(jnp.asarray(x), layer), tree)


def parts_of(call: Call, number: int, where: Where) -> list[tuple[int, Array, int]]:
    """(axis, start, length) of a cut's part, each axis that of the leaf's layer where there is one."""
    parts = call.cuts[number].parts
    if not parts:
        return []
    assert where.starts is not None
    return [(axis - call.layered, where.starts[number, k], length) for k, (axis, length) in enumerate(parts)]


def shape_of(call: Call, number: int) -> tuple[int, ...]:
    """The shape of a cut's array."""
    cut = call.cuts[number]
    shape = list(cut.leaf.shape)
    for axis, length in () if call.split else cut.parts:
        shape[axis] = length
    return tuple(shape[1:] if call.layered else shape)
