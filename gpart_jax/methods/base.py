"""What a fine-tuning method is, and methods side by side."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from gpart_jax.linear import add, merged
from gpart_jax.sharding import one_copy
from gpart_jax.targets import Layout, Params, PyTree, Targets, canonical_layout, named_leaves, replace_leaves


def _none(params):
    del params
    return {}


class Method(NamedTuple):
    """Pure functions; a trainable is a dict of pytrees.

    init(params, key) -> trainable.
    bind(params, trainable, key=None, on_mesh=False, tables=None, rows=None) -> adapt: prepares what is needed once for the whole
      of params (or `jax.ShapeDtypeStruct`s of them). `rows`, int (B,), are the numbers of a batch's rows, by which a method draws
      dropout on activations. `adapt(part)` adapts any part of params; `adapt({"layers": slices},
      layer=index)` the slices of stacked leaves that the body of a scan holds. `on_mesh` is for `sharding.value_and_grad`:
      params then have NamedShardings, and each leaf of the trainable a copy for each device along "tensor", (T, ...).
    tables(params) -> pytree: what the method's seed gives, such as a partition; neither trained nor saved. As an argument of
      `bind` it is one of the compiled program too; else it is made anew, and its arrays are constants there. Methods that
      differ in their seed alone have tables of one structure, and any one's `bind` takes any other's tables.
    linear: whether what is trained enters the weights linearly, so that a mean of trainables gives the mean of the models.
    isometric: whether distances of what is trained are distances of the weights, as P^T P = I has it (`isometry.py`).
    name, options: what made it, with every option written out: what an adapter says of it. "chain" of methods that no adapter
      can hold together.
    head_targets: the leaves of a head that is trained beside it, or with it: no part of the base model.
    """

    init: Callable[[PyTree, jax.Array], dict]
    bind: Callable[..., Callable]
    tables: Callable[[PyTree], PyTree] = _none
    linear: bool = False
    isometric: bool = False
    name: str = "chain"
    options: dict = {}
    head_targets: Targets = None

    def apply(self, params: Params, trainable: dict, key: jax.Array | None = None, tables: PyTree = None) -> Params:
        """The adapted params, arrays all of them; a key turns on dropout on the delta."""
        return merged(self.bind(params, trainable, key, False, tables)(params))


METHODS: dict[str, Callable[..., Method]] = {}
SIZES: dict[str, str] = {}  # by method: which of its options is its size


def registered(size: str | None = None) -> Callable:
    """Enters a function that makes a method into METHODS; the method then carries its name and all of its options.

    Args:
      size: the option that is the method's size, by which tables sort it: "d", for a theta of d numbers, or another; None: it has none.
    """

    def register(make: Callable[..., Method]) -> Callable[..., Method]:
        signature = inspect.signature(make)

        @functools.wraps(make)
        def named(*args, **options):
            method, given = make(*args, **options), signature.bind(*args, **options)
            given.apply_defaults()
            return method._replace(name=make.__name__, options=dict(given.arguments))

        METHODS[make.__name__] = named
        if size:
            SIZES[make.__name__] = size
        return named

    return register


def chain(*methods: Method) -> Method:
    """Methods side by side: `chain(gpart(...), head("^classifier/"))` trains theta and the head. Applied in order.

    A method and a head together are still called by the method's name.
    """

    def init(params, key):
        trainable: dict = {}
        for number, method in enumerate(methods):
            part = method.init(params, jax.random.fold_in(key, number))
            if shared := trainable.keys() & part.keys():
                raise ValueError(f"Two chained methods both train {sorted(shared)}.")
            trainable |= part
        return trainable

    def make_tables(params):
        return [method.tables(params) for method in methods]

    def bind(params, trainable, key=None, on_mesh=False, tables=None, rows=None):
        keys = [None if key is None else jax.random.fold_in(key, number) for number in range(len(methods))]
        tables = [None] * len(methods) if tables is None else tables
        adapts = [method.bind(params, trainable, key, on_mesh, own, rows) for method, key, own in zip(methods, keys, tables)]

        def adapt(part, layer=None):
            for one in adapts:
                part = one(part, layer)
            return part

        return adapt

    linear = all(method.linear for method in methods)
    if len(methods) == 2 and methods[1].name == "head" and methods[0].name != "chain":
        return methods[0]._replace(
            init=init, bind=bind, tables=make_tables, linear=linear, head_targets=methods[1].options["targets"]
        )
    return Method(init, bind, make_tables, linear)


def layer_of(tree: Params, layer: int | jax.Array | None) -> Params:
    """One layer of trained or random numbers that are stacked as their leaf is; all of them where `layer` is None."""
    return tree if layer is None else jax.tree.map(lambda x: x[layer], tree)


def adding(deltas: Callable[[str, Any], jax.Array | None]) -> Callable:
    """adapt(part, layer=None) that adds `deltas(path, layer)`, where it isn't None, to a leaf."""

    def adapt(part, layer=None):
        adapted = {}
        for path, leaf in named_leaves(part):
            if (delta := deltas(path, layer)) is not None:
                adapted[path] = add(leaf, delta)
        return replace_leaves(part, adapted)

    return adapt


def matrices(params: PyTree, targets: Targets | Layout, method: str, stacked: str | None = None) -> Layout:
    """The layout of the targeted leaves, which must be matrices (in, out), or several (..., in, out).

    Raises:
      ValueError: a target that is no matrix.
    """
    layout = canonical_layout(params, targets, stacked=stacked)
    for leaf in layout.leaves:
        if len(leaf.shape) < 2:
            raise ValueError(f"{method} adapts matrices, but {leaf.path!r} has shape {leaf.shape}. Narrow the targets.")
    return layout


def one_of(copies: Params, on_mesh: bool) -> Params:
    """The trained numbers themselves, from their copies on a mesh."""
    return one_copy(copies) if on_mesh else copies
