"""Who shares a coordinate of theta: the partition of N adapted weights into d groups.

A partition is a function of (scheme, scope, seed, d, canonical layout) alone, defined by integer arithmetic, so that a
saved adapter means the same for ever, on every backend, under every sharding. `group_ids` is the definition, in NumPy. What
compiled programs make of it is in `lowerings/`, and tests hold the two together.

Write s(k, j) for output j of the SplitMix64 generator started at k (`uint64.stream_host`).

balanced-v1 (default). Element i is in chunk c = i // d at position r = i % d, and in the group
    rho[k_c][(r + o_c) mod d].
  Table keys are s(seed, 0) ... s(seed, 7); rho[k] is the stable argsort of s(key_k, 0 ... d-1). With
  h_c = s(s(seed, 8), c): k_c = h_c mod 8, o_c = (h_c >> 32) mod d. A whole chunk meets every group once, so sizes differ
  by at most one and none is empty: P^T P = I holds by construction.

splitmix64. group = mix(i + seed + GAMMA) mod d, the "stateless" backend of the authors' PyTorch release, bit for bit.
  Sizes are multinomial and a group may be empty; it is then scaled by 1, as it is there.

signed_magnitude. The paper's deterministic alternative: groups of weights of one sign and of like magnitude, read off the
  frozen weights; no seed. Of the n negative weights, in order of magnitude (of index where equal), rank r is in group
  ((r + 1) k - 1) // n, k = floor(d n / N) (at least 1, and 1 left for the others); the others follow in groups k ... d-1 in
  the same way. The authors' release orders weights of nearly one magnitude otherwise, by a rule we don't know. It is not
  stateless: N group ids are held.

Scopes. "global" numbers all N elements together. "block" gives each of the B numbered blocks (all leaves whose paths are
the same up to the first number, `layer_3/...`; or each layer of the stacked leaves) a slice of theta of d // B numbers, the
first d % B blocks one more; block b in canonical order is a partition of its own with the seed s(seed, 9 + b).
"transformer_block" is the same with the seed (seed + b) mod 2^64, as the authors' release has it.
"""

import dataclasses
import functools
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np

from gpart_jax import uint64
from gpart_jax.targets import Array, Layout, Leaf, PyTree, named_leaves

SCHEMES = ("balanced-v1", "splitmix64")  # stateless
SIGNED_MAGNITUDE = "signed_magnitude"
SCOPES = ("global", "block", "transformer_block")
TABLES = 8  # K, the number of permutations of balanced-v1


@dataclasses.dataclass(frozen=True)
class View:
    """A leaf of the layout, or one layer of a stacked leaf, as numbered in its region."""

    leaf: Leaf  # shape and strides of the view, offset within the region
    layer: int | None  # which layer of the stacked leaf at `leaf.path`; None for the whole leaf


@dataclasses.dataclass(frozen=True)
class Region:
    """Elements 0 ... size-1 that share the slice [start, start + d) of theta: all of them, or one block's."""

    scheme: str
    start: int
    d: int
    views: tuple[View, ...]

    @property
    def size(self) -> int:
        """How many elements the region numbers."""
        return sum(view.leaf.size for view in self.views)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["permutations", "scales", "keys", "seed"],
    meta_fields=["scheme", "scope", "d", "isometric", "layout", "regions"],
)
@dataclasses.dataclass(frozen=True)
class Partition:
    """A partition with its tables: a pytree to pass to a compiled program in place of the seed.

    All that depends on the seed is an array, so partitions of one shape share a compiled program, and can be stacked.

    permutations: per region, rho, int32 of shape (8, d_region); shape (0, d_region) where there are none.
    scales: per region, the value of the non-zeros in each column of P, float32 of shape (d_region,): 1 / sqrt(n_g), or 1
      where `isometric` is false.
    keys: per region, the 64-bit number with which elements or chunks are hashed, uint32 of shape (2,), high word first. For
      signed_magnitude the group ids themselves, {path: int32 of the leaf's shape}.
    seed: uint32 of shape (2,), high word first. A record; nothing is computed from it.
    """

    permutations: tuple[Array, ...]
    scales: tuple[Array, ...]
    keys: tuple[Array | dict[str, Array], ...]
    seed: Array
    scheme: str
    scope: str
    d: int
    isometric: bool
    layout: Layout
    regions: tuple[Region, ...]

    @property
    def tables(self) -> dict[str, PyTree]:
        """All that depends on the seed, for `dataclasses.replace`: partitions of one shape have tables of one structure."""
        return {"permutations": self.permutations, "scales": self.scales, "keys": self.keys, "seed": self.seed}


