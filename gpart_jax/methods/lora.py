"""LoRA, and two methods that train less than its factors: Uni-LoRA and VeRA."""

import dataclasses
import math
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gpart_jax import linear, transform, uint64
from gpart_jax.methods.base import Method, layer_of, matrices, one_of, registered
from gpart_jax.partition import make_partition, seed_to_int
from gpart_jax.targets import Targets, canonical_layout, named_leaves, replace_leaves


APPLY = ("sum", "factors")


def _check(rank: int, dropout: float, apply: str, method: str) -> None:
    if rank < 1:
        raise ValueError(f"{method}'s rank must be at least 1, not {rank}.")
    if apply not in APPLY:
        raise ValueError(f"apply = {apply!r} must be one of {', '.join(APPLY)}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout} must be in [0, 1).")
    if dropout and apply == "sum":
        raise ValueError(f"dropout = {dropout} is of what goes into the factors, and needs apply='factors'.")


def _low_rank(factors: Callable, apply: str, dropout: float, key: jax.Array | None, rows: jax.Array | None) -> Callable:
    """adapt(part, layer=None) that adds A B to the leaves, or has our models apply it apart (`linear.LowRank`).

    Args:
      factors: factors(path, layer) -> (A, B) of a leaf or of one of its layers, or None.
    """
    if dropout == 0 or rows is None:
        key = None

    def adapt(part, layer=None):
        adapted: dict[str, linear.Kernel] = {}
        for path, leaf in named_leaves(part):
            if (pair := factors(path, layer)) is None:
                continue
            a, b = pair
            if apply == "sum" or not linear.is_kernel(path, leaf):
                adapted[path] = linear.add(leaf, a @ b)
                continue
            keys = None
            if key is not None:
                fold, own = jax.random.fold_in, jax.random.fold_in(key, zlib.crc32(path.encode()))
                keys = jax.vmap(lambda row: jax.random.key_data(fold(fold(own, 0 if layer is None else layer), row)))(rows)
            adapted[path] = linear.LowRank(leaf, a, b, keys, 1 - dropout)
        return replace_leaves(part, adapted)

    return adapt


@registered(size="rank")
def lora(
    rank: int, alpha: float | None = None, *, targets: Targets = None, dropout: float = 0.0, apply: str = "sum"
) -> Method:
    """LoRA: W = W0 + (alpha / rank) A B, A (in, rank) and B (rank, out) (Hu et al., arXiv 2106.09685, section 4.1).

    A starts Kaiming-uniform (each entry within 1 / sqrt(in)), B at zero, as in PEFT. Trains rank (in + out) numbers for each
    matrix.

    Args:
      rank: r >= 1.
      alpha: scale; None means alpha = rank.
      targets: as in `canonical_layout`; each targeted leaf must be a matrix (in, out), or several (..., in, out).
      dropout: probability with which each entry of what goes into A is zeroed in training, as in PEFT.
      apply: "sum": W0 + A B, rounded to W0's dtype. "factors", for the models of `gpart_jax.models`: their layers compute
        x W0 + x A B as PEFT does, without an array of W0's size, and dropout is possible.

    Returns:
      A `Method` that trains {"lora": {path: {"a": (..., in, rank), "b": (..., rank, out)}}}, float32.
    """
    _check(rank, dropout, apply, "LoRA")
    scale = (rank if alpha is None else alpha) / rank

    def init(params, key):
        factors = {}
        for number, leaf in enumerate(matrices(params, targets, "LoRA").leaves):
            *stack, fan_in, fan_out = leaf.shape
            bound = fan_in**-0.5
            a = jax.random.uniform(jax.random.fold_in(key, number), (*stack, fan_in, rank), jnp.float32, -bound, bound)
            factors[leaf.path] = {"a": a, "b": jnp.zeros((*stack, rank, fan_out), jnp.float32)}
        return {"lora": factors}

    def bind(params, trainable, key=None, on_mesh=False, tables=None, rows=None):
        del params, tables
        trained = one_of(trainable["lora"], on_mesh)

        def factors(path, layer):
            own = layer_of(trained[path], layer) if path in trained else None
            return own and (own["a"], scale * own["b"])

        return _low_rank(factors, apply, dropout, key, rows)

    return Method(init, bind)


