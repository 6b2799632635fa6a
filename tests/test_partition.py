"""The partition: its golden vectors, its laws, and the compiled program's positions against the definition."""

import json
import runpy
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpart_jax import Layout, Leaf, Partition, canonical_layout, make_partition, uint64
from gpart_jax.lowerings.base import is_doubled, row_length
from gpart_jax.lowerings.elements import slots
from gpart_jax.partition import (
    SCHEMES,
    Region,
    View,
    chunks,
    group_ids,
    group_sizes,
    hash_key,
    magnitude_groups,
    region_seeds,
    seed_to_int,
)

DATA = Path(__file__).parent / "data" / "partition"
ORACLE = runpy.run_path(DATA / "make_golden.py")  # plain Python integers, independent of the library
GOLDEN = json.loads((DATA / "balanced-v1.json").read_text())

SEEDS = st.integers(0, 2**64 - 1)


class region(NamedTuple):  # noqa: N801
    """A region whose `size` elements are those of one leaf, and its seed."""

    scheme: str = "balanced-v1"
    seed: int = 0
    d: int = 7
    size: int = 0

    def groups(self, index):
        return group_ids(self.scheme, self.d, self.seed, index)

    def sizes(self):
        views = (View(Leaf("w", (self.size,), 0, (1,)), None),)
        return group_sizes(Region(self.scheme, 0, self.d, views), self.seed)

    def slots(self, leaf):
        return slots(self.scheme, self.d, leaf, uint64.split(hash_key(self.scheme, self.seed)))


def layout(*shapes):
    return canonical_layout([jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])


def python_group(scheme, d, seed):
    """index -> group, in Python integers."""
    if scheme == "balanced-v1":
        return ORACLE["Balanced"](d, seed).group
    return lambda i: ORACLE["splitmix64"](i, d, seed)


# ---------------------------------------------------------------------------------------------------- golden vectors


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"d={case['d']}-seed={case['seed']}")
def test_golden_group_ids(case):
    where = region(seed=case["seed"], d=case["d"])
    for start, expected in case["group_ids"]:
        index = np.uint64(start) + np.arange(len(expected), dtype=np.uint64)
        assert where.groups(index).tolist() == expected, start


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"d={case['d']}-seed={case['seed']}")
def test_golden_permutations(case):
    rho = make_partition(layout((case["d"],)), case["d"], case["seed"]).permutations[0]
    assert rho.dtype == np.int32 and rho.shape == (8, case["d"])
    assert rho[:, :8].tolist() == case["rho"]


@pytest.mark.parametrize("case", GOLDEN["blocks"], ids=lambda case: str(case["seed"]))
def test_golden_block_seeds(case):
    blocks = canonical_layout({f"layer_{b}": jax.ShapeDtypeStruct((5,), jnp.float32) for b in range(4)})
    partition = make_partition(blocks, 8, case["seed"], scope="block")
    assert list(region_seeds(case["seed"], "block", len(partition.regions))) == case["block_seeds"]


def test_golden_file_is_what_its_script_writes():
    assert json.loads(json.dumps(ORACLE["golden"]())) == GOLDEN


@pytest.mark.parametrize("number", range(len(json.loads((DATA / "splitmix64_group_ids.json").read_text()))))
def test_splitmix64_is_that_of_the_authors(number):
    vector = json.loads((DATA / "splitmix64_group_ids.json").read_text())[number]
    where = region("splitmix64", vector["seed"] % 2**64, vector["d"])
    index = np.uint64(vector["start"]) + np.arange(vector["numel"], dtype=np.uint64)
    assert where.groups(index).tolist() == vector["group_ids"]


def test_splitmix64_sizes_are_those_of_the_authors():
    known = json.loads((DATA / "splitmix64_counts.json").read_text())
    sizes = region("splitmix64", known["seed"], known["d"], known["N"]).sizes()
    assert sizes[:32].tolist() == known["first32"]
    assert (sizes.min(), sizes.max(), np.sum(sizes == 0)) == (known["min"], known["max"], known["empty"])
    assert (sizes.sum(), np.sum(sizes**2)) == (known["N"], known["sum_sq"])


# --------------------------------------------------------------------------------------------------- the definition


@given(st.sampled_from(SCHEMES), st.integers(1, 40), SEEDS, st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=9))
def test_group_ids_of_any_index(scheme, d, seed, index):
    found = region(scheme, seed, d).groups(index)
    assert found.tolist() == list(map(python_group(scheme, d, seed), index))


