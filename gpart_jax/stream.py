"""P theta and its transpose over runs of consecutive indices, for balanced-v1: no element is looked at by itself.

A chunk, d consecutive indices, is a rotation of one of 8 tables of scaled theta. With each table twice in a row, (8, 2 d), a
rotation is a slice, so both directions move contiguous pieces; at best windows, equal pieces of a leaf that no chunk begins in.
What a backend does well differs: a CPU adds a leaf's windows in one scatter (`_on_cpu`), or chunk after chunk in place
(`_add_in_turn`); for a GPU chunk after chunk is thousands of kernels, so it turns all chunks of a leaf at once and multiplies
(`_add_as_rows`); a TPU loops over any slices that differ from row to row, so for a short theta it turns rows bit by bit.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpart_jax import partition as partitions
from gpart_jax import uint64
from gpart_jax.partition import Region
from gpart_jax.targets import Array, Leaf

_SHORTEST_RUN = 256  # a few numbers of each block and chunk are held in the program: from this d on, some per cent of N
_SHORTEST_WINDOW = 256  # likewise, of windows: pieces of a leaf that no chunk begins in
_PIECE = 2**25  # so many elements, or 8 chunks, are turned at once
_LONGEST_TURN = 2**14  # the d from which on a TPU does better chunk by chunk, by XLA's own estimate for a v5e


class Runs(NamedTuple):
    """Equally long runs of consecutive indices."""

    length: int  # elements in a run
    columns: int  # of them, in a row
    starts: np.ndarray  # uint64, index of each run's first element


def runs_of(region: Region, leaf: Leaf, layer: int | jax.Array | None) -> Runs | None:
    """The runs that a leaf or, for a layer, its layers are made of; None where elements must be looked at one by one."""
    if region.scheme != "balanced-v1" or region.d < _SHORTEST_RUN or not leaf.size:
        return None
    pieces = [leaf] if leaf.is_dense and layer is None and leaf.size < 2**31 else leaf.layers()
    if not all(piece.is_dense and piece.size < 2**31 for piece in pieces):
        return None
    columns = pieces[0].shape[-1] if pieces[0].shape else 1
    return Runs(pieces[0].size, columns, np.array([piece.offset for piece in pieces], np.uint64))


def expand(region: Region, runs: Runs, key: Array, table: jax.Array, layer: int | jax.Array | None) -> jax.Array:
    """Runs of P theta, (runs, length)."""
    on_tpu = in_blocks = functools.partial(_blocks, region, runs)
    if region.d <= _LONGEST_TURN and _many_chunks(region, runs, layer):
        on_tpu = functools.partial(_from_rows, region, runs)
    width = _window(region, runs)
    whole_rows = width >= _SHORTEST_WINDOW and width % runs.columns == 0
    elsewhere = functools.partial(_windows, region, runs, width) if whole_rows else in_blocks
    return jax.lax.platform_dependent(key, table, layer, tpu=on_tpu, default=elsewhere)


def _windows(region, runs, width, key, table, layer):
    """Pieces of one chunk each: slices of the table."""
    chunk, r = _in_chunks(region, runs, layer, 0, width, runs.length // width)
    at = _in_table(region, partitions.chunks_in_program(region, key, chunk), r)
    cut = jax.vmap(lambda at: jax.lax.dynamic_slice(table.reshape(-1), (at,), (width,)))
    return cut(at.reshape(-1)).reshape(-1, runs.length)


def _blocks(region, runs, key, table, layer):
    """Blocks of at most d elements: of two chunks at most, so two slices of the table."""
    d, flat = region.d, table.reshape(-1)

    def blocks(start, width, count):  # (runs, count * width)
        chunk, r = jax.tree.map(jnp.ravel, _in_chunks(region, runs, layer, start, width, count))
        two = chunk, uint64.add(chunk, uint64.split(1))
        at = [_in_table(region, partitions.chunks_in_program(region, key, one), r) for one in two]

        def block(numbers):
            *at, split = numbers
            one, two = (jax.lax.dynamic_slice(flat, (start,), (width,)) for start in at)
            return jnp.where(jnp.arange(width, dtype=jnp.int32) < split, one, two)

        together = jax.vmap(block)
        if width % runs.columns:
            # On CPU XLA would look for its block from each element; a loop is as fast for short blocks, and faster for long.
            apart = functools.partial(jax.lax.map, block)
            return jax.lax.platform_dependent((*at, d - r), cpu=apart, default=together).reshape(-1, count * width)
        return together((*at, d - r)).reshape(-1, count * width)

    width = _block_width(runs, d)
    count, rest = divmod(runs.length, width)
    whole = blocks(0, width, count)
    return jnp.concatenate([whole, blocks(count * width, rest, 1)], axis=1) if rest else whole


def _block_width(runs: Runs, d: int) -> int:
    """The most elements up to d that are some whole rows, or a part of one, of a run; d where they are few."""
    rows, columns = runs.length // runs.columns, runs.columns
    if columns <= d:
        width = columns * next(n for n in range(min(rows, d // columns), 0, -1) if rows % n == 0)
    else:
        width = next(n for n in range(d, 0, -1) if columns % n == 0)
    widest = min(d, runs.length)
    if 1 < columns < runs.length and width >= min(64, widest):
        return width
    return next((n for n in range(widest, widest // 2, -1) if runs.length % n == 0), widest)


def contract(
    region: Region,
    every: Sequence[Runs],
    key: Array,
    cotangents: Sequence[jax.Array],
    layer: int | jax.Array | None,
) -> jax.Array:
    """Leaves' cotangents, each added to the slices of the tables that it was read from: (16 d,)."""
    cotangents = [cotangent.reshape(-1, runs.length) for runs, cotangent in zip(every, cotangents)]

    def leaf_after_leaf(add, key, cotangents, layer):
        total = jnp.zeros_like(cotangents[0], shape=2 * partitions.TABLES * region.d)
        for runs, cotangent in zip(every, cotangents):
            add_one = add if _many_chunks(region, runs, layer) else _add_in_turn
            total = add_one(region, runs, key, cotangent, layer, total)
        return total

    on_cpu = functools.partial(_on_cpu, region, every)
    in_turn = functools.partial(leaf_after_leaf, _add_in_turn)
    on_gpu, on_tpu = (
        functools.partial(leaf_after_leaf, functools.partial(_add_as_rows, turn)) for turn in (_turn, _turn_by_bits)
    )
    if region.d > _LONGEST_TURN:
        on_tpu = in_turn
    return jax.lax.platform_dependent(
        key, cotangents, layer, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, tpu=on_tpu, default=in_turn
    )