@registered(size="d")
def uni_lora(
    d: int,
    rank: int = 4,
    seed: int = 0,
    *,
    alpha: float | None = None,
    targets: Targets = None,
    scheme: str = "balanced-v1",
    init_bound: float = 0.02,
    stacked: str | None = None,
    dropout: float = 0.0,
    apply: str = "sum",
) -> Method:
    """Uni-LoRA: the factors of LoRA on all matrices are P theta, P a global isometric partition (arXiv 2506.00799).

    The partition is this library's, over the factors instead of the weights. With both factors from theta a start at zero
    would have no gradient, so theta starts uniform in [-init_bound, init_bound], and the model a little off the base.

    Args:
      d: length of theta, 1 <= d <= D, the number of entries of all factors.
      rank, alpha, targets: as in `lora`.
      seed, scheme: of the partition.
      init_bound: the authors' recipe has 0.02.
      stacked: a pattern of leaves whose first axis counts layers, as in `canonical_layout`.
      dropout, apply: as in `lora`.

    Returns:
      A `Method` that trains {"theta": float32 (d,)}.
    """
    _check(rank, dropout, apply, "Uni-LoRA")
    scale = (rank if alpha is None else alpha) / rank

    def shapes(params):
        return {
            leaf.path: {
                "a": jax.ShapeDtypeStruct((*leaf.shape[:-1], rank), jnp.float32),
                "b": jax.ShapeDtypeStruct((*leaf.shape[:-2], rank, leaf.shape[-1]), jnp.float32),
            }
            for leaf in matrices(params, targets, "Uni-LoRA").leaves
        }

    def partition_of(params):
        return make_partition(canonical_layout(shapes(params), stacked=stacked), d, seed, scheme=scheme)

    def init(params, key):
        partition_of(params)
        return {"theta": jax.random.uniform(key, (d,), jnp.float32, -init_bound, init_bound)}

    def make_tables(params):
        partition = partition_of(params)
        return partition.tables

    def bind(params, trainable, key=None, on_mesh=False, tables=None, rows=None):
        partition = partition_of(params)
        if tables is not None:
            partition = dataclasses.replace(partition, **tables)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes(params))
        # On a mesh "tensor" is XLA's to divide here, and it can't divide a kernel.
        theta, kernels = one_of(trainable["theta"], on_mesh), False if on_mesh else None
        made = transform.bind(partition, theta, kernels=kernels)(zeros)

        def factors(path, layer):
            own = layer_of(made[path], layer) if path in made else None
            return own and (own["a"], scale * own["b"])

        return _low_rank(factors, apply, dropout, key, rows)

    return Method(init, bind, make_tables)


@registered(size="rank")
def vera(
    rank: int,
    seed: int = 0,
    *,
    targets: Targets = None,
    d_initial: float = 0.1,
    dropout: float = 0.0,
    apply: str = "sum",
) -> Method:
    """VeRA: W = W0 + (A diag(d)) (B diag(b)), A and B random and shared by all matrices (arXiv 2310.11454, section 3).

    Of one A (widest in, rank) and one B (rank, widest out) each matrix uses the first rows and columns that it needs, as in
    PEFT. Both are Kaiming-uniform, from the seed by the integer arithmetic of `uint64.py`. d starts at `d_initial`, b at
    zero. Trains rank + out numbers for each matrix.

    Args:
      rank: r >= 1.
      seed: of A and B; an int in [0, 2^64).
      targets, dropout, apply: as in `lora`.

    Returns:
      A `Method` that trains {"vera": {path: {"d": (..., rank), "b": (..., out)}}}, float32.
    """
    _check(rank, dropout, apply, "VeRA")
    key = seed_to_int(seed)

    def init(params, key):
        del key
        return {
            "vera": {
                leaf.path: {
                    "d": jnp.full((*leaf.shape[:-2], rank), d_initial, jnp.float32),
                    "b": jnp.zeros((*leaf.shape[:-2], leaf.shape[-1]), jnp.float32),
                }
                for leaf in matrices(params, targets, "VeRA").leaves
            }
        }

    def make_tables(params):
        leaves = matrices(params, targets, "VeRA").leaves
        rows, columns = (max(leaf.shape[axis] for leaf in leaves) for axis in (-2, -1))
        return {"a": _kaiming(key, 0, (rows, rank), rows), "b": _kaiming(key, 1, (rank, columns), rank)}

    def bind(params, trainable, key=None, on_mesh=False, tables=None, rows=None):
        shared = make_tables(params) if tables is None else tables
        trained = one_of(trainable["vera"], on_mesh)
        shapes = {leaf.path: leaf.shape for leaf in matrices(params, targets, "VeRA").leaves}

        def factors(path, layer):
            if path not in trained:
                return None
            own, (fan_in, fan_out) = layer_of(trained[path], layer), shapes[path][-2:]
            a = own["d"][..., None, :] * shared["a"][:fan_in]  # (..., in, rank)
            return a, shared["b"][:, :fan_out] * own["b"][..., None, :]

        return _low_rank(factors, apply, dropout, key, rows)

    return Method(init, bind, make_tables)


def _kaiming(seed: int, number: int, shape: tuple[int, int], fan: int) -> np.ndarray:
    """float32, uniform within sqrt(6 / fan): stream `number` of the seed, 24 bits of each output."""
    words = uint64.stream_host(int(uint64.stream_host(seed, number)), np.arange(math.prod(shape)).reshape(shape))
    unit = ((words >> np.uint64(40)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23) - 1
    return (unit * np.sqrt(6 / fan)).astype(np.float32)