@given(st.integers(1, 300), SEEDS, st.integers(0, 2**40))
def test_a_whole_chunk_meets_every_group_once(d, seed, c):
    index = c * d + np.arange(d, dtype=np.uint64)
    assert np.array_equal(np.sort(region(seed=seed, d=d).groups(index)), np.arange(d))


@given(st.integers(1, 200), st.integers(0, 3000), SEEDS)
def test_balanced_sizes_differ_by_at_most_one(d, extra, seed):
    where = region(seed=seed, d=d, size=d + extra)
    counted = np.bincount(where.groups(np.arange(where.size)), minlength=d)
    assert counted.min() == where.size // d >= 1 and counted.max() == -(-where.size // d)
    assert np.array_equal(where.sizes(), counted)


@given(st.integers(1, 200), st.integers(0, 3000), SEEDS)
def test_splitmix64_sizes_are_counted(d, extra, seed):
    where = region("splitmix64", seed, d, d + extra)
    assert np.array_equal(where.sizes(), np.bincount(where.groups(np.arange(where.size)), minlength=d))


def test_splitmix64_sizes_of_more_elements_than_one_pass_takes():
    where = region("splitmix64", 3, 1000, 2**22 + 5)
    assert np.array_equal(where.sizes(), np.bincount(where.groups(np.arange(where.size)), minlength=1000))


@given(st.sampled_from(SCHEMES), st.integers(1, 99), SEEDS, st.integers(0, 2**63), st.integers(1, 50))
def test_piecewise_is_at_once(scheme, d, seed, start, pieces):
    where, index = region(scheme, seed, d), np.uint64(start) + np.arange(400, dtype=np.uint64)
    parts = [where.groups(part) for part in np.array_split(index, pieces)]
    assert np.array_equal(np.concatenate(parts), where.groups(index))
    assert np.array_equal(where.groups(index.reshape(20, 20)).reshape(-1), where.groups(index))


def test_chunks_are_the_hash_of_their_number():
    d, seed, stream = 1000, 2**64 - 3, ORACLE["stream"]
    numbers = [0, 1, 2**32, 2**40 + 1, 2**63]
    k, o = chunks(d, seed, np.array(numbers, np.uint64))
    hashes = [stream(stream(seed, 8), c) for c in numbers]
    assert k.tolist() == [h % 8 for h in hashes]
    assert o.tolist() == [(h >> 32) % d for h in hashes]


# --------------------------------------------------------------------------------------- positions in compiled programs


def python_indices(leaf):
    """Exact indices of a leaf, as Python integers in row-major order."""
    return [leaf.offset + sum(s * int(x) for s, x in zip(leaf.strides, where)) for where in np.ndindex(leaf.shape)]


def groups_of_slots(where, positions):
    positions = np.asarray(positions)
    assert positions.dtype == np.int32
    if where.scheme == "splitmix64":
        return positions
    rho = np.array(ORACLE["Balanced"](where.d, where.seed).rho)
    table = np.concatenate([rho, rho], axis=1) if is_doubled(where.scheme, where.d) else rho
    table = np.pad(table, ((0, 0), (0, row_length(where.scheme, where.d) - table.shape[1])), constant_values=-1)
    assert positions.min() >= 0 and positions.max() < table.size
    return table.reshape(-1)[positions]


FAR = [
    Leaf("row-major", (3, 4, 5), 0, (20, 5, 1)),
    Leaf("offset over 2^32", (3, 4, 5), 2**32 - 7, (20, 5, 1)),
    Leaf("strides over 2^32", (3, 4, 5), 2**40 + 3, (2**35 + 11, 2**33 - 1, 2**32 - 5)),
    Leaf("stored transposed", (3, 4, 5), 2**33 + 1, (20, 1, 4)),
    Leaf("near 2^64", (3, 4, 5), 2**64 - 60, (1, 15, 3)),
]


@pytest.mark.parametrize("leaf", FAR, ids=lambda leaf: leaf.path)
@pytest.mark.parametrize("d", [1, 2, 3, 97, 256, 1000])  # with a tiny d the chunk number, too, exceeds 2^32
@pytest.mark.parametrize("scheme", SCHEMES)
def test_slots_are_exact_in_64_bits(scheme, d, leaf):
    assert not jax.config.jax_enable_x64
    where = region(scheme, 2**64 - 3, d)
    expected = list(map(python_group(scheme, d, where.seed), python_indices(leaf)))
    assert groups_of_slots(where, where.slots(leaf)).reshape(-1).tolist() == expected


