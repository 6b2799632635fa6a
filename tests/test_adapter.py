import hashlib
import json
import re
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gpart_jax import canonical_layout, load_adapter, save_adapter, sharding
from gpart_jax.adapter import Adapter, average, distance, file, interpolate, load
from gpart_jax.adapter.fingerprint import base_fingerprint
from gpart_jax.methods import bitfit, chain, from_spec, gpart, head

HEAD = "^classifier/"
SPECS = [
    {"name": "gpart", "d": 9, "seed": 2**64 - 1, "targets": ["query/kernel$", "value/kernel$"]},
    {"name": "gpart", "d": 8, "seed": 1, "targets": "kernel", "scheme": "splitmix64", "scope": "global"},
    {"name": "lora", "rank": 2, "alpha": 4, "targets": "query/kernel"},
    {"name": "head"},
    {"name": "full"},
]


@pytest.fixture(scope="module")
def params():
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def dense(*shape):
        return {"kernel": jax.random.normal(next(keys), shape), "bias": jnp.zeros(shape[-1])}

    return {"layer_0": {"query": dense(6, 5), "value": dense(6, 5)}, "classifier": dense(5, 3)}


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    """A path to write to, and the bytes of a whole file."""
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    save_adapter(path, *trained(SPECS[0], params), params)
    return path, path.read_bytes()


def adapter_of(spec, params, **more):
    return Adapter.of(*trained(spec, params), params, **more)


def trained(spec, params):
    method = from_spec(spec, HEAD)
    noise = iter(jax.random.split(jax.random.key(1), 99))
    trainable = method.init(params, jax.random.key(0))
    return method, jax.tree.map(lambda x: x + jax.random.normal(next(noise), x.shape), trainable)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["name"])
