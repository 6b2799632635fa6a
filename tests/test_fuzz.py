"""Damaged files: each reader gives the right result or one clear error, a ValueError or an OSError, and writes nothing.

  python -m pytest tests/test_fuzz.py                            a few mutations of each file
  python -m pytest tests/test_fuzz.py --hypothesis-profile=long  2,000 of each

A reader is a row of READERS: a function that fills a folder with valid files, the one that is damaged, and a function that reads
the folder. What it gives must equal what it gives of the undamaged files where `exact`; elsewhere a damaged file may say something else
that is valid, as a config does with another rate of dropout.
"""

import contextlib
import copy
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from gpart_jax import Adapter, load_adapter
from gpart_jax.adapter import file as adapter_file
from gpart_jax.interop import huggingface, peft
from gpart_jax.methods import from_spec
from gpart_jax.models import storage
from gpart_jax.models.decoder import DecoderConfig
from gpart_jax.models.encoder import EncoderConfig
from gpart_jax.models.vit import ViTConfig, normalisation
from gpart_jax.models.vocabulary import load_vocabulary

DATA = pathlib.Path(__file__).parent / "data"
SIZES = (0, 1, -1, 2, 7, 3.5, 2**31, 2**63, 10**30, -1e300, float("nan"), float("inf"))
ODD = st.one_of(
    st.none(), st.booleans(), st.sampled_from(SIZES), st.text(max_size=6), st.sampled_from(["auto", "float16", "../x", "", "\0", "a" * 300]),
    st.lists(st.integers(0, 9) | st.none() | st.text(max_size=2), max_size=3), st.dictionaries(st.text(max_size=3), st.none() | st.integers(), max_size=2),
)  # fmt: skip