@given(
    st.sampled_from(SCHEMES), st.integers(1, 50), SEEDS, st.integers(0, 2**61), st.tuples(*[st.integers(0, 2**60)] * 3)
)
def test_slots_of_any_offset_and_strides(scheme, d, seed, offset, strides):
    where, leaf = region(scheme, seed, d), Leaf("w", (3, 4, 5), offset, strides)
    expected = list(map(python_group(scheme, d, seed), python_indices(leaf)))
    assert groups_of_slots(where, where.slots(leaf)).reshape(-1).tolist() == expected


@pytest.mark.parametrize("shape, strides", [((), ()), ((1,), (9,)), ((5,), (3,)), ((0, 3), (3, 1)), ((1, 1), (4, 4))])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_slots_of_small_shapes(scheme, shape, strides):
    where, leaf = region(scheme, 5, 7), Leaf("w", shape, 2**36, strides)
    found = where.slots(leaf)
    assert found.shape == shape
    if found.size:
        expected = list(map(python_group(scheme, 7, 5), python_indices(leaf)))
        assert groups_of_slots(where, found).reshape(-1).tolist() == expected


LONG = [Leaf("vector", (9001,), 2**40 + 3, (1,)), Leaf("matrix", (2, 4097), 2**64 - 10**12, (7, 2**27 + 1))]


@pytest.mark.parametrize("leaf", LONG, ids=lambda leaf: leaf.path)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_slots_along_a_long_axis(scheme, leaf):
    """An axis of more than 4096 elements is computed as two."""
    where = region(scheme, 2**64 - 3, 97)
    expected = list(map(python_group(scheme, 97, where.seed), python_indices(leaf)))
    assert groups_of_slots(where, where.slots(leaf)).reshape(-1).tolist() == expected


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_slots_under_jit(scheme, x64):
    where, leaf = region(scheme, 2**63 + 1, 97), FAR[2]
    with jax.enable_x64(x64):
        found = jax.jit(lambda: where.slots(leaf))()
    assert np.array_equal(found, where.slots(leaf))


def test_slots_of_the_largest_d():
    """8 tables of nearly 2^27 numbers: positions of 30 bits."""
    d, leaf, stream = 2**27 - 1, FAR[2], ORACLE["stream"]
    found = np.asarray(region(seed=1, d=d).slots(leaf)).reshape(-1).tolist()
    for index, slot in zip(python_indices(leaf), found):
        c, r = divmod(index, d)
        h = stream(stream(1, 8), c)
        assert slot == (h % 8) * 2**27 + (r + (h >> 32)) % d


# ---------------------------------------------------------------------------------------------------- signed_magnitude


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=60), st.data())
def test_signed_magnitude_is_even_quantiles_of_each_sign(values, data):
    weights = np.array(values, np.float32)
    d = data.draw(st.integers(1, len(values)))
    groups = magnitude_groups(weights, d)
    negative = groups[weights < 0], np.abs(weights[weights < 0])
    positive = groups[weights >= 0], weights[weights >= 0]
    assert np.bincount(groups, minlength=d).min() >= 1  # none is empty
    if d > 1 and len(negative[0]) and len(positive[0]):
        assert negative[0].max() < positive[0].min()
    for ids, magnitude in (negative, positive):
        order = np.argsort(magnitude, kind="stable")
        assert np.all(np.diff(ids[order]) >= 0)
        sizes = np.bincount(ids)[np.unique(ids)]
        assert not len(sizes) or sizes.max() - sizes.min() <= 1


def test_signed_magnitude_beside_the_authors():
    """Group sizes are theirs; group ids differ by at most one, where magnitudes are close (they order those otherwise)."""
    agree = []
    for case in json.loads((DATA / "signed_magnitude_group_ids.json").read_text()):
        found, theirs = magnitude_groups(np.array(case["values"], np.float32), case["d"]), np.array(case["group_ids"])
        assert np.array_equal(np.bincount(found), np.bincount(theirs))
        assert np.abs(found - theirs).max() <= (1 if case["d"] < len(theirs) else 2)  # there every weight has its own
        agree.append(np.mean(found == theirs))
    np.testing.assert_allclose(agree, [22 / 24, 56 / 60, 29 / 40])


