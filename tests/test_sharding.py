"""Meshes of eight virtual devices: the same numbers as one device, and what the compiled step communicates."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from experiments.data import Task
from experiments.step import make_language_loss, make_loss, make_train_step, trained_shardings
from experiments.text import INPUTS
from gpart_jax import (
    canonical_layout,
    chain,
    fastfood,
    full,
    gpart,
    head,
    lora,
    lowerings,
    make_partition,
    sharding,
    uni_lora,
    vera,
)  # fmt: skip
from gpart_jax.lowerings.base import Call, Cut, Where, as_table, shape_of
from gpart_jax.models.decoder import Decoder, DecoderConfig
from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig
from gpart_jax.targets import named_leaves
from launch.hlo import collectives

MESHES = {
    "one": ({}, 1),
    "data 8": ({"data": 8}, 8),
    "fsdp 8": ({"fsdp": 8}, 8),
    "2 x 2 x 2": ({"data": 2, "fsdp": 2, "tensor": 2}, 8),
}
ROWS, LENGTH = 16, 12
ENCODER = EncoderConfig(64, 64, 2, 4, 128, 16, hidden_dropout=0.1, attention_dropout=0.1)
DECODER = DecoderConfig(
    vocab_size=64, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=128,
    max_positions=16, norm_eps=1e-6, rope_theta=1e4, family="qwen2", tied=False,
)  # fmt: skip
D = 300  # enough to stream


def case(family):
    """(loss, method, params, batch, rules) of a small model; dropout on the delta, and in the encoder."""
    random = np.random.default_rng(0)
    ids = random.integers(1, 64, (ROWS, LENGTH)).astype(np.int32)
    mask = (np.arange(LENGTH) < random.integers(2, LENGTH + 1, (ROWS, 1))).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": mask}
    if family == "encoder":
        model = EncoderClassifier(ENCODER, 2)
        method = chain(gpart(D, 1, targets="(query|value)/kernel", dropout=0.1), head("^classifier/"))
        loss = make_loss(model, Task([], [], [], ("0", "1"), ("accuracy",), INPUTS, None))
        batch["label"] = ids[:, 0] % 2
        rules = sharding.ENCODER
    else:
        model = Decoder(DECODER)
        method = gpart(D, 1, targets="(query|key|value|out)/kernel", dropout=0.1, stacked="^layers")
        loss = make_language_loss(model)
        batch["loss_mask"] = mask
        rules = sharding.DECODER
    params = jax.jit(model.init)(jax.random.key(0), ids, mask)["params"]
    return loss, method, params, batch, rules


def on_mesh(name, params, rules):
    sizes, count = MESHES[name]
    mesh = sharding.make_mesh(sizes, jax.devices()[:count])
    return mesh, sharding.param_shardings(params, mesh, rules)


def prepared(family, name):
    """(compiled step, its arguments) on a mesh."""
    loss, method, params, batch, rules = case(family)
    mesh, shardings = on_mesh(name, params, rules)
    optimizer = optax.adam(1e-2, eps=1e-3)  # a smaller one turns the rounding of small gradients into whole steps
    step = make_train_step(loss, method, optimizer, shardings)
    trainable = method.init(params, jax.random.key(1))
    state, key_data = optimizer.init(trainable), jax.random.key_data(jax.random.key(2))
    trainable, state, key_data = sharding.replicate((trainable, state, key_data), mesh)
    part, parts = sharding.data_part(mesh)
    batch = sharding.global_batch({name: rows[part::parts] for name, rows in batch.items()}, mesh)
    arguments = trainable, state, sharding.place(params, shardings), batch, key_data
    return step.lower(*arguments, 0).compile(), arguments


def ten_steps(step, trainable, state, *rest):
    """(losses, trainable) after ten steps, in NumPy."""
    losses = []
    for number in range(10):
        trainable, state, numbers = step(trainable, state, *rest, number)
        losses.append(float(numbers["loss"]))
    return losses, jax.tree.map(np.asarray, trainable)


@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_a_mesh_trains_as_one_device_does_at_the_cost_of_one_all_reduce(family):
    runs = {}
    for name in MESHES:
        step, arguments = prepared(family, name)
        if name != "one":
            trained = D + (64 * 2 + 2 if family == "encoder" else 0)
            check_collectives(name, step, arguments[0], arguments[2], trained)
        runs[name] = ten_steps(step, *arguments)
    losses, trained = runs.pop("one")
    assert losses[-1] < losses[0] and np.abs(trained["theta"]).max() > 0.01
    for name, (others, other) in runs.items():  # with dropout on the delta and in the model
        np.testing.assert_allclose(others, losses, rtol=2e-6, err_msg=name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, err_msg=name), other, trained)


def test_full_fine_tuning_keeps_its_masters_and_moments_where_the_weights_lie():
    model = Decoder(DECODER, jnp.bfloat16, jnp.bfloat16)
    ids = np.random.default_rng(0).integers(1, 64, (ROWS, LENGTH)).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids, ids)["params"]
    loss, method, optimizer, runs = make_language_loss(model), full(), optax.adam(1e-3, eps=1e-3), {}
    for name, (sizes, count) in {"one": MESHES["one"], "2 x 2 x 2": MESHES["2 x 2 x 2"]}.items():
        mesh = sharding.make_mesh(sizes, jax.devices()[:count])
        shardings = sharding.param_shardings(params, mesh, sharding.DECODER)
        step = make_train_step(loss, method, optimizer, shardings, accumulate=2)
        trainable = method.init(params, jax.random.key(1))
        places = trained_shardings(trainable, state := optimizer.init(trainable), shardings)
        trainable, state = jax.tree.map(sharding.place, (trainable, state), places)
        batch = sharding.global_batch({"input_ids": ids, "attention_mask": np.ones_like(ids), "loss_mask": np.ones_like(ids)}, mesh)
        key_data = sharding.replicate(jax.random.key_data(jax.random.key(2)), mesh)
        for number in range(3):
            trainable, state, numbers = step(trainable, state, sharding.place(params, shardings), batch, key_data, number)
        runs[name] = jax.tree.map(np.asarray, trainable), float(numbers["loss"])
        kernel = "layers/mlp/gate/kernel"
        for leaf in (trainable["params"][kernel], state[0].mu["params"][kernel], state[0].nu["params"][kernel]):
            assert leaf.dtype == jnp.float32 and leaf.shape == (3, 64, 128)
            assert leaf.addressable_shards[0].data.shape == ((3, 32, 64) if count == 8 else leaf.shape)
    (one, loss_one), (other, loss_other) = runs.values()
    np.testing.assert_allclose(loss_one, loss_other, rtol=2e-3)
    before = dict(named_leaves(params))
    for path, leaf in one["params"].items():
        moved = leaf - np.asarray(before[path], np.float32)
        assert np.abs(moved).max() > 1e-5, path  # below half of bfloat16's last place, for most
        assert np.linalg.norm(other["params"][path] - leaf) < 0.02 * np.linalg.norm(moved), path


def check_collectives(name, step, trainable, frozen, trained):
    """Of the compiled step: one all-reduce of the trained numbers over all devices, and nothing of order N reduced."""
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == trained
    rest = []
    for one in collectives(step.as_text()):
        for _, shape in one.shapes:
            if shape == (trained,):
                assert (one.kind, one.group, one.times) == ("all-reduce", 8, 1)
                trained = None  # once
            elif shape != ():
                rest.append((one, shape))
    assert trained is None
    if name == "data 8":
        assert not rest
    elif name == "fsdp 8":  # weights are gathered, never reduced
        assert rest and {one.kind for one, _ in rest} == {"all-gather"}
        assert sum(one.elements * one.times for one, _ in rest) < 3 * sum(x.size for x in jax.tree.leaves(frozen))
    else:  # between the two devices of "tensor", activations; between those of "fsdp", weights
        activations = [shape for one, shape in rest if one.kind != "all-gather"]
        assert activations and all(shape[0] == ROWS // 4 for shape in activations), activations
        assert {one.group for one, _ in rest} == {2}


METHODS = {
    "gpart": gpart(D, 1, targets="(query|value)/kernel", dropout=0.1, stacked="^layers"),
    "gpart, a few elements": gpart(40, 1, targets="(query|value)/(kernel|bias)", stacked="^layers"),
    "splitmix64": gpart(D, 1, targets="(query|value)/kernel", scheme="splitmix64", stacked="^layers"),
    "signed_magnitude": gpart(D, targets="(query|value)/kernel", scheme="signed_magnitude", stacked="^layers"),
    "uni_lora": uni_lora(90, 2, targets="(query|value)/kernel", stacked="^layers"),
    "vera": vera(4, targets="(query|value)/kernel"),
    "fastfood": fastfood(D, targets="(query|value)/kernel", stacked="^layers"),
    "lora and a head": chain(lora(4, targets="(query|value)/kernel"), head("^lm_head/")),
    "full": full(),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_gradient_is_that_of_the_whole_model(name):
    """Layer by layer, divided over all axes, in two parts: against `apply` to the whole, on one device."""
    loss, _, params, batch, rules = case("decoder")
    method, key = METHODS[name], jax.random.key(3)
    trainable = method.init(params, jax.random.key(1))
    leaves, tree = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    trainable = tree.unflatten([x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])
    batch["weights"] = np.asarray(batch.pop("loss_mask"), np.float32)

    tables = method.tables(params)

    def whole(trainable):
        params_ = method.apply(params, trainable, jax.random.split(key)[0], tables)
        return loss(lambda part, layer=None: part, params_, batch)

    expected = jax.jit(jax.value_and_grad(whole))(trainable)
    mesh, shardings = on_mesh("2 x 2 x 2", params, rules)
    accumulate = 1 if "dropout" in name or name == "gpart" else 2  # each part draws its own dropout
    compute = jax.jit(sharding.value_and_grad(loss, method, shardings, accumulate))
    found = compute(
        sharding.replicate(trainable, mesh), sharding.place(params, shardings), sharding.global_batch(batch, mesh),
        jax.random.wrap_key_data(sharding.replicate(jax.random.key_data(key), mesh)), sharding.replicate(tables, mesh),
    )  # fmt: skip
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * max(1, np.abs(b).max()))


def test_blocks_of_a_stacked_leaf_are_divided_too():
    params = {"layers": {"w": np.random.default_rng(0).standard_normal((3, 8, 16), np.float32)}}
    method = gpart(30, 1, scope="block", stacked="^layers")
    trainable = {"theta": jnp.linspace(-1, 1, 30)}
    batch = {"x": np.random.default_rng(1).standard_normal((8, 8), np.float32)}

    def loss(adapt, frozen, batch, key):
        return jnp.square(jnp.einsum("bi,lio->bo", batch["x"], adapt(frozen)["layers"]["w"])).mean()

    expected = jax.grad(lambda t: loss(method.bind(params, t), params, batch, None))(trainable)
    mesh, shardings = on_mesh("2 x 2 x 2", params, [("w", P(None, "fsdp", "tensor"))])
    compute = jax.jit(sharding.value_and_grad(loss, method, shardings))
    _, found = compute(
        sharding.replicate(trainable, mesh), sharding.place(params, shardings), sharding.global_batch(batch, mesh)
    )
    np.testing.assert_allclose(found["theta"], expected["theta"], rtol=1e-4, atol=1e-5)


def test_a_mesh_dithers_as_one_device_does():
    params = {"layers": {"w": np.random.default_rng(0).standard_normal((3, 8, 16), np.float32).astype(jnp.bfloat16)}}
    method = gpart(30, 1, stacked="^layers", apply="dither", dropout=0.1)
    trainable, key = {"theta": jnp.linspace(-0.1, 0.1, 30)}, jax.random.key(2)
    batch = {"x": np.random.default_rng(1).standard_normal((8, 3, 8, 16), np.float32)}

    def loss(adapt, frozen, batch, key):
        return (batch["x"] * adapt(frozen)["layers"]["w"].astype(jnp.float32)).sum((1, 2, 3)).mean()

    mesh, shardings = on_mesh("2 x 2 x 2", params, [("w", P(None, "fsdp", "tensor"))])
    found, _ = jax.jit(sharding.value_and_grad(loss, method, shardings))(
        sharding.replicate(trainable, mesh), sharding.place(params, shardings), sharding.global_batch(batch, mesh),
        jax.random.wrap_key_data(sharding.replicate(jax.random.key_data(key), mesh)),
    )  # fmt: skip
    expected, other = (loss(method.bind(params, trainable, jax.random.split(key)[n]), params, batch, None) for n in (0, 1))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert abs(other / expected - 1) > 1e-3  # by another key


@settings(max_examples=12)
@given(
    st.integers(1, 4), st.integers(1, 4), st.sampled_from([4, 6, 12]), st.sampled_from([8, 40, 300]),
    st.sampled_from(["balanced-v1", "splitmix64"]), st.booleans(), st.sampled_from([2**20, 50]), st.integers(0, 10),
)  # fmt: skip
def test_a_part_of_a_layer_is_that_part_of_the_whole(layers, rows, columns, d, scheme, transposed, piece, draw):
    params = {"layers": {"a": {"kernel": np.zeros((layers, 24 * rows, columns), np.float32)},
                         "b": {"kernel": np.zeros((layers, columns, 12), np.float32)}}}  # fmt: skip
    layout = canonical_layout(params, stacked="^layers", transposed="kernel$" if transposed else None)
    partition = make_partition(layout, min(d, layout.size), 7, scheme=scheme)
    (region,), (key,) = partition.regions, partition.keys
    random = np.random.default_rng(draw)
    rows_of = 8 if scheme == "balanced-v1" else 1
    table = as_table(jnp.asarray(random.standard_normal((rows_of, region.d)), jnp.float32), scheme)
    layer, axis, index = int(random.integers(layers)), int(random.integers(2)), int(random.integers(2))
    leaves = [view.leaf for view in region.views]
    cotangents, placed = [], []  # the same, among zeros; small integers, so that sums are exact
    for leaf in leaves:
        placed.append(np.zeros(leaf.shape, np.float32))
        chosen = np.split(placed[-1][layer], 2, axis)[index]
        chosen[...] = random.integers(-8, 8, chosen.shape)
        cotangents.append(chosen.copy())

    def expand(cut, layer=None, start=None):
        call = Call(scheme, region.d, (cut,), layer is not None)
        where = Where((key,), layer, None if start is None else jnp.reshape(start, (1, 1)))
        zeros = jnp.zeros(shape_of(call, 0))
        return lowerings.adapt(call, table, [zeros], where, False)[0]

    def contract(cut, cotangent, layer=None, start=None):
        call = Call(scheme, region.d, (cut,), layer is not None)
        where = Where((key,), layer, None if start is None else jnp.reshape(start, (1, 1)))
        return lowerings.contract(call, [cotangent], where, jnp.float32, False)

    @jax.jit
    def everything(layer, index, cotangents, placed):
        results = []
        for leaf, cotangent, among_zeros in zip(leaves, cotangents, placed):
            length = leaf.shape[axis + 1] // 2
            whole, part, start = Cut(leaf), Cut(leaf, ((axis + 1, length),)), index * length
            results.append((
                expand(whole), expand(whole, layer), expand(part, layer, start),
                contract(whole, among_zeros), contract(part, cotangent, layer, start),
            ))  # fmt: skip
        return results

    with mock.patch.object(lowerings.elements, "_PIECE", piece):
        results = everything(layer, index, cotangents, placed)
    for whole, one, part, sums, part_sums in results:
        np.testing.assert_array_equal(one, whole[layer])
        np.testing.assert_array_equal(part, np.split(np.asarray(one), 2, axis)[index])
        np.testing.assert_array_equal(part_sums, sums)


def test_layers_one_by_one_are_the_whole_dropout_included():
    _, method, params, *_ = case("decoder")
    trainable, key = {"theta": jnp.linspace(-1, 1, D)}, jax.random.key(5)
    whole = method.apply(params, trainable, key)["layers"]
    adapt = method.bind(params, trainable, key)
    for number in range(3):
        one = jax.tree.map(lambda x: x[number], params["layers"])
        one = jax.jit(lambda x, n: adapt({"layers": x}, layer=n))(one, number)["layers"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[number], rtol=1e-6, atol=1e-8), one, whole)


@pytest.mark.parametrize("change", [{"stacked": None}, {"scope": "block"}])
def test_what_cannot_be_adapted_layer_by_layer_says_so(change):
    _, _, params, *_ = case("decoder")
    method = gpart(**dict(d=60, targets="query/kernel", stacked="^layers") | change)
    adapt = method.bind(params, {"theta": jnp.ones(60)})
    with pytest.raises(ValueError, match="'layers/attention/query/kernel' can't be adapted layer by layer"):
        adapt({"layers": jax.tree.map(lambda x: x[0], params["layers"])}, layer=0)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": 3}, "A mesh of data 3, fsdp 1, tensor 1 doesn't divide 8 devices"),
        ({"data": 4}, "data 4, fsdp 1, tensor 1 doesn't divide 8 devices: the sizes' product must be their number"),
        ({"data": -1, "tensor": 3}, "data -1, fsdp 1, tensor 3 doesn't divide 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one of them -1"),
        ({"data": 0}, "must be positive"),
        ({"model": 8}, "Unknown mesh axis 'model'. The axes are data, fsdp, tensor"),
    ],
)
def test_a_mesh_that_does_not_divide_the_devices_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sizes)


def test_the_rest_of_the_devices():
    assert dict(sharding.make_mesh({"data": 2, "fsdp": -1}).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}


def test_a_batch_that_does_not_divide_the_mesh_is_refused():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sharding.check_batch("batch_size", 8, mesh, 2)
    with pytest.raises(ValueError, match="batch_size = 12 doesn't divide over the mesh: it must be a multiple of 8"):
        sharding.check_batch("batch_size", 12, mesh, 2)
    loss, method, params, batch, rules = case("encoder")
    mesh, shardings = on_mesh("data 8", params, rules)
    short = {name: rows[:12] for name, rows in batch.items()}
    with pytest.raises(ValueError, match="The batch = 12 doesn't divide over the mesh"):
        sharding.value_and_grad(loss, method, shardings)(method.init(params, jax.random.key(0)), params, short)


def test_rules_place_what_they_match():
    _, _, params, _, rules = case("decoder")
    mesh, shardings = on_mesh("2 x 2 x 2", params, rules)
    assert shardings["layers"]["attention"]["query"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert shardings["layers"]["mlp"]["down"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert shardings["norm"]["scale"].spec == P()
    odd = sharding.param_shardings({"embed": np.zeros((7, 6))}, mesh, [("embed", P("tensor", "fsdp"))])
    assert odd["embed"].spec == P(None, "fsdp")  # 7 rows don't divide over two
    tied = {name: part for name, part in params.items() if name != "lm_head"}
    with pytest.raises(ValueError, match=r"Sharding rule '\^lm_head/' matches no parameter. Paths look like: 'embed/"):
        sharding.param_shardings(tied, mesh, sharding.DECODER)
    with pytest.raises(ValueError, match=r"has more axes than 'norm/scale', of shape \(64,\)"):
        sharding.param_shardings(params, mesh, [("norm/scale", P("fsdp", "tensor"))])


@dataclasses.dataclass(frozen=True)
class Device:
    process_index: int


@pytest.mark.parametrize(
    "processes, tensor, parts",  # of each process, its part of a batch
    [([0] * 4 + [1] * 4, 1, {0: (0, 2), 1: (1, 2)}), ([0] * 4 + [1] * 4, 8, {0: (0, 1), 1: (0, 1)}),
     ([0, 0, 1, 1, 2, 2, 3, 3], 4, {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)})],
)  # fmt: skip
def test_processes_that_share_rows_feed_the_same_part(monkeypatch, processes, tensor, parts):
    class Mesh:
        devices = np.array([Device(index) for index in processes], object).reshape(-1, 1, tensor)
        shape = {"tensor": tensor}

    for process, part in parts.items():
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.data_part(Mesh) == part
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    Mesh.devices = np.array([Device(index) for index in (0, 1, 0, 1)], object).reshape(4, 1, 1)
    Mesh.shape = {"tensor": 1}
    with pytest.raises(ValueError, match="no contiguous rows"):
        sharding.data_part(Mesh)


def test_memory_does_not_grow_by_a_second_copy_of_the_model():
    """Eight more layers cost their activations; adapted copies of their weights would be 8 MiB more."""
    sizes = {}
    for layers in (2, 10):
        config = dataclasses.replace(
            DECODER, hidden_size=256, num_layers=layers, num_heads=4, num_kv_heads=4, head_dim=64
        )
        model = Decoder(config)
        tokens = jax.ShapeDtypeStruct((8, 4), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)["params"]
        method = gpart(D, 1, targets="(query|key|value|out)/kernel", stacked="^layers")
        shardings = sharding.param_shardings(params, sharding.make_mesh({"data": 8}), sharding.DECODER)
        compute = sharding.value_and_grad(make_language_loss(model), method, shardings)
        batch = dict.fromkeys(("input_ids", "attention_mask"), tokens) | {"weights": tokens}
        trainable = jax.eval_shape(method.init, params, jax.random.key(0))
        sizes[layers] = jax.jit(compute).lower(trainable, params, batch).compile().memory_analysis().temp_size_in_bytes
    assert sizes[10] - sizes[2] < 2**20, sizes
