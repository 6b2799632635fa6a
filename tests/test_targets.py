"""Which leaves are adapted, and the numbering of their elements."""

import dataclasses
import hashlib
import json
from typing import NamedTuple

import equinox as eqx
import flax.core
import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpart_jax import Adapter, Layout, Leaf, canonical_layout, full, gpart
from gpart_jax.targets import floating, named_leaves, replace_leaves, select


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def indices(leaf):
    """The index of each element of a leaf, by the definition: offset + sum(strides[k] * x[k])."""
    grid = np.indices(leaf.shape, dtype=np.uint64)
    return leaf.offset + sum((g * np.uint64(s) for g, s in zip(grid, leaf.strides)), np.zeros(leaf.shape, np.uint64))


def by_path(layout):
    return {leaf.path: leaf for leaf in layout.leaves}


BLOCK = {"query": {"kernel": array(4, 6), "bias": array(6)}, "value": {"kernel": array(4, 6)}}
MODEL = {"embed": array(9, 4), "layer_10": BLOCK, "layer_2": BLOCK, "steps": array(dtype=jnp.int32)}

# ------------------------------------------------------------------------------------------------------------- paths


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    left: jax.Array
    right: jax.Array


class Point(NamedTuple):
    x: jax.Array
    y: jax.Array


def test_paths_of_nested_containers():
    tree = {"a": [array(1), (array(1), Pair(array(1), array(1)))], "p": Point(array(1), array(1)), "n": {3: array(1)}}
    assert [path for path, _ in named_leaves(tree)] == [
        "a/0",
        "a/1/0",
        "a/1/1/left",
        "a/1/1/right",
        "n/3",
        "p/x",
        "p/y",
    ]


def test_paths_of_linen_params():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="query")(x)

    params = jax.eval_shape(Model().init, jax.random.key(0), jnp.ones((1, 2)))["params"]
    assert [path for path, _ in named_leaves(params)] == ["query/bias", "query/kernel"]


def test_paths_of_nnx_state():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.Linear(2, 3, rngs=rngs) for _ in range(2)])

    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    assert [path for path, _ in named_leaves(state)] == [
        f"blocks/{b}/{name}" for b in (0, 1) for name in ("bias", "kernel")
    ]


def test_paths_of_equinox_module():
    model = eqx.nn.MLP(2, 3, width_size=4, depth=1, key=jax.random.key(0))
    paths = [path for path, leaf in named_leaves(model) if eqx.is_array(leaf)]
    assert paths == ["layers/0/weight", "layers/0/bias", "layers/1/weight", "layers/1/bias"]


@pytest.mark.parametrize("tree", [{"a": {"b": array(2)}, "a/b": array(2)}, {"a": {1: array(2)}, "a/1": array(2)}])
def test_equal_paths_are_an_error(tree):
    with pytest.raises(ValueError, match="same path.*Rename"):
        canonical_layout(tree)


def test_replace_keeps_other_leaves():
    tree = {"a": jnp.ones(2), "b": [jnp.ones(3), "text", len]}
    new = replace_leaves(tree, {"b/0": 7})
    assert new["b"] == [7, "text", len] and new["a"] is tree["a"]


# --------------------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("embed", ["embed"]),
        ("query/kernel$", ["layer_2/query/kernel", "layer_10/query/kernel"]),
        (["embed", "layer_2/.*bias"], ["embed", "layer_2/query/bias"]),
        (lambda path, leaf: len(leaf.shape) == 1, ["layer_2/query/bias", "layer_10/query/bias"]),
    ],
)
def test_select(targets, expected):
    assert list(select(MODEL, targets)) == expected


def test_select_all_floats_by_default():
    tree = {
        "a": array(2, dtype=jnp.bfloat16),
        "b": array(2, dtype=jnp.int32),
        "c": np.ones(2),
        "f": len,
        "n": None,
        "s": 1.0,
    }
    assert list(select(tree)) == ["a", "c"]


