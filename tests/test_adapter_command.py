"""python -m gpart_jax.adapter, on small models."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpart_jax import adapter as artifact
from gpart_jax import serving
from gpart_jax.adapter import Adapter
from gpart_jax.adapter.__main__ import main
from gpart_jax.interop import huggingface, peft
from gpart_jax.methods import from_spec
from gpart_jax.models import pretrained

BASE = str(pathlib.Path(__file__).parent / "data" / "encoder" / "bert_pair")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """a and b share a partition, c has another d; their head has the 3 outputs of the base."""
    directory = tmp_path_factory.mktemp("adapters")
    model, params = huggingface.load_base(BASE)
    layout = peft.layout(model, params, ["query", "value"])
    for name, d, value in (("a", 300, 0.5), ("b", 300, 0.25), ("c", 200, 0.5)):
        spec = {"name": "gpart", "d": d, "seed": 42, "targets": layout, "scheme": "splitmix64"}
        head = {f"classifier/{leaf}": params["classifier"][leaf] + 1 for leaf in ("kernel", "bias")}
        trainable = {"theta": np.full(d, value, np.float32), "head": head}
        method = from_spec(spec, "^classifier/")
        Adapter.of(method, trainable, params, metadata={"note": name}).save(directory / name)
    return directory


def test_inspect(folder, capsys):
    assert main(["inspect", str(folder / "a")]) == 0
    text = capsys.readouterr().out
    assert "gpart, 399 trained numbers" in text and '{"note": "a"}' in text
    for row in ("d                        300", "scheme                   splitmix64", "adapted weights N        4,096",
                "theta                    float32[300], norm 8.66025", "targets                  4 leaves"):  # fmt: skip
        assert row in text


def test_check(folder, capsys, tmp_path):
    assert main(["check", str(folder / "a"), BASE]) == 0
    assert f"belongs to {BASE}: 4,096 adapted weights" in capsys.readouterr().out
    other = str(pathlib.Path(BASE).with_name("bert_regression"))
    assert main(["check", str(folder / "a"), other]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    (tmp_path / "a").write_bytes((folder / "a").read_bytes()[:-1])
    assert main(["check", str(tmp_path / "a"), BASE]) == 1
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_merge(folder, capsys, tmp_path, dtype):
    assert main(["merge", str(folder / "a"), BASE, str(tmp_path), *(["--dtype", dtype] if dtype else [])]) == 0
    text = capsys.readouterr().out
    assert "4,096 weights moved by 8.66025 in all" in text and f"Rounding to {dtype or 'the dtype of the base'}" in text
    model, params = huggingface.load_base(BASE)
    expected = artifact.load(folder / "a").apply(params)
    _, merged = huggingface.load_base(tmp_path)
    for layer in ("layer_0", "layer_1"):
        ours, theirs = (x[layer]["attention"]["query"]["kernel"] for x in (merged, expected))
        np.testing.assert_array_equal(ours, theirs.astype(dtype or jnp.float16).astype(jnp.float32))  # the base is float16


def test_diff(folder, capsys):
    assert main(["diff", str(folder / "a"), str(folder / "a")]) == 0
    assert "The adapters are equal." in capsys.readouterr().out
    assert main(["diff", str(folder / "a"), str(folder / "b")]) == 1
    text = capsys.readouterr().out
    assert "norms 8.66025 and 4.33013, distance 4.33013" in text and "metadata note            a and b" in text
    assert main(["diff", str(folder / "a"), str(folder / "c")]) == 1
    assert "don't share a partition: d is 300 and 200" in capsys.readouterr().err


def test_to_and_from_the_authors_checkpoints(folder, tmp_path, capsys):
    assert main(["to-peft", str(folder / "a"), BASE, str(tmp_path)]) == 0
    assert json.loads((tmp_path / peft.CONFIG).read_text())["target_modules"] == ["query", "value"]
    assert main(["from-peft", str(tmp_path), BASE, str(tmp_path / "back")]) == 0
    capsys.readouterr()
    ours, back = artifact.load(folder / "a"), artifact.load(tmp_path / "back")
    assert back.method == ours.method
    np.testing.assert_array_equal(back.theta, ours.theta)


def test_help_names_the_commands_and_warns_of_nothing():
    command = [sys.executable, "-m", "gpart_jax.adapter", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[1], timeout=120)
    assert done.returncode == 0 and not done.stderr
    for name in ("inspect", "check", "merge", "diff", "to-peft", "from-peft"):
        assert f"    {name}" in done.stdout


def test_a_model_without_a_pooler_takes_its_own_adapter_back(tmp_path, capsys):
    """The pooler that a run drew is in no file but the adapter."""
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    kept = {n: x for n, x in load_file(base / "model.safetensors").items() if "pooler" not in n and "classifier" not in n}
    save_file(kept, base / "model.safetensors")
    model, params = pretrained.load_encoder(base, 3, key=jax.random.key(9))
    drawn = pretrained.drawn(base, model)
    assert drawn == ("classifier/", "pooler/")
    method = from_spec({"name": "gpart", "d": 9, "seed": 1, "targets": "query/kernel"}, "^classifier/")
    trainable = method.init(params, jax.random.key(0)) | {"theta": jnp.ones(9)}
    artifact.save_adapter(tmp_path / "a", method, trainable, params, drawn=drawn)
    expected = method.apply(params, trainable)

    assert main(["check", str(tmp_path / "a"), str(base)]) == 0, capsys.readouterr().err
    assert main(["merge", str(tmp_path / "a"), str(base), str(tmp_path / "merged"), "--dtype=float32"]) == 0
    _, merged = huggingface.load_base(tmp_path / "merged")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merged, expected)
    tensors = artifact.load_adapter(tmp_path / "a").tensors
    assert {"given/pooler/kernel", "given/pooler/bias", "head/classifier/kernel", "theta"} <= tensors.keys()
    with pytest.raises(ValueError, match="given/pooler/.* can't be served"):
        serving.stack([artifact.load_adapter(tmp_path / "a")])


def test_a_full_adapter_brings_a_head_of_another_size(tmp_path, capsys):
    model, params = pretrained.load_encoder(BASE, 5, key=jax.random.key(9))
    method = from_spec({"name": "full"}, "^classifier/")
    trainable = jax.tree.map(lambda x: x + 0.5, method.init(params, jax.random.key(0)))
    artifact.save_adapter(tmp_path / "a", method, trainable, params, drawn=pretrained.drawn(BASE, model))
    assert main(["merge", str(tmp_path / "a"), BASE, str(tmp_path / "merged"), "--dtype=float32"]) == 0, capsys.readouterr().err
    _, merged = huggingface.load_base(tmp_path / "merged")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merged, method.apply(params, trainable))


def tree(directory):
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


SIDE = ("generation_config.json", "chat_template.jinja", "tokenizer.model", "LICENSE", "README.md", "1_Pooling/config.json", "merges.txt")
LEFT = ("pytorch_model.bin", "tf_model.h5", "model.q4.gguf", "onnx/model.onnx", ".git/HEAD", "pytorch_model.bin.index.json",
        "old/model.safetensors", "old/config.json", ".hidden", "adapter_config.json")  # fmt: skip


@pytest.mark.parametrize("dtype, labels", [("bfloat16", 3), ("float32", 5)])
def test_a_merged_directory_is_the_bases_with_other_weights(folder, tmp_path, dtype, labels):
    """With the adapter's own head of as many outputs the names of the base's stay; of another number they can't."""
    base = pathlib.Path(shutil.copytree(BASE, tmp_path / "base"))
    for name in (*SIDE, *LEFT):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    config = json.loads((base / "config.json").read_text()) | {"mine": {"a": [1]}, "id2label": {"0": "x", "1": "y", "2": "z"}}
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors") | {"bert.embeddings.position_ids": np.arange(3), "x": np.ones(2, np.float16)}
    save_file(tensors, base / "model.safetensors")
    before, adapter = tree(base), folder / "a"
    if labels == 5:
        _, params = pretrained.load_encoder(base, 5, key=jax.random.key(0))
        method = from_spec({"name": "gpart", "d": 8, "seed": 1, "targets": "query/kernel$"}, "^classifier/")
        artifact.save_adapter(adapter := tmp_path / "a", method, method.init(params, jax.random.key(0)), params)
    assert main(["merge", str(adapter), str(base), str(base / "merged"), "--dtype", dtype]) == 0  # a folder in it is no part of it
    merged = tree(base / "merged")
    assert merged.keys() == {*SIDE, "config.json", "model.safetensors", *(n for n in before if n.startswith("expected"))}
    assert {name: merged[name] for name in SIDE} == {name: before[name] for name in SIDE}
    assert {name: content for name, content in tree(base).items() if not name.startswith("merged/")} == before
    written = json.loads(merged["config.json"])
    assert written.pop("dtype", dtype) == dtype and config.pop("dtype") == "float16"
    if labels == 5:
        assert written.pop("id2label") == {str(n): f"LABEL_{n}" for n in range(5)} and len(written.pop("label2id")) == 5
    assert written == {name: value for name, value in config.items() if name in written} and written["mine"] == {"a": [1]}
    found = load_file(base / "merged" / "model.safetensors")
    assert found.keys() == tensors.keys() and found["bert.embeddings.position_ids"].dtype == np.int64
    assert {str(x.dtype) for name, x in found.items() if "position_ids" not in name} == {dtype}


