"""The mask of delta dropout: the hash it is made of, and where it takes the index from; and the dither made of the same hash."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpart_jax import Adapter, Leaf, canonical_layout, gpart_transform, make_partition
from gpart_jax.dropout import dithered, hashed, index_words, keep_mask, key_words
from gpart_jax.methods import gpart
from gpart_jax.transform import bind

N = 2**21
LOW = np.arange(N, dtype=np.uint32)
KEEP = jax.jit(keep_mask, static_argnums=3)
LIMIT = 5.0  # standard deviations; each test below makes some tens of comparisons


def python_keep(index, words, rate):
    """The definition, in Python's integers."""
    word = 2**32 - 1
    h = (index & word) ^ ((words[0] + words[1] * 0xCC9E2D51 + (index >> 32) * 0x9E3779B9) & word)
    h = (h ^ h >> 16) * 0x7FEB352D & word
    h ^= words[1]
    h = (h ^ h >> 15) * 0x846CA68B & word
    return (h ^ h >> 16) >= round(rate * 2**32)


def mask(words, rate=0.5, high=0, low=LOW):
    return np.asarray(KEEP(jnp.uint32(high), low, jnp.asarray(words, jnp.uint32), rate))


def score(one, other=None, rate=0.5):
    """How far the mean (or the correlation) of masks is from what chance gives, in standard deviations."""
    variance = rate * (1 - rate)
    one = one - (1 - rate)
    x, scale = (one, variance) if other is None else (one * (other - (1 - rate)), variance**2)
    return abs(x.sum()) / (scale * x.size) ** 0.5


def words_of(*keys):
    return [np.asarray(key_words(key)) for key in keys]


WORDS = words_of(*(jax.random.key(n) for n in range(4)), jax.random.key(7, impl="rbg"))


def test_golden_and_definition():
    words = [0x12345678, 0x9ABCDEF0]
    for index in (0, 1, 2**32 - 1, 2**32, 2**40 + 12345, 2**64 - 1):
        found = KEEP(jnp.uint32(index >> 32), jnp.uint32(index & (2**32 - 1)), jnp.asarray(words, jnp.uint32), 0.3)
        assert bool(found) == python_keep(index, words, 0.3), index
    assert np.packbits(mask(words, low=LOW[:64])).tobytes().hex() == "ee77cab002760be1"


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_mean(rate):
    for words in WORDS:
        for high in (0, 1, 2**31):
            assert score(mask(words, rate, high), rate=rate) < LIMIT


def test_rates_at_the_ends():
    assert mask(WORDS[0], 0.0).all()
    assert not mask(WORDS[0], 1 - 1e-12).any()


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_neighbours_are_independent(rate):
    """Next to each other, in the same column of neighbouring rows, and by every power of two."""
    for words in WORDS:
        kept = mask(words, rate)
        for stride in (2, 3, 768, 1024, 2304, 3072, 4096, *(2**k for k in range(5, 20)), 1):
            assert score(kept[stride:], kept[:-stride], rate) < LIMIT, stride


def test_runs_are_as_long_as_chance_makes_them():
    """Runs of length k are a share 2^-k of the runs of a fair coin."""
    for words in WORDS:
        lengths = np.diff(np.flatnonzero(np.diff(mask(words))))
        for k in range(1, 12):
            share = 2.0**-k
            assert abs((lengths == k).sum() - share * lengths.size) < LIMIT * (share * (1 - share) * lengths.size) ** 0.5