def test_order_is_natural_and_not_that_of_the_tree():
    names = ["z", "b_10", "b_9", "b_1_12", "b_1_3", "a"]
    assert list(select({name: array(1) for name in names})) == ["a", "b_1_3", "b_1_12", "b_9", "b_10", "z"]
    assert [leaf.path for leaf in canonical_layout([array(1)] * 12).leaves] == [str(k) for k in range(12)]


@pytest.mark.parametrize(
    "targets, message",
    [
        ("nothing", "'nothing' matches no leaf.*embed"),
        (["embed", "nothing"], "'nothing' matches no leaf"),
        ([], "empty list.*pattern"),
        (lambda path, leaf: False, "chose no leaf.*embed"),
        ("steps", "'steps' is int32, not floating-point.*Narrow"),
    ],
)
def test_bad_targets(targets, message):
    with pytest.raises(ValueError, match=message):
        canonical_layout(MODEL, targets)


def test_target_that_is_no_array():
    with pytest.raises(ValueError, match="'f' is builtin_function_or_method, not floating-point"):
        select({"f": len, "a": array(2)}, "f")


def test_nothing_to_adapt():
    with pytest.raises(ValueError, match="no floating-point array"):
        canonical_layout({"steps": array(dtype=jnp.int32)})


# --------------------------------------------------------------------------------------------------------- numbering


def test_row_major_in_path_order():
    layout = canonical_layout(MODEL, "kernel|embed")
    assert [(leaf.path, leaf.offset, leaf.strides) for leaf in layout.leaves] == [
        ("embed", 0, (4, 1)),
        ("layer_2/query/kernel", 36, (6, 1)),
        ("layer_2/value/kernel", 60, (6, 1)),
        ("layer_10/query/kernel", 84, (6, 1)),
        ("layer_10/value/kernel", 108, (6, 1)),
    ]
    assert layout.size == 132


SHAPES = st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple)


@given(st.lists(SHAPES, min_size=1, max_size=4), st.lists(SHAPES, max_size=3), st.integers(1, 4))
def test_each_index_once(plain, inner, layers):
    """Whatever is stacked and transposed, the elements have the indices 0 ... N-1."""
    tree = {f"a{k}": array(*shape) for k, shape in enumerate(plain)}
    tree |= {"stack": {f"b{k}": array(layers, *shape) for k, shape in enumerate(inner)}}
    tree["z"] = array()
    layout = canonical_layout(
        tree, stacked="^stack" if inner else None, transposed="a[02]|b1" if len(inner) > 1 else "a0"
    )
    found = np.concatenate([indices(leaf).reshape(-1) for leaf in layout.leaves])
    assert np.array_equal(np.sort(found), np.arange(layout.size))
    assert layout.size == sum(leaf.size for leaf in layout.leaves)
    assert [leaf.offset for leaf in layout.leaves] == sorted(leaf.offset for leaf in layout.leaves)


@given(st.lists(SHAPES, min_size=1, max_size=3), st.integers(1, 12))
def test_stacked_layers_are_numbered_as_separate_ones(inner, layers):
    block = {f"w{k}": shape for k, shape in enumerate(inner)}
    separate = by_path(
        canonical_layout(
            {"a": array(3), "layers": [{k: array(*s) for k, s in block.items()} for _ in range(layers)], "z": array(2)}
        )
    )
    stacked = by_path(
        canonical_layout(
            {"a": array(3), "layers": {k: array(layers, *s) for k, s in block.items()}, "z": array(2)},
            stacked="^layers",
        )
    )
    assert separate["a"] == stacked["a"] and separate["z"] == stacked["z"]
    for name in block:
        twins = [indices(separate[f"layers/{b}/{name}"]) for b in range(layers)]
        assert np.array_equal(indices(stacked[f"layers/{name}"]), np.stack(twins))
        assert [leaf.offset for leaf in stacked[f"layers/{name}"].layers()] == [t.flat[0] for t in twins]


