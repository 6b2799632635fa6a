import json
import pathlib
import shutil
import string

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from gpart_jax import sharding
from gpart_jax.models import storage
from gpart_jax.models.gguf_file import NAMES
from gpart_jax.models.pretrained_decoder import load_decoder, save
from gpart_jax.models.vocabulary import load_vocabulary

DATA = pathlib.Path(__file__).parents[1] / "data" / "decoder"
TINY = ("llama", "mistral", "qwen2", "gemma")
SHARD = "model-00002-of-00002.safetensors"  # of the llama


def load(source, dtype=jnp.float32, **options):
    return jax.tree.map(np.asarray, load_decoder(source, dtype=dtype, **options)[1])


def stored(directory):
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def assert_same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.fixture
def llama(tmp_path):
    return pathlib.Path(shutil.copytree(DATA / "llama", tmp_path / "llama"))


# Directories


def test_layers_are_stacked_and_weights_transposed():
    tensors, params = stored(DATA / "qwen2"), load(DATA / "qwen2")
    for n in range(3):
        prefix = f"model.layers.{n}.self_attn"
        attention = jax.tree.map(lambda leaf: leaf[n], params["layers"]["attention"])
        np.testing.assert_array_equal(
            attention["key"]["kernel"], tensors[f"{prefix}.k_proj.weight"].T.astype(np.float32)
        )
        np.testing.assert_array_equal(attention["key"]["bias"], tensors[f"{prefix}.k_proj.bias"].astype(np.float32))
    words = tensors["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["embed"]["embedding"], words)
    assert "lm_head" not in params  # tied


def test_weights_are_bfloat16_unless_asked_otherwise():
    model, params = load_decoder(DATA / "mistral")  # stored as float16
    assert model.dtype == model.param_dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert_same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), load(DATA / "mistral")))


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_mesh_holds_the_same_and_reads_each_number_once(sizes, monkeypatch):
    read, original = {}, storage.Tensor.read

    def counted(self, *arguments):
        part = original(self, *arguments)
        read[self.name] = read.get(self.name, 0) + part.size
        return part

    monkeypatch.setattr(storage.Tensor, "read", counted)
    _, params = load_decoder(DATA / "llama", mesh=sharding.make_mesh(sizes), dtype=jnp.float32)
    assert read == {name: tensor.size for name, tensor in stored(DATA / "llama").items()}
    assert_same(params, load(DATA / "llama"))
    up = params["layers"]["mlp"]["up"]["kernel"]
    assert up.addressable_shards[0].data.size * sizes.get("fsdp", 1) * sizes.get("tensor", 1) == up.size


def test_names_of_a_model_saved_without_its_head(tmp_path):
    shutil.copy(DATA / "gemma" / "config.json", tmp_path)
    tensors = {name.removeprefix("model."): tensor for name, tensor in stored(DATA / "gemma").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(load(tmp_path), load(DATA / "gemma"))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("sizes, shard_bytes", [({}, 2**30), ({"fsdp": 2, "tensor": 4}, 30_000)])
def test_what_is_saved_is_what_was_read(name, sizes, shard_bytes, tmp_path):
    devices = jax.devices() if sizes else jax.devices()[:1]
    dtype = jnp.float16 if name == "mistral" else jnp.bfloat16
    model, params = load_decoder(DATA / name, mesh=sharding.make_mesh(sizes, devices), dtype=dtype)
    save(tmp_path, model, params, shard_bytes)
    saved, expected = stored(tmp_path), stored(DATA / name)
    assert saved.keys() == expected.keys()
    for key, tensor in saved.items():
        assert tensor.dtype == expected[key].dtype
        np.testing.assert_array_equal(tensor, expected[key])
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if shard_bytes > 2**20 else 2 + (name == "gemma"))
    again, reread = load_decoder(tmp_path, dtype=dtype)
    assert again.config == model.config
    assert_same(reread, params)
    architecture = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert architecture == json.loads((DATA / name / "config.json").read_text())["architectures"]


def test_a_save_that_is_cut_short_leaves_nothing_that_loads(tmp_path, monkeypatch):
    model, params = load_decoder(DATA / "llama")
    save(tmp_path, model, params)
    fail = lambda *_: (_ for _ in ()).throw(OSError("No space left"))  # noqa: E731
    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, model, params, 30_000)
    with pytest.raises(FileNotFoundError, match="holds neither model.safetensors nor"):
        load(tmp_path)


