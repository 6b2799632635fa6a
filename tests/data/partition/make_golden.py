"""Golden vectors of balanced-v1, in plain Python integers, from the text of `gpart_jax/partition.py` and none of its code.

    python tests/data/partition/make_golden.py        # writes balanced-v1.json beside this file

The file that is committed pins the scheme: a change of it is a new scheme. Tests also use `Balanced` and `splitmix64`
as the reference for elements that the file does not hold.
"""

import json
from pathlib import Path

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """SplitMix64's finaliser."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def stream(start: int, j: int) -> int:
    """Output j of the SplitMix64 generator that starts at `start`: s(start, j)."""
    return mix((start + (j + 1) * GAMMA) & MASK)


class Balanced:
    """group(i) = rho[k_c][(r + o_c) mod d] with c = i // d and r = i % d."""

    def __init__(self, d: int, seed: int):
        self.d, self.chunk_key = d, stream(seed, 8)
        self.rho = []
        for k in range(8):
            key = stream(seed, k)
            self.rho.append(sorted(range(d), key=lambda j: stream(key, j)))  # `sorted` is stable

    def group(self, i: int) -> int:
        c, r = divmod(i, self.d)
        h = stream(self.chunk_key, c)
        return self.rho[h % 8][(r + (h >> 32) % self.d) % self.d]


def splitmix64(i: int, d: int, seed: int) -> int:
    """The group of element i in the authors' stateless backend."""
    return mix((i + seed + GAMMA) & MASK) % d


CASES = [
    (1, 0),
    (2, 2**64 - 1),
    (7, 0),
    (97, 1),
    (256, 2**63),
    (768, 42),
    (1000, 2**64 - 3),
    (23040, 42),
    (65537, 0x0123456789ABCDEF),
]
STARTS = [0, 1000, 2**32 - 9, 2**33 + 1, 2**40 + 5, 2**63 - 3, 2**64 - 16]
COUNT = 16


def golden() -> dict:
    """What `balanced-v1.json` holds."""
    cases = []
    for d, seed in CASES:
        partition = Balanced(d, seed)
        vectors = [[start, [partition.group(i) for i in range(start, start + COUNT)]] for start in STARTS]
        cases.append({"d": d, "seed": seed, "rho": [row[:8] for row in partition.rho], "group_ids": vectors})
    blocks = [{"seed": seed, "block_seeds": [stream(seed, 9 + b) for b in range(4)]} for seed in (0, 42, 2**64 - 1)]
    return {"cases": cases, "blocks": blocks}


def main() -> None:
    data = golden()
    lines = [
        f' "{name}": [\n' + ",\n".join("  " + json.dumps(row) for row in rows) + "\n ]" for name, rows in data.items()
    ]
    Path(__file__).with_name("balanced-v1.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
