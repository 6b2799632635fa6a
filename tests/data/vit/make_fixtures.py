"""Makes the ViT fixtures beside it, with PyTorch: pip install torch torchvision transformers, then python make_fixtures.py."""

import io
import json
import pathlib

import numpy as np
import torch
import torchvision.transforms as T
import transformers
from PIL import Image

HERE = pathlib.Path(__file__).parent
SHAPE = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=24, patch_size=8
)


def tiny(name, seed, sizes, **change):
    """A random checkpoint, images of several sizes, and their logits."""
    torch.manual_seed(seed)
    config = transformers.ViTConfig(**SHAPE | change, num_labels=5, initializer_range=0.3)
    model = transformers.ViTForImageClassification(config).eval()
    for parameter in model.parameters():  # zero biases and position would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(HERE / name)
    cases = []
    for height, width in sizes:
        pixels = torch.randint(0, 256, (2, config.num_channels, height, width)).float() / 127.5 - 1
        with torch.no_grad():
            logits = model(pixels, interpolate_pos_encoding=(height, width) != (config.image_size,) * 2).logits
        whole = ((pixels + 1) * 127.5).round().int()
        cases.append({"pixels": whole.permute(0, 2, 3, 1).tolist(), "logits": logits.tolist()})
    (HERE / name / "expected.json").write_text(json.dumps(cases) + "\n")


def pictures():
    """Images of several shapes and modes as files, and what torchvision's Resize and CenterCrop make of them."""
    rng, stored = np.random.default_rng(0), {}
    for name, (width, height), mode, size in [
        ("wide.png", (61, 40), "RGB", 32),
        ("tall.jpg", (37, 90), "RGB", 32),
        ("grey.png", (50, 33), "L", 32),
        ("palette.png", (48, 48), "P", 32),
        ("small.png", (13, 17), "RGB", 32),
    ]:
        coarse = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
        buffer = io.BytesIO()
        coarse.convert(mode).save(buffer, "JPEG" if name.endswith("jpg") else "PNG")
        (HERE / name).write_bytes(buffer.getvalue())
        image = Image.open(buffer).convert("RGB")
        made = T.CenterCrop(size)(T.Resize(size)(image))
        stored[name] = np.asarray(made)
    np.savez_compressed(HERE / "prepared.npz", **stored)


if __name__ == "__main__":
    tiny("square", 0, [(24, 24), (32, 40), (16, 16)])
    tiny("grey", 1, [(24, 24), (48, 24)], num_channels=1, patch_size=6, hidden_act="gelu_new")
    pictures()
