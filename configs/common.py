"""What the configs share: the methods at a recipe's size, and how a run goes on, apart from what it learns."""

import ml_collections
from ml_collections import config_dict

METHODS = ("gpart", "lora", "uni_lora", "vera", "fastfood", "bitfit", "head", "full")


def method(name: str, targets: str, d: int, **changes) -> ml_collections.ConfigDict:
    """A method's options; `changes` are a recipe's own."""
    options = {
        "gpart": dict(
            d=d, targets=targets, scheme="balanced-v1", scope="global", isometric=True, dropout=0.0, init_bound=0.0,
            # In bfloat16 "sum" loses a small theta; "dither" keeps it on average, and "split" applies W0 and P theta apart.
            apply="sum",
        ),
        # apply: "factors", as PEFT computes it, or "sum", the sum with W0. dropout: on what goes into the factors.
        "lora": dict(rank=8, alpha=8, targets=targets, dropout=0.0, apply="factors"),
        "uni_lora": dict(d=d, rank=4, alpha=4, targets=targets, init_bound=0.02, dropout=0.0, apply="factors"),
        "vera": dict(rank=256, targets=targets, dropout=0.0, apply="factors"),
        "fastfood": dict(d=d, targets=targets),
        "bitfit": {},
        "head": {},
        "full": {},
    }[name]  # fmt: skip
    return ml_collections.ConfigDict({"name": name} | options | changes)


def has_seed(name: str) -> bool:
    """Whether a method has a seed of its own."""
    return name in ("gpart", "uni_lora", "vera", "fastfood")


def optimizer() -> ml_collections.ConfigDict:
    """config.optimizer: how theta's rate is found, beside what a recipe sets."""
    config = ml_collections.ConfigDict()
    config.name = "adamw"  # or "prodigy", "dog", which find their own rate: lr and step are None then
    config.lr = config_dict.placeholder(float)  # peak rate of all but the head
    config.step = config_dict.placeholder(float)  # in its place the length of a step in weight space: the rate is step / sqrt(d)
    config.start = 0.01  # of prodigy and dog: the first estimate of the distance to be moved, a share of |W0|
    return config


def train(**sizes: int) -> ml_collections.ConfigDict:
    """config.train: the sizes, and what may be set beside them."""
    config = ml_collections.ConfigDict(sizes)
    config.steps = config_dict.placeholder(int)  # in place of epochs, which are None then: how many there are
    config.validate_every = config_dict.placeholder(int)  # steps; None: each epoch
    config.patience = config_dict.placeholder(int)  # validations in a row without a better one, which end it; None: nothing does
    # Which validation's adapter is kept and tested: the best on "heldout" training data; the "last"; or the best on the test set that is
    # then "scored", as most published tables have it: then results.json has all three.
    config.select = "heldout"
    config.nonfinite = "stop"  # or "skip": what to do about a loss that isn't finite
    config.step_timeout = config_dict.placeholder(float)  # seconds for log_every steps; None: any
    config.writers = ("tensorboard",)  # of logger.WRITERS, beside the console and metrics.jsonl: tensorboard, wandb
    config.profile = config_dict.placeholder(str)  # "10:15": leaves a trace of these steps in workdir/profile
    # A folder for compiled programs, which the next run finds there; None: ~/.cache/gpart_jax/compiled, or what JAX was told; "": none.
    config.compiled = config_dict.placeholder(str)
    return config
