"""P theta and its transpose as JAX primitives, with the rules that every transformation of JAX asks for.

  adapt     W + P theta
  expand    P theta alone: what `adapt` is to a tangent
  contract  P^T, from the entries' cotangents

P is linear, so `adapt` has `expand` as its derivative, and `expand` and `contract` are each other's transposes; nothing is kept
from forward to backward but a few integers. All three are bound with the same static `Call` and the small arrays of a `Where`;
under `vmap` they take batched operands, and say of which. How they are computed is up to `lowerings/`.
"""

import functools
import math
import os
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpart_jax import lowerings
from gpart_jax.lowerings.base import Call, Where, shape_of, table_shape
from gpart_jax.sharding import over_tensor

adapt_p, expand_p, contract_p = (Primitive(f"gpart_{name}") for name in ("adapt", "expand", "contract"))


def adapt(call: Call, table: jax.Array, weights: Sequence[jax.Array], where: Where, kernels: bool | None) -> list[jax.Array]:
    """W + P theta of each cut.

    Args:
      table: (K, rows, 128), float32 or float64; with `call.split` (T, K, rows, 128), one for each device along "tensor".
      weights: one array for each cut of the call.
      kernels: whether a TPU may use its own; None: unless the environment variable GPART_KERNELS is 0.
    """
    if kernels is None:
        kernels = os.environ.get("GPART_KERNELS", "1") != "0"
    table, weights, where = jax.tree.map(jnp.asarray, (table, list(weights), where))
    if jax.sharding.get_abstract_mesh().explicit_axes and any(_divides(x) for x in (table, *weights)):
        return _over_explicit_axes(call, table, weights, where, kernels)
    alike: dict[frozenset, list[int]] = {}
    for number, weight in enumerate(weights):
        alike.setdefault(varying(weight), []).append(number)
    results: dict[int, jax.Array] = {}
    for numbers in alike.values():
        own, here = lowerings.some(call, where, numbers)
        leaves, tree = jax.tree.flatten(here)
        operands = _varying_alike([table, *(weights[n] for n in numbers), *leaves])
        results |= dict(zip(numbers, adapt_p.bind(*operands, call=own, tree=tree, kernels=kernels, vmaps=())))
    return [results[number] for number in range(len(weights))]


