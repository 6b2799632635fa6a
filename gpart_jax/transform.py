"""gpart_transform: frozen params and theta to adapted params, W = W0 + P theta (GPart, arXiv 2605.14841).

P theta is one gather and P^T g one segment sum. Under balanced-v1 each chunk of d elements is a rotation of one of 8 tables of
scaled theta, so where a leaf is a run of consecutive indices both directions move slices, and look at no element by itself. They
are primitives (`primitive.py`), computed in one of several ways (`lowerings/`). Nothing of N entries is kept from forward to
backward; signed_magnitude alone holds N positions.
"""

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gpart_jax import partition as partitions
from gpart_jax import primitive
from gpart_jax.dropout import key_words
from gpart_jax.linear import Split, is_kernel, is_narrow
from gpart_jax.lowerings.base import Call, Cut, Where, as_table
from gpart_jax.partition import Partition
from gpart_jax.targets import Layout, Params, Targets, canonical_layout, named_leaves, replace_leaves, wide

APPLY = ("sum", "dither", "split")


def gpart_transform(
    params: Params,
    theta: ArrayLike,
    seed: int | jax.Array | Partition | None = None,
    *,
    partition: Partition | None = None,
    targets: Targets | Layout = None,
    scheme: str = "balanced-v1",
    scope: str = "global",
    isometric: bool = True,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    kernels: bool | None = None,
) -> Params:
    """Adds P theta to the targeted leaves of a frozen model (arXiv 2605.14841).

    Pure; works under all of JAX's transformations. The gradient with respect to theta is P^T of the
    gradient with respect to the adapted weights. P theta has the same bits however it is compiled or sharded; in the sum
    with the frozen weights a compiler may round once instead of twice.

    In bfloat16 the sum loses the entries of P theta below half of W0's last place, which are most of them while theta is small: after
    one step of Adam at 2e-4 on SmolLM2 2 % of the adapted entries had moved, after 50 steps 41 % (docs/bfloat16.md). `gpart` with
    apply="dither" rounds by chance instead, and keeps them on average.

    Args:
      params: any pytree with the frozen weights: Flax Linen params, an NNX State, an Equinox module, plain containers.
      theta: the trained vector, floating-point, shape (d,).
      seed: an int in [0, 2^64) or a concrete two-word `jax.random` key.
      partition: in place of a seed, from `make_partition`. Its tables are then arguments of the compiled program instead of
        constants in it, and it fixes targets, scheme, scope and isometric.
      targets: which leaves to adapt: regular expression(s) searched for in the leaf's path, a predicate `(path, leaf)`,
        a `Layout`, or None for every floating-point leaf that is a parameter. See `canonical_layout`.
      scheme: "balanced-v1", "splitmix64" or "signed_magnitude"; see `partition.py`.
      scope: "global", or "block" for a slice of theta for each numbered block ("transformer_block": with the authors' seeds).
      isometric: scale the columns of P so that P^T P = I.
      dropout: probability with which each entry of P theta is zeroed (the others are divided by 1 - dropout). Needs `key`;
        without a key nothing is dropped.
      key: `jax.random` key of the dropout mask. The mask is a function of the key and the index of each entry alone.
      kernels: whether a TPU (v5e, v5p, v6e) may use Pallas kernels; None: unless the environment variable GPART_KERNELS is 0.

    Returns:
      A pytree like `params`. Targeted leaves keep their shape and dtype (the sum is taken in float32 or wider and then
      rounded); every other leaf is the same object.

    Raises:
      ValueError: theta not of shape (d,), d > N, targets that match nothing or something not floating-point, an unknown
        scheme or scope, a Partition made for other leaves, dropout outside [0, 1).
      TypeError: theta not floating-point; a traced seed; neither or both of seed and partition.
    """
    theta = jnp.asarray(theta)
    if not jnp.issubdtype(theta.dtype, jnp.floating):
        raise TypeError(f"theta must be floating-point, not {theta.dtype}.")
    if theta.ndim != 1:
        raise ValueError(f"theta must have shape (d,), not {theta.shape}. For several thetas use jax.vmap.")
    if isinstance(seed, Partition):
        warnings.warn("Pass a Partition as gpart_transform(..., partition=...), not as the seed.", DeprecationWarning, 2)
        seed, partition = None, seed
    if partition is not None and seed is not None:
        raise TypeError("gpart_transform takes a seed or a partition, not both.")
    if partition is not None:
        if targets is not None or (scheme, scope, isometric) != ("balanced-v1", "global", True):
            raise ValueError("A Partition already fixes targets, scheme, scope and isometric. Leave them out.")
        canonical_layout(params, partition.layout)
    else:
        if seed is None:
            raise TypeError("gpart_transform needs a seed or a partition.")
        layout = canonical_layout(params, targets)
        partition = partitions.make_partition(
            layout, theta.shape[0], seed, scheme=scheme, scope=scope, isometric=isometric, params=params
        )

    return bind(partition, theta, dropout, key if dropout else None, kernels=kernels)(params)


