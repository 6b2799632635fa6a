"""Programs compiled for TPUs that aren't here, by the package libtpu: that kernels are in them, and what isn't."""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from configs import math
from experiments.abstract import describe
from gpart_jax import canonical_layout, gpart, gpart_transform, lowerings, make_partition, sharding
from gpart_jax.lowerings.base import Call, Cut, Where, table_shape
from gpart_jax.models import cross_entropy, published
from gpart_jax.models.attention import Pattern, attend
from gpart_jax.transform import bind
from launch.hlo import collectives

pytest.importorskip("libtpu")
KEY = jax.random.key_data(jax.random.key(0))


@pytest.fixture(scope="module")
def chips():
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # it can't load what was compiled for no device
    compilation_cache.reset_cache()
    yield topologies.get_topology_desc("v5e:2x4", "tpu").devices
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def on(sharding, tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def kernels(text):
    return text.count('custom_call_target="tpu_custom_call"')


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def gradient(**options):
    """(partition, theta, params, cotangent, key) -> W + P theta, P^T of the cotangent."""

    def both(partition, theta, params, cotangent, key):
        key = jax.random.wrap_key_data(key) if options else None
        adapted, pull = jax.vjp(lambda theta: bind(partition, theta, key=key, **options)(params), theta)
        return adapted, pull(cotangent)[0]

    return both


KINDS = {  # shapes of leaves, dtype, d, options
    "float32": ([(768, 768)] * 3, jnp.float32, 23_040, {"dropout": 0.1}),
    "bfloat16": ([(768, 768)] * 2, jnp.bfloat16, 512, {}),
    "dither": ([(768, 768), (50, 100)], jnp.bfloat16, 512, {"apply": "dither"}),
    "no multiples of 8 and 128": ([(100, 700), (1001, 130), (5000,), (3, 50, 96)], jnp.float32, 1001, {}),
    "the same in bfloat16": ([(100, 700), (1001, 130), (5000,), (3, 50, 96)], jnp.bfloat16, 100, {"dropout": 0.1}),
    "tables that are held once": ([(1024, 1024)], jnp.bfloat16, 2**16 + 1, {"dropout": 0.1}),
    "the shortest theta": ([(512, 1024)], jnp.float32, 64, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_leaves(chips, kind):
    shapes, dtype, d, options = KINDS[kind]
    params = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    partition = make_partition(canonical_layout(params), d, 3)
    one = jax.sharding.SingleDeviceSharding(chips[0])
    arguments = on(one, (partition, jax.ShapeDtypeStruct((d,), jnp.float32), params, params, KEY))
    text = compiled(gradient(**options), *arguments)
    assert kernels(text) == 2
    size = sum(np.prod(shape) for shape in shapes)
    integers = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\b[su]\d+\[([\d,]+)\]", text)]
    assert max(integers) <= max(8 * d, size / 4)  # the permutations; no index of each element


def test_the_longest_theta(chips):
    """Tables of 34 MB; made outside, for that takes the compiler long."""
    layout = canonical_layout([jax.ShapeDtypeStruct((2**11, 2**13), jnp.float32)])
    call, one = Call("balanced-v1", 2**20, (Cut(layout.leaves[0]),)), jax.sharding.SingleDeviceSharding(chips[0])
    table, where = jax.ShapeDtypeStruct(table_shape(call), jnp.float32), Where((KEY,))
    weights = [jax.ShapeDtypeStruct((2**11, 2**13), jnp.float32)]
    both = lambda table, where, w: (lowerings.adapt(call, table, w, where, True), lowerings.contract(call, w, where, jnp.float32, True))  # noqa: E731
    assert kernels(compiled(both, *on(one, (table, where, weights)))) == 2


@pytest.mark.parametrize("off", ["argument", "environment", "d", "scheme"])
def test_without_kernels(chips, off, monkeypatch):
    d, options = 63 if off == "d" else 300, {"scheme": "splitmix64"} if off == "scheme" else {}
    if off == "environment":
        monkeypatch.setenv("GPART_KERNELS", "0")
    one = jax.sharding.SingleDeviceSharding(chips[0])
    arguments = on(one, (jax.ShapeDtypeStruct((d,), jnp.float32), jax.ShapeDtypeStruct((64, 256), jnp.float32)))
    transform = lambda theta, w: gpart_transform(w, theta, 3, kernels=False if off == "argument" else None, **options)  # noqa: E731
    assert kernels(compiled(transform, *arguments)) == 0


def test_vmap_over_theta(chips):
    one = jax.sharding.SingleDeviceSharding(chips[0])
    arguments = on(one, (jax.ShapeDtypeStruct((3, 300), jnp.float32), jax.ShapeDtypeStruct((64, 256), jnp.float32)))
    loss = lambda theta, w: jnp.sum(gpart_transform(w, theta, 3) ** 2)  # noqa: E731
    assert kernels(compiled(jax.vmap(jax.grad(loss), (0, None)), *arguments)) == 2


LAYERS, WIDTH, D = 4, 512, 3000
RULES = [("query$", P(None, "fsdp", "tensor")), ("out$", P(None, "tensor", "fsdp"))]


def stacked():
    return {"layers": {name: jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16) for name in ("query", "out")}}


def model(adapt, params, x):
    """A scan over layers, each made again on the way back."""

    def layer(x, numbered):
        own = adapt({"layers": numbered[1]}, layer=numbered[0])["layers"]
        return jnp.tanh(jnp.tanh(x @ own["query"]) @ own["out"]), None

    return jax.lax.scan(jax.checkpoint(layer), x, (jnp.arange(LAYERS), params["layers"]))[0]


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_layers_on_a_mesh(chips, sizes):
    """`value_and_grad`: with dropout, of a layer at a time, under "tensor" of a device's part; one all-reduce of d numbers."""
    mesh = sharding.make_mesh(sizes, chips)
    shardings = sharding.param_shardings(stacked(), mesh, RULES)
    method = gpart(D, 3, dropout=0.1, stacked="^layers")
    loss = lambda adapt, frozen, batch, key: jnp.mean(model(adapt, frozen, batch["x"]).astype(jnp.float32) ** 2)  # noqa: E731
    frozen = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), stacked(), shardings)
    everywhere = NamedSharding(mesh, P())
    trainable = on(everywhere, {"theta": jax.ShapeDtypeStruct((D,), jnp.float32)})
    batch = on(NamedSharding(mesh, sharding.BATCH), {"x": jax.ShapeDtypeStruct((64, WIDTH), jnp.bfloat16)})
    tables = on(everywhere, method.tables(stacked()))

    def step(trainable, frozen, batch, key, tables):
        key = jax.random.wrap_key_data(key)
        return sharding.value_and_grad(loss, method, shardings)(trainable, frozen, batch, key, tables)

    text = compiled(step, trainable, frozen, batch, on(everywhere, KEY), tables)
    assert kernels(text) == 3  # forward, again, back
    moved = [one.elements for one in collectives(text) if one.kind == "all-reduce"]
    assert sum(D <= n <= D + 1 for n in moved) == 1 and max(moved) < WIDTH**2 / 8  # with the loss; activations; no weights