def make_partition(
    layout: Layout,
    d: int,
    seed: int | jax.Array,
    *,
    scheme: str = "balanced-v1",
    scope: str = "global",
    isometric: bool = True,
    params: PyTree = None,
) -> Partition:
    """The partition of `layout` into d groups.

    Args:
      layout: the canonical layout, from `canonical_layout(params, targets)`.
      d: the number of groups, 1 <= d <= N.
      seed: an int in [0, 2^64), or a concrete `jax.random` key of two words, read as one 64-bit number (so the key of
        `jax.random.key(42)` is the seed 42).
      scheme: "balanced-v1", "splitmix64" or "signed_magnitude".
      scope: "global", "block" or "transformer_block".
      isometric: scale column g by 1 / sqrt(n_g), so that P^T P = I (arXiv 2605.14841); False leaves ones (ablation).
      params: the frozen weights, which signed_magnitude alone reads.

    Returns:
      A `Partition` whose tables are NumPy arrays of 4 * 9 * d bytes, and 8 for each region (signed_magnitude: 4 * (N + d)
      bytes). The last 16 results of the stateless schemes are kept in memory.

    Raises:
      ValueError: an unknown scheme or scope, a seed or d out of range, or no numbered blocks for scope "block".
      TypeError: a seed that is traced or not an integer, or traced weights for signed_magnitude.
    """
    regions, number = regions_of(layout, d, scheme=scheme, scope=scope), seed_to_int(seed)
    if scheme == SIGNED_MAGNITUDE:
        tables = _by_magnitude(layout, regions[0], bool(isometric), params)
    else:
        tables = _hashed(regions, region_seeds(number, scope, len(regions)), bool(isometric))
    words = np.array(uint64.split(number), np.uint32)
    return Partition(*tables, words, scheme, scope, operator.index(d), bool(isometric), layout, regions)


def regions_of(layout: Layout, d: int, *, scheme: str, scope: str) -> tuple[Region, ...]:
    """What of a partition doesn't hold arrays. Arguments and errors as in `make_partition`."""
    if scheme not in (*SCHEMES, SIGNED_MAGNITUDE):
        raise ValueError(f"Unknown scheme {scheme!r}. Choose one of {', '.join((*SCHEMES, SIGNED_MAGNITUDE))}.")
    if scope not in SCOPES:
        raise ValueError(f"Unknown scope {scope!r}. Choose one of {', '.join(SCOPES)}.")
    if scheme == SIGNED_MAGNITUDE and scope != "global":
        raise ValueError("scheme='signed_magnitude' needs scope='global'.")
    try:
        d = operator.index(d)
    except TypeError:
        raise TypeError(f"d must be an integer, not {d!r}.") from None
    if not 1 <= d <= layout.size:
        raise ValueError(f"d = {d} must be between 1 and N = {layout.size}, the number of adapted weights.")
    if d >= 2**27:
        raise ValueError(f"d = {d} must be below 2^27, so that 8 tables of 2 d entries have 32-bit positions.")
    if scope == "global":
        return (Region(scheme, 0, d, tuple(View(leaf, None) for leaf in layout.leaves)),)
    return _block_regions(layout, d, scheme, scope)


def region_seeds(seed: int, scope: str, count: int) -> tuple[int, ...]:
    """The definition: the seeds of so many regions, from that of their partition."""
    if scope == "global":
        return (seed,)
    if scope == "transformer_block":
        return tuple((seed + b) & uint64.MASK for b in range(count))
    return tuple(int(uint64.stream_host(seed, TABLES + 1 + b)) for b in range(count))


