"""Mathematical reasoning: MetaMathQA, tested on GSM8K and MATH, after the authors' recipe (arXiv 2605.14841).

Config:   --config=configs/math.py:<model>[,method]
          model: llama31_8b, gemma_7b, qwen25_7b, qwen25_3b, qwen25_05b    method: gpart (default), lora
Expected: the paper's table, whose figures are not at hand.
Command:  python -m launch.dryrun --config=configs/math.py:llama31_8b --mesh=data:16,tensor:4 --devices=64
          So far these configs serve the dry run: reading the data and the weights is still to come.
Device:   7B and 8B: see docs/meshes.md for what fits.
"""

import ml_collections

MODELS = {  # hub name, d
    "llama31_8b": ("meta-llama/Llama-3.1-8B", 524_288),
    "gemma_7b": ("google/gemma-7b", 524_288),
    "qwen25_7b": ("Qwen/Qwen2.5-7B", 524_288),
    "qwen25_3b": ("Qwen/Qwen2.5-3B", 524_288),
    "qwen25_05b": ("Qwen/Qwen2.5-0.5B", 131_072),
}
METHODS = ("gpart", "lora")


def get_config(arguments: str = "qwen25_05b") -> ml_collections.ConfigDict:
    name, _, method = arguments.partition(",")
    method = method or "gpart"
    if name not in MODELS:
        raise ValueError(f"configs/math.py has no model {name!r}. Choose one of {', '.join(MODELS)}.")
    if method not in METHODS:
        raise ValueError(f"configs/math.py has no method {method!r}. Choose one of {', '.join(METHODS)}.")
    source, d = MODELS[name]

    config = ml_collections.ConfigDict()
    config.seed = 42  # data order, dropout; and the partition

    config.model = ml_collections.ConfigDict()
    config.model.source = source  # a directory or a hub name
    config.model.dtype = "bfloat16"  # of the computation and of the frozen weights; theta is float32
    config.model.remat = (
        "full"  # what is made again on the way back: all of a layer, or "dots": all but its projections
    )

    config.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # devices along each axis; -1: the rest

    config.task = ml_collections.ConfigDict()
    config.task.name = "metamathqa"
    config.task.max_length = 2048  # tokens

    attention = r"attention/(query|key|value|out)/kernel$"
    config.method = ml_collections.ConfigDict(
        {
            "gpart": dict(name="gpart", d=d, targets=attention, scheme="balanced-v1", dropout=0.05, stacked="^layers"),
            "lora": dict(name="lora", rank=8, alpha=8, targets=attention),  # rank and scale are ours
        }[method]
    )
    if method == "gpart":
        config.method.seed = config.get_oneway_ref("seed")  # an override of one leaves the other its own
    config.head_targets = ml_collections.config_dict.placeholder(str)  # no head is trained

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 2
    config.train.batch_size = 16
    config.train.accumulate = 1  # parts of a batch that go through the model one after another, to need less memory
    config.train.eval_batch_size = 16
    config.train.log_every = 50  # steps
    config.train.checkpoint_every = 500  # steps

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.lr = 2e-4  # peak
    config.optimizer.head_lr = 0.0
    config.optimizer.weight_decay = 0.01
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = 0.05  # of the steps
    config.optimizer.clip = 1.0  # the gradient's norm, at most
    return config
