"""P theta element by element: for leaves that aren't runs of consecutive indices, and for the other schemes.

A gather from the tables, and its transpose a scatter. Positions are computed where they are used, and again on the way back.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpart_jax import uint64
from gpart_jax.lowerings.base import Call, Where, chunks_of, is_doubled, parts_of, row_length
from gpart_jax.partition import SCHEMES, SIGNED_MAGNITUDE
from gpart_jax.targets import Array, Leaf

_PIECE = 2**20  # positions that are held at once on the way back
_LONGEST_AXIS = 4096

Part = tuple[int, int | Array, int]  # (axis, start, length): a slice of a leaf


def expand(call: Call, number: int, table: jax.Array, where: Where) -> jax.Array:
    """The entries of P theta in a cut, from the tables."""
    leaf, key = call.cuts[number].leaf, where.keys[number]
    positions = slots(call.scheme, call.d, leaf, key, where.layer, parts_of(call, number, where))
    return table.reshape(-1).at[positions].get(mode="promise_in_bounds", wrap_negative_indices=False)


def contract(call: Call, number: int, cotangent: jax.Array, where: Where, total: jax.Array) -> jax.Array:
    """`total`, the tables laid flat, with a cut's cotangent added where its entries come from."""
    leaf, key, parts = call.cuts[number].leaf, where.keys[number], parts_of(call, number, where)
    return _scatter(call.scheme, call.d, leaf, key, cotangent, where.layer, parts, total)


def _scatter(scheme, d, leaf: Leaf, key, cotangent, layer, held: Sequence[Part], total):
    """Adds a cotangent element by element, in pieces, so that no more positions than those of a piece are alive."""
    if (
        cotangent.ndim == 1
        and cotangent.size > _PIECE
        and leaf.shape == cotangent.shape
        and scheme in SCHEMES
    ):
        (n,), (stride,) = leaf.shape, leaf.strides  # a long vector, as a matrix and what is left
        columns = min(1024, _PIECE)
        rows, rest = divmod(n, columns)
        matrix = dataclasses.replace(leaf, shape=(rows, columns), strides=(columns * stride, stride))
        total = _scatter(scheme, d, matrix, key, cotangent[: n - rest].reshape(rows, columns), layer, [], total)
        last = dataclasses.replace(leaf, shape=(rest,), offset=leaf.offset + (n - rest) * stride)
        return _scatter(scheme, d, last, key, cotangent[n - rest :], layer, [], total)

    shape = cotangent.shape
    # Axes from this one on go whole, and of the one before as many rows as fit.
    axis = next(k for k in range(len(shape) + 1) if math.prod(shape[k:]) <= _PIECE)

    def add(total, starts, rows):
        parts = {k: (k, start, 1) for k, start in enumerate(starts)}
        if axis:
            parts[axis - 1] = (axis - 1, starts[-1], rows)
        for on, start, length in held:
            parts[on] = (on, start + parts[on][1], parts[on][2]) if on in parts else (on, start, length)
        positions = slots(scheme, d, leaf, key, layer, list(parts.values()))
        values = jax.lax.dynamic_slice(cotangent, [*starts, *[0] * (len(shape) - axis)], positions.shape)
        at = total.at[positions.reshape(-1)]
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


def slots(
    scheme: str, d: int, leaf: Leaf, key: Array, layer: int | Array | None = None, parts: Sequence[Part] = ()
) -> Array:
    """Where each element of a leaf finds its value: positions in the tables laid flat, in a compiled program.

    Args:
      scheme, d: of the region.
      key: the region's, from `Partition.keys`.
      layer: of a stacked leaf that layer alone, without the layer axis. May be traced.
      parts: (axis, start, length) each: that slice alone, of the leaf or of its layer. The starts may be traced.

    Returns:
      int32 of the shape of what is asked for. Computed element by element from a small table for each axis, exactly for any
      N < 2^64.
    """
    if scheme == SIGNED_MAGNITUDE:
        ids = key if layer is None else jax.lax.dynamic_index_in_dim(key, layer, keepdims=False)
        for axis, start, length in parts:
            ids = jax.lax.dynamic_slice_in_dim(ids, start, length, axis)
        return ids
    along, laid, cut = _axes(leaf, layer, parts)
    if scheme == "splitmix64":
        element = functools.reduce(uint64.add, (laid(uint64.split(x), k) for k, x in enumerate(along)))
        slot = uint64.remainder(uint64.mix(uint64.add(element, (key[0], key[1]))), d)
    else:
        many = np.uint32(d)
        digits = []  # mixed radix: index = c * d + r, so that no element needs a 64-bit division
        for k, x in enumerate(along):
            quotient, rest = np.divmod(x, np.uint64(d))
            digits.append(laid((*uint64.split(quotient), rest.astype(np.uint32)), k))
        high, low, r = digits[0]
        for *quotient, rest in digits[1:]:
            r = r + rest
            carry = (r >= many).astype(jnp.uint32)
            high, low = uint64.add(uint64.add((high, low), tuple(quotient)), (jnp.zeros_like(carry), carry))
            r = r - carry * many
        table, o = (x.astype(jnp.uint32) for x in chunks_of(d, key, (high, low)))
        at = r + o
        at = at if is_doubled(scheme, d) else jnp.where(at >= many, at - many, at)
        slot = table * np.uint32(row_length(scheme, d)) + at
    return cut(slot.astype(jnp.int32))


def _axes(leaf: Leaf, layer, parts):
    """What an index is a sum of: tables along axes, a function that lays the k-th along its axis, and one that cuts the result."""
    picks: dict[int, tuple[int | jax.Array, int]] = {} if layer is None else {0: (layer, 1)}  # axis: (start, length)
    for axis, start, length in parts:
        picks[axis if layer is None else axis + 1] = start, length
    axes = [(1, 0)]  # (length, step); the first carries the offset
    shape, padded = [], []
    taken = {}  # table: (start, length)
    for axis, (n, step) in enumerate(zip(leaf.shape, leaf.strides)):
        shape.append(picks[axis][1] if axis in picks else n)
        if n <= _LONGEST_AXIS or axis in picks:
            if axis in picks:
                taken[len(axes)] = picks[axis]
            axes.append((n, step))
            padded.append(shape[-1])
        else:  # as two axes, so that the table of a leaf of one long axis has not N entries
            inner = 2 ** math.isqrt(n).bit_length()
            outer = -(-n // inner)
            axes += [(outer, step * inner), (inner, step)]
            padded.append(outer * inner)
    along = [np.arange(n, dtype=np.uint64) * np.uint64(step & uint64.MASK) for n, step in axes]
    along[0] = along[0] + np.uint64(leaf.offset)

    def laid(arrays, k):
        return _on_axis(arrays, k, len(axes), taken.get(k))

    def cut(x):
        x = x.reshape(padded)[tuple(slice(n) for n in shape)]
        return x if layer is None else x[0]

    return along, laid, cut


def _on_axis(arrays, axis: int, ndim: int, pick=None):
    """1-D tables, or slices (start, length) of them, laid along `axis`."""
    # The barrier keeps XLA from folding N constants into the program.
    arrays = jax.lax.optimization_barrier(tuple(jnp.asarray(a) for a in arrays))
    if pick is not None:
        arrays = [jax.lax.dynamic_slice_in_dim(a, *pick) for a in arrays]
    return tuple(a.reshape([-1 if k == axis else 1 for k in range(ndim)]) for a in arrays)