def test_saved_and_loaded_it_gives_the_same_model(params, tmp_path, spec):
    method, trainable = trained(spec, params)
    save_adapter(tmp_path / "adapter.safetensors", method, trainable, params)
    # Another head to begin with: the adapter brings its own.
    elsewhere = params | {"classifier": jax.tree.map(lambda x: x + 1, params["classifier"])}
    loaded, numbers = load_adapter(tmp_path / "adapter.safetensors").on(elsewhere)
    jax.tree.map(np.testing.assert_array_equal, numbers, trainable)
    expected = method.apply(params, trainable)
    jax.tree.map(np.testing.assert_array_equal, loaded.apply(elsewhere, numbers), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_it_takes_4_d_bytes_and_a_little(params, tmp_path):
    spec = SPECS[0] | {"d": 60}
    save_adapter(tmp_path / "a", *trained(spec, params), params)
    size = (tmp_path / "a").stat().st_size
    assert 4 * 60 + 4 * 18 < size < 4 * 60 + 4 * 18 + 4096


def test_it_says_how_it_was_made_defaults_included(params, tmp_path):
    save_adapter(tmp_path / "a", *trained(SPECS[0], params), params)
    content = (tmp_path / "a").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    metadata = json.loads(header["__metadata__"]["gpart_jax"])
    assert metadata["method"] == SPECS[0] | {
        "scheme": "balanced-v1", "scope": "global", "isometric": True, "dropout": 0.0, "init_bound": 0.0,
        "stacked": None, "apply": "sum"
    }  # fmt: skip
    assert metadata["n"] == 60 and metadata["head_targets"] == HEAD


def test_the_base_may_be_loaded_in_half_precision(params, tmp_path):
    save_adapter(tmp_path / "a", *trained(SPECS[0], params), params)
    load_adapter(tmp_path / "a").on(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def other_base(params):
    return jax.tree.map(lambda x: x * 1.01, params)


def swapped(params):
    layer = params["layer_0"]
    return params | {"layer_0": {"query": layer["value"], "value": layer["query"]}}


def wider(params):
    return params | {"layer_0": jax.tree.map(lambda x: jnp.concatenate([x, x], -1), params["layer_0"])}


@pytest.mark.parametrize(
    "change, message",
    [
        (other_base, "the base model's weights is .* there and .* here"),
        (swapped, "the base model's weights is"),
        (wider, "number of adapted weights N is 60 there and 120 here"),
        (lambda p: {"classifier": p["classifier"]}, "matches no leaf"),
    ],
)
def test_on_another_model_it_says_what_differs(params, tmp_path, change, message):
    save_adapter(tmp_path / "a", *trained(SPECS[0], params), params)
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path / "a").on(change(params))


def test_damage_is_named(params, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        load_adapter(path).on(params)
    save_adapter(path, *trained(SPECS[0], params), params)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="a.safetensors is damaged"):
        load_adapter(path).on(params)
    save_file({"theta": np.zeros(9, np.float32)}, path)
    with pytest.raises(ValueError, match="not one that gpart_jax.adapter wrote"):
        load_adapter(path).on(params)
    path.write_bytes(whole.replace(b'\\"format\\": 2', b'\\"format\\": 9'))
    with pytest.raises(ValueError, match="adapter format 9; this version of gpart_jax reads 2"):
        load_adapter(path).on(params)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda fields, tensors: fields.pop("layout"), "field 'layout' is missing"),
        (lambda fields, tensors: fields.update(n="60"), "field 'n' is str"),
        (lambda fields, tensors: tensors.pop("theta"), "d is 9, but the shape of theta is None"),
        (lambda fields, tensors: fields["method"].update(d=10), r"d is 10, but the shape of theta is \(9,\)"),
        (lambda fields, tensors: fields["method"].update(d=10**15), "d is 1000000000000000, but"),
        (lambda fields, tensors: fields["method"].update(scheme="balanced-v2"), "Unknown scheme 'balanced-v2'"),
        (lambda fields, tensors: fields["method"].update(name="gpart2"), "Unknown method 'gpart2'"),
        (lambda fields, tensors: fields["method"].pop("d"), "can't be made|missing"),
        (lambda fields, tensors: fields.update(base="0" * 16), "the base model's weights is 0000000000000000 there"),
        (lambda fields, tensors: fields["method"].update(targets="query/("), "can't be made"),
        (
            lambda fields, tensors: fields["method"].update(targets={"layout": [["a", [2], 0, [-1], False]]}),
            "its layout",
        ),
        (
            lambda fields, tensors: fields["method"].update(targets={"layout": [["a", [2], 0, [9], False]]}),
            "its layout",
        ),
        (lambda fields, tensors: tensors.update(theta=np.zeros(9, np.int32)), "'theta' is I32"),
        (lambda fields, tensors: tensors.update({"head/../../etc/passwd": tensors["theta"]}), "its tensors should be"),
    ],
)
def test_what_is_missing_or_wrong_is_named(params, tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    save_adapter(path, *trained(SPECS[0], params), params)
    fields, tensors = file.read(path)
    change(fields, tensors)
    file.write(path, fields, tensors)
    with pytest.raises(ValueError, match=message):
        load_adapter(path).on(params)


@given(st.data())
def test_any_changed_byte_is_noticed(saved, data):
    path, whole = saved
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    with pytest.raises(ValueError):
        load(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "../../x", "kernel", "(", "__import__('os')", "splitmix64", "block", "uni_lora", "full"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["layout", "name", "d"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=150)
@given(st.data())
def test_a_hostile_file_is_refused_or_harmless(saved, params, data):
    path, whole = saved
    path.write_bytes(whole)
    fields, tensors = file.read(path)
    level = fields if data.draw(st.booleans()) else fields["method"]
    level[data.draw(st.sampled_from(sorted(level)))] = data.draw(JSON)
    tensor = st.sampled_from([np.zeros(0, np.float32), np.zeros((1, 9), np.float16), np.zeros(9, bool)])
    if data.draw(st.booleans()):
        tensors[data.draw(st.sampled_from(["theta", "../theta", "head//", "rank"]))] = data.draw(tensor)
    file.write(path, fields, tensors)
    try:
        load(path).on(params)
    except ValueError:
        pass


@settings(max_examples=100)
@given(st.integers(0, 2**64 - 1) | st.integers(0, 2**11), st.binary(max_size=200), st.booleans())
def test_a_header_that_lies_is_refused(saved, length, content, keep):
    path, whole = saved
    path.write_bytes(struct.pack("<Q", length) + (whole[8:] if keep else content))
    if path.read_bytes() != whole:
        with pytest.raises(ValueError):
            load(path)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}, None),
        ({"dtype": "F32", "shape": [9], "data_offsets": [-36, 0]}, "damaged"),
        ({"dtype": "F32", "shape": [-9], "data_offsets": [0, 36]}, "damaged"),
        ({"dtype": "F32", "shape": [2**62, 9], "data_offsets": [0, 36]}, "damaged"),
        ({"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}, "damaged"),
        ({"dtype": "F32", "shape": [9], "data_offsets": [2**64, 36]}, "damaged"),
        ({"dtype": "object", "shape": [9], "data_offsets": [0, 36]}, "damaged"),
        ({"dtype": "U8", "shape": [36], "data_offsets": [0, 36]}, "'theta' is U8"),
        ({"dtype": "F16", "shape": [18], "data_offsets": [0, 36]}, "the shape of theta is"),
        (None, "damaged"),
    ],
)
def test_a_forged_header_with_the_right_digest_is_refused(saved, params, entry, message):
    path, whole = saved
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    head = adapter_of(SPECS[0], params).head  # beside theta, as it was
    data, start = np.zeros(9, np.float32).tobytes(), 36
    forged = {"__metadata__": header["__metadata__"], "theta": entry}
    for name, array in head.items():
        forged[f"head/{name}"] = header[f"head/{name}"] | {"data_offsets": [start, start + array.nbytes]}
        data, start = data + array.tobytes(), start + array.nbytes
    text = re.sub(r'"sha256": "[0-9a-f]+"', f'"sha256": "{"0" * 64}"', forged["__metadata__"]["gpart_jax"])
    forged["__metadata__"] = {"gpart_jax": text}
    content = json.dumps(forged).encode()
    content = struct.pack("<Q", len(content)) + content + data
    path.write_bytes(content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1))
    if message is None:  # the forger's own work is sound
        load(path).on(params)
    else:
        with pytest.raises(ValueError, match=message):
            load(path).on(params)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 900_000, b"{" * 2**20, b"[]," * 300_000, b" " * (2**20 + 1), b'{"__metadata__": []}', b"9" * 5000, b"\xff\xfe",
        b'{"__metadata__": {"gpart_jax": "' + b"[" * 900_000 + b'"}}', b'{"__metadata__": {"gpart_jax": 5}}',
        b'{"theta": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}',
    ],
    ids=range(10),
)  # fmt: skip
def test_a_header_that_asks_for_much_gets_nothing(tmp_path, header):
    path = tmp_path / "a"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    tracemalloc.start()
    with pytest.raises(ValueError):
        load(path)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