@st.composite
def json_values(draw, value):
    """A JSON value with one to three of its parts replaced, taken away, renamed or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        at = value
        while True:
            keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else []
            if not len(keys):
                return draw(ODD)  # the whole of it
            key = draw(st.sampled_from(keys))
            if not isinstance(at[key], dict | list) or not at[key] or draw(st.booleans()):
                break
            at = at[key]
        match draw(st.sampled_from(["replace", "replace", "delete", "exchange", "rename"])):
            case "delete":
                del at[key]
            case "exchange":
                other = draw(st.sampled_from(keys))
                at[key], at[other] = at[other], at[key]
            case "rename" if isinstance(at, dict):
                at[draw(st.text(max_size=5))] = at.pop(key)
            case _:
                at[key] = draw(ODD)
    return value


@st.composite
def contents(draw, original: bytes):
    """The bytes of a file, cut, changed, or with some put in or taken out; of JSON also with other values."""
    if original[:1] in b"{[" and draw(st.integers(0, 2)):
        return json.dumps(draw(json_values(json.loads(original)))).encode()
    at = draw(st.integers(0, max(0, min(len(original) - 1, 4000))) | st.integers(0, max(0, len(original) - 1)))
    some = draw(st.binary(min_size=1, max_size=4))
    return draw(st.sampled_from([
        original[:at], original[:at] + some + original[at + len(some) :], original[:at] + some + original[at:],
        original[:at] + original[at + len(some) :], some + original, b"\xef\xbb\xbf" + original, original + original[-at:],
    ]))  # fmt: skip


class Reader(NamedTuple):
    fill: Callable[[pathlib.Path], object]
    damaged: str
    read: Callable[[pathlib.Path], Any]
    exact: bool = False


def copied(source):
    return lambda folder: shutil.copytree(DATA / source, folder, dirs_exist_ok=True)


def read_base(folder):
    """A model, its weights and its dtype, as `gpart-adapter merge` reads them."""
    model, params = huggingface.load_base(folder)
    return model, huggingface.base_dtype(folder), jax.tree.map(np.asarray, params)


def read_description(folder):
    """What config.json and preprocessor_config.json say, without the weights: quick enough for thousands."""
    config = storage.read_config(folder)
    kind = {"vit": ViTConfig, "bert": EncoderConfig, "roberta": EncoderConfig}.get(str(config.get("model_type")), DecoderConfig)
    normalised = normalisation(storage.read_preprocessor(folder)) if kind is ViTConfig else {}
    described = dataclasses.replace(kind.from_hf(config), **normalised)
    return described, storage.stated_dtype(config), huggingface._outputs(config)


def read_weights(folder):
    with contextlib.ExitStack() as stack:
        stored = storage.open_tensors(folder, stack)
        return {name: tensor.read(tensor.shape) for name, tensor in stored.items()}, storage.stored_dtype(folder)


def small_bert(folder):
    copied("encoder/bert_regression")(folder)
    halves: dict[str, dict] = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for number, (name, tensor) in enumerate(load_file(folder / "model.safetensors").items()):
        list(halves.values())[number % 2][name] = tensor
    (folder / "model.safetensors").unlink()
    for name, tensors in halves.items():
        save_file(tensors, folder / name)
    weight_map = {name: file for file, tensors in halves.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def small_vit(folder):
    copied("vit/square")(folder)
    described = {"do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(described))


def small_tokenizer(folder):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}, [("a", "b")]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4], "do_sample": False}))


def read_tokenizer(folder):
    vocabulary = load_vocabulary(folder, 8)
    return vocabulary.bos, vocabulary.ends, vocabulary.tokenizer.encode("ab ba").ids


PARAMS = {"a/query/kernel": np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8), "classifier/bias": np.ones(3, np.float32)}


def small_adapter(folder):
    method = from_spec({"name": "gpart", "d": 5, "seed": 7, "targets": "query/kernel$"}, "^classifier/")
    Adapter.of(method, method.init(PARAMS, jax.random.key(0)), PARAMS, metadata={"note": [1]}).save(folder / "adapter")
    fields, _ = adapter_file.read(folder / "adapter")
    (folder / "fields.json").write_text(json.dumps(fields))


def read_adapter(folder):
    method, trainable = load_adapter(folder / "adapter").on(PARAMS)
    return jax.tree.map(np.asarray, trainable)


def read_fields(folder):
    """An adapter file that is whole, and says what fields.json has: who changes a file can change its digest."""
    fields = json.loads((folder / "fields.json").read_bytes())
    changed = folder.with_name(f"{folder.name}-changed")
    changed.mkdir(exist_ok=True)
    adapter_file.write(changed / "adapter", fields if isinstance(fields, dict) else {}, adapter_file.read(folder / "adapter")[1])
    return read_adapter(changed)


def read_peft(folder):
    return peft.read(folder, *huggingface.load_base(DATA / "encoder" / "bert_regression")).method


def small_peft(folder):
    model, params = huggingface.load_base(DATA / "encoder" / "bert_regression")
    spec = {"name": "gpart", "d": 9, "seed": 5, "scheme": "splitmix64", "targets": peft.layout(model, params, ["query"])}
    peft.write(folder, Adapter.of(from_spec(spec), {"theta": np.arange(9, dtype=np.float32)}, params), model, params)


FAMILIES = {name: copied(f"decoder/{name}") for name in ("llama", "mistral", "qwen2", "gemma")} | {
    "bert": small_bert, "roberta": copied("encoder/roberta"), "vit": small_vit
}  # fmt: skip
READERS = {
    **{f"config of {name}": Reader(fill, "config.json", read_description) for name, fill in FAMILIES.items()},
    **{f"model of {name}": Reader(fill, "config.json", read_base) for name, fill in FAMILIES.items()},
    "preprocessor": Reader(small_vit, "preprocessor_config.json", read_description),
    "weight index": Reader(small_bert, "model.safetensors.index.json", read_weights),
    "weight index of a model": Reader(small_bert, "model.safetensors.index.json", lambda folder: read_base(folder)[2], exact=True),
    "weights": Reader(small_bert, "model-00001-of-00002.safetensors", read_weights),
    **{name: Reader(small_tokenizer, f"{name}.json", read_tokenizer)
       for name in ("tokenizer", "tokenizer_config", "special_tokens_map", "generation_config")},
    "adapter": Reader(small_adapter, "adapter", read_adapter, exact=True),
    "adapter's fields": Reader(small_adapter, "fields.json", read_fields),
    "peft's config": Reader(small_peft, peft.CONFIG, read_peft),
}  # fmt: skip


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_gives_the_right_result_or_a_clear_error(name, tmp_path_factory):
    reader = READERS[name]
    folder = tmp_path_factory.mktemp("fuzz") / "folder"
    folder.mkdir()
    reader.fill(folder)
    expected, original = reader.read(folder), (folder / reader.damaged).read_bytes()

    @settings(suppress_health_check=list(HealthCheck), print_blob=False)
    @given(contents(original))
    def damage(content):
        (folder / reader.damaged).write_bytes(content)
        before = tree(folder)
        try:
            found = reader.read(folder)
        except (ValueError, OSError) as error:
            assert str(error).strip()
        else:
            if reader.exact or content == original:
                jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert tree(folder) == before

    damage()
