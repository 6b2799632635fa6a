"""Is balanced-v1 as good as chance? Pairs of weights that share a coordinate, with splitmix64 as the control.

Theory. Under independent uniform assignment (splitmix64) any two elements share a group with probability 1/d, and these
events are pairwise independent: n pairs give n/d collisions with variance n (1/d)(1 - 1/d). Under balanced-v1 two
elements of one chunk never collide, and two of different chunks do with probability 1/d. But collisions come in clumps:
two chunks use the same table with probability 1/8, and are then rotations of each other, so that all pairs of equal
difference of positions collide together. For n pairs between two chunks, n_k of them at difference k, the variance is
at most (1/8) (sum(n_k^2)/d - (n/d)^2) + (7/8) n/(d - 1), and different pairs of chunks are uncorrelated.

Everything below is deterministic: 4 layers of 64 x 48, and 40 seeds. Limit: 4.5 standard errors, which a normal variable
exceeds 7 times in a million. `pytest -s` prints the figures.
"""

import functools

import numpy as np
import pytest

from gpart_jax import Layout, Leaf, make_partition
from gpart_jax.partition import SCHEMES, TABLES, chunks, group_ids
from gpart_jax.uint64 import stream_host

LAYERS, ROWS, COLUMNS = 4, 64, 48
LAYOUT = Layout((Leaf("w", (LAYERS, ROWS, COLUMNS), 0, (ROWS * COLUMNS, COLUMNS, 1)),))
N = LAYOUT.size
SEEDS = stream_host(2026, range(40)).tolist()
LIMIT = 4.5  # standard errors

# A prime; the row width; multiples of it, of which the last is a layer; powers of two.
SIZES = [97, 48, 768, 3072, 256, 1024]


@functools.cache
def groups(scheme, seed, d):
    return group_ids(scheme, d, seed, np.arange(N))


def all_pairs(lines):
    """All pairs of elements within each line, for lines of shape (lines, length)."""
    i, j = np.triu_indices(lines.shape[1], 1)
    return lines[:, i].reshape(-1), lines[:, j].reshape(-1)


@functools.cache
def pairs(kind):
    index = np.arange(N).reshape(LAYERS, ROWS, COLUMNS)
    if kind == "row":
        return all_pairs(index.reshape(-1, COLUMNS))
    if kind == "column":
        return all_pairs(index.transpose(0, 2, 1).reshape(-1, ROWS))
    if kind == "layers":  # the same place in two layers
        return all_pairs(index.reshape(LAYERS, -1).T)
    i, j = np.random.default_rng(0).integers(0, N, (2, 400_000))
    return i[i != j], j[i != j]


