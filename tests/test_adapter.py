import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpart_jax import load_adapter, save_adapter
from gpart_jax.methods import from_spec

HEAD = "^classifier/"
SPECS = [
    {"name": "gpart", "d": 9, "seed": 2**64 - 1, "targets": ["query/kernel$", "value/kernel$"]},
    {"name": "gpart", "d": 8, "seed": 1, "targets": "kernel", "scheme": "splitmix64", "scope": "global"},
    {"name": "lora", "rank": 2, "alpha": 4, "targets": "query/kernel"},
    {"name": "head"},
    {"name": "full"},
]


@pytest.fixture
def params():
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def dense(*shape):
        return {"kernel": jax.random.normal(next(keys), shape), "bias": jnp.zeros(shape[-1])}

    return {"layer_0": {"query": dense(6, 5), "value": dense(6, 5)}, "classifier": dense(5, 3)}


def trained(spec, params):
    method = from_spec(spec, HEAD)
    noise = iter(jax.random.split(jax.random.key(1), 99))
    trainable = method.init(params, jax.random.key(0))
    return method, jax.tree.map(lambda x: x + jax.random.normal(next(noise), x.shape), trainable)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["name"])
def test_saved_and_loaded_it_gives_the_same_model(params, tmp_path, spec):
    method, trainable = trained(spec, params)
    save_adapter(tmp_path / "adapter.safetensors", spec, trainable, params, HEAD)
    # Another head to begin with: the adapter brings its own.
    elsewhere = params | {"classifier": jax.tree.map(lambda x: x + 1, params["classifier"])}
    loaded, numbers = load_adapter(tmp_path / "adapter.safetensors", elsewhere)
    jax.tree.map(np.testing.assert_array_equal, numbers, trainable)
    expected = method.apply(params, trainable)
    jax.tree.map(np.testing.assert_array_equal, loaded.apply(elsewhere, numbers), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_it_takes_4_d_bytes_and_a_little(params, tmp_path):
    spec = SPECS[0] | {"d": 60}
    save_adapter(tmp_path / "a", spec, trained(spec, params)[1], params, HEAD)
    size = (tmp_path / "a").stat().st_size
    assert 4 * 60 + 4 * 18 < size < 4 * 60 + 4 * 18 + 4096


def test_it_says_how_it_was_made_defaults_included(params, tmp_path):
    save_adapter(tmp_path / "a", SPECS[0], trained(SPECS[0], params)[1], params, HEAD)
    content = (tmp_path / "a").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    metadata = json.loads(header["__metadata__"]["gpart_jax"])
    assert metadata["method"] == SPECS[0] | {
        "scheme": "balanced-v1", "scope": "global", "isometric": True, "dropout": 0.0, "init_bound": 0.0,
        "stacked": None
    }  # fmt: skip
    assert metadata["n"] == 60 and metadata["head_targets"] == HEAD


def test_the_base_may_be_loaded_in_half_precision(params, tmp_path):
    save_adapter(tmp_path / "a", SPECS[0], trained(SPECS[0], params)[1], params, HEAD)
    load_adapter(tmp_path / "a", jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


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
    save_adapter(tmp_path / "a", SPECS[0], trained(SPECS[0], params)[1], params, HEAD)
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path / "a", change(params))


def test_damage_is_named(params, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        load_adapter(path, params)
    save_adapter(path, SPECS[0], trained(SPECS[0], params)[1], params, HEAD)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="a.safetensors is damaged"):
        load_adapter(path, params)
    save_file({"theta": np.zeros(9, np.float32)}, path)
    with pytest.raises(ValueError, match="not one that gpart_jax.adapter wrote"):
        load_adapter(path, params)
    path.write_bytes(whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(ValueError, match="adapter format 9; this version of gpart_jax reads 1"):
        load_adapter(path, params)
    path.write_bytes(whole)
    tensors = load_file(path)
    metadata = {"gpart_jax": json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])["__metadata__"]["gpart_jax"]}
    save_file({name: array for name, array in tensors.items() if name != "theta"}, path, metadata)
    with pytest.raises(ValueError, match=r"damaged: its tensors should be .*'theta'"):
        load_adapter(path, params)


def test_an_interrupted_save_leaves_the_old_adapter(params, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_adapter(path, SPECS[0], trained(SPECS[0], params)[1], params, HEAD)
    before = path.read_bytes()

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("gpart_jax.adapter.save_file", fail)
    with pytest.raises(OSError):
        save_adapter(path, SPECS[0], trained(SPECS[0], params)[1], params, HEAD)
    assert path.read_bytes() == before


def test_only_plain_data_can_be_saved(params, tmp_path):
    spec = SPECS[0] | {"targets": lambda path, leaf: True}
    with pytest.raises(ValueError, match="must be plain data, with targets as patterns"):
        save_adapter(tmp_path / "a", spec, trained(spec, params)[1], params, HEAD)