@functools.lru_cache(maxsize=16)
def _hashed(regions, seeds, isometric) -> tuple[tuple, tuple, tuple]:
    permutations = tuple(_permutations(region.scheme, region.d, seed) for region, seed in zip(regions, seeds))
    sizes = [group_sizes(region, seed, rho) for region, seed, rho in zip(regions, seeds, permutations)]
    keys = tuple(np.array(uint64.split(hash_key(r.scheme, seed)), np.uint32) for r, seed in zip(regions, seeds))
    tables = permutations, tuple(_scale(n, isometric) for n in sizes), keys
    for table in (*tables[0], *tables[1], *keys):
        table.flags.writeable = False  # equal partitions share their tables
    return tables


def _scale(sizes, isometric):
    return (1 / np.sqrt(np.maximum(sizes, 1)) if isometric else np.ones(len(sizes))).astype(np.float32)


def _by_magnitude(layout, region, isometric, params) -> tuple[tuple, tuple, tuple]:
    leaves = {} if params is None else dict(named_leaves(params))
    values = [leaves.get(leaf.path) for leaf in layout.leaves]
    if any(isinstance(value, (jax.core.Tracer, jax.ShapeDtypeStruct, type(None))) for value in values):
        raise TypeError(
            "signed_magnitude reads the weights, which aren't there yet (traced, or shapes alone). Make its Partition "
            "outside of jit with make_partition(..., params=params), or pass method.tables(params) to the program."
        )
    flat = np.empty(layout.size, np.float32)
    indices = [_indices(leaf) for leaf in layout.leaves]
    for index, value in zip(indices, values):
        flat[index] = np.asarray(value, np.float32)
    groups = magnitude_groups(flat, region.d)
    ids = {leaf.path: groups[index] for leaf, index in zip(layout.leaves, indices)}
    sizes = np.bincount(groups, minlength=region.d)
    return (np.zeros((0, region.d), np.int32),), (_scale(sizes, isometric),), (ids,)