@pytest.mark.parametrize("at", ["save_file", "os.fsync", "os.replace"])
def test_an_interrupted_save_leaves_the_old_adapter(params, tmp_path, monkeypatch, at):
    path = tmp_path / "a.safetensors"
    save_adapter(path, *trained(SPECS[0], params), params)
    before = path.read_bytes()

    def fail(*args, **_):
        if at == "save_file":
            args[1].write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(f"gpart_jax.adapter.file.{at}", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(path, *trained(SPECS[0] | {"seed": 5}, params), params)
    assert path.read_bytes() == before


def test_only_plain_data_can_be_saved(params, tmp_path):
    spec = SPECS[0] | {"targets": lambda path, leaf: True}
    with pytest.raises(ValueError, match="must be plain data, with targets as patterns"):
        save_adapter(tmp_path / "a", *trained(spec, params), params)


# Fingerprints


@given(st.data())
def test_any_changed_weight_changes_the_fingerprint(params, data):
    leaf = np.array(params["layer_0"]["query"]["kernel"])
    at = data.draw(st.integers(0, leaf.size - 1))
    factor = data.draw(st.sampled_from([-1.0, 0.0, 1.01, 3.0]))  # bfloat16 tells 1.01 from 1
    changed = leaf.copy()
    changed.flat[at] *= factor
    elsewhere = params | {"layer_0": params["layer_0"] | {"query": params["layer_0"]["query"] | {"kernel": changed}}}
    assert base_fingerprint(elsewhere) != base_fingerprint(params)


def test_the_fingerprint_is_the_same_sharded_in_half_precision_and_on_the_host():
    leaves = {"kernel": jnp.sin(jnp.arange(384.0).reshape(16, 24)).astype(jnp.bfloat16).astype(jnp.float32)}
    leaves["scale"] = jnp.float32(3)
    expected = base_fingerprint(leaves)
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    rules = [("kernel", jax.sharding.PartitionSpec("fsdp", "tensor"))]
    assert base_fingerprint(sharding.place(leaves, sharding.param_shardings(leaves, mesh, rules))) == expected
    assert base_fingerprint(jax.tree.map(lambda x: x.astype(jnp.bfloat16), leaves)) == expected
    assert base_fingerprint(jax.tree.map(np.asarray, leaves)) == expected == "37259f32d9c07685"


# Merging


def forward(params, x):
    layer = params["layer_0"]
    hidden = jnp.tanh(x @ layer["query"]["kernel"]) + x @ layer["value"]["kernel"]
    return hidden @ params["classifier"]["kernel"] + params["classifier"]["bias"]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["name"])
