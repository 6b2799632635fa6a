"""Which keys a config has, and which of them make a run what it is. The values are checked where they are used."""

import difflib
import json
from collections.abc import Collection

import ml_collections
from absl import app, flags
from ml_collections import config_flags

_KEYS = {  # None: a value, or a section that is checked by its user
    "seed": None,
    "head_targets": None,
    "method": None,  # by gpart_jax.methods.from_spec
    "model": {"source", "dtype"},
    "mesh": {"data", "fsdp", "tensor"},
    "task": None,  # by experiments.tasks.load_task
    "train": {"epochs", "batch_size", "accumulate", "eval_batch_size", "log_every", "checkpoint_every"},
    "optimizer": {"lr", "head_lr", "weight_decay", "schedule", "warmup", "clip"},
}
_OPTIONAL = {
    "model": {"attention", "dropout", "remat", "shape"},
    "optimizer": {"name", "start", "step"},
    "train": {"compiled", "export", "nonfinite", "patience", "profile", "select", "step_timeout", "steps", "validate_every", "writers"},
}


_NUMBER = int | float
_TYPES = {  # of values that are used without a look at their type; a section is checked by its user else
    "seed": int, "model.source": str | None, "model.dtype": str, "method.name": str, "mesh.data": int, "mesh.fsdp": int, "mesh.tensor": int,
    "task.name": str, "task.max_length": int, "task.image_size": int, "task.holdout": _NUMBER, "task.crop": _NUMBER,
    "task.train_examples": int | None, "task.validation_examples": int | None, "task.test_examples": int, "task.data_dir": str | None,
    "task.source": str, "task.template": str | None, "task.characters": int | None, "task.forgetting": str | None,
    "task.new_tokens": int | None, "train.profile": str | None, "train.compiled": str | None, "optimizer.name": str,
    "optimizer.lr": _NUMBER | None, "optimizer.step": _NUMBER | None, "optimizer.start": _NUMBER | None, "optimizer.head_lr": _NUMBER,
    "optimizer.weight_decay": _NUMBER, "optimizer.warmup": _NUMBER, "optimizer.clip": _NUMBER | None,
}  # fmt: skip


# Keys that don't decide what is learned, but for rounding: they may change while a run is stopped. All others may not.
OPERATIONAL = (
    "mesh.data", "mesh.fsdp", "mesh.tensor", "model.attention", "model.remat", "task.data_dir", "task.forgetting", "task.lengths",
    "task.new_tokens", "task.source", "task.workers",
    "train.eval_batch_size", "train.log_every", "train.checkpoint_every", "train.nonfinite", "train.step_timeout",
    "train.compiled", "train.export", "train.profile", "train.writers",
)  # fmt: skip


# What options that came later did before they came: no older run is another for lacking them.
_BEFORE = {
    "optimizer.name": ("adamw",), "optimizer.start": (0.01,), "train.select": ("heldout",), "method.apply": ("sum",),
    "method.dropout": (0.0,),
}  # fmt: skip