def _on_cpu(region, every, key, cotangents, layer):
    """A leaf in windows, all of them in one scatter; where those would be short, chunk after chunk."""
    d = region.d
    widths = [_window(region, runs) for runs in every]
    windowed = [(runs, width) for runs, width in zip(every, widths) if width >= _SHORTEST_WINDOW]
    if windowed:
        begins = [_in_chunks(region, runs, layer, 0, width, runs.length // width) for runs, width in windowed]
        chunk, r = jax.tree.map(lambda *of_leaves: jnp.concatenate([x.reshape(-1) for x in of_leaves]), *begins)
        places = _in_table(region, partitions.chunks_in_program(region, key, chunk), r)
        places = iter(jnp.split(places, np.cumsum([r.size for _, r in begins])[:-1]))

    # A scatter and a loop take one core each: two sums, where they are small beside leaves and caches, can be had at once.
    total = jnp.zeros_like(cotangents[0], shape=2 * partitions.TABLES * d)
    small = d <= 2**18 and sum(cotangent.size for cotangent in cotangents) >= 256 * d
    totals = [total, total] if small else [total]
    for n, (runs, width, cotangent) in enumerate(zip(every, widths, cotangents)):
        which = n * len(totals) // len(every)
        if width >= _SHORTEST_WINDOW:
            totals[which] = _add_windows(totals[which], next(places), cotangent.reshape(-1, width))
        else:
            totals[which] = _add_in_turn(region, runs, key, cotangent, layer, totals[which])
    return sum(totals[1:], totals[0])


def _add_windows(total, at, windows):
    dimensions = jax.lax.ScatterDimensionNumbers((1,), (), (0,))
    return jax.lax.scatter_add(total, at[:, None], windows, dimensions, mode="promise_in_bounds")


def _add_in_turn(region, runs, key, cotangent, layer, total):
    """Chunk after chunk, in place."""
    d, length = region.d, runs.length
    first, skip = np.divmod(runs.starts[:, None], np.uint64(d))
    chunks = np.arange(_chunks_of(region, runs))
    # (runs, chunks): where in its run a chunk begins, which may be outside.
    begins = chunks * d - skip.astype(np.int64)
    width = min(d, length)
    starts = np.clip(begins, 0, length - width)  # of a window within the run that holds what the run has of the chunk
    low, high = np.maximum(begins - starts, 0), np.minimum(np.minimum(begins + d, length) - starts, width)
    inside = np.all((low == 0) & (high == width), axis=0)
    shifts = (starts - begins) % d
    numbers = uint64.split(first + chunks.astype(np.uint64))
    per_run = _of_layer(layer, (numbers, *(x.astype(np.int32) for x in (shifts, starts, low, high))))

    def add(total, chunk, masked):
        run, at, start, low, high = chunk
        row = jax.lax.dynamic_slice(cotangent, (run, start), (1, width))[0]
        if masked:
            where = jnp.arange(width, dtype=jnp.int32)
            row = jnp.where((where >= low) & (where < high), row, 0)
        row += jax.lax.dynamic_slice(total, (at,), (width,))
        return jax.lax.dynamic_update_slice(total, row, (at,)), None

    for masked in (False, True):  # all but the edges go without a mask, in two thirds of the time
        chosen = np.flatnonzero(inside != masked)
        if chosen.size:
            numbers, shifts, *others = jax.tree.map(lambda x: x[:, chosen], per_run)
            at = _in_table(region, partitions.chunks_in_program(region, key, numbers), shifts)
            run = np.broadcast_to(np.arange(len(shifts), dtype=np.int32)[:, None], shifts.shape)
            windows = [jnp.asarray(x).reshape(-1) for x in (run, at, *others)]
            total, _ = jax.lax.scan(functools.partial(add, masked=masked), total, windows)
    return total


def _chunks_of(region, runs) -> int:
    """How many chunks a run has a part of, at most."""
    return -(-(int((runs.starts % np.uint64(region.d)).max()) + runs.length) // region.d)


def _many_chunks(region, runs, layer) -> bool:
    """Whether it is worth while to turn them all at once."""
    return _chunks_of(region, runs) * (len(runs.starts) if layer is None else 1) >= partitions.TABLES


def _groups(region, runs, key, layer):
    """Each run's chunks in groups: (groups,) the run, and where in it the group begins; (groups, chunks) table, rotation."""
    d, count = region.d, _chunks_of(region, runs)
    size = min(count, max(partitions.TABLES, _PIECE // d))
    groups = -(-count // size)
    first, skip = np.divmod(runs.starts[:, None], np.uint64(d))
    numbers = uint64.split(first + np.arange(groups * size, dtype=np.uint64))
    begins = np.arange(groups) * (size * d) - skip.astype(np.int64)
    numbers, begins = _of_layer(layer, (numbers, begins.astype(np.int32)))
    run = np.broadcast_to(np.arange(len(begins), dtype=np.int32)[:, None], begins.shape)
    table, rotation = partitions.chunks_in_program(region, key, numbers)
    return run.reshape(-1), begins.reshape(-1), table.reshape(-1, size), rotation.reshape(-1, size)


def _add_as_rows(turn, region, runs, key, cotangent, layer, total):
    """Chunks as rows, turned to their tables' order, and a product with the (8, rows) matrix that tells whose they are."""
    d, length = region.d, runs.length
    run, begin, table, rotation = _groups(region, runs, key, layer)
    size = table.shape[1] * d
    # Leaf after leaf: else XLA may hold the rows of all leaves.
    rotation, total = jax.lax.optimization_barrier((rotation, total))

    def cut(run, begin):  # (size,): what the run has from `begin` on, which may be outside; else 0
        width = min(size, length)
        start = jnp.clip(begin, 0, length - width)
        window = jax.lax.dynamic_slice(cotangent, (run, start), (1, width))[0]
        return jax.lax.dynamic_slice(jnp.pad(window, (size, size)), (size + begin - start,), (size,))

    def add(sums, groups):
        run, begin, table, rotation = groups
        rows = turn(jax.vmap(cut)(run, begin).reshape(-1, d), rotation.reshape(-1))
        whose = (jnp.arange(partitions.TABLES)[:, None] == table.reshape(-1)).astype(sums.dtype)
        return sums + jnp.dot(whose, rows, precision=jax.lax.Precision.HIGHEST), None

    sums = jnp.zeros_like(total, shape=(partitions.TABLES, d))
    together = max(1, _PIECE // size)
    whole, rest = divmod(len(begin), together)
    groups = run, begin, table, rotation
    if whole:
        pieces = [x[: whole * together].reshape(whole, together, *x.shape[1:]) for x in groups]
        sums, _ = jax.lax.scan(add, sums, pieces)
    if rest:
        sums, _ = add(sums, [x[whole * together :] for x in groups])
    return total + jnp.pad(sums, ((0, 0), (0, d))).reshape(-1)


def _from_rows(region, runs, key, table, layer):
    """Chunks as rows of their tables, each turned."""
    d = region.d
    skip = _of_layer(layer, (runs.starts % np.uint64(d)).astype(np.int32))
    _, _, tables, rotation = _groups(region, runs, key, layer)

    def group(one):
        tables, rotation = one
        rows = list(table[:, :d])
        for bit in range(len(rows).bit_length() - 1):  # `table[tables]` by three choices, not by a gather
            odd = (tables >> bit & 1 == 1)[:, None]
            rows = [jnp.where(odd, second, first) for first, second in zip(rows[::2], rows[1::2])]
        return _turn_by_bits(rows[0], -rotation % d)

    groups = jax.lax.map(group, (tables, rotation)) if len(tables) > 1 else group((tables[0], rotation[0]))
    rows = groups.reshape(len(skip), -1)
    return jax.vmap(lambda row, skip: jax.lax.dynamic_slice(row, (skip,), (runs.length,)))(rows, skip)


def _turn(rows, rotation):
    """Element r of a row to (r + rotation) mod d, by a slice of the row twice."""

    def one(row, rotation):
        return jax.lax.dynamic_slice(jnp.concatenate([row, row]), (len(row) - rotation,), (len(row),))

    return jax.vmap(one)(rows, rotation)


def _turn_by_bits(rows, rotation):
    """The same, by shifts that are the same for all rows."""
    for bit in range((rows.shape[1] - 1).bit_length()):
        rows = jnp.where((rotation >> bit & 1)[:, None] == 1, jnp.roll(rows, 1 << bit, axis=1), rows)
    return rows


def _window(region, runs) -> int:
    """The length of the longest equal pieces of runs that no chunk begins in."""
    return math.gcd(*runs.starts.tolist(), region.d, runs.length)


def _in_chunks(region, runs, layer, start, width, count):
    """(runs, count) pieces of runs, from their element `start` on: the chunk that each begins in, and where in it."""
    first = runs.starts[:, None] + np.uint64(start) + np.arange(count, dtype=np.uint64) * np.uint64(width)
    chunk, r = np.divmod(first, np.uint64(region.d))
    return _of_layer(layer, (uint64.split(chunk), r.astype(np.int32)))


def _of_layer(layer, per_run):
    """The row of one layer, or all rows, of arrays with a row for each run."""
    return per_run if layer is None else jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer), per_run)


def _in_table(region, chunk, r):
    """Where in the flattened table the element r of a chunk (table, rotation) is, and those after it in the chunk."""
    table, rotation = chunk
    return table * (2 * region.d) + (rotation + r) % region.d