def test_merge_then_forward_is_apply_then_forward(params, spec):
    adapter = adapter_of(spec, params)
    merged = adapter.merge(params)
    x = jax.random.normal(jax.random.key(2), (4, 6))
    np.testing.assert_allclose(forward(merged.params, x), forward(adapter.apply(params), x), atol=1e-6)
    assert merged.rounding == 0
    unmerged = adapter.unmerge(merged.params, merged.kept)
    jax.tree.map(np.testing.assert_array_equal, unmerged.params, params)
    assert set(unmerged.error.values()) == {0.0}


def test_merge_into_bfloat16_says_what_rounding_costs(params):
    adapter = adapter_of(SPECS[0], params)
    exact, merged = adapter.apply(params)["layer_0"], adapter.merge(params, jnp.bfloat16)
    off = [
        merged.params["layer_0"][name]["kernel"].astype(jnp.float32) - exact[name]["kernel"]
        for name in ("query", "value")
    ]
    np.testing.assert_allclose(merged.rounding, jnp.linalg.norm(jnp.stack(off)), rtol=1e-5)
    np.testing.assert_allclose(merged.update, adapter.norm(), rtol=1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged.params)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(np.testing.assert_array_equal, adapter.unmerge(merged.params, merged.kept).params, params)
    # A base that is in bfloat16 already.
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    jax.tree.map(np.testing.assert_array_equal, adapter.merge(half).params, adapter.apply(half))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_unmerged_without_the_frozen_weights_it_says_how_far_off_it_may_be(params, dtype, caplog):
    adapter = adapter_of(SPECS[0], params)
    frozen = jax.tree.map(lambda x: x.astype(dtype), params)
    unmerged = adapter.unmerge(adapter.merge(frozen).params)
    assert set(unmerged.error) == {
        "layer_0/query/kernel", "layer_0/value/kernel", "classifier/kernel", "classifier/bias"
    }  # fmt: skip
    for name in ("query", "value"):
        off = unmerged.params["layer_0"][name]["kernel"].astype(jnp.float32) - frozen["layer_0"][name]["kernel"]
        assert 0 < jnp.abs(off).max() <= unmerged.error[f"layer_0/{name}/kernel"] < 0.1
    assert unmerged.error["classifier/kernel"] == np.inf
    assert "entries may be off by" in caplog.text and "2 replaced leaves stay as they are" in caplog.text
    with pytest.raises(ValueError, match="Pass what `merge` kept"):
        adapter_of(SPECS[0] | {"scheme": "signed_magnitude"}, params).unmerge(params)


def test_a_merged_leaf_lies_where_the_frozen_one_does(params):
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    rules = [("query/kernel|value/kernel", jax.sharding.PartitionSpec("tensor"))]
    placed = sharding.place(params, sharding.param_shardings(params, mesh, rules))
    adapter = adapter_of(SPECS[0], params)
    merged = adapter.merge(placed)
    assert jax.tree.map(lambda x: x.sharding, merged.params) == jax.tree.map(lambda x: x.sharding, placed)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged.params, adapter.apply(params))


# Arithmetic