def test_signed_magnitude_reads_the_weights_in_canonical_order():
    weights = np.random.default_rng(0).standard_normal((3, 6, 5)).astype(np.float32)
    params = {"layers": {"w": weights}}
    layout_ = canonical_layout(params, stacked="^layers", transposed="w")
    partition = make_partition(layout_, 7, 0, scheme="signed_magnitude", params=params)
    expected = magnitude_groups(weights.transpose(0, 2, 1).reshape(-1), 7).reshape(3, 5, 6).transpose(0, 2, 1)
    assert np.array_equal(partition.keys[0]["layers/w"], expected)
    np.testing.assert_allclose(partition.scales[0], np.bincount(expected.reshape(-1)) ** -0.5, rtol=1e-6)
    with pytest.raises(TypeError, match="signed_magnitude reads the weights.*pass method.tables"):
        make_partition(layout_, 7, 0, scheme="signed_magnitude")
    with pytest.raises(ValueError, match="needs scope='global'"):
        make_partition(layout_, 7, 0, scheme="signed_magnitude", scope="block", params=params)


# ------------------------------------------------------------------------------------------------- partition and seeds


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_are_inverse_roots_of_sizes(scheme):
    partition = make_partition(layout((40, 5), (23,)), 20, 9, scheme=scheme)
    sizes = np.bincount(group_ids(scheme, 20, 9, np.arange(223)), minlength=20)
    assert sizes.min() > 0 and len(set(sizes)) > 1
    assert partition.scales[0].dtype == np.float32
    np.testing.assert_allclose(partition.scales[0], sizes**-0.5, rtol=1e-7)


