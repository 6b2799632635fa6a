"""P theta and its transpose over runs of consecutive indices, for balanced-v1, in plain XLA: no element is looked at by itself.

A chunk, d consecutive indices, is a rotation of one of 8 tables of scaled theta. With each table twice in a row, (8, 2 d), a
rotation is a slice, so both directions move contiguous pieces. Forward, a leaf is cut into equal blocks of one chunk, or two,
each. Backward a CPU adds windows, equal pieces of a leaf that no chunk begins in, or few, by a scatter; where there are none, and
for narrow numbers, chunk after chunk in place. For a GPU chunk after chunk is thousands of kernels, so it turns all chunks of a
leaf at once and multiplies.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gpart_jax import uint64
from gpart_jax.lowerings.base import LANES, Call, Where, chunks_of, is_doubled, of_layer, parts_of, row_length
from gpart_jax.partition import TABLES

_SHORTEST_RUN = 256  # a few numbers of each block and chunk are held in the program: from this d on, some per cent of N
_BLOCK = 256  # the shortest blocks that no chunk begins in, forward
_WINDOW = 64  # the shortest windows, backward: a CPU's scatter of longer ones takes as long
_LONG = 256  # times d: elements beyond which a CPU makes two sums, and cuts windows; at 141 that took four times as long
_FEW = 24  # windows to a chunk from which on those that a chunk begins in are few
_PIECE = 2**25  # elements, or 8 chunks, that a GPU turns at once


class Runs(NamedTuple):
    """Equally long runs of consecutive indices."""

    length: int  # elements in a run
    columns: int  # of them, in a row
    starts: np.ndarray  # uint64, index of each run's first element


def reaches(call: Call, number: int) -> bool:
    """Whether a cut's leaf is runs of consecutive indices, of a scheme that has chunks."""
    return _runs_of(call, number) is not None


def _runs_of(call: Call, number: int) -> Runs | None:
    """The runs that a cut's leaf or, for one layer, its layers are made of; None where elements must be looked at one by one."""
    leaf = call.cuts[number].leaf
    if call.scheme != "balanced-v1" or call.d < _SHORTEST_RUN or not leaf.size:
        return None
    pieces = [leaf] if leaf.is_dense and not call.layered and leaf.size < 2**31 else leaf.layers()
    if not all(piece.is_dense and piece.size < 2**31 for piece in pieces):
        return None
    columns = pieces[0].shape[-1] if pieces[0].shape else 1
    return Runs(pieces[0].size, columns, np.array([piece.offset for piece in pieces], np.uint64))


def expand(call: Call, number: int, table: jax.Array, where: Where) -> jax.Array:
    """The entries of P theta in a cut, from the tables; in their dtype. Of a part the whole is made, and then cut."""
    runs = _runs_of(call, number)
    assert runs is not None
    delta = _expand(call, runs, where.keys[number], _twice(call.d, table), where.layer)
    delta = delta.reshape(call.cuts[number].leaf.shape[call.layered :])
    for axis, start, length in parts_of(call, number, where):
        delta = jax.lax.dynamic_slice_in_dim(delta, start, length, axis)
    return delta


def contract(call: Call, numbers: Sequence[int], cotangents: Sequence[jax.Array], where: Where, dtype: DTypeLike) -> jax.Array:
    """The transpose of `expand`, for the cuts with these numbers: the tables' cotangent, summed in `dtype`."""
    every, whole = [], []
    for number, cotangent in zip(numbers, cotangents):
        runs = _runs_of(call, number)
        assert runs is not None
        every.append(runs)
        if parts := parts_of(call, number, where):  # in its place among zeros: cheaper than to look at elements
            zeros = jnp.zeros_like(cotangent, shape=call.cuts[number].leaf.shape[call.layered :])
            starts = {axis: start for axis, start, _ in parts}
            cotangent = jax.lax.dynamic_update_slice(zeros, cotangent, [starts.get(axis, 0) for axis in range(zeros.ndim)])
        whole.append(cotangent.reshape(-1, runs.length))
    on_cpu, elsewhere = (functools.partial(way, call, every, dtype) for way in (_on_cpu, _elsewhere))
    total = jax.lax.platform_dependent(where.keys[numbers[0]], whole, where.layer, cpu=on_cpu, default=elsewhere)
    return _folded(call.d, total)


def _pitch(d) -> int:
    """From one table to the next where each is held twice in a row, so that any rotation of one is a slice."""
    return row_length("balanced-v1", d) if is_doubled("balanced-v1", d) else 2 * d


def _twice(d, table):
    """The tables so, laid flat."""
    if is_doubled("balanced-v1", d):
        return table.reshape(-1)
    rows = table.reshape(TABLES, -1)[:, :d]
    return jnp.concatenate([rows, rows], axis=1).reshape(-1)