@settings(max_examples=8)
@given(st.sampled_from([1, 7, 59]), st.sampled_from([0, 2**64 - 1]), st.floats(-2, 2, width=32))
def test_distances_and_means_are_those_of_the_weights(params, d, seed, t):
    spec = {"name": "gpart", "d": d, "seed": seed, "targets": ["query/kernel$", "value/kernel$"]}
    random = np.random.default_rng(d)
    one, other = (Adapter.of(from_spec(spec), {"theta": random.standard_normal(d, np.float32)}, params) for _ in range(2))

    def weights(adapter):
        adapted = adapter.apply(params)["layer_0"]
        return np.stack([adapted[name]["kernel"] for name in ("query", "value")])

    frozen = np.stack([params["layer_0"][name]["kernel"] for name in ("query", "value")])
    np.testing.assert_allclose(np.linalg.norm(weights(one) - frozen), one.norm(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        np.linalg.norm(weights(one) - weights(other)), distance(one, other), rtol=1e-4, atol=1e-5
    )
    between = (1 - t) * weights(one) + t * weights(other)
    np.testing.assert_allclose(weights(interpolate(one, other, t)), between, atol=1e-5)
    assert distance(interpolate(one, other, 0), one) == distance(interpolate(one, other, 1), other) == 0
    mean = average([one, other, other], [2, 1, 1])
    np.testing.assert_allclose(mean.theta, (one.theta + other.theta) / 2, atol=1e-6)
    np.testing.assert_array_equal(average([one, one, one]).theta, one.theta)


def test_what_shares_no_partition_has_no_mean(params):
    one = adapter_of(SPECS[0], params)
    other = adapter_of(SPECS[0] | {"d": 8, "scheme": "splitmix64", "dropout": 0.1}, params)
    with pytest.raises(ValueError, match="d is 9 and 8, scheme is balanced-v1 and splitmix64.$"):
        distance(one, other)
    elsewhere = adapter_of(SPECS[0], other_base(params))
    with pytest.raises(ValueError, match="base model is .* and "):
        average([one, elsewhere])
    lora = adapter_of(SPECS[2], params)
    with pytest.raises(ValueError, match="The mean of 'lora' adapters isn't"):
        interpolate(lora, lora, 0.5)
    with pytest.raises(ValueError, match="weights must be 2 numbers"):
        average([one, one], [1, -1])
    with pytest.raises(ValueError, match="Only an isometric GPart adapter"):
        adapter_of(SPECS[0] | {"isometric": False}, params).norm()
    with pytest.raises(ValueError, match="'lora' has no theta"):
        lora.theta  # noqa: B018


def test_a_layout_and_metadata_are_saved_too(params, tmp_path):
    layout = canonical_layout(params, "query/kernel$|value/kernel$", transposed="kernel$")
    spec = SPECS[0] | {"targets": layout}
    adapter = adapter_of(spec, params, metadata={"note": "naïve", "scores": [1, {"sha256": "0"}]})
    adapter.save(tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert loaded.method == adapter.method and loaded.metadata == adapter.metadata
    jax.tree.map(np.testing.assert_array_equal, loaded.apply(params), adapter.apply(params))
    with pytest.raises(ValueError, match="and so must its metadata"):
        adapter_of(spec, params, metadata={"x": {1, 2}}).save(tmp_path / "a")


# The method says what it is


def test_what_trained_it_is_what_is_saved(params, tmp_path):
    """The seed, and all else, come from the method itself: they can't be told wrongly."""
    method = chain(gpart(9, 7, targets="query/kernel$", dropout=0.5), head(HEAD))
    trainable = method.init(params, jax.random.key(0)) | {"theta": jnp.arange(9.0)}
    save_adapter(tmp_path / "a", method, trainable, params)
    adapter = load_adapter(tmp_path / "a")
    assert (adapter.method["seed"], adapter.method["dropout"], adapter.head_targets) == (7, 0.5, HEAD)
    jax.tree.map(np.testing.assert_array_equal, adapter.apply(params), method.apply(params, trainable))


def test_what_the_method_does_not_train_is_not_saved(params, tmp_path):
    method = from_spec(SPECS[0], HEAD)
    trainable = method.init(params, jax.random.key(0))
    with pytest.raises(ValueError, match=r"'gpart' trains .*'theta': \(9,\).* but the trainable is .*\(8,\)"):
        save_adapter(tmp_path / "a", method, trainable | {"theta": jnp.zeros(8)}, params)
    with pytest.raises(ValueError, match="one method, and a head beside it"):
        both = chain(gpart(9, targets="query/kernel$"), bitfit())
        save_adapter(tmp_path / "a", both, both.init(params, jax.random.key(0)), params)
    assert not list(tmp_path.iterdir())


def test_the_former_calls_hold_for_a_version(params, tmp_path):
    method, trainable = trained(SPECS[0], params)
    with pytest.warns(DeprecationWarning, match="Pass the Method"):
        save_adapter(tmp_path / "a", SPECS[0], trainable, params, HEAD)
    with pytest.warns(DeprecationWarning, match="is now load_adapter"):
        loaded, numbers = load_adapter(tmp_path / "a", params)
    jax.tree.map(np.testing.assert_array_equal, numbers, trainable)
    assert loaded.options == method.options


def test_every_spec_survives_a_method(params):
    """`from_spec` of what a method says of itself is that method."""
    for spec in SPECS + [{"name": "bitfit"}, {"name": "vera", "rank": 2, "targets": "query/kernel"}]:
        method = from_spec(spec, HEAD)
        again = from_spec({"name": method.name} | method.options, method.head_targets)
        assert (again.name, again.options, again.head_targets) == (method.name, method.options, method.head_targets)
        assert method.head_targets == HEAD and method.linear == (spec["name"] not in ("lora", "vera"))