def _over_explicit_axes(call, table, weights, where, kernels):
    """`adapt` where weights are divided among devices by explicit axes of the mesh: each makes what it holds."""
    mesh = jax.sharding.get_abstract_mesh()
    specs = [jax.typeof(x).sharding.spec for x in weights]

    leaves, tree = jax.tree.flatten(where)

    def local(table, leaves, *weights):
        where = jax.tree.unflatten(tree, leaves)
        results: dict[int, jax.Array] = {}
        for spec in dict.fromkeys(specs):  # those of one spec vary over the mesh alike
            numbers = [n for n, other in enumerate(specs) if other == spec]
            own, here = lowerings.some(call, where, numbers)
            divided = [(axis, names) for axis, names in enumerate(spec) if names is not None]
            counts = [math.prod(mesh.shape[name] for name in _names(names)) for _, names in divided]
            axes = [axis + call.layered for axis, _ in divided]
            lengths = [[cut.leaf.shape[axis] // count for axis, count in zip(axes, counts)] for cut in own.cuts]
            own = own._replace(cuts=tuple(cut._replace(parts=tuple(zip(axes, n))) for cut, n in zip(own.cuts, lengths)))
            if divided:
                device = jnp.stack([jax.lax.axis_index(names) for _, names in divided])
                here = here._replace(starts=device * np.array(lengths, np.int32))
            results |= dict(zip(numbers, adapt(own, table, [weights[n] for n in numbers], here, kernels)))
        return [results[n] for n in range(len(specs))]

    table, leaves = jax.tree.map(lambda x: jax.sharding.reshard(x, P()), (table, leaves))
    run = jax.shard_map(local, in_specs=(P(), P(), *specs), out_specs=specs, axis_names=set(mesh.explicit_axes))
    return run(table, leaves, *weights)


def _divides(x) -> bool:
    return any(names is not None for names in jax.typeof(x).sharding.spec)


def _names(names) -> tuple:
    return names if isinstance(names, tuple) else (names,)


def _varying_alike(arrays) -> list[jax.Array]:
    """Arrays that vary over the same axes of a mesh in shard_map, as a primitive's operands must."""
    axes = set().union(*(varying(x) for x in arrays))
    missing = [tuple(axes - varying(x)) for x in arrays]
    return [jax.lax.pcast(x, more, to="varying") if more else x for x, more in zip(arrays, missing)]


def varying(x: jax.Array) -> frozenset:
    """The axes of a mesh over which an array varies in shard_map."""
    of = jax.typeof(x)
    return of.vma if hasattr(of, "vma") else of.manual_axis_type.varying


def _like(aval, shape, dtype):
    """A shape that varies over a mesh as `aval` does, and is divided by none of its explicit axes."""
    sharding = NamedSharding(aval.sharding.mesh, P(*[None] * len(shape)))
    return aval.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def _sizes(avals, vmaps) -> tuple[int, ...]:
    """The sizes of the axes that vmap added, the outermost first; an operand has those that it is batched along."""
    sizes = []
    for level, batched in enumerate(vmaps):
        operand = batched.index(True)
        sizes.append(avals[operand].shape[sum(outer[operand] for outer in vmaps[:level])])
    return tuple(sizes)


def _nested(function, vmaps, loop=False):
    """`function` of operands that are batched so."""
    for batched in reversed(vmaps):
        function = _mapped(function, batched) if loop else jax.vmap(function, [0 if one else None for one in batched])
    return function


def _mapped(function, batched):
    """As jax.vmap, one after another."""

    def run(*operands):
        def one(own):
            own = iter(own)
            return function(*(next(own) if mine else x for mine, x in zip(batched, operands)))

        return jax.lax.map(one, [x for mine, x in zip(batched, operands) if mine])

    return run


def _spread(x, levels):
    """An operand that is batched along some levels, with axes of size 1 for the others."""
    return jnp.expand_dims(x, [level for level, mine in enumerate(levels) if not mine])


def _summed(x, levels):
    """The transpose of a broadcast along the levels that an operand isn't batched along."""
    return jnp.sum(x, [level for level, mine in enumerate(levels) if not mine])


def _levels(vmaps, operand) -> list[bool]:
    return [batched[operand] for batched in vmaps]


# --------------------------------------------------------------------------------------------------- shapes and evaluation


@adapt_p.def_abstract_eval
def _(table, *avals, call, vmaps, **_):
    sizes = _sizes((table, *avals), vmaps)
    return [_like(w, (*sizes, *w.shape[sum(_levels(vmaps, 1 + n)) :]), w.dtype) for n, w in enumerate(avals[: len(call.cuts)])]


@expand_p.def_abstract_eval
def _(table, *avals, call, dtypes, vmaps, **_):
    sizes = _sizes((table, *avals), vmaps)
    return [_like(table, (*sizes, *shape_of(call, n)), dtype) for n, dtype in enumerate(dtypes)]


@contract_p.def_abstract_eval
def _(*avals, call, dtype, copies, vmaps, **_):
    shape = table_shape(call) if copies is None else (copies, *table_shape(call))
    return _like(avals[0], (*_sizes(avals, vmaps), *shape), dtype)


adapt_p.multiple_results = expand_p.multiple_results = True


def _adapt(table, *operands, call, tree, on_tpu):
    weights, where = operands[: len(call.cuts)], jax.tree.unflatten(tree, operands[len(call.cuts) :])
    if not call.split:
        return lowerings.adapt(call, table, weights, where, on_tpu)

    def local(table, weights, where, device):
        own, where = _on_device(call, where, device[0])
        return lowerings.adapt(own, table[0], weights, where, on_tpu)

    specs, devices = _specs(call), jnp.arange(len(table))
    return over_tensor(local, specs)((table, P("tensor")), (list(weights), specs), (where, P()), (devices, P("tensor")))


def _expand(table, *leaves, call, tree, dtypes, on_tpu):
    zeros = [jnp.zeros_like(table, shape=shape_of(call, n), dtype=dtype) for n, dtype in enumerate(dtypes)]
    return _adapt(table, *zeros, *leaves, call=call, tree=tree, on_tpu=on_tpu)


def _contract(*operands, call, tree, dtype, copies, on_tpu):
    cotangents, where = operands[: len(call.cuts)], jax.tree.unflatten(tree, operands[len(call.cuts) :])
    if not call.split:
        return lowerings.contract(call, cotangents, where, dtype, on_tpu)

    def local(cotangents, where, device):
        # What all devices hold counts once.
        own = [g if cut.parts else jnp.where(device[0] == 0, g, 0) for g, cut in zip(cotangents, call.cuts)]
        call_here, where = _on_device(call, where, device[0])
        return lowerings.contract(call_here, own, where, dtype, on_tpu)[None]

    devices = jnp.arange(copies)
    return over_tensor(local, P("tensor"))((list(cotangents), _specs(call)), (where, P()), (devices, P("tensor")))


def _specs(call) -> list[P]:
    axes = [cut.parts[0][0] - call.layered if cut.parts else None for cut in call.cuts]
    return [P() if axis is None else P(*[None] * axis, "tensor") for axis in axes]


def _on_device(call, where, device):
    lengths = np.array([[length for _, length in cut.parts] or [0] for cut in call.cuts], np.int32)
    return call._replace(split=False), where._replace(starts=device * lengths)


# ------------------------------------------------------------------------------------------------------------------- rules


def _zero_tangent(output):
    return ad.Zero(jax.typeof(output).to_tangent_aval())


def _adapt_jvp(primals, tangents, *, call, tree, kernels, vmaps):
    outputs, count = adapt_p.bind(*primals, call=call, tree=tree, kernels=kernels, vmaps=vmaps), len(call.cuts)
    table, *own = tangents[: 1 + count]
    results = []
    for n, (dot, output) in enumerate(zip(own, outputs)):
        if isinstance(dot, ad.Zero):
            results.append(_zero_tangent(output))
        else:
            results.append(jnp.broadcast_to(_spread(dot, _levels(vmaps, 1 + n)), output.shape))
    if not isinstance(table, ad.Zero):
        sizes = _sizes([jax.typeof(x) for x in primals], vmaps)
        table = jnp.broadcast_to(_spread(table, _levels(vmaps, 0)), (*sizes, *table.shape[sum(_levels(vmaps, 0)) :]))
        deltas = expand_p.bind(
            table, *primals[1 + count :], call=call._replace(dither=False), tree=tree, dtypes=tuple(x.dtype for x in outputs),
            kernels=kernels, vmaps=tuple((True, *batched[1 + count :]) for batched in vmaps),
        )  # fmt: skip
        results = [delta if isinstance(dot, ad.Zero) else dot + delta for dot, delta in zip(results, deltas)]
    return outputs, results


def _expand_jvp(primals, tangents, **params):
    outputs, dot = expand_p.bind(*primals, **params), tangents[0]
    if isinstance(dot, ad.Zero):
        return outputs, [_zero_tangent(x) for x in outputs]
    return outputs, expand_p.bind(dot, *primals[1:], **params)


def _contract_jvp(primals, tangents, *, call, **params):
    output, count = contract_p.bind(*primals, call=call, **params), len(call.cuts)
    used = [n for n, dot in enumerate(tangents[:count]) if not isinstance(dot, ad.Zero)]
    if not used:
        return output, _zero_tangent(output)
    return output, _contract_some([tangents[n] for n in used], used, primals[count:], call=call, **params)


def _contract_some(cotangents, used, leaves, *, call, tree, vmaps, **params):
    """`contract` of those cuts' cotangents."""
    own, where = lowerings.some(call, jax.tree.unflatten(tree, leaves), used)
    count = len(vmaps[0]) - len(leaves) if vmaps else 0

    def flags(batched):  # of what is left: the operands' own, and of each cut its key's
        of = jax.tree.unflatten(tree, batched[count:])
        return *(batched[n] for n in used), *jax.tree.leaves(of._replace(keys=tuple(of.keys[n] for n in used)))

    vmaps = tuple(map(flags, vmaps))
    leaves, tree = jax.tree.flatten(where)
    return contract_p.bind(*cotangents, *leaves, call=own, tree=tree, vmaps=vmaps, **params)


def _expand_transpose(cotangents, table, *leaves, call, tree, dtypes, kernels, vmaps):
    del dtypes
    used = [n for n, cotangent in enumerate(cotangents) if not isinstance(cotangent, ad.Zero)]
    if not used:
        return [ad.Zero(table.aval), *[None] * len(leaves)]
    every = tuple((*[True] * len(call.cuts), *batched[1:]) for batched in vmaps)  # the cotangents are batched along all
    copies = table.aval.shape[sum(_levels(vmaps, 0))] if call.split else None
    total = _contract_some(
        [cotangents[n] for n in used], used, leaves, call=call, tree=tree, dtype=table.aval.dtype, copies=copies,
        kernels=kernels, vmaps=every,
    )  # fmt: skip
    return [_summed(total, _levels(vmaps, 0)), *[None] * len(leaves)]


def _contract_transpose(cotangent, *operands, call, tree, dtype, copies, kernels, vmaps):
    del dtype, copies
    own, leaves = operands[: len(call.cuts)], operands[len(call.cuts) :]
    linear = [ad.is_undefined_primal(x) for x in own]
    if isinstance(cotangent, ad.Zero):
        return [ad.Zero(x.aval) if mine else None for x, mine in zip(own, linear)] + [None] * len(leaves)
    dtypes = tuple((x.aval if mine else x).dtype for x, mine in zip(own, linear))
    every = tuple((True, *batched[len(own) :]) for batched in vmaps)
    results = expand_p.bind(cotangent, *leaves, call=call, tree=tree, dtypes=dtypes, kernels=kernels, vmaps=every)
    summed = [_summed(x, _levels(vmaps, n)) if mine else None for n, (x, mine) in enumerate(zip(results, linear))]
    return summed + [None] * len(leaves)


def _batch(primitive, operands, axes, *, vmaps, **params):
    batched = tuple(axis is not None for axis in axes)
    operands = [jnp.moveaxis(x, axis, 0) if mine else x for x, axis, mine in zip(operands, axes, batched)]
    results = primitive.bind(*operands, vmaps=(batched, *vmaps), **params)
    return results, [0] * len(results) if primitive.multiple_results else 0


def _lowering(primitive, function):
    """For each platform but TPUs."""

    def run(*operands, kernels, vmaps, **params):
        del kernels
        return _nested(functools.partial(function, on_tpu=False, **params), vmaps)(*operands)

    return mlir.lower_fun(run, primitive.multiple_results)


def _tpu_lowering(primitive, function):
    def run(*operands, kernels, vmaps, **params):
        return _nested(functools.partial(function, on_tpu=kernels, **params), vmaps, loop=kernels)(*operands)

    lower = mlir.lower_fun(run, primitive.multiple_results)

    def rule(ctx, *operands, kernels, **params):
        kernels = kernels and lowerings.tpu.fit_here()
        if kernels and not params["call"].split and _divided(ctx.module_context.axis_context):
            kernels = False
            warnings.warn(
                "P theta is computed without TPU kernels: XLA divides this program among several devices, and can't divide a "
                "kernel. Use gpart_jax.sharding.value_and_grad, or jax.shard_map over all axes of the mesh.",
                stacklevel=2,
            )  # fmt: skip
        return lower(ctx, *operands, kernels=kernels, **params)

    return rule


def _divided(context) -> bool:
    """Whether XLA divides a program among devices, by the context of its lowering."""
    if not hasattr(context, "manual_axes"):
        return getattr(context, "num_devices", 1) > 1
    manual = set(context.manual_axes) | set(context.mesh.manual_axes)
    return bool(context.manual_axes) and manual != set(context.mesh.axis_names)


@functools.partial(jax.jit, static_argnames=("primitive", "params"))
def _now(*operands, primitive, params):
    return primitive.bind(*operands, **dict(params))


def _register(primitive, function, jvp, transpose=None):
    def now(*operands, **params):
        return _now(*operands, primitive=primitive, params=tuple(sorted(params.items())))

    primitive.def_impl(now)
    ad.primitive_jvps[primitive] = jvp
    if transpose is not None:
        ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    mlir.register_lowering(primitive, _lowering(primitive, function))
    mlir.register_lowering(primitive, _tpu_lowering(primitive, function), platform="tpu")


_register(adapt_p, _adapt, _adapt_jvp)  # as a function of W and theta it isn't linear to AD, whose tangents go through `expand`
_register(expand_p, _expand, _expand_jvp, _expand_transpose)
_register(contract_p, _contract, _contract_jvp, _contract_transpose)
