"""64-bit arithmetic on pairs of uint32, against Python's integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpart_jax import uint64
from gpart_jax.uint64 import GAMMA, MASK

EDGES = [0, 1, 2, 2**16, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 2**32, MASK - 1, MASK]
NUMBERS = st.lists(st.integers(0, MASK), min_size=16, max_size=16)
WORDS = [EDGES, [x * GAMMA & MASK for x in range(1, 13)]]


def pair(numbers):
    return tuple(jnp.asarray(word) for word in uint64.split(np.array(numbers, np.uint64)))


def ints(pair):
    assert [word.dtype for word in pair] == ["uint32", "uint32"]
    return [(int(high) << 32) | int(low) for high, low in zip(*map(np.asarray, pair))]


def python_mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


@given(NUMBERS)
def test_split_keeps_both_words(numbers):
    assert ints(pair(numbers)) == numbers


@pytest.mark.parametrize("shift", range(len(EDGES)))
def test_add_at_the_edges(shift):
    other = EDGES[shift:] + EDGES[:shift]
    assert ints(uint64.add(pair(EDGES), pair(other))) == [(a + b) & MASK for a, b in zip(EDGES, other)]


@given(NUMBERS, NUMBERS)
def test_add(a, b):
    assert ints(uint64.add(pair(a), pair(b))) == [(x + y) & MASK for x, y in zip(a, b)]


@pytest.mark.parametrize("constant", EDGES + [GAMMA])
@pytest.mark.parametrize("numbers", WORDS)
def test_multiply_at_the_edges(numbers, constant):
    assert ints(uint64.multiply(pair(numbers), constant)) == [x * constant & MASK for x in numbers]


@given(NUMBERS, st.integers(0, MASK))
def test_multiply(numbers, constant):
    assert ints(uint64.multiply(pair(numbers), constant)) == [x * constant & MASK for x in numbers]


@pytest.mark.parametrize("d", [1, 2, 3, 97, 2**8, 2**16 - 1, 2**16, 2**16 + 1, 23_040, 2**28 - 1, 2**30 + 1, 2**31 - 1])
@pytest.mark.parametrize("numbers", WORDS)
def test_remainder_at_the_edges(numbers, d):
    assert np.asarray(uint64.remainder(pair(numbers), d)).tolist() == [x % d for x in numbers]


@given(NUMBERS, st.integers(1, 2**31 - 1))
def test_remainder(numbers, d):
    assert np.asarray(uint64.remainder(pair(numbers), d)).tolist() == [x % d for x in numbers]


@given(NUMBERS)
def test_mix_on_device_and_host(numbers):
    expected = [python_mix(x) for x in numbers]
    assert ints(uint64.mix(pair(numbers))) == expected
    assert uint64.mix_host(numbers).tolist() == expected


def test_mix_under_jit():
    numbers = WORDS[1]
    assert not jax.config.jax_enable_x64
    assert ints(jax.jit(uint64.mix)(pair(numbers))) == [python_mix(x) for x in numbers]


def test_stream_is_splitmix64():
    """The outputs that circulate as SplitMix64's test vectors (seed 1234567: Rosetta Code; seed 0: Vigna's C code)."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert uint64.stream_host(1234567, range(5)).tolist() == known
    assert [int(uint64.stream_host(0, j)) for j in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@given(st.integers(0, MASK), NUMBERS)
def test_stream_wraps_around(seed, numbers):
    assert uint64.stream_host(seed, numbers).tolist() == [python_mix((seed + (j + 1) * GAMMA) & MASK) for j in numbers]