def data_parallel(chips, kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,), devices=chips)
    theta = jax.ShapeDtypeStruct((300,), jnp.float32, sharding=NamedSharding(mesh, P()))
    w = jax.ShapeDtypeStruct((1024, 256), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    gradient = jax.grad(lambda theta, w: jnp.sum(jnp.sin(gpart_transform(w, theta, 3))))
    return mesh, gradient, theta, w


def test_in_shard_map(chips):
    mesh, gradient, theta, w = data_parallel(chips, AxisType.Auto)
    local = lambda theta, w: jax.lax.psum(gradient(jax.lax.pcast(theta, ("x",), to="varying"), w), "x")  # noqa: E731
    x = on(NamedSharding(mesh, P()), jax.ShapeDtypeStruct((1024, 256), jnp.float32))
    assert kernels(compiled(jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P()), theta, x)) >= 1


def test_over_explicit_axes(chips):
    mesh, gradient, theta, w = data_parallel(chips, AxisType.Explicit)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = compiled(gradient, theta, w)
    assert kernels(text) == 2 and "all-reduce" in text


def test_xla_divides_no_kernel_and_it_is_said(chips):
    _, gradient, theta, w = data_parallel(chips, AxisType.Auto)
    with pytest.warns(UserWarning, match="without TPU kernels.*value_and_grad, or jax.shard_map"):
        assert kernels(compiled(gradient, theta, w)) == 0


