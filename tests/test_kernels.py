"""The TPU's kernels in interpret mode on a CPU, against the definition in NumPy. `test_tpu.py` compiles them for a TPU."""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpart_jax import Leaf, canonical_layout, dropout, lowerings, make_partition
from gpart_jax.lowerings import pieces, tpu
from gpart_jax.lowerings.base import Call, Cut, Where, as_table, is_doubled, shape_of
from gpart_jax.partition import group_ids

SEED = 3
DROP = jnp.array([5, 7], jnp.uint32)


def check(shapes, d, dtype, *, offset=0, parts=(), stacked=False, layer=None, rate=0.0, dither=False):
    """W + P theta to the bit, and P^T within 1e-6 of each group's sum of absolute values.

    Args:
      shapes: of leaves that are numbered one after another, behind `offset` other elements.
      parts: (axis, index, count): which of `count` equal parts along an axis of every leaf.
      layer: of stacked leaves.
    """
    params = ([jnp.zeros(offset)] if offset else []) + [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    layout = canonical_layout(params, stacked=f"^({'|'.join(map(str, range(bool(offset), len(params))))})$" if stacked else None)
    partition = make_partition(layout, d, SEED)
    leaves = [view.leaf for view in partition.regions[0].views][bool(offset) :]
    cuts = tuple(Cut(leaf, tuple((axis, leaf.shape[axis] // count) for axis, _, count in parts)) for leaf in leaves)
    call = Call("balanced-v1", d, cuts, layer is not None, rate, dither)
    starts = jnp.array([[index * n for (_, index, _), (_, n) in zip(parts, cut.parts)] for cut in cuts], jnp.int32) if parts else None
    where = Where((partition.keys[0],) * len(cuts), None if layer is None else jnp.int32(layer), starts, DROP if rate or dither else None)
    assert all(tpu.reaches(call, n, jnp.dtype(dtype)) for n in range(len(cuts)))

    random, rho = np.random.default_rng(0), partition.permutations[0]
    theta = random.standard_normal(d).astype(np.float32)
    weights = [random.standard_normal(shape_of(call, n)).astype(dtype) for n in range(len(cuts))]
    adapted = jax.jit(lambda *a: tpu.adapt(call, *a, interpret=True))(where, as_table(jnp.asarray(theta[rho]), "balanced-v1"), weights)
    summed = jax.jit(lambda *a: tpu.contract(call, *a, interpret=True))(where, weights)

    sums, magnitude = np.zeros(d), np.zeros(d)
    for leaf, weight, found in zip(leaves, weights, adapted):
        index = leaf.offset + sum(np.arange(n).reshape([-1 if k == axis else 1 for k in range(len(leaf.shape))]) * step
                                  for axis, (n, step) in enumerate(zip(leaf.shape, leaf.strides)))  # fmt: skip
        for axis, number, count in parts:
            index = np.split(index, count, axis)[number]
        index = index if layer is None else index[layer]
        kept = dropout.keep_mask(np.uint32(0), index.astype(np.uint32), DROP, rate) if rate else np.ones(index.shape, bool)
        factor = np.where(kept, dropout.scale(rate), np.float32(0))
        groups = group_ids("balanced-v1", d, SEED, index)
        total = weight.astype(np.float32) + theta[groups] * factor
        if dither and dtype == "bfloat16":
            total = np.asarray(dropout.dithered(total, dropout.hashed(np.uint32(0), index.astype(np.uint32), DROP)))
        np.testing.assert_array_equal(found, total.astype(dtype))
        cotangent = weight.astype(np.float32) * factor
        sums += np.bincount(groups.ravel(), cotangent.ravel().astype(np.float64), d)
        magnitude += np.bincount(groups.ravel(), abs(cotangent).ravel().astype(np.float64), d)
    assert np.all(abs(by_group(summed, partition) - sums) <= 1e-6 * magnitude)


def by_group(summed, partition):
    """The sums of a table's cotangent over its groups; zeros behind the tables."""
    rows, (rho,) = np.asarray(summed, np.float64).reshape(8, -1), partition.permutations
    twice = np.concatenate([rho, rho], 1) if is_doubled("balanced-v1", partition.d) else rho
    assert not rows[:, twice.shape[1] :].any()
    return sum(np.bincount(order, row[: len(order)], partition.d) for order, row in zip(twice, rows))


DTYPES = st.sampled_from(["float32", "bfloat16"])
# Shorter than a lane row, not a multiple of it, exactly one; more than a piece takes; too long to hold each table twice.
LENGTHS = st.sampled_from([64, 65, 100, 127, 128, 300, 768, 1024, 4097, 5000, 9000, 66_048])
OFFSETS = st.sampled_from([0, 1, 77, 128, 1000])
RATES = st.sampled_from([0.0, 0.0, 0.25])
FILLER = 70_000  # elements before the leaves, so that there are as many as groups


@contextlib.contextmanager
def short_loops(step=16):
    """Pieces of so many flat rows at most, and little unrolled: half the time to compile. The tests further down leave both alone."""
    with mock.patch.multiple(pieces, STEP=step, _AT_ONCE=16, _UNROLLED=8):
        yield


@settings(max_examples=14)
@given(st.integers(1, 40), st.sampled_from([64, 100, 128, 130, 256, 300]), LENGTHS, DTYPES, OFFSETS, RATES, st.booleans())
def test_matrices(rows, columns, d, dtype, offset, rate, dither):
    with short_loops():
        check([(rows + 1024 // columns, columns)], d, dtype, offset=offset + FILLER, rate=rate, dither=dither)


@settings(max_examples=4)
@given(st.integers(1024, 9000), LENGTHS, DTYPES, OFFSETS, RATES)
def test_vectors(n, d, dtype, offset, rate):
    with short_loops():
        check([(n,)], d, dtype, offset=offset + FILLER, rate=rate)


@settings(max_examples=5)
@given(st.integers(2, 4), st.integers(1, 30), st.sampled_from([30, 64, 130, 256]), LENGTHS, DTYPES, OFFSETS, RATES)
def test_three_dimensions(count, rows, columns, d, dtype, offset, rate):
    with short_loops():
        check([(count, rows + 1024 // columns, columns)], d, dtype, offset=offset + FILLER, rate=rate)


@settings(max_examples=10)
@given(st.integers(1, 4), st.sampled_from([128, 256, 512]), LENGTHS, DTYPES, OFFSETS, RATES, st.integers(0, 2), st.sampled_from("rcb"))
def test_parts_of_a_layer(rows, columns, d, dtype, offset, rate, layer, kind):
    """The rows, the columns, or both, that one device holds of a stacked leaf; one layer, whose number is traced."""
    parts = {"r": [(1, 1, 2)], "c": [(2, 1, 2)], "b": [(1, 0, 2), (2, 1, 2)]}[kind]
    with short_loops():
        options = dict(parts=parts, stacked=True, layer=layer, rate=rate, dither=rows % 2 == 0)
        check([(3, 32 * rows, columns)], d, dtype, offset=offset + FILLER, **options)


@pytest.mark.parametrize("d", [100, 5000, 66_048])
@pytest.mark.parametrize("layer", [None, 1])
def test_several_leaves_at_once(d, layer):
    """Of two forms, whose layers take turns in the order of the indices."""
    check([(2, 40, 256), (2, 24, 130), (2, 40, 256)], d, "float32", offset=FILLER, stacked=True, layer=layer, rate=0.25)


def test_more_arrays_than_a_loop_takes(monkeypatch):
    monkeypatch.setattr(tpu, "_GROUP", 2)
    monkeypatch.setattr(tpu, "_TOGETHER", 2)
    check([(8, 128)] * 7, 300, "float32")


def test_several_blocks_and_a_last_one_that_is_shorter(monkeypatch):
    monkeypatch.setattr(pieces, "_BLOCK", 2048)
    monkeypatch.setattr(pieces, "_AT_ONCE", 16)
    for columns, d in ((128, 300), (200, 9000), (130, 66_048)):
        check([(56, columns)], d, "float32", offset=FILLER, rate=0.25)
        check([(56, columns)], d, "bfloat16", offset=FILLER + 1)


@pytest.mark.parametrize("d, dtype, offset", [(5200, "bfloat16", 0), (66_048, "float32", FILLER + 1)])
def test_columns_whose_rows_lie_at_equal_distances(monkeypatch, d, dtype, offset):
    """Some rows a piece, in several blocks, the last tiles of a row and of the matrix not full."""
    monkeypatch.setattr(pieces, "_BLOCK", 2**14)
    with short_loops(step=32):
        check([(100, 640)], d, dtype, offset=offset, parts=[(1, 1, 2)], rate=0.25)
        assert pieces.plan_of(pieces.Form(1, 100, 320, 640, 0, False), d, 0).tall


def test_the_mask_of_a_leaf_that_crosses_2_32():
    leaf = Leaf("w", (40, 130), 2**32 - 2500, (130, 1))
    call, where = Call("balanced-v1", 300, (Cut(leaf),), rate=0.5), Where((jnp.array([1, 2], jnp.uint32),), drop=DROP)
    table, zeros = as_table(jnp.ones((8, 300)), "balanced-v1"), [jnp.zeros(leaf.shape)]
    (found,) = jax.jit(lambda *a: tpu.adapt(call, *a, interpret=True))(where, table, zeros)
    (expected,) = jax.jit(lambda *a: lowerings.adapt(call, *a, False))(table, zeros, where)
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, jax.jit(lambda *a: tpu.adapt(call, *a, interpret=True))(
        where._replace(drop=DROP + 1), table, zeros)[0])  # fmt: skip


def test_parts_that_are_narrow_beside_their_rows():
    """Many chunks begin in what lies between two rows of a part."""
    check([(48, 1280)], 64, "float32", parts=[(1, 3, 10)])
    check([(64, 128)], 300, "bfloat16", parts=[(1, 5, 8)], rate=0.25)


def reaches(shape, d=1000, dtype="float32", scheme="balanced-v1", transposed=None, parts=(), layered=False):
    layout = canonical_layout({"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, transposed=transposed, stacked="w" if layered else None)
    cut = Cut(layout.leaves[0], parts)
    return tpu.reaches(Call(scheme, d, (cut,), layered), 0, jnp.dtype(dtype))


@pytest.mark.parametrize(
    "inside, outside",
    [
        (dict(shape=(64, 128), d=64), dict(shape=(64, 128), d=63)),
        (dict(shape=(2**13, 2**8), d=2**20), dict(shape=(2**13, 2**8), d=2**20 + 1)),
        (dict(shape=(1024,)), dict(shape=(1023,))),
        (dict(shape=(8, 128)), dict(shape=(7, 128))),
        (dict(shape=(64, 128), parts=((1, 16),)), dict(shape=(256, 128), parts=((1, 8),))),
        (dict(shape=(4, 64, 128), parts=((0, 2),)), dict(shape=(4, 64, 128), parts=((0, 2),), layered=True)),
        (dict(shape=(64, 128)), dict(shape=(64, 128), dtype="float16")),
        (dict(shape=(64, 128)), dict(shape=(64, 128), dtype="float64")),
        (dict(shape=(64, 128)), dict(shape=(64, 128), scheme="splitmix64")),
        (dict(shape=(64, 128)), dict(shape=(64, 128), transposed="w")),
        (dict(shape=(16, 2**15)), dict(shape=(2**17, 2**14))),  # 2^31 elements and more have no 32-bit offsets
        # Of the chunks that begin within 16 rows, the fewest of a block, 2^13 can be listed.
        (dict(shape=(32, 2**15), d=64, parts=((1, 128),)), dict(shape=(32, 2**15 + 128), d=64, parts=((1, 128),))),
    ],
)  # fmt: skip
def test_where_kernels_are_for(inside, outside):
    """Everything else keeps XLA's lowering."""
    assert reaches(**inside) and not reaches(**outside)


def test_what_kernels_are_not_for_is_lowered_otherwise():
    """In one call, with those that they are for."""
    layout = canonical_layout([jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 128), (7,), (130, 64))], transposed="2")
    partition = make_partition(layout, 300, SEED)
    cuts = tuple(Cut(leaf) for leaf in layout.leaves)
    call, where = Call("balanced-v1", 300, cuts), Where((partition.keys[0],) * 3)
    theta = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    table, zeros = as_table(jnp.asarray(theta[partition.permutations[0]]), "balanced-v1"), [jnp.zeros(leaf.shape) for leaf in layout.leaves]

    def both(kernels):
        adapted = lowerings.adapt(call, table, zeros, where, kernels)
        return adapted, lowerings.contract(call, adapted, where, jnp.float32, kernels)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("adapt", "contract"):
            function = getattr(tpu, name)
            patch.setattr(tpu, name, lambda *a, function=function: function(*a, interpret=True))
        found, summed = jax.jit(lambda: both(True))()
    expected, sums = jax.jit(lambda: both(False))()
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    np.testing.assert_allclose(by_group(summed, partition), by_group(sums, partition), rtol=1e-5, atol=1e-5)
