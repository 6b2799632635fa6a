"""Makes the fixtures beside it: small checkpoints as the authors' release writes them, and the weight deltas they mean.

  python tests/data/peft/make_fixtures.py

Needs NumPy and safetensors alone, and nothing of this repository: the rule is written out here anew, element by element, as
in the description of their format, and the modules of each model are listed by hand.
"""

import json
import math
import pathlib

import numpy as np
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).parent
MASK = 2**64 - 1
HIDDEN, MLP, LAYERS, LABELS = 8, 12, 3, 2


def group(index, seed, d):
    v = (index + seed + 0x9E3779B97F4A7C15) & MASK
    v = ((v ^ (v >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    v = ((v ^ (v >> 27)) * 0x94D049BB133111EB) & MASK
    return (v ^ (v >> 31)) % d


def bert_layer(prefix, n):  # (name, out, in, has a bias), in the order of the modules
    for name in ("query", "key", "value"):
        yield f"{prefix}.encoder.layer.{n}.attention.self.{name}", HIDDEN, HIDDEN, True
    yield f"{prefix}.encoder.layer.{n}.attention.output.dense", HIDDEN, HIDDEN, True
    yield f"{prefix}.encoder.layer.{n}.intermediate.dense", MLP, HIDDEN, True
    yield f"{prefix}.encoder.layer.{n}.output.dense", HIDDEN, MLP, True


def vit_layer(n):
    for name in ("query", "key", "value"):
        yield f"vit.encoder.layer.{n}.attention.attention.{name}", HIDDEN, HIDDEN, True
    yield f"vit.encoder.layer.{n}.attention.output.dense", HIDDEN, HIDDEN, True
    yield f"vit.encoder.layer.{n}.intermediate.dense", MLP, HIDDEN, True
    yield f"vit.encoder.layer.{n}.output.dense", HIDDEN, MLP, True


def decoder_layer(n, qkv_bias):  # 2 heads of 4, one of them for key and value
    prefix = f"model.layers.{n}"
    yield f"{prefix}.self_attn.q_proj", HIDDEN, HIDDEN, qkv_bias
    yield f"{prefix}.self_attn.k_proj", HIDDEN // 2, HIDDEN, qkv_bias
    yield f"{prefix}.self_attn.v_proj", HIDDEN // 2, HIDDEN, qkv_bias
    yield f"{prefix}.self_attn.o_proj", HIDDEN, HIDDEN, False
    yield f"{prefix}.mlp.gate_proj", MLP, HIDDEN, False
    yield f"{prefix}.mlp.up_proj", MLP, HIDDEN, False
    yield f"{prefix}.mlp.down_proj", HIDDEN, MLP, False


COMMON = dict(hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=MLP)
TEXT = dict(vocab_size=11, max_position_embeddings=16, hidden_act="gelu", type_vocab_size=1,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-5)  # fmt: skip
DECODER = dict(vocab_size=11, max_position_embeddings=16, num_key_value_heads=1, rms_norm_eps=1e-6, rope_theta=1e4,
               hidden_act="silu", tie_word_embeddings=False)  # fmt: skip
MODELS = {  # config.json, and the modules of each layer
    "bert": (COMMON | TEXT, lambda n: bert_layer("bert", n)),
    "roberta": (COMMON | TEXT, lambda n: bert_layer("roberta", n)),
    "vit": (COMMON | dict(image_size=8, patch_size=4, num_channels=1), vit_layer),
    "llama": (COMMON | DECODER, lambda n: decoder_layer(n, False)),
    "qwen2": (COMMON | DECODER, lambda n: decoder_layer(n, True)),
}
CASES = {  # model, what is targeted (by hand; and as the config says it), and the rest of the config
    "bert_bias": ("bert", lambda name: name.endswith((".key", "attention.output.dense", "intermediate.dense")),
                  dict(target_modules=["intermediate.dense", "key", "attention.output.dense"], bias="all", d=37,
                       proj_seed=-5)),
    "roberta_blocks": ("roberta", lambda name: name.endswith((".query", ".value")) and ".1." not in name,
                       dict(target_modules=["value", "query"], partition_scope="transformer_block", isometric=False, d=13,
                            proj_seed=2**64 - 1, layers_to_transform=[0, 2], bias="gpart_only")),
    "vit_blocks": ("vit", lambda name: name.endswith((".query", ".value")),
                   dict(target_modules=["query", "value"], partition_scope="transformer_block", d=20, proj_seed=7)),
    "vit_5": ("vit", lambda name: name.endswith((".query", ".value", ".output.dense")) and "attention.output" not in name,
              dict(target_modules=["q_proj", "v_proj", "fc2"], isometric=False, d=20, proj_seed=7)),
    "llama": ("llama", lambda name: name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")),
              dict(target_modules=["o_proj", "q_proj", "v_proj", "k_proj"], d=50, proj_seed=42)),
    "llama_all": ("llama", lambda name: True,
                  dict(target_modules=r"model\.layers\.\d+\..*_proj", d=1000, proj_seed=3, isometric=False)),
    "qwen2_bias": ("qwen2", lambda name: name.endswith(("q_proj", "v_proj", "down_proj")),
                   dict(target_modules=["down_proj", "q_proj", "v_proj"], bias="all", d=31, proj_seed=1,
                        assignment_backend="implicit_stateless_v1")),
    "qwen2_blocks": ("qwen2", lambda name: name.endswith(("q_proj", "v_proj")),
                     dict(target_modules=["q_proj", "v_proj"], partition_scope="transformer_block", bias="all", d=32,
                          proj_seed=11)),
}  # fmt: skip


def deltas(modules, theta, seed, bias, isometric):
    """P theta of those modules, by tensor name."""
    d, entries = len(theta), []
    for name, rows, columns, has_bias in modules:
        entries += [(f"{name}.weight", i, j) for i in range(rows) for j in range(columns)]
        entries += [(f"{name}.bias", i, None) for i in range(rows) if has_bias and bias != "none"]
    groups = [group(index, seed, d) for index in range(len(entries))]
    sizes = [max(groups.count(g), 1) for g in range(d)]
    arrays = {}
    for name, rows, columns, has_bias in modules:
        arrays[f"{name}.weight"] = np.zeros((rows, columns))
        if has_bias and bias != "none":
            arrays[f"{name}.bias"] = np.zeros(rows)
    for (name, i, j), g in zip(entries, groups):
        arrays[name][i if j is None else (i, j)] = theta[g] / (math.sqrt(sizes[g]) if isometric else 1)
    return arrays


def main():
    for number, (case, (family, wanted, options)) in enumerate(CASES.items()):
        random = np.random.default_rng(number)
        described, layer = MODELS[family]
        config = dict(
            peft_type="GPART", peft_version="0.18.2.dev0", base_model_name_or_path=None, revision=None, auto_mapping=None,
            inference_mode=True, bias="none", fan_in_fan_out=False, gpart_dropout=0.0, init_bound=0.0, isometric=True,
            partition_scope="global", projection_type="partition", grouping_strategy="random", layers_pattern=None,
            assignment_backend="stateless", layers_to_transform=None, modules_to_save=None, task_type=None,
        ) | options  # fmt: skip
        layers = [[module for module in layer(n) if wanted(module[0])] for n in range(LAYERS)]
        layers = [modules for modules in layers if modules]
        theta = random.standard_normal(config["d"]).astype(np.float32)
        expected = {}
        if config["partition_scope"] == "global":
            modules = sum(layers, [])
            expected |= deltas(modules, theta, config["proj_seed"], config["bias"], config["isometric"])
        else:
            start = 0
            for n, modules in enumerate(layers):
                width = config["d"] // len(layers) + (n < config["d"] % len(layers))
                own, seed = theta[start : start + width], config["proj_seed"] + n
                expected |= deltas(modules, own, seed, config["bias"], config["isometric"])
                start += width
        tensors = {"base_model.gpart_theta_d": theta}
        heads = {"bert": ["classifier"], "vit": ["classifier"], "roberta": ["classifier.dense", "classifier.out_proj"]}
        for name in heads.get(family, []):
            shape = (HIDDEN, HIDDEN) if name.endswith("dense") else (LABELS, HIDDEN)
            for ending, array in (
                ("weight", random.standard_normal(shape)),
                ("bias", random.standard_normal(shape[0])),
            ):
                expected[f"{name}.{ending}"] = array
                tensors[f"base_model.model.{name}.{ending}"] = array.astype(np.float32)
            config["modules_to_save"], config["task_type"] = ["classifier", "score"], "SEQ_CLS"
        folder = HERE / case
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(described | {"model_type": family}) + "\n")
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        save_file({name: x.astype(np.float32) for name, x in expected.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