def test_no_output_takes_the_place_of_an_input_and_others_need_to_be_told(folder, tmp_path, capsys):
    base = pathlib.Path(shutil.copytree(BASE, tmp_path / "hub" / "base"))
    blobs = tmp_path / "hub" / "blobs"  # as the hub's cache has it: links to files that lie elsewhere
    blobs.mkdir()
    shutil.move(base / "model.safetensors", blobs / "1")
    (base / "model.safetensors").symlink_to(blobs / "1")
    (base / "part").mkdir()
    (base / "part" / "x").write_text("x")
    adapter = pathlib.Path(shutil.copy(folder / "a", tmp_path / "hub" / "a"))
    (tmp_path / "link").symlink_to(base)
    before = tree(tmp_path / "hub")
    for to in (base, tmp_path / "link", f"{base}/../base", blobs, tmp_path / "hub", base / "part", adapter, adapter / "below"):
        for command in ("merge", "to-peft"):
            assert main([command, str(adapter), str(base), str(to), "--overwrite"]) == 1, to
            assert capsys.readouterr().err.startswith(f"error: {to} "), to
    assert main(["to-peft", str(adapter), str(base), str(tmp_path / "peft")]) == 0
    for to in (tmp_path / "peft" / peft.TENSORS, base / "model.safetensors", blobs / "1"):
        assert main(["from-peft", str(tmp_path / "peft"), str(base), str(to), "--overwrite"]) == 1
        assert "would be written over" in capsys.readouterr().err
    assert tree(tmp_path / "hub") == before

    for command, to in (("merge", "merged"), ("to-peft", "peft"), ("from-peft", "back")):
        inputs = [tmp_path / "peft", base] if command == "from-peft" else [adapter, base]
        call = [command, *map(str, inputs), str(tmp_path / to)]
        assert to == "peft" or main(call) == 0
        assert main(call) == 1 and "--overwrite" in capsys.readouterr().err
        assert main([*call, "--overwrite"]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("x")
    assert main(["merge", str(adapter), str(base), str(tmp_path / "mine"), "--overwrite"]) == 1
    assert (tmp_path / "mine" / "thesis").is_file() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("value, dtype, words", [
    (np.nan, None, "adapter's theta isn't finite: 1 of 300"), (np.inf, "float32", "adapter's theta isn't finite"),
    (1e8, "float16", "layer_0/attention/query/kernel and 3 more would hold NaN or infinities in float16"),
])  # fmt: skip
def test_what_is_not_finite_is_not_merged(folder, tmp_path, capsys, value, dtype, words):
    adapter = artifact.load(folder / "a")
    theta = np.where(np.arange(300) == 7, value, adapter.theta).astype(np.float32)
    dataclasses.replace(adapter, tensors=adapter.tensors | {"theta": theta}).save(tmp_path / "a")
    assert main(["merge", str(tmp_path / "a"), BASE, str(tmp_path / "m"), *(["--dtype", dtype] if dtype else [])]) == 1
    assert words in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_merge_that_is_cut_short_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("safetensors.numpy.save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert main(["merge", str(folder / "a"), BASE, str(tmp_path / "merged")]) == 1
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())