def expected_collisions(scheme, kind, d):
    """Mean and variance of the number of colliding pairs, for one seed; see the top of the file."""
    i, j = pairs(kind)
    if scheme == "splitmix64":
        return len(i) / d, len(i) / d * (1 - 1 / d)
    i, j = np.minimum(i, j), np.maximum(i, j)
    i, j = i[i // d != j // d], j[i // d != j // d]
    chunk_pair = (i // d) * (N // d + 1) + j // d
    _, n = np.unique(chunk_pair, return_counts=True)
    _, n_k = np.unique(chunk_pair * d + (i - j) % d, return_counts=True)
    rotated = np.sum(n_k**2.0) / d - np.sum((n / d) ** 2)
    return len(i) / d, rotated / TABLES + (1 - 1 / TABLES) * len(i) / (d - 1)


# Left out: rows within one chunk (below), and places whose few, large clumps say nothing (their error is over 25 %).
KINDS = {"row": [97, 256, 1024], "column": [97, 48, 768, 256, 1024], "layers": [97, 48, 256], "any": SIZES}


@pytest.mark.parametrize("kind, d", [(kind, d) for kind, sizes in KINDS.items() for d in sizes])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_pairs_collide_as_often_as_by_chance(scheme, kind, d):
    i, j = pairs(kind)
    count = sum(int(np.sum(g[i] == g[j])) for g in (groups(scheme, seed, d) for seed in SEEDS))
    mean, variance = expected_collisions(scheme, kind, d)
    mean, error = mean * len(SEEDS), (variance * len(SEEDS)) ** 0.5
    print(f"\n{scheme:12} {kind:7} d={d:<5} {count:7} collisions, {count / mean:.4f} of theory, +- {error / mean:.4f}")
    assert error < 0.25 * mean
    assert abs(count - mean) <= LIMIT * error


@pytest.mark.parametrize("d", SIZES)
def test_one_chunk_never_shares_a_group(d):
    for seed in SEEDS:
        assert all(len(set(chunk)) == len(chunk) for chunk in np.split(groups("balanced-v1", seed, d), range(d, N, d)))


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_groups_spread_over_rows_columns_and_layers(scheme, d):
    """A group's mean coordinate is that of a random sample of its size, or closer to the middle.

    Let z = (mean - middle) / (deviation / sqrt(n)) for each of the m groups of all seeds. By chance the mean of z^2 is 1
    with standard error sqrt(2 / m); chunks spread evenly make it smaller. Groups that follow one another in a table
    travel together, for which the error is multiplied by sqrt(8). The largest of m normal |z| stays below
    sqrt(2 log(m / 1e-5)).
    """
    for name, x in zip(("layer", "row", "column"), np.unravel_index(np.arange(N), (LAYERS, ROWS, COLUMNS))):
        z = []
        for seed in SEEDS:
            g = groups(scheme, seed, d)
            n, total = np.bincount(g, minlength=d), np.bincount(g, x, minlength=d)
            z.append((total - n * x.mean())[n > 0] / np.sqrt(n * x.var())[n > 0])
        z = np.concatenate(z)
        print(f"\n{scheme:12} d={d:<5} {name:6} mean z^2 {np.mean(z**2):.3f}, largest |z| {np.abs(z).max():.2f}")
        assert np.mean(z**2) <= 1 + LIMIT * np.sqrt(TABLES * 2 / len(z))
        assert np.abs(z).max() <= np.sqrt(2 * np.log(len(z) / 1e-5))


def chi_square(counts):
    """The statistic of equal expected counts, in standard deviations from its mean."""
    expected, freedom = np.mean(counts), counts.size - 1
    return (np.sum((counts - expected) ** 2) / expected - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("start", [0, 2**32 - 50_000, 2**45])
@pytest.mark.parametrize("d", [48, 97, 1024])
def test_tables_and_rotations_are_uniform_and_independent(d, start):
    """By chi-square, also from a chunk to its neighbours and to that 12 chunks on: no pattern from layer to layer."""
    c = np.uint64(start) + np.arange(100_000, dtype=np.uint64)
    for seed in (0, 1, 42):
        k, o = chunks(d, seed, c)
        statistics = [chi_square(np.bincount(k * d + o, minlength=TABLES * d))]
        for lag in (1, 2, 12):
            statistics.append(chi_square(np.bincount((o[lag:] - o[:-lag]) % d, minlength=d)))
            statistics.append(chi_square(np.bincount(k[lag:] * TABLES + k[:-lag], minlength=TABLES**2)))
        assert np.abs(statistics).max() < LIMIT


@pytest.mark.parametrize("d", [97, 768, 3072])
def test_permutations_are_uncorrelated(d):
    """The 8 tables of seeds 0 ... 9: with each other, with the identity, and with themselves shifted by one.

    The correlation of two random permutations has mean 0 and standard deviation 1 / sqrt(d - 1).
    """
    tables = np.concatenate([make_partition(LAYOUT, d, seed).permutations[0] for seed in range(10)])
    tables = np.concatenate([np.arange(d)[None], tables, np.roll(tables, 1, axis=1)])
    correlation = np.corrcoef(tables)[np.triu_indices(len(tables), 1)] * np.sqrt(d - 1)
    print(
        f"\nd={d:<5} {len(correlation)} correlations: deviation {correlation.std():.3f}, largest {np.abs(correlation).max():.2f}"
    )
    assert np.abs(correlation).max() < np.sqrt(2 * np.log(len(correlation) / 1e-5))
    assert abs(correlation.std() - 1) < 0.05


def shifted_agreement(scheme, a, b, d):
    """For shifts -10 ... 10: elements whose group under seed a is that of the element `shift` on under seed b; in errors.

    By chance 1/d of n elements, with variance n/d.
    """
    one, two, errors = groups(scheme, a, d), groups(scheme, b, d), []
    for shift in range(-10, 11):
        same = one[max(0, -shift) : N - max(0, shift)] == two[max(0, shift) : N + min(0, shift)]
        errors.append((np.sum(same) - same.size / d) / np.sqrt(same.size / d))
    return np.array(errors)


@pytest.mark.parametrize("d", SIZES)
def test_consecutive_seeds_label_differently(d):
    errors = np.array([shifted_agreement("balanced-v1", a, b, d) for a in range(10) for b in range(a)])
    print(
        f"\nd={d:<5} 45 pairs of seeds: worst shift {np.abs(errors).max():.2f} standard errors, deviation {errors.std():.2f}"
    )
    assert np.abs(errors).max() < 8  # 945 counts of a Poisson variable with a mean of N/d = 4 ... 256
    assert abs(errors.std() - 1) < 0.2


def test_consecutive_seeds_of_splitmix64_are_shifts():
    """The authors' hash adds seed and index: seed 8 is seed 7 one element on. balanced-v1 must not; this is the control."""
    assert np.argmax(shifted_agreement("splitmix64", 8, 7, 97)) == 10 + 1
    assert shifted_agreement("splitmix64", 8, 7, 97)[10 + 1] > 1000


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_consecutive_seeds_group_differently(scheme, d):
    """Two elements that share a group under seed a share one under seed b with probability 1/d; seeds 0 ... 9 (for the
    control: ten that are far apart), all pairs.

    Under balanced-v1 the count for two chunks has mean 1. With probability 1/64 both seeds make them rotations of each
    other, by the same amount with probability 1/d, and then all d collisions coincide: variance 1 + d/64.
    """
    count = mean = variance = 0.0
    chunk = np.arange(N) // d
    seeds = range(10) if scheme == "balanced-v1" else SEEDS[:10]
    for a in range(10):
        for b in range(a):
            _, n = np.unique(groups(scheme, seeds[a], d) * d + groups(scheme, seeds[b], d), return_counts=True)
            count += np.sum(n * (n - 1)) / 2
            pairs = N * (N - 1) / 2
            if scheme == "balanced-v1":
                n = np.bincount(chunk)
                pairs -= np.sum(n * (n - 1)) / 2
            mean += pairs / d**2
            variance += pairs / d**2 * (1 + d / TABLES**2 * (scheme == "balanced-v1"))
    print(
        f"\n{scheme:12} d={d:<5} {count:9.0f} collisions under both, {count / mean:.4f} of theory, +- {variance**0.5 / mean:.4f}"
    )
    assert abs(count - mean) <= LIMIT * variance**0.5


@pytest.mark.parametrize("d", SIZES)
def test_sizes_are_more_even_than_by_chance(d):
    balanced, hashed = (np.bincount(groups(scheme, 0, d), minlength=d) for scheme in ("balanced-v1", "splitmix64"))
    assert balanced.max() - balanced.min() <= 1 < hashed.max() - hashed.min()
