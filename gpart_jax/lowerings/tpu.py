"""P theta and its transpose for balanced-v1 on a TPU: two Pallas kernels that the memory bounds, not the arithmetic.

Both hold the tables in VMEM, flat, 128 numbers a row, and fetch blocks of the arrays one ahead. In flat order a piece
(`pieces.py`) is a slice of a table that begins anywhere: two loads one row apart, a choice by lane and one turn of the lanes put
it in its place. Loads of every n-th flat row then give the (8, 128) tiles of a matrix. Forward, W is read once and W + P theta
written once; backward, the cotangent is read once, and the sums stay in VMEM until the end.

They were compiled for v5e, v5p and v6e. A v4 and older ones have too little VMEM, 16 MB.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gpart_jax import dropout
from gpart_jax.lowerings.base import LANES, Call, Where, table_shape
from gpart_jax.lowerings.pieces import (
    LEAD, LONGEST, SHORTEST, Form, Plan, begins_of, blocks_of, form_of, plan_of, round_up, words_of
)  # fmt: skip

_GROUP = 64  # arrays that share a loop: to start a copy from one of them is a branch each
_TOGETHER = 4  # loops of a kernel, each of which has its own blocks in VMEM


def fit_here() -> bool:
    """Whether the TPUs of this process, if it has any, have VMEM enough."""
    return jax.default_backend() != "tpu" or not re.match("TPU v[234]", jax.devices()[0].device_kind)


def reaches(call: Call, number: int, dtype: np.dtype) -> bool:
    """Whether the kernels are for a cut."""
    return (
        call.scheme == "balanced-v1" and SHORTEST <= call.d <= LONGEST and dtype in (jnp.float32, jnp.bfloat16)
        and form_of(call.cuts[number], call.layered, call.d) is not None
    )  # fmt: skip


def adapt(
    call: Call, where: Where, table: jax.Array, weights: Sequence[jax.Array], interpret: bool = False
) -> list[jax.Array]:
    """W + P theta of each cut, all of which the kernels reach. Arguments as in `lowerings.adapt`."""
    table, begins = table.reshape(-1, LANES), begins_of(call, where)
    results: dict[int, jax.Array] = {}
    for groups in _groups(call, weights, turned=0):
        words = _words(call, groups, where, begins)
        own = [(n, group.form) for group in groups for n in group.numbers]
        laid = [form.lay(weights[n]) for n, form in own]
        kernel = functools.partial(_adapt_kernel, call, groups)
        found = _run(kernel, call, groups, [table], words, laid, [_like(x) for x in laid], 2, interpret)
        results |= {n: form.unlay(x, weights[n].shape) for (n, form), x in zip(own, found)}
    return [results[n] for n in range(len(weights))]


def contract(call: Call, where: Where, cotangents: Sequence[jax.Array], interpret: bool = False) -> jax.Array:
    """The tables' cotangent, (8, rows, 128), from those of the cuts, all of which the kernels reach."""
    begins, totals = begins_of(call, where), []
    for groups in _groups(call, cotangents, turned=1):
        words = _words(call, groups, where, begins)
        laid = [group.form.lay(cotangents[n]) for group in groups for n in group.numbers]
        kernel = functools.partial(_contract_kernel, call, groups)
        shape = _like(laid[0], (math.prod(table_shape(call)[:2]), LANES), jnp.float32)
        totals += _run(kernel, call, groups, [], words, laid, [shape], 1, interpret)
    return sum(totals[1:], totals[0]).reshape(table_shape(call))


def _words(call, groups, where, begins):
    blocks = blocks_of(call, [(group.form, group.plan, group.numbers) for group in groups], begins)
    # In one row, for of one dimension the kernel then knows the address of a word at little arithmetic, the scalar unit's bottleneck.
    return [words_of(call, group.form, group.plan, where, own).reshape(1, -1) for group, own in zip(groups, blocks)]