def bind(
    partition: Partition,
    theta: jax.Array,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    split: dict[str, int | None] | None = None,
    kernels: bool | None = None,
    apply: str = "sum",
) -> Callable:
    """adapt(params, layer=None): `params`, or a part of the model such as one layer's, with P theta added where it belongs.

    Inside a scan over layers `adapt({"layers": slices}, layer=index)` adapts the slices that the body holds of stacked
    leaves, so that only one layer's deltas are alive; `index` may be traced. The tables of theta are made once, here.

    Args:
      partition: of the whole model.
      theta: (d,); with `split`, (T, d): a copy for each of the T devices along the mesh axis "tensor".
      dropout, key, kernels: as in `gpart_transform`.
      split: for each targeted path the axis along which "tensor" divides the leaf, or None. Each device then makes its own
        part from its own copy of theta, and its copy's gradient from its own part: nothing is communicated, and the copies'
        gradients are yet to be summed.
      apply: "sum"; "dither", the sum rounded to bfloat16 up or down by chance, by the key and each entry's index (or, without a
        key, by its index alone); or "split", which leaves the kernels that our models apply (`linear.is_kernel`) as pairs, `linear.Split`.
    """
    if apply not in APPLY:
        raise ValueError(f"apply = {apply!r} must be one of {', '.join(APPLY)}.")
    if theta.shape[-1] != partition.d:
        raise ValueError(f"theta has shape {theta.shape}, but the partition has d = {partition.d}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout} must be in [0, 1).")
    dither = apply == "dither"
    rate = 0.0 if key is None else dropout
    tables = []
    for number, (region, rho, scale) in enumerate(zip(partition.regions, partition.permutations, partition.scales)):
        scaled = theta[..., region.start : region.start + region.d] * scale  # float32 or wider, as scale is
        make_table = functools.partial(_table, rho=rho, scheme=region.scheme)
        table = make_table(scaled) if split is None else jax.vmap(make_table)(scaled)
        drop = jnp.zeros(2, jnp.uint32) if dither else None
        drop = drop if key is None else key_words(jax.random.fold_in(key, number))
        tables.append((region, table, partition.keys[number], drop))

    def adapt(params, layer=None):
        leaves = dict(named_leaves(params))
        adapted: dict[str, dict] = {}
        for region, table, own, drop in tables:
            views = [view for view in region.views if view.leaf.path in leaves]
            for view in views:
                if layer is not None and not view.leaf.stacked:
                    raise ValueError(
                        f"{view.leaf.path!r} can't be adapted layer by layer: that takes scope='global' and a layout that numbers "
                        f"it as stacked (canonical_layout(..., stacked=...)). Otherwise adapt params before the scan."
                    )
            if not views:
                continue
            keys = tuple(own[view.leaf.path] if isinstance(own, dict) else own for view in views)
            cuts = tuple(_cut(view, table, split) for view in views)
            call = Call(region.scheme, region.d, cuts, layer is not None, rate, dither, split is not None)
            weights = [leaves[view.leaf.path] for view in views]
            weights = [weight if view.layer is None else weight[view.layer] for view, weight in zip(views, weights)]
            for view, weight in zip(views, weights):
                if dither and weight.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
                    raise ValueError(f"apply='dither' rounds to bfloat16, but {view.leaf.path!r} is {weight.dtype}. Use apply='sum'.")
            apart = [apply == "split" and is_kernel(view.leaf.path, weight) for view, weight in zip(views, weights)]
            held = [weight.astype(wide(weight.dtype)) if is_narrow(weight.dtype) else weight for weight in weights]
            added_to = [jnp.zeros_like(weight) if alone else weight for weight, alone in zip(held, apart)]
            results = primitive.adapt(call, table, added_to, Where(keys, layer, None, drop), kernels)
            for view, weight, result, alone in zip(views, weights, results, apart):
                new = Split(weight, result) if alone else result.astype(weight.dtype)
                adapted.setdefault(view.leaf.path, {})[view.layer] = new
        return replace_leaves(
            params, {path: of[None] if None in of else _stacked([of[n] for n in sorted(of)]) for path, of in adapted.items()}
        )  # fmt: skip

    return adapt


def _stacked(layers: list):
    return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)


def _cut(view, table, split) -> Cut:
    axis = None if split is None else split[view.leaf.path]
    if axis is None:
        return Cut(view.leaf)
    axis -= view.layer is not None  # a view that is one layer of a stacked leaf has an axis less
    return Cut(view.leaf, ((axis, view.leaf.shape[axis] // len(table)),))


def _table(scaled, rho, scheme):
    """The tables (`lowerings/base.py`) of scaled theta, (d,)."""
    if not len(rho):
        return as_table(scaled[None], scheme)
    # A gather for each, with unique indices, so that its transpose is a fast scatter whose sum is reproducible.
    options = dict(unique_indices=True, mode="promise_in_bounds", wrap_negative_indices=False)
    flat = jax.lax.optimization_barrier(rho.reshape(-1))  # a TPU cuts rows out of it six times as fast
    rows = [scaled.at[order].get(**options) for order in jnp.split(flat, len(rho))]
    return as_table(jnp.stack(rows), scheme)