@given(SHAPES)
def test_transposed_storage_keeps_indices(shape):
    swapped = shape[:-2] + (shape[-1], shape[-2])
    plain = canonical_layout({"a": array(2), "k": array(*shape), "z": array(2)})
    other = canonical_layout({"a": array(2), "k": array(*swapped), "z": array(2)}, transposed="^k$")
    for one, two in zip(plain.leaves, other.leaves):
        expected = np.swapaxes(indices(one), -1, -2) if one.path == "k" else indices(one)
        assert np.array_equal(indices(two), expected)


def test_stacked_and_transposed():
    plain = indices(canonical_layout({"l": [{"k": array(3, 5)}, {"k": array(3, 5)}]}).leaves[1])
    both = canonical_layout({"l": {"k": array(2, 5, 3)}}, stacked="^l", transposed="k$")
    assert np.array_equal(indices(both.leaves[0])[1].T, plain)


@pytest.mark.parametrize("shape, strides, dense", [((4, 6), (6, 1), True), ((4, 6), (1, 4), False), ((2, 4, 6), (99, 6, 1), False), ((1, 6), (77, 1), True), ((), (), True)])  # fmt: skip
def test_is_dense(shape, strides, dense):
    assert Leaf("k", shape, 5, strides).is_dense == dense


def test_path_may_begin_like_a_stack():
    layout = canonical_layout({"stacked a": array(3, 4), "b": array(2, 2)})
    assert by_path(layout)["stacked a"] == Leaf("stacked a", (3, 4), 4, (4, 1))


def test_path_with_superscript_digits():
    assert list(select({"²": array(3)})) == ["²"]


@pytest.mark.parametrize(
    "tree, options, message",
    [
        ({"l": {"a": array(3, 2), "b": array(4, 2)}}, {"stacked": "^l"}, "number of layers.*l/a': 3.*l/b': 4"),
        ({"l": {"a": array()}}, {"stacked": "^l"}, "number of layers"),
        ({"a": array(3)}, {"transposed": "a"}, r"\(3,\) has no two axes.*Narrow"),
        ({"a": array(3, 3)}, {"stacked": "^layers"}, "'\\^layers'.*match"),
        ({"a": array(3, 3)}, {"transposed": "weight"}, "'weight'.*match"),
    ],
)
def test_bad_numbering(tree, options, message):
    with pytest.raises(ValueError, match=message):
        canonical_layout(tree, **options)


# --------------------------------------------------------------------------------------------- layouts and fingerprint


def test_layout_passes_through():
    layout = canonical_layout(MODEL, "kernel", transposed="query")
    assert canonical_layout(MODEL, layout) is layout


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"b": array(4, 6)}, "'k' is not a floating-point leaf"),
        ({"k": array(4, 6, dtype=jnp.int32)}, "'k' is not a floating-point leaf"),
        ({"k": array(6, 4)}, r"'k' has shape \(6, 4\).*\(4, 6\)"),
    ],
)
def test_layout_of_other_params(tree, message):
    layout = canonical_layout({"k": array(4, 6)})
    with pytest.raises(ValueError, match=message):
        canonical_layout(tree, layout)


def test_fingerprint_never_changes():
    """Adapters carry it: SHA-256 of [[offset, shape in canonical order] for each layer of each leaf, sorted]."""
    layout = canonical_layout({"a": array(3, 4), "l": {"k": array(2, 6, 5)}}, stacked="^l", transposed="k")
    rows = [[0, [3, 4]], [12, [5, 6]], [42, [5, 6]]]
    assert layout.fingerprint() == hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == "5cd272a7a3108ba0"


@given(SHAPES, SHAPES, st.integers(1, 3))
def test_fingerprint_ignores_names_stacking_and_storage_order(first, second, layers):
    swapped = first[:-2] + (first[-1], first[-2])
    plain = canonical_layout([{"a": array(*first), "b": array(*second)} for _ in range(layers)])
    other = canonical_layout(
        {"h": {"kernel": array(layers, *swapped), "other": array(layers, *second)}}, stacked="^h", transposed="kernel"
    )
    assert plain.fingerprint() == other.fingerprint()