def magnitude_groups(weights: np.ndarray, d: int) -> np.ndarray:
    """The definition of signed_magnitude: int32 group ids of all N weights in canonical order."""
    groups = np.empty(len(weights), np.int32)
    negative = weights < 0
    n = int(negative.sum())
    k = min(max(d * n // len(weights), n > 0), d - (n < len(weights)))
    for chosen, first, count in ((negative, 0, k), (~negative, k, d - k)):
        order = np.flatnonzero(chosen)[np.argsort(np.abs(weights[chosen]), kind="stable")]
        ranks = np.arange(1, len(order) + 1, dtype=np.int64)
        groups[order] = first + (ranks * max(count, 1) - 1) // max(len(order), 1)
    return groups


def _indices(leaf: Leaf) -> np.ndarray:
    """The canonical index of each element, int64 of the leaf's shape."""
    steps = np.meshgrid(*(np.arange(n) * step for n, step in zip(leaf.shape, leaf.strides)), indexing="ij", sparse=True)
    return leaf.offset + sum(steps, np.zeros(leaf.shape, np.int64))


def seed_to_int(seed: int | jax.Array) -> int:
    """The seed as a Python int in [0, 2^64)."""
    if isinstance(seed, jax.core.Tracer):
        raise TypeError(
            "The seed is traced, but the partition is made on the host. Close over a concrete seed, mark it static, "
            "or pass a Partition from make_partition() as the argument instead."
        )
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        words = np.asarray(jax.random.key_data(seed), np.uint64)
        if words.shape != (2,):
            raise TypeError(
                f"A key as seed must have 2 words of 32 bits, not shape {words.shape}. Pass an int instead."
            )
        return (int(words[0]) << 32) | int(words[1])
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"The seed must be an int, a key of jax.random.key(), or a Partition, not {seed!r}.") from None
    if not 0 <= number < 2**64:
        raise ValueError(
            f"The seed {number} must be in [0, 2^64). For a negative seed of the authors' release add 2^64."
        )
    return number


def group_ids(scheme: str, d: int, seed: int, index: np.ndarray, rho: np.ndarray | None = None) -> np.ndarray:
    """The definition: groups of the elements with the given indices, in NumPy.

    Args:
      scheme, d, seed: of the region; for scope "global" those of the partition. See `region_seeds`.
      index: indices in the region, any shape, read as uint64.
      rho: the region's permutations, if they are there already.

    Returns:
      int64 group ids in [0, d), of the shape of `index`.
    """
    index = np.asarray(index, np.uint64)
    if scheme == "splitmix64":
        return (uint64.mix_host(index + np.uint64(hash_key(scheme, seed))) % np.uint64(d)).astype(np.int64)
    rho = _permutations(scheme, d, seed) if rho is None else rho
    k, o = chunks(d, seed, index // np.uint64(d))
    return rho[k, (index % np.uint64(d) + o.astype(np.uint64)) % np.uint64(d)].astype(np.int64)


def chunks(d: int, seed: int, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """balanced-v1's table number k_c and rotation o_c of the chunks with numbers c: int32 arrays of c's shape."""
    h = uint64.stream_host(hash_key("balanced-v1", seed), c)
    return (h % np.uint64(TABLES)).astype(np.int32), ((h >> np.uint64(32)) % np.uint64(d)).astype(np.int32)


def group_sizes(region: Region, seed: int, rho: np.ndarray | None = None) -> np.ndarray:
    """Number of elements in each group, int64 of shape (region.d,)."""
    if region.scheme == "balanced-v1":  # known without looking at the elements: whole chunks, and what is left
        whole, rest = divmod(region.size, region.d)
        sizes = np.full(region.d, whole, np.int64)
        index = np.arange(region.size - rest, region.size, dtype=np.uint64)
        sizes[group_ids(region.scheme, region.d, seed, index, rho)] += 1
        return sizes
    sizes = np.zeros(region.d, np.int64)
    for start in range(0, region.size, 2**22):  # the only pass over N, and once
        index = np.arange(start, min(start + 2**22, region.size), dtype=np.uint64)
        sizes += np.bincount(group_ids(region.scheme, region.d, seed, index), minlength=region.d)
    return sizes


def _permutations(scheme: str, d: int, seed: int) -> np.ndarray:
    count = TABLES if scheme == "balanced-v1" else 0
    hashes = [uint64.stream_host(int(uint64.stream_host(seed, k)), np.arange(d)) for k in range(count)]
    rows = [np.argsort(h, kind="stable") for h in hashes]
    return np.array(rows, np.int32).reshape(count, d)


def hash_key(scheme: str, seed: int) -> int:
    """What is added to the number of a chunk (balanced-v1), or to an index (splitmix64), before it is hashed."""
    if scheme == "splitmix64":
        return (seed + uint64.GAMMA) & uint64.MASK
    return int(uint64.stream_host(seed, TABLES))


def _block_regions(layout: Layout, d: int, scheme: str, scope: str) -> tuple[Region, ...]:
    blocks: dict[tuple[str, int], list[View]] = {}  # in canonical order
    for leaf in layout.leaves:
        if leaf.stacked:
            for number, layer in enumerate(leaf.layers()):
                blocks.setdefault(("", number), []).append(View(layer, number))
            continue
        # layer_3 and 3 are blocks' names; a number within a word, as of bert2/layer_3, is one only where there is no other.
        match = re.search(r"(?<![^/._])([0-9]+)(/|$)", leaf.path) or re.search(r"([0-9]+)(/|$)", leaf.path)
        if not match:
            raise ValueError(
                f"scope={scope!r} needs leaves of numbered blocks (layer_3/..., layers/3/..., or stacked leaves), "
                f"but {leaf.path!r} has no number. Narrow the targets, or use scope='global'."
            )
        blocks.setdefault((leaf.path[: match.start()], int(match.group(1))), []).append(View(leaf, None))
    regions, start = [], 0
    for b, views in enumerate(blocks.values()):
        share = d // len(blocks) + (b < d % len(blocks))
        offset, renumbered = 0, []
        for view in sorted(views, key=lambda view: view.leaf.offset):
            renumbered.append(View(dataclasses.replace(view.leaf, offset=offset), view.layer))
            offset += view.leaf.size
        if not 1 <= share <= offset:
            raise ValueError(
                f"scope={scope!r} gives block {b} of {len(blocks)} {share} of d = {d} for its {offset} weights."
            )
        regions.append(Region(scheme, start, share, tuple(renumbered)))
        start += share
    return tuple(regions)
