"""What the TPU's kernels move: the pieces of a block, each one slice of the tables, listed by XLA before the kernel starts.

The kernels take an array as matrices, and a matrix in blocks of rows. In VMEM a block lies flat, 128 numbers a flat row, and each
matrix row begins a new one. Where they leave no gap the block is one run of consecutive indices; else each matrix row is a run.
A piece is a part of a run within one chunk, so that it is one slice of the tables, and of a few flat rows at most. Or, where the
matrix rows are short parts of longer ones, it is the part of some rows that lies within one chunk: in a table these begin at
equal distances. Then the block lies as its columns of 128, one behind the other. So all pieces take the same time, and a block
has a fixed number of them; those that a block doesn't need are empty.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpart_jax import uint64
from gpart_jax.lowerings.base import LANES, Call, Cut, Where, chunks_of, is_doubled, row_length
from gpart_jax.targets import Array, Leaf

LEAD = 64  # flat rows before the tables, and before a block: a slice that begins within a row is read from the row's begin
LONGEST = 2**20  # d whose tables, 34 MB, fit into VMEM beside the blocks
SHORTEST = 64  # d for which a kernel is worth while: a piece costs 14 cycles or more, however short it is
_FEWEST = 1024  # elements, likewise
_NARROWEST = 16  # columns of a part along the last axis, whose rows are pieces of their own
_WIDEST = 2**15  # columns: a block has 16 rows at least
_MOST = 2**13  # chunks that begin within a block: what is to be known of each lies in SMEM
_BLOCK = 192 * 1024  # elements of a block, about: to work on them takes longer than to fetch the next begins to
_UNROLLED = 48  # vectors of 8 x 128 that one turn of a loop over matrix rows works on
STEP = 64  # flat rows of a piece, at most
_AT_ONCE = 128  # flat rows of the pieces in one turn of a loop: a turn of the lanes has some fifty cycles of latency


Begins = tuple[tuple[Array, Array], Array]  # the chunk (high, low) and the place in it, uint32 (n,)


class Form(NamedTuple):
    """An array as equal matrices, whose rows are runs of consecutive indices."""

    matrices: int
    rows: int
    columns: int
    pitch: int  # indices from one row to the next
    stride: int  # indices from one matrix to the next, within a layer
    flat: bool  # the array is laid out anew, 128 to a row

    def lay(self, array: jax.Array) -> jax.Array:
        """(matrices, rows, columns), filled up with zeros to whole flat rows, and to rows that are a multiple of 8."""
        if self.flat:
            array = array.reshape(self.matrices, -1)
            array = jnp.pad(array, ((0, 0), (0, self.rows * LANES - array.shape[1])))
        array = array.reshape(self.matrices, self.rows, self.columns)
        return jnp.pad(array, ((0, 0), (0, -self.rows % 8), (0, 0)))

    def unlay(self, array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The array of that shape again."""
        array = array[:, : self.rows]
        if self.flat:
            array = array.reshape(self.matrices, -1)[:, : math.prod(shape) // self.matrices]
        return array.reshape(shape)


class Plan(NamedTuple):
    """How matrices of a form go through VMEM, and in which pieces."""

    block: int  # matrix rows
    rows_at_once: int  # of them, in one turn of a loop
    per_row: int  # flat rows of a matrix row
    runs: int  # of a block
    length: int  # elements of a run
    step: int  # rows of a piece, flat ones or the matrix's
    stride: int  # indices from one of them to the next: LANES of flat rows, else the pitch
    cell: int  # elements: a run begins a piece at every multiple of it
    begins: int  # chunks that begin within a block, at most
    wraps: bool  # whether a chunk may reach over a table's end, and so be two slices

    @property
    def tall(self) -> bool:
        """Whether pieces are rows of the matrix. The block's columns of tiles then lie one behind the other, not its rows."""
        return self.stride > LANES

    @property
    def tiles(self) -> int:
        """Columns of tiles that a piece goes over."""
        return self.per_row if self.tall else 1

    @property
    def height(self) -> int:
        """Flat rows from one of these columns to the next."""
        return self.block + self.step

    @property
    def unroll(self) -> int:
        """Pieces in one turn of a loop."""
        return max(1, _AT_ONCE // (self.step * self.tiles))

    @property
    def cells(self) -> int:
        """Pieces that begin with a cell, which come first, and some empty ones to a whole number of a loop's turns."""
        return round_up(self.runs * -(-self.length // self.cell), self.unroll)

    @property
    def pieces(self) -> int:
        """All of a block's, likewise."""
        return self.cells + round_up(self.begins + (self.begins + 1) * self.wraps, self.unroll)

    @property
    def words(self) -> int:
        """Of each kind in a block's list."""
        return round_up(self.pieces, LANES)

    @property
    def flat_rows(self) -> int:
        return self.per_row * (self.height if self.tall else self.block)


def round_up(n: int, of: int) -> int:
    return -(-n // of) * of


@functools.lru_cache(maxsize=1024)
def form_of(cut: Cut, layered: bool, d: int) -> Form | None:
    """None where the kernels don't reach, or aren't worth while."""
    form = _form(cut, layered)
    return form if form and 16 * form.pitch <= _MOST * d else None


def _form(cut, layered) -> Form | None:
    layers, parts = _layers(cut, layered)
    if any(axis < 0 for axis in parts) or not all(layer.is_dense and layer.size < 2**31 for layer in layers):
        return None
    whole = layers[0].shape
    shape = [parts.get(axis, n) for axis, n in enumerate(whole)]
    size, copies = math.prod(shape), 1 if layered else len(layers)
    if size < _FEWEST:
        return None
    *before, rows, columns = [1, *shape] if len(shape) == 1 else shape
    if parts.keys() <= {0} and (columns < LANES or rows < 8 or columns > _WIDEST):  # a single run
        return Form(copies, -(-size // LANES), LANES, LANES, 0, True)
    if not _NARROWEST <= columns <= _WIDEST or any(0 < axis < len(shape) - 2 for axis in parts):
        return None
    pitch = whole[-1]
    count, stride = math.prod(before), pitch * (whole[-2] if len(whole) > 1 else 1)
    if rows % 8 == 0 and stride == rows * pitch:
        count, rows = 1, count * rows
    return Form(copies * count, rows, columns, pitch, stride, False)


def _layers(cut: Cut, layered: bool) -> tuple[list[Leaf], dict[int, int]]:
    """The leaf, or its layers, each one run of indices; and {axis of one of them: length} of the part, -1 for the layers' own."""
    leaf = cut.leaf
    if not leaf.stacked or (leaf.is_dense and leaf.size < 2**31 and not layered):
        return [leaf], dict(cut.parts)
    return leaf.layers(), {axis - 1: length for axis, length in cut.parts}


def plan_of(form: Form, d: int, turned: int) -> Plan:
    """turned: 1 where a piece, turned into the tables' order, must also fit into its number of flat rows, else 0."""
    per_row = -(-form.columns // LANES)
    most = _MOST * d // form.pitch // 16 * 16  # rows
    at_once = min(max(16, _UNROLLED * 8 // per_row // 16 * 16), most)
    block = min(max(1, min(_BLOCK // (per_row * LANES), most) // at_once) * at_once, round_up(form.rows, at_once))
    joined = form.pitch == form.columns and form.columns % LANES == 0
    length = block * form.columns if joined else form.columns
    longest = min(-(-length // LANES), (d + 2 * LANES - 2) // LANES) + turned  # flat rows of a part of a chunk
    step = min(STEP, round_up(longest, 8))
    cell = (step - turned) * LANES if longest > step else length
    begins = -(-((min(block, form.rows) - 1) * form.pitch + form.columns - 1) // d)
    runs, wraps = 1 if joined else block, not is_doubled("balanced-v1", d)
    plan = Plan(block, at_once, per_row, runs, length, step, LANES, cell, begins, wraps)

    # Rows of one chunk lie in a table at equal distances: where these are whole flat rows, and loads with such a stride no loads
    # of one row each (as with multiples of 32), some rows of the matrix are a piece.
    step = min(STEP // per_row, d // form.pitch, 0xFFFF // form.pitch) // 8 * 8
    if step and per_row * LANES < form.pitch and form.pitch % LANES == 0 and form.pitch % (32 * LANES):
        return plan._replace(runs=1, length=block * form.pitch, step=step, stride=form.pitch, cell=step * form.pitch)
    return plan


def begins_of(call: Call, where: Where) -> Begins:
    """Where layers begin, of all layers of all cuts one after another."""
    of_cuts = [_layers(cut, call.layered) for cut in call.cuts]
    offsets = np.array([[layer.offset for layer in layers] for layers, _ in of_cuts] if call.layered else
                       [[layer.offset] for layers, _ in of_cuts for layer in layers], np.uint64).T  # fmt: skip
    chunk, r = np.divmod(offsets, np.uint64(call.d))
    fields = np.stack([*uint64.split(chunk), r.astype(np.uint32)])  # (3, layers or 1, cuts or their layers)
    high, low, r = fields[:, 0] if where.layer is None else jax.lax.dynamic_index_in_dim(fields, where.layer, 1, False)
    if where.starts is not None:
        steps = np.zeros(where.starts.shape, np.uint32)
        for row, (layers, parts) in zip(steps, of_cuts):
            row[: len(parts)] = [math.prod(layers[0].shape[axis + 1 :]) for axis in parts]
        own = (where.starts.astype(jnp.uint32) * steps).sum(1, dtype=jnp.uint32)
        r = r + (own if call.layered else jnp.repeat(own, np.array([len(layers) for layers, _ in of_cuts])))
    return _carried(call.d, (high, low), r)


def blocks_of(call: Call, groups: Sequence[tuple[Form, Plan, Sequence[int]]], begins: Begins) -> list[Begins]:
    """Where the blocks of each group of cuts begin, those of one matrix after another. A group is of one form; it names its cuts."""
    counts = [1 if call.layered else len(_layers(cut, False)[0]) for cut in call.cuts]
    ends = np.cumsum(counts)
    layers, offsets = [], []
    for form, plan, numbers in groups:
        own = np.concatenate([np.arange(ends[n] - counts[n], ends[n]) for n in numbers])
        of_matrices = np.arange(form.matrices // counts[numbers[0]])[:, None] * form.stride
        of_blocks = (of_matrices + np.arange(0, form.rows, plan.block) * form.pitch).reshape(-1)
        layers.append(np.repeat(own, of_blocks.size))
        offsets.append(np.tile(of_blocks, own.size))
    chunk, r = jax.tree.map(lambda x: x[np.concatenate(layers)], begins)
    found = _carried(call.d, chunk, r + np.concatenate(offsets).astype(np.uint32))
    parts = np.cumsum([own.size for own in layers])
    return [jax.tree.map(lambda x: x[end - own.size : end], found) for own, end in zip(layers, parts)]


def _carried(d, chunk, r):
    carry = r // np.uint32(d)
    return uint64.add(chunk, (carry * np.uint32(0), carry)), r - carry * np.uint32(d)


def words_of(call: Call, form: Form, plan: Plan, where: Where, blocks: Begins) -> jax.Array:
    """What the kernels read of each block's pieces, int32 (blocks, 3 or 4, plan.words).

    Of each piece: the row of the block that it begins in; where in the tables that row begins, which may be before the
    slice; and its first element and the one behind its last, in 16 bits each, counted in indices from that row. With dropout a fourth:
    the index (high, low) of the block's first element, and the key. XLA makes all of it in a few operations, for each costs a
    TPU more than the arithmetic.
    """
    d, pitch = call.d, np.uint32(form.pitch)
    chunk, r = jax.tree.map(lambda x: x.reshape(-1, 1), blocks)
    of_matrix = np.minimum(plan.block, form.rows - np.arange(0, form.rows, plan.block))  # rows of its blocks
    rows = np.tile(of_matrix.astype(np.int32), r.size // of_matrix.size)[:, None]

    # Three kinds of pieces: a cell's, one that begins with a chunk, and one that begins with a table, in the midst of a chunk.
    number = np.arange(plan.words)
    per_run = -(-plan.length // plan.cell)
    is_cell, is_begin = number < plan.runs * per_run, (number >= plan.cells) & (number < plan.cells + plan.begins)
    is_wrap = (number >= plan.cells + plan.begins) & (number <= plan.cells + 2 * plan.begins) & plan.wraps
    of_cell = [np.where(is_cell, x, 0) for x in (number // per_run, number % per_run * plan.cell)]
    ahead = r + (of_cell[0] * form.pitch + of_cell[1]).astype(np.uint32)  # of a cell, from the begin of the block's first chunk
    known = np.where(is_begin, number - plan.cells + 1, np.where(is_wrap, number - plan.cells - plan.begins, 0))
    later = jnp.where(is_cell, ahead // np.uint32(d), known.astype(np.uint32))  # chunks after the block's first
    table, rotation = chunks_of(d, where.keys[0], uint64.add(chunk, (later * np.uint32(0), later)))
    within = jnp.where(is_cell, (ahead % np.uint32(d)).astype(jnp.int32), jnp.where(is_wrap, d - rotation, 0))

    from_first = later * np.uint32(d) + within.astype(jnp.uint32)
    behind = (from_first - r).astype(jnp.uint32)  # elements from the block's first on
    other = behind // pitch if plan.runs > 1 else behind * np.uint32(0)
    run = jnp.where(is_cell, of_cell[0].astype(np.int32), other.astype(jnp.int32))
    place = jnp.where(is_cell, of_cell[1].astype(np.int32), (behind - other * pitch).astype(jnp.int32))
    # A cell's begin has its own piece; and a first chunk may begin, or its table end, before the block.
    own = is_cell | (is_begin | (is_wrap & (rotation > 0) & (from_first > r))) & (place % plan.cell > 0)

    at, size = rotation + within, d - within
    if plan.wraps:
        at = jnp.where(at >= d, at - d, at)
        size = jnp.minimum(size, d - at)
    length = rows * form.pitch if plan.runs == 1 else jnp.where(run < rows, form.columns, 0)
    size = jnp.minimum(size, jnp.minimum(plan.cell - place % plan.cell, length - place))
    size = jnp.where(own, jnp.maximum(size, 0), 0)
    end = plan.block * plan.stride if plan.tall else plan.flat_rows * LANES
    place = jnp.where(is_cell | (size > 0), run * (plan.per_row * LANES) + place, end)  # else behind the block
    lane = place % plan.stride
    words = [place // plan.stride, table * row_length(call.scheme, d) + at - lane, lane | (lane + size) << 16]
    if where.drop is not None:
        high, low = uint64.add(uint64.multiply(chunk, d), (r * np.uint32(0), r))
        words.append(_chosen(number, [high, low, where.drop[0], where.drop[1]]).astype(jnp.int32))
    kind = np.arange(len(words))[:, None]
    return _chosen(kind, [x[:, None] for x in words])


def _chosen(number, values):
    """values[number], by choices."""
    chosen = values[-1]
    for n, value in enumerate(values[:-1]):
        chosen = jnp.where(number == n, value, chosen)
    return chosen