def _folded(d, total):
    """The transpose of `_twice`."""
    if not is_doubled("balanced-v1", d):
        total = total.reshape(TABLES, 2 * d)
        total = total[:, :d] + total[:, d:]
        total = jnp.pad(total, ((0, 0), (0, row_length("balanced-v1", d) - d)))
    return total.reshape(TABLES, -1, LANES)


def _expand(call, runs, key, flat, layer):
    """Runs of P theta, (runs, length), or (1, length) for a layer."""
    d = call.d

    def blocks(start, width, count):  # (runs, count * width)
        chunk, r = _in_chunks(call, runs, start, width, count)
        whole = np.all(r + width <= d)  # else a block may end in the next chunk
        chunks = [chunk] if whole else [chunk, chunk + np.uint64(1)]
        *chunks, r = of_layer(layer, (*map(uint64.split, chunks), r))
        at = [_in_table(call, key, chunk, r).reshape(-1) for chunk in chunks]

        def block(numbers):
            *at, split = numbers
            parts = [jax.lax.dynamic_slice(flat, (start,), (width,)) for start in at]
            return parts[0] if whole else jnp.where(jnp.arange(width, dtype=jnp.int32) < split, *parts)

        numbers = *at, (d - r).reshape(-1)
        together = jax.vmap(block)
        if width % runs.columns:
            # On CPU XLA would look for its block from each element: 1.3 times (one slice) to 3 times (two) as slow as a loop.
            apart = functools.partial(jax.lax.map, block)
            return jax.lax.platform_dependent(numbers, cpu=apart, default=together).reshape(-1, count * width)
        return together(numbers).reshape(-1, count * width)

    width = _block_width(call, runs)
    count, rest = divmod(runs.length, width)
    most = blocks(0, width, count)
    return jnp.concatenate([most, blocks(count * width, rest, 1)], axis=1) if rest else most


