"""P theta and its transpose over runs of consecutive indices, for balanced-v1: no element is looked at by itself.

A chunk, d consecutive indices, is a rotation of one of 8 tables of scaled theta. With each table twice in a row, (8, 2 d), a
rotation is a slice, so both directions move contiguous blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpart_jax import partition as partitions
from gpart_jax import uint64
from gpart_jax.partition import Region
from gpart_jax.targets import Leaf

_SHORTEST_RUN = 256  # a few numbers of each block and chunk are held in the program: from this d on, some per cent of N
_PIECE = 2**24  # elements that are turned at once


class Runs(NamedTuple):
    """Equally long runs of consecutive indices."""

    length: int  # elements in a run
    columns: int  # of them, in a row
    starts: np.ndarray  # uint64, index of each run's first element


def runs_of(region: Region, leaf: Leaf, layer) -> Runs | None:
    """The runs that a leaf or, for a layer, its layers are made of; None where elements must be looked at one by one."""
    if region.scheme != "balanced-v1" or region.d < _SHORTEST_RUN or not leaf.size:
        return None
    pieces = [leaf] if leaf.is_dense and layer is None and leaf.size < 2**31 else leaf.layers()
    if not all(piece.is_dense and piece.size < 2**31 for piece in pieces):
        return None
    columns = pieces[0].shape[-1] if pieces[0].shape else 1
    return Runs(pieces[0].size, columns, np.array([piece.offset for piece in pieces], np.uint64))


def expand(region: Region, runs: Runs, key, table, layer):
    """Runs of P theta, (runs, length), as blocks of at most d elements: of two chunks at most, so two slices of the table."""
    d, flat = region.d, table.reshape(-1)

    def blocks(start, width, count):  # (runs, count * width)
        first = runs.starts[:, None] + np.uint64(start) + np.arange(count, dtype=np.uint64) * np.uint64(width)
        chunk, r = np.divmod(first, np.uint64(d))
        chunk, r = jax.tree.map(jnp.ravel, _of_layer(layer, (uint64.split(chunk), r.astype(np.int32))))
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


def contract(region: Region, runs: Runs, key, cotangent, layer, total):
    """Adds a cotangent to the slices of the tables that it was read from. total: (16 d,)."""
    d, length = region.d, runs.length
    cotangent = cotangent.reshape(-1, length)
    first, skip = np.divmod(runs.starts[:, None], np.uint64(d))
    chunks = np.arange(-(-(int(skip.max()) + length) // d))
    begins = chunks * d - skip.astype(np.int64)  # (runs, chunks): where in its run a chunk begins, which may be outside
    inside = np.all((begins >= 0) & (begins + d <= length), axis=0)

    # A window of each run holds what the run has of a chunk: `low` to `high` of it.
    width = min(d, length)
    starts = np.clip(begins, 0, length - width)
    low, high = np.maximum(begins - starts, 0), np.minimum(np.minimum(begins + d, length) - starts, width)
    numbers, *windows = _of_layer(
        layer,
        (
            uint64.split(first + chunks.astype(np.uint64)),
            *(x.astype(np.int32) for x in ((starts - begins) % d, starts, low, high)),
        ),
    )
    shift, start, low, high = windows
    table, rotation = partitions.chunks_in_program(region, key, numbers)
    rotation = (rotation + shift) % d
    run = np.arange(len(start), dtype=np.int32)[:, None]
    windows = [jnp.broadcast_to(x, table.shape) for x in (run, start, low, high, table, rotation)]

    in_turn = functools.partial(_add_in_turn, width, inside)
    if table.size < partitions.TABLES:
        return in_turn(cotangent, total, *windows)
    # A GPU starts two kernels for each turn: tens of thousands for a small d.
    at_once = functools.partial(_add_at_once, width)
    return jax.lax.platform_dependent(cotangent, total, *windows, cuda=at_once, rocm=at_once, default=in_turn)


def _add_in_turn(width, inside, cotangent, total, run, start, low, high, table, rotation):
    """Window after window, to its table's slice, in place. `inside`: of which columns the windows are whole chunks."""
    d = len(total) // (2 * partitions.TABLES)

    def add(total, window, masked):
        run, start, low, high, at = window
        row = jax.lax.dynamic_slice(cotangent, (run, start), (1, width))[0]
        if masked:
            where = jnp.arange(width, dtype=jnp.int32)
            row = jnp.where((where >= low) & (where < high), row, 0)
        row += jax.lax.dynamic_slice(total, (at,), (width,))
        return jax.lax.dynamic_update_slice(total, row, (at,)), None

    at = table * (2 * d) + rotation
    for masked in (False, True):  # all but the edges go without a mask, in two thirds of the time
        chosen = np.flatnonzero(inside != masked)
        if chosen.size:
            windows = [x[:, chosen].reshape(-1) for x in (run, start, low, high, at)]
            total, _ = jax.lax.scan(functools.partial(add, masked=masked), total, windows)
    return total


def _add_at_once(width, cotangent, total, run, start, low, high, table, rotation):
    """All windows as rows, each turned to its table's order, and a product with the (8, rows) matrix that tells whose they are."""
    d = len(total) // (2 * partitions.TABLES)
    # Leaf after leaf: else XLA may hold the rows of all leaves.
    start, total = jax.lax.optimization_barrier((start, total))

    def row(run, start, low, high, rotation):
        row = jax.lax.dynamic_slice(cotangent, (run, start), (1, width))[0]
        where = jnp.arange(width, dtype=jnp.int32)
        row = jnp.pad(jnp.where((where >= low) & (where < high), row, 0), (0, d - width))
        return jax.lax.dynamic_slice(jnp.concatenate([row, row]), (d - rotation,), (d,))

    def add(sums, windows):
        *windows, table = windows
        whose = (jnp.arange(partitions.TABLES)[:, None] == table).astype(sums.dtype)
        return sums + jnp.dot(whose, jax.vmap(row)(*windows), precision=jax.lax.Precision.HIGHEST), None

    windows = [x.reshape(-1) for x in (run, start, low, high, rotation, table)]
    sums = jnp.zeros_like(total, shape=(partitions.TABLES, d))
    most = max(partitions.TABLES, _PIECE // d)
    pieces, rest = divmod(len(windows[0]), most)
    if pieces:
        sums, _ = jax.lax.scan(add, sums, [x[: pieces * most].reshape(pieces, most) for x in windows])
    if rest:
        sums, _ = add(sums, [x[pieces * most :] for x in windows])
    return total + jnp.pad(sums, ((0, 0), (0, d))).reshape(-1)


def _of_layer(layer, per_run):
    """The row of one layer, or all rows, of arrays with a row for each run."""
    return per_run if layer is None else jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer), per_run)


def _in_table(region, chunk, r):
    """Where in the flattened table the element r of a chunk (table, rotation) is, and those after it in the chunk."""
    table, rotation = chunk
    return table * (2 * region.d) + (rotation + r) % region.d