@pytest.mark.parametrize(
    "other",
    [
        {"a": array(6, 4), "b": array(5)},
        {"a": array(24), "b": array(5)},
        {"a": array(5), "b": array(4, 6)},
        {"a": array(4, 6), "b": array(4)},
        {"a": array(4, 6), "b": array(5), "c": array(1)},
        {"a": array(4, 6)},
    ],
)
def test_fingerprint_sees_another_numbering(other):
    assert canonical_layout(other).fingerprint() != canonical_layout({"a": array(4, 6), "b": array(5)}).fingerprint()


def test_layout_is_hashable():
    assert len({canonical_layout(MODEL), canonical_layout(MODEL), canonical_layout(MODEL, "embed")}) == 2
    assert isinstance(canonical_layout(MODEL), Layout)


def test_an_nnx_module_and_its_state_are_numbered_alike():
    """Variables called w and w2 come in another order where their paths end in /value."""

    class Model(nnx.Module):
        def __init__(self):
            self.w2, self.w = nnx.Param(jnp.full((2, 3), 2.0)), nnx.Param(jnp.full((4,), 1.0))
            self.linear, self.norm = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(0))

    model = Model()
    state = nnx.state(model, nnx.Param)
    targets = "^(w|w2|linear/kernel)$"
    assert canonical_layout(model, targets) == canonical_layout(state, targets)
    paths = [path for path, _ in named_leaves(model)]
    assert {"w", "w2", "linear/kernel", "norm/mean"} <= set(paths) and not any(path.endswith("/value") for path in paths)
    changed = replace_leaves(model, {"w": jnp.zeros(4)})
    assert isinstance(changed, Model) and not changed.w[...].any() and changed.w2[...].all()


class Net(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.dropout, self.steps, self.mean = nnx.Dropout(0.5, rngs=rngs), nnx.Variable(jnp.array(3)), nnx.Variable(jnp.ones(4))


def linen():
    return {"params": {"norm": {"scale": jnp.ones(4)}}, "batch_stats": {"norm": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}}


@pytest.mark.parametrize("make, parameters", [
    (lambda: nnx.state(Net(nnx.Rngs(0))), {"linear/bias", "linear/kernel", "norm/bias", "norm/scale"}),
    (lambda: Net(nnx.Rngs(0)), {"linear/bias", "linear/kernel", "norm/bias", "norm/scale"}),
    (linen, {"params/norm/scale"}), (lambda: flax.core.freeze(linen()), {"params/norm/scale"}),
    (lambda: {"teacher": linen(), "x": jnp.ones(1)}, {"teacher/params/norm/scale", "x"}),
    (lambda: linen()["batch_stats"], {"norm/mean", "norm/var"}),  # of themselves nothing says what they are
    (lambda: {"w": jnp.ones(2), "key": jax.random.key(0), "old": jax.random.PRNGKey(0), "n": jnp.arange(2), "b": jnp.ones(1, bool)}, {"w"}),
])  # fmt: skip
def test_without_targets_parameters_alone_are_adapted(make, parameters):
    """State stays as it is, through all that goes by targets; an adapter's fingerprint of the base still covers it."""
    params = make()
    assert canonical_layout(params) == canonical_layout(params, [f"^{path}$" for path in sorted(parameters)])
    assert {leaf.path for leaf in canonical_layout(params).leaves} == parameters
    for method in (gpart(1, 5), full()):
        trainable = jax.tree.map(lambda x: x + 9, method.init(params, jax.random.key(0)))
        adapter = Adapter.of(method, trainable, params)
        for adapted in (method.apply(params, trainable), adapter.merge(params).params):
            for (path, before), (_, after) in zip(named_leaves(params), named_leaves(adapted)):
                assert (after is before) == (path not in parameters), path
        other = {path: leaf + 1 for path, leaf in floating(params).items() if path not in parameters}
        if other:
            with pytest.raises(ValueError, match="base model's weights"):
                adapter.on(replace_leaves(params, other))


def test_state_that_is_named_is_adapted():
    assert [leaf.path for leaf in canonical_layout(linen(), "mean").leaves] == ["batch_stats/norm/mean"]