# Damage


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_truncated_shard(llama, size):
    (llama / SHARD).write_bytes((llama / SHARD).read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{SHARD} is damaged.*Download or copy it again"):
        load(llama)


def test_missing_shard(llama):
    (llama / SHARD).unlink()
    with pytest.raises(FileNotFoundError, match=f"{SHARD} is missing, though .*index.json lists it"):
        load(llama)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.2.mlp.up_proj.weight", "model.norm.weight"])
def test_missing_tensor(llama, name):
    for file in llama.glob("*.safetensors"):
        save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file)
    with pytest.raises(ValueError, match=f"{llama} holds no tensor '{name}'"):
        load(llama)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"vocab_size": 50},
            r"tensor 'model.embed_tokens.weight' has shape \(48, 32\), but its config asks for \(50, 32\)",
        ),
        ({"intermediate_size": 48}, r"tensor 'model.layers.0.mlp.\w+_proj.weight' has shape"),
        ({"num_hidden_layers": 4}, "holds no tensor 'model.layers.3"),
        ({"model_type": "mamba"}, "model_type 'mamba'; this decoder is llama, mistral, qwen2, gemma"),
        ({"model_type": None}, "model_type None"),
    ],
)
def test_configs_of_other_models(llama, change, message):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load(llama)


# GGUF