PATTERNS = {  # pattern, dtype, (length, heads, key heads, size of a head)
    "causal": (Pattern(True), jnp.bfloat16, (2048, 8, 2, 128)),
    "window, cap, odd length": (Pattern(True, 300, 30.0), jnp.bfloat16, (1000, 4, 4, 256)),
    "bidirectional": (Pattern(False, packed=False), jnp.float32, (197, 12, 12, 64)),
    "heads that tensor doesn't divide": (Pattern(True), jnp.bfloat16, (256, 14, 2, 64)),
    "small heads": (Pattern(False), jnp.float32, (384, 12, 12, 32)),
}


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "tensor": 4}], ids=str)
@pytest.mark.parametrize("kind", PATTERNS)
def test_attention(chips, kind, sizes):
    """Its kernels compile, there and back, where "tensor" divides heads and where it can't; no score is written to memory."""
    pattern, dtype, (length, heads, key_heads, size) = PATTERNS[kind]
    mesh = sharding.make_mesh(sizes, chips)
    by_row = NamedSharding(mesh, sharding.BATCH)
    query, key = (jax.ShapeDtypeStruct((8, length, n, size), dtype) for n in (heads, key_heads))
    arguments = on(by_row, (query, key, key, jax.ShapeDtypeStruct((8, length), jnp.int32), query))

    def local(query, key, value, segments, cotangent):
        kept = jax.checkpoint(lambda *arrays: attend(*arrays, segments, pattern, "splash"))
        out, pull_back = jax.vjp(kept, query, key, value)
        return out, *pull_back(cotangent)

    rows = jax.shard_map(
        local, mesh=mesh, in_specs=sharding.BATCH, out_specs=sharding.BATCH, axis_names={"data", "fsdp"}, check_vma=False
    )
    text = compiled(rows, *arguments)
    assert kernels(text) >= 3  # forward, and two back
    assert not re.search(rf"\[[\d,]*\b{length},{length}\]", text)


def test_a_decoders_step(chips):
    """Attention's kernels, P theta's and the loss in blocks, in one program on a mesh."""
    mesh = sharding.make_mesh({"data": 2, "tensor": 4}, chips)
    config = math.get_config("llama31_8b")
    config.train.batch_size, config.task.max_length = 4, 512
    small = dict(num_hidden_layers=2, hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=4)
    with (
        mock.patch.dict(published.CONFIGS[config.model.source], vocab_size=8192, head_dim=64, **small),
        mock.patch.object(cross_entropy, "NUMBERS", 2 * 64 * 8192),
    ):
        step = describe(config, mesh)
        text = step.function.lower(*step.arguments).compile().as_text()
    names = re.findall(r"%(splash_mha_[a-z]+|gpart)[\w.]* = \S+ custom-call|%(splash_mha_[a-z]+|gpart)[\w.]* = \(.*?\) custom-call", text)
    assert {one or other for one, other in names} == {"splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv", "gpart"}
    assert "f32[2,64,2048]" in text and "f32[2,512,2048]" not in text  # logits of a block, and of all of a device's rows