def test_empty_groups_have_scale_one():
    partition = make_partition(layout((40,)), 40, 9, scheme="splitmix64")
    empty = np.bincount(group_ids("splitmix64", 40, 9, np.arange(40)), minlength=40) == 0
    assert empty.any() and np.all(partition.scales[0][empty] == 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_not_isometric_is_all_ones(scheme):
    assert np.all(make_partition(layout((40,)), 7, 9, scheme=scheme, isometric=False).scales[0] == 1)


def test_partition_is_a_pytree_of_its_tables():
    partition = make_partition(layout((40, 5)), 50, 9)
    arrays, tree = jax.tree.flatten(partition)
    assert [a.shape for a in arrays] == [(8, 50), (50,), (2,), (2,)]
    again = jax.tree.unflatten(tree, arrays)
    assert isinstance(again, Partition) and (again.d, again.layout) == (50, partition.layout)
    assert again.seed.tolist() == [0, 9]
    assert jax.tree.structure(make_partition(layout((40, 5)), 50, 8)) == tree  # its seed is one of the arrays
    assert jax.tree.structure(make_partition(layout((40, 5)), 49, 9)) != tree


def test_writing_into_a_partition_does_not_change_the_next():
    """Equal partitions share their tables in memory, so the tables must not be writable, or must be copies."""
    table = make_partition(layout((41,)), 5, 3).permutations[0]
    before = table.copy()
    try:
        table[:] = 0
    except ValueError:
        pass
    assert np.array_equal(make_partition(layout((41,)), 5, 3).permutations[0], before)


@pytest.mark.parametrize("seed", [42, np.int64(42), np.uint64(42), jnp.int32(42), jax.random.key(42)], ids=repr)
def test_seed_42_in_every_form(seed):
    assert seed_to_int(seed) == 42


def test_seed_key_has_two_words():
    assert seed_to_int(jax.random.wrap_key_data(jnp.array([2**31, 7], jnp.uint32))) == 2**63 + 7


@pytest.mark.parametrize(
    "seed, error, message",
    [
        (-3, ValueError, r"-3 must be in \[0, 2\^64\).*add 2\^64"),
        (2**64, ValueError, r"must be in \[0, 2\^64\)"),
        (1.0, TypeError, "must be an int.*not 1.0"),
        ("1", TypeError, "must be an int"),
        (None, TypeError, "must be an int"),
        (jax.random.key(1, impl="rbg"), TypeError, r"2 words.*\(4,\).*int instead"),
        (jax.random.split(jax.random.key(1)), TypeError, r"2 words.*\(2, 2\)"),
        (jax.random.PRNGKey(1), TypeError, r"jax\.random\.key"),
    ],
    ids=repr,
)
def test_bad_seed(seed, error, message):
    with pytest.raises(error, match=message):
        make_partition(layout((9,)), 3, seed)


def test_traced_seed():
    with pytest.raises(TypeError, match="seed is traced.*static.*Partition"):
        jax.jit(lambda seed: make_partition(layout((9,)), 3, seed))(1)


@pytest.mark.parametrize(
    "d, options, error, message",
    [
        (0, {}, ValueError, "d = 0 must be between 1 and N = 9"),
        (10, {}, ValueError, "d = 10 must be between 1 and N = 9"),
        (3.0, {}, TypeError, "d must be an integer, not 3.0"),
        (3, {"scheme": "balanced"}, ValueError, "scheme 'balanced'.*balanced-v1, splitmix64"),
        (3, {"scope": "layer"}, ValueError, "scope 'layer'.*global, block"),
        (3, {"scope": "block"}, ValueError, "'kernel' has no number.*scope='global'"),
    ],
)
def test_bad_arguments(d, options, error, message):
    with pytest.raises(error, match=message):
        make_partition(canonical_layout({"kernel": jax.ShapeDtypeStruct((9,), jnp.float32)}), d, 1, **options)


def test_d_beyond_32_bit_positions():
    with pytest.raises(ValueError, match="below 2\\^27"):
        make_partition(Layout((Leaf("w", (2**29,), 0, (1,)),)), 2**27, 1)


# -------------------------------------------------------------------------------------------------------- block scope


@settings(max_examples=15)
@given(st.lists(st.integers(5, 40), min_size=1, max_size=12), st.data())
def test_blocks_share_theta_without_gaps(sizes, data):
    """Slices follow one another in the order of block numbers, as even as can be, and cover theta."""
    d = data.draw(st.integers(len(sizes), 5 * len(sizes)))
    tree = {f"layer_{b}": jax.ShapeDtypeStruct((size,), jnp.float32) for b, size in enumerate(sizes)}
    regions = make_partition(canonical_layout(tree), d, 4, scope="block").regions
    assert [block.views[0].leaf.path for block in regions] == [f"layer_{b}" for b in range(len(sizes))]
    assert [block.size for block in regions] == sizes
    shares = [block.d for block in regions]
    assert sum(shares) == d and max(shares) - min(shares) <= 1 and shares == sorted(shares, reverse=True)
    assert [block.start for block in regions] == np.cumsum([0] + shares[:-1]).tolist()


def test_a_block_is_numbered_on_its_own():
    tree = {f"layer_{b}": {"k": jax.ShapeDtypeStruct((3, 4), jnp.float32), "b": jax.ShapeDtypeStruct((5,), jnp.float32)} for b in (2, 10)}  # fmt: skip
    regions = make_partition(canonical_layout(tree), 7, 4, scope="block").regions
    for block, name in zip(regions, ("layer_2", "layer_10")):
        assert [(v.leaf.path, v.leaf.offset) for v in block.views] == [(f"{name}/b", 0), (f"{name}/k", 5)]


def test_more_blocks_than_theta():
    tree = [jax.ShapeDtypeStruct((5,), jnp.float32)] * 3
    with pytest.raises(ValueError, match="block 2 of 3 0 of d = 2"):
        make_partition(canonical_layout(tree), 2, 4, scope="block")


def test_more_theta_than_a_block_holds():
    tree = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in (2, 50)]
    with pytest.raises(ValueError, match="block 0 of 2 5 of d = 10 for its 2 weights"):
        make_partition(canonical_layout(tree), 10, 4, scope="block")


def test_blocks_of_two_stacks_are_apart():
    leaf = jax.ShapeDtypeStruct((5,), jnp.float32)
    tree = {"encoder": [leaf, leaf], "decoder": [leaf, leaf], "layer_10": leaf, "layer_9": leaf}
    regions = make_partition(canonical_layout(tree), 12, 1, scope="block").regions
    paths = [[view.leaf.path for view in region.views] for region in regions]
    assert paths == [["decoder/0"], ["decoder/1"], ["encoder/0"], ["encoder/1"], ["layer_9"], ["layer_10"]]


def test_blocks_are_the_numbered_layers_not_a_number_in_a_models_name():
    params = {"bert2": {f"layer_{n}": {"kernel": jnp.ones((4, 4))} for n in range(3)}}
    assert len(make_partition(canonical_layout(params), 9, 0, scope="block").regions) == 3
    named = {f"block{n}": {"kernel": jnp.ones((4, 4))} for n in range(2)}
    assert len(make_partition(canonical_layout(named), 4, 0, scope="block").regions) == 2
