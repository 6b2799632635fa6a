"""Makes losses.json: what PEFT's LoRA, VeRA and Uni-LoRA lose in twenty steps.

  pip install torch transformers peft==0.21.2 -e '.[experiments]'
  python tests/data/peft_methods/make_fixtures.py

Random parts that a seed of PyTorch's gives there, and our own hashes here, are ours: VeRA's two matrices, and which entry of
Uni-LoRA's factors belongs to which number of theta. All else, forward, backward and AdamW, is PEFT's and PyTorch's.
"""

import json
import pathlib
import re
import sys
import tempfile

import numpy as np
import peft
import torch
import transformers

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2]))

from gpart_jax import canonical_layout, make_partition  # noqa: E402
from gpart_jax.methods import from_spec  # noqa: E402
from gpart_jax.models import pretrained  # noqa: E402
from gpart_jax.partition import group_ids  # noqa: E402
from tests.interop.peft_methods import D, LR, SEED, SPECS, case, start  # noqa: E402

MODULES = ["query", "value"]
CONFIGS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=MODULES),
    "vera": peft.VeraConfig(r=8, target_modules=MODULES),
    "uni_lora": peft.UniLoraConfig(r=4, theta_d_length=D, target_modules=MODULES),
}


def path_of(name: str) -> str:
    """Our path of a module of theirs."""
    number, module = re.search(r"layer\.(\d+)\.attention\.self\.(query|value)$", name).groups()
    return f"layer_{number}/attention/{module}/kernel"


def begin(name, theirs, trainable, tables, params):
    """Puts our beginning into their modules."""
    layers = {path_of(n): m for n, m in theirs.named_modules() if re.search(r"attention\.self\.(query|value)$", n)}
    tensor = lambda x: torch.tensor(np.asarray(x, np.float32))
    if name == "lora":
        for path, layer in layers.items():
            layer.lora_A["default"].weight.data = tensor(trainable["lora"][path]["a"].T)
            layer.lora_B["default"].weight.data = tensor(trainable["lora"][path]["b"].T)
    elif name == "vera":
        for layer in layers.values():
            layer.vera_A["default"], layer.vera_B["default"] = tensor(tables["a"].T), tensor(tables["b"].T)
    else:
        theirs.base_model.unilora_theta_d["default"].data = tensor(trainable["theta"])
        shapes = {path: {"a": np.zeros((32, 4), np.float32), "b": np.zeros((4, 32), np.float32)} for path in layers}
        partition = make_partition(canonical_layout(shapes), D, SEED)
        rho, scale = np.asarray(partition.permutations[0]), np.asarray(partition.scales[0])
        for leaf in partition.layout.leaves:
            path, factor = leaf.path.rsplit("/", 1)
            index = np.arange(leaf.size).reshape(leaf.shape).astype(np.uint64) + np.uint64(leaf.offset)
            ids = group_ids("balanced-v1", D, SEED, index, rho).T
            indices = getattr(layers[path], f"unilora_indices_{factor.upper()}")
            scales = getattr(layers[path], f"unilora_scales_{factor.upper()}")
            assert indices["default"].shape == ids.shape
            indices["default"], scales["default"] = torch.tensor(ids.astype(np.int64)), tensor(scale[ids])


def main():
    model, params, batches = case()
    losses = {}
    for name, config in CONFIGS.items():
        method = from_spec(SPECS[name])
        with tempfile.TemporaryDirectory() as directory:
            pretrained.save(directory, model, params)
            base = transformers.AutoModelForSequenceClassification.from_pretrained(directory, attn_implementation="eager")
        theirs = peft.get_peft_model(base, config).eval()
        begin(name, theirs, start(name, method, params), method.tables(params), params)
        trained = [x for x in theirs.parameters() if x.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
        losses[name] = []
        for batch in batches:
            inputs = {key: torch.tensor(batch[key]).long() for key in ("input_ids", "attention_mask")}
            optimizer.zero_grad()
            loss = theirs(**inputs, labels=torch.tensor(batch["label"]).long()).loss
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
        print(name, sum(x.numel() for x in trained), losses[name][0], losses[name][-1])
    what = f"PEFT {peft.__version__}, transformers {transformers.__version__}, PyTorch {torch.__version__}"
    (HERE / "losses.json").write_text(json.dumps({"what": what, **losses}, indent=1) + "\n")


if __name__ == "__main__":
    main()