def test_rows_and_columns_have_fair_sums():
    """Chi-squared of the sums of rows and columns of matrices: mean n, variance 2 n."""
    for words in WORDS:
        for columns in (768, 1024, 4096):
            kept = mask(words)[: N // columns * columns].reshape(-1, columns)
            for axis in (0, 1):
                n = kept.shape[axis]
                squares = (kept.sum(axis) - n / 2) ** 2 / (n / 4)
                assert abs(squares.sum() - squares.size) < LIMIT * (2 * squares.size) ** 0.5, (columns, axis)


def test_eight_neighbours_make_all_bytes_alike():
    for words in WORDS:
        counts = np.bincount(np.packbits(mask(words)), minlength=256)
        expected = N / 8 / 256
        assert abs(((counts - expected) ** 2 / expected).sum() - 255) < LIMIT * (2 * 255) ** 0.5


def test_keys_are_independent():
    """Of neighbouring seeds, steps and leaves; of words that differ in one bit; and of neighbouring high words."""
    root = jax.random.key(0)
    steps = words_of(*(jax.random.fold_in(root, step) for step in range(6)))
    parts = words_of(*jax.random.split(jax.random.fold_in(root, 1), 4))
    kept = [mask(words) for words in [*WORDS, *steps, *parts]]
    for k, one in enumerate(kept):
        assert all(score(one, other) < LIMIT for other in kept[:k])
    base = mask(WORDS[0])
    for word in (0, 1):
        for bit in range(32):
            changed = WORDS[0].copy()
            changed[word] ^= np.uint32(1) << np.uint32(bit)
            assert score(base, mask(changed)) < LIMIT, (word, bit)
    assert all(score(base, mask(WORDS[0], high=high)) < LIMIT for high in (1, 2, 2**16, 2**32 - 1))


# ------------------------------------------------------------------------------------------------------- index words


def joined(words):
    high, low = (np.asarray(word).astype(np.uint64) for word in words)
    return (high << np.uint64(32)) + low


def indices(leaf):
    grid = np.indices(leaf.shape, dtype=np.uint64)
    at = sum((g * np.uint64(step) for g, step in zip(grid, leaf.strides)), np.zeros(leaf.shape, np.uint64))
    return at + np.uint64(leaf.offset)


LEAVES = {
    "dense": Leaf("w", (3, 17, 2), 77, (34, 2, 1)),
    "over 2^32": Leaf("w", (3, 17, 2), 2**32 - 50, (34, 2, 1)),
    "far": Leaf("w", (3, 17, 2), 2**40 + 3, (34, 2, 1)),
    "up to 2^64": Leaf("w", (3, 17, 2), 2**64 - 102, (34, 2, 1)),
    "transposed": Leaf("w", (3, 17, 2), 2**32 - 3, (2, 6, 1)),
    "layers far apart": Leaf("w", (3, 17, 2), 2**33 + 5, (2**34 + 9, 2**31 + 1, 2**40 - 7), stacked=True),
    "no axes": Leaf("w", (), 2**35 + 1, ()),
}


@pytest.mark.parametrize("leaf", LEAVES.values(), ids=LEAVES)
def test_index_words(leaf):
    expected = indices(leaf)
    assert np.array_equal(joined(jax.jit(lambda: index_words(leaf))()), expected)
    if not leaf.shape:
        return
    by_layer = jax.jit(lambda layer, start: index_words(leaf, layer, [(0, start, 5)]))
    part = jax.jit(lambda start: index_words(leaf, None, [(1, start, 5)]))
    assert np.array_equal(joined(part(4)), expected[:, 4:9])
    for layer in range(3):
        assert np.array_equal(joined(by_layer(layer, 11)), expected[layer, 11:16])


# ------------------------------------------------------------------------------------------------------- the transform

KEY = jax.random.key(3)


def kept_of(params, layout):
    """Which elements of P theta are kept, read off the transform of zeros."""
    adapted = gpart_transform(params, jnp.ones(300), 3, targets=layout, dropout=0.4, key=KEY, isometric=False)
    return jax.tree.map(lambda x: np.asarray(x) != 0, adapted)


def test_a_mask_does_not_depend_on_how_leaves_are_held():
    """Apart or stacked, as a whole or layer by layer; a square leaf as it is or transposed."""
    apart = {"layers": [{"k": jnp.zeros((20, 20))} for _ in range(3)]}
    stacked = {"layers": {"k": jnp.zeros((3, 20, 20))}}
    layout = canonical_layout(stacked, stacked="^layers")
    expected = np.stack([one["k"] for one in kept_of(apart, None)["layers"]])
    assert np.array_equal(kept_of(stacked, layout)["layers"]["k"], expected)
    transposed = canonical_layout(stacked, stacked="^layers", transposed="k")
    assert np.array_equal(kept_of(stacked, transposed)["layers"]["k"], expected.swapaxes(1, 2))

    partition = make_partition(layout, 300, 3, isometric=False)
    by_layer = jax.jit(lambda n: bind(partition, jnp.ones(300), 0.4, KEY)({"layers": {"k": jnp.zeros((20, 20))}}, n))
    for layer in range(3):
        assert np.array_equal(np.asarray(by_layer(layer)["layers"]["k"]) != 0, expected[layer])


def test_no_random_words_of_n_elements():
    """The mask is made in the fusion that uses it; of JAX's own generators only a key's two words are taken."""
    params = [jnp.zeros((200, 300))]

    def both(theta, key, g):
        adapted, pull = jax.vjp(lambda theta: gpart_transform(params, theta, 3, dropout=0.4, key=key), theta)
        return adapted, pull(g)

    text = jax.jit(both).lower(jnp.ones(300), KEY, params).compile().as_text()
    outside = [line for part in text.split("\n\n") if "fused_computation" not in part[:40] for line in part.splitlines()]
    assert not [line for line in outside if "= u32[200,300]" in line or "= pred[200,300]" in line]


# ---------------------------------------------------------------------------------------------------------------- dither


def test_dither_keeps_the_mean_and_what_lies_on_the_grid():
    """x lies on bfloat16's grid, or is rounded to one of its two neighbours, up with the probability of its distance from the lower."""
    on_grid = np.array([0, 1, -1.5, 2.0**-130, -3e38, np.inf, -np.inf], jnp.bfloat16).astype(np.float32)
    for bits in (0, 0xFFFF, 0xFFFFFFFF):
        np.testing.assert_array_equal(dithered(on_grid, np.uint32(bits)), on_grid)
    bits = hashed(jnp.uint32(0), LOW, jnp.asarray(WORDS[0]))
    for x in (1 + 2.0**-9, -1 - 2.0**-9, 3.1415927, -1e-20):
        found = np.unique(np.asarray(dithered(jnp.full(N, x, jnp.float32), bits)), return_counts=True)
        low, high = sorted(found[0].astype(np.float64))
        share = (np.float64(np.float32(x)) - low) / (high - low)
        assert np.array_equal(found[0].astype(jnp.bfloat16).astype(np.float32), found[0])
        assert abs(found[1][1] - share * N) < LIMIT * (N * share * (1 - share)) ** 0.5, x


@pytest.mark.parametrize("key", [None, KEY])
def test_a_dithered_sum_loses_nothing_of_a_small_delta_on_average(key):
    """Its rounding is that of its entries' indices and the key alone; gradients are those of the plain sum."""
    params = {"layers": {"k": 0.02 * jax.random.normal(jax.random.key(0), (3, 100, 128), jnp.bfloat16)}}
    theta = {"theta": 1e-4 * jax.random.normal(jax.random.key(1), (300,))}
    method = {way: gpart(300, 3, stacked="^layers", apply=way) for way in ("sum", "dither")}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    meant = method["sum"].apply(wide, theta)["layers"]["k"] - wide["layers"]["k"]
    share = {}
    for way in method:
        moved = method[way].apply(params, theta, key)["layers"]["k"].astype(jnp.float32) - wide["layers"]["k"]
        share[way] = float(jnp.vdot(moved, meant) / jnp.vdot(meant, meant))
    assert share["sum"] < 0.3 and abs(share["dither"] - 1) < 0.15
    whole = method["dither"].apply(params, theta, key)["layers"]["k"]
    adapt = method["dither"].bind(params, theta, key)
    for layer in range(3):
        assert np.array_equal(adapt({"layers": {"k": params["layers"]["k"][layer]}}, layer)["layers"]["k"], whole[layer])
    assert np.array_equal(method["dither"].apply(params, {"theta": jnp.zeros(300)}, key)["layers"]["k"], params["layers"]["k"])
    g = jax.random.normal(jax.random.key(2), (3, 100, 128), jnp.bfloat16)
    pulled = [jax.vjp(lambda t, m=m: m.apply(params, t, key), theta)[1]({"layers": {"k": g}})[0]["theta"] for m in method.values()]
    np.testing.assert_array_equal(*pulled)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
def test_a_merge_dithers_as_the_tested_model_did(dtype):
    params = {"k": 0.02 * jax.random.normal(jax.random.key(0), (100, 128), jnp.bfloat16)}
    method, trainable = gpart(300, 3, apply="dither"), {"theta": 1e-4 * jax.random.normal(jax.random.key(1), (300,))}
    merged = Adapter.of(method, trainable, params).merge(params, dtype).params["k"]
    if dtype == jnp.float32:
        exact = gpart(300, 3).apply(jax.tree.map(lambda x: x.astype(jnp.float32), params), trainable)["k"]
        np.testing.assert_array_equal(merged, exact)
    else:
        np.testing.assert_array_equal(merged, method.apply(params, trainable)["k"])


def test_dither_is_for_bfloat16():
    half = {"k": jnp.ones((30, 40), jnp.float16)}
    with pytest.raises(ValueError, match="'k' is float16. Use apply='sum'"):
        gpart(300, 3, apply="dither").apply(half, {"theta": jnp.zeros(300)})
    wide = {"k": jnp.ones((30, 40))}
    sums = [gpart(300, 3, apply=way).apply(wide, {"theta": jnp.arange(300.0)}, KEY)["k"] for way in ("sum", "dither")]
    np.testing.assert_array_equal(*sums)
