"""python -m gpart_jax.adapter, on small models."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    assert_close = np.testing.assert_array_equal if dtype else lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6)
    for layer in ("layer_0", "layer_1"):
        ours, theirs = (x[layer]["attention"]["query"]["kernel"] for x in (merged, expected))
        assert_close(ours, theirs.astype(dtype or jnp.float32).astype(jnp.float32))


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
    from safetensors.numpy import load_file, save_file

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
    assert main(["merge", str(tmp_path / "a"), str(base), str(tmp_path / "merged")]) == 0
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
    assert main(["merge", str(tmp_path / "a"), BASE, str(tmp_path / "merged")]) == 0, capsys.readouterr().err
    _, merged = huggingface.load_base(tmp_path / "merged")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merged, method.apply(params, trainable))
