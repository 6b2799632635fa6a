"""Unsigned 64-bit arithmetic as pairs of uint32, for programs traced without `jax_enable_x64`.

A value is a pair `(high, low)` of uint32 arrays. Everything is exact modulo 2^64 and element-wise. `mix` exists twice:
once here for compiled programs, once in NumPy (`mix_host`) for tables and as the readable reference.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's increment, and the two multipliers of its finaliser
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
MASK = 2**64 - 1

Word = TypeVar("Word", jax.Array, np.ndarray)


@np.errstate(over="ignore")  # NumPy warns of the wrap-around only for scalars
def mix_host(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on NumPy uint64 (Steele, Lea and Flood 2014; constants of Stafford's variant 13)."""
    x = np.asarray(x, np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MULTIPLIERS[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MULTIPLIERS[1])
    return x ^ (x >> np.uint64(31))


@np.errstate(over="ignore")
def stream_host(seed: int, j: int | np.ndarray) -> np.ndarray:
    """Output number j of the SplitMix64 generator that starts at `seed`: mix(seed + (j + 1) * GAMMA) modulo 2^64."""
    j = np.asarray(j, np.uint64)
    return mix_host(np.uint64(seed) + (j + np.uint64(1)) * np.uint64(GAMMA))


def split(x: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """NumPy uint64 (or a Python int) -> the pair (high, low) of NumPy uint32."""
    x = np.asarray(x, np.uint64)
    return (x >> np.uint64(32)).astype(np.uint32), x.astype(np.uint32)


def add(a: tuple[Word, Word], b: tuple[Word, Word] | tuple[np.ndarray, np.ndarray]) -> tuple[Word, Word]:
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]).astype(jnp.uint32), low


def multiply(a: tuple[Word, Word], constant: int) -> tuple[Word, Word]:
    """a * constant modulo 2^64, for a Python int constant."""
    c_high, c_low = split(constant)
    high, low = _widening_multiply(a[1], c_low)
    return high + a[0] * c_low + a[1] * c_high, low


def mix(a: tuple[Word, Word]) -> tuple[Word, Word]:
    """SplitMix64's finaliser; equals `mix_host`."""
    a = multiply(_xor_shift_right(a, 30), _MULTIPLIERS[0])
    a = multiply(_xor_shift_right(a, 27), _MULTIPLIERS[1])
    return _xor_shift_right(a, 31)


def remainder(a: tuple[Word, Word], d: int) -> Word:
    """a mod d as uint32, for 1 <= d < 2^31."""
    rest = a[0] % np.uint32(d)
    bits = 32 - d.bit_length()  # so many low bits can join a remainder below d without leaving 32 bits
    for shift in range(32, 0, -bits):
        take = min(bits, shift)
        digit = (a[1] >> np.uint32(shift - take)) & np.uint32(2**take - 1)
        rest = ((rest << np.uint32(take)) | digit) % np.uint32(d)
    return rest


def _xor_shift_right(a, s: int):  # 0 < s < 32
    high, low = a
    return high ^ (high >> np.uint32(s)), low ^ ((low >> np.uint32(s)) | (high << np.uint32(32 - s)))


def _widening_multiply(a, b):
    """uint32 x uint32 -> 64 bits, by 16-bit halves."""
    mask, sixteen = np.uint32(0xFFFF), np.uint32(16)
    a0, a1, b0, b1 = a & mask, a >> sixteen, b & mask, b >> sixteen
    low, cross = a0 * b0, a1 * b0
    middle = (low >> sixteen) + (cross & mask) + a0 * b1  # below 2^32: at most 2 * 0xFFFF + 0xFFFF^2
    high = a1 * b1 + (cross >> sixteen) + (middle >> sixteen)
    return high, (middle << sixteen) | (low & mask)