def write_gguf(file, directory, quantization=None, **metadata):
    """The tensors and config of a directory as the converter writes them: with permuted rows of queries and keys."""
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(file, metadata.pop("architecture", "llama"))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads["attn_q"])
    writer.add_head_count_kv(heads["attn_k"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    vocabulary = ["<s>", "</s>", "<tool>", "Ġ", *string.ascii_lowercase, *string.digits, "ab", "Ġab", "12"]
    writer.add_tokenizer_model(metadata.pop("model", "gpt2"))
    writer.add_tokenizer_pre(metadata.pop("pre", "smollm"))
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3, 4] + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(["a b", "Ġ ab", "1 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, value in metadata.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    for theirs, ours in NAMES.items():
        for layer in range(config["num_hidden_layers"] if "#" in theirs else 1):
            name, tensor = (
                theirs.replace("#", str(layer)),
                stored(directory).get(f"{ours.replace('#', str(layer))}.weight"),
            )
            if tensor is None:
                continue  # tied
            tensor = tensor.astype(np.float32)
            if count := heads.get(theirs.split(".")[-1]):
                tensor = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
            kind = (
                quantization
                if quantization and tensor.ndim == 2 and tensor.shape[1] % 32 == 0
                else gguf.GGMLQuantizationType.F32
            )
            writer.add_tensor(f"{name}.weight", gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def plain_llama(tmp_path_factory):
    """The llama without its scaled angles."""
    directory = tmp_path_factory.mktemp("plain_llama")
    shutil.copytree(DATA / "llama", directory, dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text())
    config = {name: value for name, value in config.items() if name != "rope_parameters"} | {"rope_theta": 500.0}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_gguf_holds_what_the_directory_held(plain_llama, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", plain_llama)
    model, params = load_decoder(file, dtype=jnp.float32)
    expected, weights = load_decoder(plain_llama, dtype=jnp.float32)
    assert model.config.norm_eps == pytest.approx(expected.config.norm_eps)  # a float32 there
    assert model.clone(config=expected.config) == expected and not model.config.tied
    assert_same(params, weights)
    assert_same(load(file, mesh=sharding.make_mesh({"fsdp": 4, "tensor": 2})), jax.tree.map(np.asarray, weights))


@pytest.mark.parametrize("kind, error", [("F16", 1e-3), ("BF16", 0), ("Q8_0", 0.01), ("Q4_1", 0.15)])
def test_gguf_is_dequantized(plain_llama, tmp_path, kind, error):
    file = write_gguf(tmp_path / "model.gguf", plain_llama, gguf.GGMLQuantizationType[kind])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=error), load(file), load(plain_llama))


def test_gguf_of_other_kinds_and_damaged(plain_llama, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", plain_llama)
    content = file.read_bytes()
    for size in (0, 100, 5000, len(content) // 2, len(content) - 4000):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(ValueError, match="cut.gguf is damaged or no GGUF file.*Download or copy it again"):
            load(tmp_path / "cut.gguf")
    other = write_gguf(tmp_path / "other.gguf", plain_llama, architecture="gemma")
    with pytest.raises(ValueError, match="architecture 'gemma'; of GGUF files only 'llama' is read"):
        load(other)
    with pytest.raises(FileNotFoundError, match="missing.gguf is not a directory, nor a GGUF file"):
        load(tmp_path / "missing.gguf")


# Vocabularies


def test_vocabulary_of_a_gguf_file(plain_llama, tmp_path):
    vocabulary = load_vocabulary(write_gguf(tmp_path / "model.gguf", plain_llama), 48)
    assert (vocabulary.bos, vocabulary.eos) == (None, 1)
    tokens = ["ab", "Ġab", "1", "2", "Ġ", "1", "2", "</s>", "<tool>"]
    encoded = vocabulary.tokenizer.encode("ab ab12 12</s><tool>")
    assert encoded.tokens == tokens and vocabulary.tokenizer.decode(encoded.ids) == "ab ab12 12<tool>"
    other = load_vocabulary(write_gguf(tmp_path / "gpt2.gguf", plain_llama, pre="gpt-2"), 48)
    assert other.tokenizer.encode("ab12 12").tokens == ["ab", "12", "Ġ", "12"]
    beginning = write_gguf(tmp_path / "bos.gguf", plain_llama, add_bos_token=True)
    assert load_vocabulary(beginning, 48).bos == 0
    with pytest.raises(ValueError, match="the tokenizer's ids reach 42, but the model has 40 tokens.*one place"):
        load_vocabulary(tmp_path / "model.gguf", 40)
    for change in ({"pre": "unheard-of"}, {"model": "llama"}):
        with pytest.raises(ValueError, match="of GGUF files only 'gpt2' with 'gpt-2' or 'smollm' is read"):
            load_vocabulary(write_gguf(tmp_path / "other.gguf", plain_llama, **change), 48)


def write_tokenizer(directory, template=None, **config):
    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if template:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(template, special_tokens=[("<s>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_vocabulary_of_a_directory(tmp_path):
    both = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    cases = [
        (dict(template="<s> $A", **both), 0),  # as Llama 3's and Gemma's put it before a text
        (both, None),
        (dict(both, add_bos_token=True), 0),
        (dict(both, template="<s> $A", add_bos_token=False), None),
        ({"bos_token": None, "eos_token": "</s>"}, None),  # Qwen2.5's
    ]
    for config, bos in cases:
        vocabulary = load_vocabulary(write_tokenizer(tmp_path, **config), 10)  # some models are padded
        assert (vocabulary.bos, vocabulary.eos) == (bos, 1)
    with pytest.raises(ValueError, match="the tokenizer's ids reach 3, but the model has 3 tokens"):
        load_vocabulary(tmp_path, 3)
    with pytest.raises(ValueError, match="eos_token '<end>', which is no token of tokenizer.json"):
        load_vocabulary(write_tokenizer(tmp_path, eos_token="<end>"), 4)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="its tokenizer cannot be read"):
        load_vocabulary(tmp_path, 4)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no tokenizer_config.json. Save the model's fast tokenizer"):
        load_vocabulary(tmp_path, 4)


BEFORE, AFTER, BOTH = "<s> $A", "$A </s>", "<s> $A </s>"
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


def write_templated(directory, template, described, others=()):
    write_tokenizer(directory, **NAMED)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    if template:
        special = [("<s>", 0), ("</s>", 1)]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(template, special_tokens=special)
    tokenizer.enable_padding(direction="left", length=9)  # which isn't what the post-processor adds
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in {"tokenizer_config.json": described, **dict(others)}.items():
        (directory / name).write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("template, described, others, found", [
    (BEFORE, NAMED | {"add_bos_token": None}, {}, (0, (1,))), (BEFORE, {"eos_token": "</s>"}, {}, (0, (1,))),
    (BOTH, {}, {}, (0, (1,))), (AFTER, {"bos_token": None}, {}, (None, (1,))), (None, NAMED | {"add_bos_token": None}, {}, (None, (1,))),
    (BOTH, NAMED | {"add_bos_token": False}, {}, (None, (1,))), (None, NAMED | {"add_bos_token": True}, {}, (0, (1,))),
    (None, {}, {"special_tokens_map.json": {"eos_token": {"content": "</s>"}}}, (None, (1,))),
    (None, {}, {"generation_config.json": {"eos_token_id": [3, 2]}}, (None, (3, 2))),
    (None, {}, {"config.json": {"eos_token_id": 2}}, (None, (2,))),
    (None, NAMED, {"generation_config.json": {"eos_token_id": [2, 1, 99]}, "config.json": {"eos_token_id": 3}}, (None, (1, 2))),
    (None, NAMED, {"generation_config.json": {"eos_token_id": None}, "config.json": {"eos_token_id": [1, 3]}}, (None, (1, 3))),
])  # fmt: skip
def test_what_begins_and_ends_a_text_is_found_where_it_is_named(tmp_path, template, described, others, found):
    vocabulary = load_vocabulary(write_templated(tmp_path, template, described, others), 4)
    assert (vocabulary.bos, vocabulary.ends) == found


@pytest.mark.parametrize("template, described, others, words", [
    (None, None, {}, "tokenizer_config.json is damaged: it is not a JSON object"), (None, [], {}, "tokenizer_config.json is damaged: it is not a JSON object"),
    (None, {"eos_token": ["</s>"]}, {}, "eos_token .* is no token"), (None, {"eos_token": {"lstrip": False}}, {}, "is no token"),
    (None, NAMED | {"bos_token": 1, "add_bos_token": True}, {}, "bos_token '1', which is no token"),
    (None, NAMED | {"add_bos_token": "no"}, {}, "add_bos_token 'no'"), ("<s> <s> $A", NAMED, {}, "puts the tokens .0, 0. before"),
    (None, NAMED, {"generation_config.json": []}, "generation_config.json is damaged: it is not a JSON object"),
    (None, NAMED, {"config.json": {"eos_token_id": ["2"]}}, "eos_token_id .'2'."), (None, {}, {}, "eos_token None"),
])  # fmt: skip
def test_damaged_tokenizer_files_are_refused_by_name(tmp_path, template, described, others, words):
    with pytest.raises(ValueError, match=words):
        load_vocabulary(write_templated(tmp_path, template, described, others), 4)