def identity(config: ml_collections.ConfigDict | dict) -> dict:
    """What makes a run what it is: the keys outside OPERATIONAL, such as {"method.d": 4096}, but for options that are off."""
    flat = flatten(config if isinstance(config, dict) else json.loads(config.to_json()))
    return {
        key: value
        for key, value in flat.items()
        if key not in OPERATIONAL and value not in (None, False, *_BEFORE.get(key, ()))
    }


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"method": {"d": 4096}} -> {"method.d": 4096}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError that names the first missing, unknown or non-positive key, and what was probably meant."""
    if "sweep" in config:
        raise ValueError("config.sweep makes this config a grid of runs: start it with python -m experiments.sweep.")
    _check_keys("config", set(config), set(_KEYS))
    for section in ("method", "task", *(section for section, keys in _KEYS.items() if keys)):
        if not isinstance(config[section], ml_collections.ConfigDict):
            raise ValueError(f"config.{section} must be a section of keys, not {config[section]!r}.")
    for section, keys in _KEYS.items():
        if keys:
            _check_keys(f"config.{section}", set(config[section]) - _OPTIONAL.get(section, set()), keys)
    flat = flatten(json.loads(config.to_json()))
    for key, kind in _TYPES.items():
        if key in flat and not isinstance(flat[key], kind):
            raise ValueError(f"config.{key} = {flat[key]!r} is of the wrong type: it must be {getattr(kind, '__name__', kind)}.")
    for name in ("method", "task"):
        if f"{name}.name" not in flat:
            raise ValueError(f"config.{name} lacks the key 'name'. See configs/quickstart.py for a complete config.")
    lengths = [key for key in ("epochs", "steps") if config.train.get(key) is not None]
    if len(lengths) != 1:
        raise ValueError(
            "Set one of config.train.epochs and config.train.steps, the length of a training, and the other to None. "
            f"{'Both are' if lengths else 'Neither is'} set."
        )
    for key in (*lengths, *sorted(_KEYS["train"] - {"epochs"})):
        if not isinstance(config.train[key], int) or config.train[key] < 1:
            raise ValueError(f"config.train.{key} must be a positive integer, not {config.train[key]!r}.")
    for key in ("patience", "validate_every"):
        if (value := config.train.get(key)) is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"config.train.{key} must be a positive integer or None, not {value!r}.")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"config.seed must be an integer from 0 to 2^32 - 1, not {config.seed!r}.")
    if config.model.dtype not in DTYPES:
        raise ValueError(f"config.model.dtype must be one of {', '.join(DTYPES)}, not {config.model.dtype!r}.")
    for key, known in (("nonfinite", NONFINITE), ("select", SELECT)):
        if config.train.get(key, known[0]) not in known:
            raise ValueError(f"config.train.{key} must be one of {', '.join(known)}, not {config.train[key]!r}.")


RATE_FREE = ("prodigy", "dog")  # optimizers that find their rate from the distance moved


def from_flags() -> ml_collections.ConfigDict:
    """The config of --config, with what else the command line sets of it."""
    config = flags.FLAGS.config
    given = config_flags.get_override_values(flags.FLAGS["config"])
    settle_rate(config, given)
    settle_length(config, given)
    return config


def settle_rate(config: ml_collections.ConfigDict, given: Collection[str]) -> None:
    """Of a config's ways to give theta's rate (lr, step, a rate-free optimizer) leaves what `given`, the keys set by hand, name."""
    chosen = {key for key in ("lr", "step") if f"optimizer.{key}" in given}
    if chosen or ("optimizer.name" in given and config.optimizer.name in RATE_FREE):
        for key in {"lr", "step"} - chosen:
            config.optimizer[key] = None


def settle_length(config: ml_collections.ConfigDict, given: Collection[str]) -> None:
    """Of the ways to give a training's length, epochs and steps, leaves what `given`, the keys set by hand, name."""
    chosen = {key for key in ("epochs", "steps") if f"train.{key}" in given}
    for key in {"epochs", "steps"} - chosen if chosen else ():
        if key in config.train:
            config.train[key] = None


DTYPES = ("float32", "bfloat16", "float16")
NONFINITE = ("stop", "skip")  # what to do about a loss that isn't finite: config.train.nonfinite
SELECT = ("heldout", "scored", "last")  # by what the validation is chosen whose adapter is kept and tested: config.train.select


# What runs trained together, in one program, may differ in (experiments/population.py).
OF_ONE_PROGRAM = ("seed", "method.seed", "optimizer.lr", "optimizer.step", "optimizer.head_lr", "optimizer.weight_decay")


def differences(one: ml_collections.ConfigDict, other: ml_collections.ConfigDict) -> list[str]:
    """The keys outside OF_ONE_PROGRAM in which two configs differ."""
    here, there = (flatten(json.loads(config.to_json())) for config in (one, other))
    return sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key) and key not in OF_ONE_PROGRAM)


def _check_keys(where: str, found: set[str], known: set[str]) -> None:
    for key in sorted(found - known):
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known keys: {', '.join(sorted(known))}."
        raise ValueError(f"{where} has an unknown key {key!r}. {hint}")
    for key in sorted(known - found):
        raise ValueError(f"{where} lacks the key {key!r}. See configs/quickstart.py for a complete config.")


def parse_mesh(text: str) -> dict[str, int]:
    """ "data:16,tensor:4" -> {"data": 16, "tensor": 4}."""
    try:
        return {axis: int(size) for axis, size in (part.split(":") for part in text.split(","))}
    except ValueError:
        raise app.UsageError(f"--mesh={text} must look like data:16,tensor:4.") from None