def _adapt_kernel(call, groups, table_ref, *refs):
    counts = [len(group.numbers) for group in groups]
    words, arrays, results, (table, flat, sems), buffers = _split(refs, counts, counts, 4)
    _copy(table_ref, table.at[pl.ds(LEAD, table_ref.shape[0])], sems.at[0])
    for group, own, from_, to, scratch in zip(groups, words, arrays, results, buffers):

        def work(words, block, result, group=group):
            lay = functools.partial(_lay, words, table, flat, group.plan)
            group.each_piece(0, group.plan.cells, functools.partial(lay, whole=True))
            group.each_piece(group.plan.cells, group.plan.pieces, functools.partial(lay, whole=False))

            def add(tile, places):
                bits = group.bits(call, words, tile, wanted=call.rate or group.dithers(call))
                total = block[tile].astype(jnp.float32) + group.drop(call, bits, flat[places])
                result[tile] = (dropout.dithered(total, bits) if group.dithers(call) else total).astype(group.dtype)

            group.each_tile(add)

        _stream(group, own, from_, to, scratch, work)


def _contract_kernel(call, groups, *refs):
    words, arrays, ((result,), *_), (total, flat, sems), buffers = _split(refs, [len(group.numbers) for group in groups], [1], 3)

    def clear(n, _):
        for k in range(8):
            total[pl.ds((8 * n + k) * 8, 8), :] = jnp.zeros((8, LANES), jnp.float32)
        return 0

    jax.lax.fori_loop(0, total.shape[0] // 64, clear, 0)
    for group, word_ref, own, scratch in zip(groups, words, arrays, buffers):

        def work(words, block, group=group):
            def lay(tile, places):
                bits = group.bits(call, words, tile, wanted=call.rate)
                flat[places] = group.drop(call, bits, block[tile].astype(jnp.float32))

            group.each_tile(lay)
            group.each_piece(0, group.plan.pieces, functools.partial(_add, words, total, flat, group))

        _stream(group, word_ref, own, [], scratch, work)
    _copy(total.at[pl.ds(LEAD, result.shape[0])], result, sems.at[0])


def _split(refs, arrays, results, buffers):
    """A kernel's refs but for the table: words, arrays and results of each group, what all share, buffers of each group."""
    refs, count = iter(refs), len(arrays)
    sizes = [count], arrays, results, [3], [buffers] * count
    words, *others = ([[next(refs) for _ in range(size)] for size in each] for each in sizes)
    arrays, results, (shared,), buffers = others
    return words[0], arrays, results, shared, buffers


def _lay(words, table, flat, plan, n, whole):
    """Lays piece n. `whole`: with what follows it in the table, which other pieces overwrite."""
    row, first, shift, low, high = _read(words, n)
    lanes = jax.lax.broadcasted_iota(jnp.int32, (plan.step, LANES), 1)
    loaded = [table[pl.ds(first + k, plan.step, stride=plan.stride // LANES), :] for k in range(plan.tiles + 1)]
    for k, (one, after) in enumerate(zip(loaded, loaded[1:])):
        turned = pltpu.roll(jnp.where(lanes >= shift, one, after), (LANES - shift) & 127, 1)
        to = pl.ds(row + k * plan.height, plan.step), slice(None)
        if not whole:
            place = jax.lax.broadcasted_iota(jnp.int32, (plan.step, LANES), 0) * plan.stride + k * LANES + lanes
            turned = jnp.where((place >= low) & (place < high), turned, flat[to])
        flat[to] = turned


def _add(words, total, flat, group, n):
    """Adds piece n to where it comes from in the tables."""
    plan, columns = group.plan, group.form.columns
    row, first, shift, low, high = _read(words, n)
    lanes = jax.lax.broadcasted_iota(jnp.int32, (plan.step, LANES), 1)
    in_row = lanes < LANES - shift
    loaded = [flat[pl.ds(row + k * plan.height, plan.step), :] for k in range(plan.tiles)]
    if plan.tall:
        pairs = zip([*loaded, loaded[-1]], [loaded[0], *loaded])  # of a column of tiles and the one before it, if they are there
    else:
        pairs = zip(loaded, [flat[pl.ds(row - 1, plan.step), :]])
    turned = []
    for k, (one, before) in enumerate(pairs):
        column = k * LANES + lanes - jnp.where(in_row, 0, LANES)
        place = jax.lax.broadcasted_iota(jnp.int32, (plan.step, LANES), 0) * plan.stride + column
        meant = (place >= low) & (place < high)
        if plan.tall and (k == 0 or (k + 1) * LANES > columns):
            meant &= (column >= 0) & (column < columns)
        turned.append(pltpu.roll(jnp.where(meant, jnp.where(in_row, one, before), 0), shift, 1))
    to = [(pl.ds(first + k, plan.step, stride=plan.stride // LANES), slice(None)) for k in range(len(turned))]
    for rows, sums in zip(to, [total[rows] + own for rows, own in zip(to, turned)]):
        total[rows] = sums


def _read(words, n):
    """Of piece n: its first flat row; the row of the tables where that begins, and its lane; which of its elements are meant."""
    row, source, bounds = (words(kind, *n) for kind in range(3))
    first = LEAD + jax.lax.shift_right_arithmetic(source, 7)
    return LEAD + row, first, source & 127, bounds & 0xFFFF, jax.lax.shift_right_logical(bounds, 16)


class _Group(NamedTuple):
    """Arrays of one form and dtype, whose blocks go through the same buffers in one loop."""

    form: Form
    plan: Plan
    dtype: np.dtype
    numbers: tuple[int, ...]  # of the cuts

    @property
    def blocks(self) -> int:
        """Of a matrix."""
        return -(-self.form.rows // self.plan.block)

    @property
    def turns(self) -> int:
        return len(self.numbers) * self.form.matrices * self.blocks

    def each_piece(self, first, last, work):
        unroll = self.plan.unroll

        def some(turn, _):
            for n in range(unroll):
                work((first + turn * unroll, n))  # apart, so that the kinds and pieces of a turn share the first's address
            return 0

        jax.lax.fori_loop(0, (last - first) // unroll, some, 0)

    def each_tile(self, work):
        """work(rows and columns of the block, the same places laid flat) for each column of tiles, some rows at a time."""
        rows, per_row = self.plan.rows_at_once, self.plan.per_row

        def some(turn, _):
            top = pl.multiple_of(turn * rows, 8)
            for k in range(per_row):
                left, right = k * LANES, min((k + 1) * LANES, self.form.columns)
                places = pl.ds(LEAD + top * per_row + k, rows, stride=per_row)
                if self.plan.tall:
                    places = pl.ds(pl.multiple_of(LEAD + k * self.plan.height + top, 8), rows)
                work((pl.ds(top, rows), slice(left, right)), (places, slice(0, right - left)))
            return 0

        jax.lax.fori_loop(0, self.plan.block // rows, some, 0)

    def dithers(self, call) -> bool:
        return call.dither and self.dtype == jnp.bfloat16

    def drop(self, call, bits, x):
        """Dropout on a tile."""
        return jnp.where(dropout.kept(bits, call.rate), x * dropout.scale(call.rate), 0) if call.rate else x

    def bits(self, call, words, tile, wanted):
        """Of a tile's elements. The last kind of `words` holds the index of the block's first element, and the key."""
        if not wanted:
            return None
        rows, columns = tile
        shape = rows.size, columns.stop - columns.start
        first_high, first_low, *key = (words(3, n).astype(jnp.uint32) for n in range(4))
        row, column = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(2))
        begin = first_low + rows.start.astype(jnp.uint32) * np.uint32(self.form.pitch) + np.uint32(columns.start)
        low = row * np.uint32(self.form.pitch) + column + begin  # what varies from tile to tile is a scalar
        high = first_high
        if any(call.cuts[number].leaf.crosses_2_32 for number in self.numbers):
            high = jnp.where(low < first_low, first_high + np.uint32(1), first_high)
        return dropout.hashed(high, low, (key[0], key[1]))


def _stream(group: _Group, word_ref, arrays, results, scratch, work):
    """work(words, block) or work(words, block, result) for one block after another, the next one being fetched meanwhile."""
    plan = group.plan
    words, sems, *buffers = scratch
    size = words.shape[0] // 2
    edge = -(-group.form.rows // 8) * 8 - (group.blocks - 1) * plan.block  # rows of a matrix's last block

    def move(turn, refs, buffer, sem, out=False, wait=False):
        array, rest = jax.lax.div(turn, group.form.matrices * group.blocks), jax.lax.rem(turn, group.form.matrices * group.blocks)
        matrix, block = jax.lax.div(rest, group.blocks), jax.lax.rem(rest, group.blocks)
        slot, last = turn & 1, block == group.blocks - 1

        def go(ref, rows):
            pair = ref.at[matrix, pl.ds(pl.multiple_of(block * plan.block, 8), rows)], buffer.at[slot, pl.ds(0, rows)]
            copy = pltpu.make_async_copy(*(pair[::-1] if out else pair), sems.at[sem, slot])
            copy.wait() if wait else copy.start()

        for number, ref in enumerate(refs[:1] if wait else refs):  # all wait alike
            mine = turn >= 0 if wait else array == number
            if group.blocks == 1 or edge == plan.block:
                pl.when(mine)(functools.partial(go, ref, edge))
            else:
                pl.when(mine & ~last)(functools.partial(go, ref, plan.block))
                pl.when(mine & last)(functools.partial(go, ref, edge))

    def fetch(turn, wait=False):
        move(turn, arrays, buffers[0], 0, wait=wait)
        from_, to = (pl.ds(pl.multiple_of(block * size, LANES), size) for block in (turn, turn & 1))
        copy = pltpu.make_async_copy(word_ref.at[0, from_], words.at[to], sems.at[1, turn & 1])
        copy.wait() if wait else copy.start()

    def turn(n, _):
        pl.when(n + 1 < group.turns)(lambda: fetch(n + 1))
        fetch(n, wait=True)
        if results:
            pl.when(n > 1)(lambda: move(n - 2, results, buffers[1], 2, out=True, wait=True))
        slot = pl.multiple_of((n & 1) * size, LANES)
        work(lambda kind, first, n=0: words[slot + first + (kind * plan.words + n)], *(buffer.at[n & 1] for buffer in buffers))
        if results:
            move(n, results, buffers[1], 2, out=True)
        return 0

    fetch(jnp.int32(0))
    jax.lax.fori_loop(0, group.turns, turn, 0)
    for n in range(max(0, group.turns - 2), group.turns) if results else ():
        move(jnp.int32(n), results, buffers[1], 2, out=True, wait=True)


def _copy(source, to, sem):
    copy = pltpu.make_async_copy(source, to, sem)
    copy.start()
    copy.wait()


def _groups(call, arrays, turned) -> list[list[_Group]]:
    """The groups of one kernel after another."""
    numbers: dict = {}
    for number, array in enumerate(arrays):
        numbers.setdefault((form_of(call.cuts[number], call.layered, call.d), array.dtype), []).append(number)
    groups = []
    for (form, dtype), own in numbers.items():
        plan = plan_of(form, call.d, turned)
        groups += [_Group(form, plan, dtype, tuple(own[n : n + _GROUP])) for n in range(0, len(own), _GROUP)]
    return [groups[n : n + _TOGETHER] for n in range(0, len(groups), _TOGETHER)]


def _like(x, shape=None, dtype=None):
    """The shape of an output that varies over a mesh as x does."""
    of = jax.typeof(x)
    name = "manual_axis_type" if hasattr(of, "manual_axis_type") else "vma"  # before JAX 0.10
    return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype, **{name: getattr(of, name)})


def _run(kernel, call, groups, tables, words, arrays, shapes, buffers, interpret) -> list[jax.Array]:
    span = max(group.plan.step * group.plan.stride // LANES for group in groups)
    rows = round_up(math.prod(table_shape(call)[:2]) + 2 * LEAD + span, 64)
    flat = max(group.plan.flat_rows + group.plan.step for group in groups) + 2 * LEAD
    scratch = [pltpu.VMEM((rows, LANES), jnp.float32), pltpu.VMEM((flat, LANES), jnp.float32), pltpu.SemaphoreType.DMA((1,))]
    size = 4 * LANES * (rows + flat)
    for group, own in zip(groups, words):
        block = pltpu.VMEM((2, group.plan.block, group.form.columns), group.dtype)
        scratch += [pltpu.SMEM((2 * own.size // group.turns,), jnp.int32), pltpu.SemaphoreType.DMA((3, 2)), *[block] * buffers]
        size += buffers * 2 * 4 * LANES * group.plan.flat_rows
    any_space = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        in_specs=[any_space] * (len(tables) + len(words) + len(arrays)),
        out_specs=[any_space] * len(shapes),
        out_shape=shapes,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=size + 4 * 2**20),
        interpret=interpret,
        name="gpart",
    )(*tables, *words, *arrays)