def _block_width(call: Call, runs: Runs) -> int:
    """Whole rows that no chunk begins in; or the most up to d that are whole rows, or a part of one; d where they are few."""
    d, rows, columns = call.d, runs.length // runs.columns, runs.columns
    window = math.gcd(*runs.starts.tolist(), d, runs.length)
    if window >= _BLOCK and window % columns == 0:
        return window
    if columns <= d:
        width = columns * next(n for n in range(min(rows, d // columns), 0, -1) if rows % n == 0)
    else:
        width = next(n for n in range(d, 0, -1) if columns % n == 0)
    widest = min(d, runs.length)
    if 1 < columns < runs.length and width >= min(64, widest):
        return width
    return next((n for n in range(widest, widest // 2, -1) if runs.length % n == 0), widest)


def _on_cpu(call, every, dtype, key, cotangents, layer):
    d = call.d
    # A scatter adds windows, equal pieces, as fast as a loop adds chunks, and two scatters can run at once, on two cores. But
    # XLA would first widen all of a narrow leaf for a scatter, which takes ten times as long as the loop.
    long = sum(cotangent.size for cotangent in cotangents) > _LONG * d  # else the tables cost as much as the leaves
    widths = [_window(call, runs, long) if g.dtype == dtype else 0 for runs, g in zip(every, cotangents)]
    pieces, whole = [], []
    for width, runs in zip(widths, every):
        pieces += _windows(call, runs, width) if width else [_chunks(call, runs)]
        whole += pieces[-2:-1] if width else []
    places, rest = iter(zip(pieces, _places(call, pieces, key, layer))), []
    size = TABLES * _pitch(d)
    cut = any(np.any(x.high < width) or np.any(x.low) for x, width in zip(whole, filter(None, widths)))
    spare = _WINDOW * cut  # for the windows that a chunk begins in, which are added below, in two parts
    totals = [jnp.zeros_like(cotangents[0], shape=size + spare, dtype=dtype)] * (2 if long and len(every) > 1 else 1)
    for n, (width, cotangent) in enumerate(zip(widths, cotangents)):
        if width:
            windows, at = next(places)
            if cut:
                at = jnp.where(of_layer(layer, (windows.low == 0) & (windows.high == windows.width)), at, size)
            which = n * len(totals) // len(every)
            totals[which] = _add_windows(totals[which], at, cotangent[:, : at.shape[1] * windows.width])
        rest.append((*next(places), cotangent))
    total = sum(totals[1:], totals[0])
    for piece, at, cotangent in rest:
        total = _add_in_turn(total, piece, at, cotangent, layer)
    return total[:size]


class _Pieces(NamedTuple):
    """Slices of the runs of a leaf; (runs, pieces) each, but for the width."""

    width: int
    chunk: np.ndarray  # uint64, to which a piece belongs
    r: np.ndarray  # int32, where in its chunk it begins, modulo d
    start: np.ndarray  # int32, where in its run
    low: np.ndarray  # int32, from which of its elements on it counts
    high: np.ndarray  # int32, and up to which


def _window(call, runs, long) -> int:
    """The width of a leaf's windows: the longest that no chunk begins in, else one that few chunks begin in; 0: none."""
    longest = math.gcd(*runs.starts.tolist(), call.d, runs.length)
    if longest >= _WINDOW:
        return longest
    return _WINDOW if long and call.d >= _FEW * _WINDOW and runs.length >= _WINDOW else 0


def _windows(call, runs, width) -> list[_Pieces]:
    """Windows, one after another; and, in two pieces each, those that a chunk begins in, and what is left at a run's end."""
    d, left = np.uint64(call.d), runs.length % width
    start = np.append(np.arange(0, runs.length - width + 1, width), [runs.length - width] if left else [])
    chunk, r = np.divmod(runs.starts[:, None] + start.astype(np.uint64), d)
    high = np.minimum(width, (d - r).astype(np.int64))  # of the chunk that a window begins in
    low = np.zeros_like(high)
    low[:, -1] = width - left if left else 0
    split = [np.flatnonzero((of_low > 0) | (of_high < width)) for of_low, of_high in zip(low, high)]
    most = max(map(len, split))
    chosen = np.array([np.resize(of, most) if len(of) else np.zeros(most) for of in split], np.int64)
    real = np.arange(most) < np.array([[len(of)] for of in split])
    of_split = [np.take_along_axis(np.broadcast_to(x, chunk.shape), chosen, 1) for x in (chunk, r, start, low, high)]

    def parts(second):
        chunk, r, start, low, high = of_split
        ends = (np.maximum(low, high), width) if second else (low, high)
        return chunk + np.uint64(second), r, start, *(np.where(real, end, 0) for end in ends)

    whole = chunk, r, np.broadcast_to(start, r.shape), low, high
    both = (np.concatenate(two, 1) for two in zip(parts(False), parts(True)))
    return [_Pieces(width, x[0], *(y.astype(np.int32) for y in x[1:])) for x in ([x[:, : runs.length // width] for x in whole], list(both))]


def _chunks(call, runs) -> _Pieces:
    """For each chunk a piece within the run that holds what the run has of it."""
    d, length = call.d, runs.length
    first, skip = np.divmod(runs.starts[:, None], np.uint64(d))
    chunk = first + np.arange(_chunks_of(call, runs), dtype=np.uint64)
    begin = (chunk - first).astype(np.int64) * d - skip.astype(np.int64)  # of the chunk, which may be outside
    width = min(d, length)
    start = np.clip(begin, 0, length - width)
    low, high = np.maximum(begin - start, 0), np.minimum(np.minimum(begin + d, length) - start, width)
    return _Pieces(width, chunk, *(x.astype(np.int32) for x in ((start - begin) % d, start, low, high)))


def _places(call, every, key, layer):
    """Where in the flattened table the pieces of each leaf begin, (runs, pieces): hashed for all leaves at once."""
    chunk = [of_layer(layer, uint64.split(pieces.chunk)) for pieces in every]
    r = [of_layer(layer, pieces.r) for pieces in every]
    joined = jax.tree.map(lambda *of_leaves: jnp.concatenate([x.reshape(-1) for x in of_leaves]), *zip(chunk, r))
    split = jnp.split(_in_table(call, key, *joined), np.cumsum([x.size for x in r])[:-1])
    return [at.reshape(x.shape) for at, x in zip(split, r)]


def _add_windows(total, at, cotangent):
    """In one scatter."""
    at = at.reshape(-1, 1)
    dimensions = jax.lax.ScatterDimensionNumbers((1,), (), (0,))
    return jax.lax.scatter_add(total, at, cotangent.reshape(len(at), -1), dimensions, mode="promise_in_bounds")


def _add_in_turn(total, pieces, at, cotangent, layer):
    """One after another, in place."""
    width = pieces.width
    run = np.broadcast_to(np.arange(len(at), dtype=np.int32)[:, None], at.shape)
    numbers = run, at, *of_layer(layer, (pieces.start, pieces.low, pieces.high))

    def add(total, piece, masked):
        run, at, start, low, high = piece
        # What XLA believes to change from turn to turn it can't widen before the loop, to 4 N bytes.
        cut, start = jax.lax.optimization_barrier((cotangent, start))
        row = jax.lax.dynamic_slice(cut, (run, start), (1, width))[0].astype(total.dtype)
        if masked:
            where = jnp.arange(width, dtype=jnp.int32)
            row = jnp.where((where >= low) & (where < high), row, 0)
        row += jax.lax.dynamic_slice(total, (at,), (width,))
        return jax.lax.dynamic_update_slice(total, row, (at,)), None

    inside = np.all((pieces.low == 0) & (pieces.high == width), axis=0)
    for masked in (False, True):  # all but the edges go without a mask, in some nine tenths of the time
        chosen = np.flatnonzero(inside != masked)
        if chosen.size:
            xs = [jnp.asarray(x)[:, chosen].reshape(-1) for x in numbers]
            total, _ = jax.lax.scan(functools.partial(add, masked=masked), total, xs)
    return total


def _elsewhere(call, every, dtype, key, cotangents, layer):
    total = jnp.zeros_like(cotangents[0], shape=TABLES * _pitch(call.d), dtype=dtype)
    for runs, cotangent in zip(every, cotangents):
        if _chunks_of(call, runs) * (len(runs.starts) if layer is None else 1) >= TABLES:
            total = _add_as_rows(call, runs, key, cotangent, layer, total)
        else:  # fewer are fewer kernels one by one
            pieces = _chunks(call, runs)
            (at,) = _places(call, [pieces], key, layer)
            total = _add_in_turn(total, pieces, at, cotangent, layer)
    return total


def _add_as_rows(call, runs, key, cotangent, layer, total):
    """Chunks as rows, turned to their tables' order, and a product with the (8, rows) matrix that tells whose they are."""
    d, length = call.d, runs.length
    run, begin, table, rotation = _groups(call, runs, key, layer)
    size = table.shape[1] * d
    # Leaf after leaf: else XLA may hold the rows of all leaves.
    rotation, total = jax.lax.optimization_barrier((rotation, total))

    def cut(run, begin):  # (size,): what the run has from `begin` on, which may be outside; else 0
        width = min(size, length)
        start = jnp.clip(begin, 0, length - width)
        window = jax.lax.dynamic_slice(cotangent, (run, start), (1, width))[0].astype(total.dtype)
        return jax.lax.dynamic_slice(jnp.pad(window, (size, size)), (size + begin - start,), (size,))

    def turn(row, rotation):  # element r to (r + rotation) mod d, by a slice of the row twice
        return jax.lax.dynamic_slice(jnp.concatenate([row, row]), (d - rotation,), (d,))

    def add(sums, groups):
        run, begin, table, rotation = groups
        rows = jax.vmap(turn)(jax.vmap(cut)(run, begin).reshape(-1, d), rotation.reshape(-1))
        whose = (jnp.arange(TABLES)[:, None] == table.reshape(-1)).astype(sums.dtype)
        return sums + jnp.dot(whose, rows, precision=jax.lax.Precision.HIGHEST), None

    sums = jnp.zeros_like(total, shape=(TABLES, d))
    together = max(1, _PIECE // size)
    whole, rest = divmod(len(begin), together)
    groups = run, begin, table, rotation
    if whole:
        pieces = [x[: whole * together].reshape(whole, together, *x.shape[1:]) for x in groups]
        sums, _ = jax.lax.scan(add, sums, pieces)
    if rest:
        sums, _ = add(sums, [x[whole * together :] for x in groups])
    return total + jnp.pad(sums, ((0, 0), (0, _pitch(d) - d))).reshape(-1)


def _groups(call, runs, key, layer):
    """Each run's chunks in groups: (groups,) the run, and where in it the group begins; (groups, chunks) table, rotation."""
    d, count = call.d, _chunks_of(call, runs)
    size = min(count, max(TABLES, _PIECE // d))
    groups = -(-count // size)
    first, skip = np.divmod(runs.starts[:, None], np.uint64(d))
    numbers = uint64.split(first + np.arange(groups * size, dtype=np.uint64))
    begins = np.arange(groups) * (size * d) - skip.astype(np.int64)
    numbers, begins = of_layer(layer, (numbers, begins.astype(np.int32)))
    run = np.broadcast_to(np.arange(len(begins), dtype=np.int32)[:, None], begins.shape)
    table, rotation = chunks_of(call.d, key, numbers)
    return run.reshape(-1), begins.reshape(-1), table.reshape(-1, size), rotation.reshape(-1, size)


def _chunks_of(call, runs) -> int:
    """How many chunks a run has a part of, at most."""
    return -(-(int((runs.starts % np.uint64(call.d)).max()) + runs.length) // call.d)


def _in_chunks(call, runs, start, width, count):
    """(runs, count) pieces of runs, from their element `start` on: the chunk that each begins in, and where in it."""
    first = runs.starts[:, None] + np.uint64(start) + np.arange(count, dtype=np.uint64) * np.uint64(width)
    chunk, r = np.divmod(first, np.uint64(call.d))
    return chunk, r.astype(np.int32)


def _in_table(call, key, chunk, r):
    """Where in the flattened table the element r of a chunk is, and those after it in the chunk."""
    table, rotation = chunks_of(call.d, key, chunk)
    return table * _pitch(call.d) + (rotation + r) % call.d
