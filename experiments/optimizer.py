"""An optimizer for theta and AdamW for the head, each with a rate of its own, as all recipes of the paper have it."""

import functools
import math

import jax
import ml_collections
import optax
from optax import contrib

from experiments.config import RATE_FREE
from gpart_jax.isometry import base_norm
from gpart_jax.isometry import learning_rate as rate_of_step
from gpart_jax.methods import Method

SCHEDULES = ("linear", "cosine", "constant")
NAMES = ("adamw", *RATE_FREE)
START = 1e-6  # of a rate-free optimizer, where a map is no isometry: optax's own


def make_optimizer(
    total_steps: int,
    *,
    lr: float,
    head_lr: float,
    name: str = "adamw",
    start: float | None = None,
    weight_decay: float = 0.0,
    schedule: str = "linear",
    warmup: float = 0.06,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """An optimizer of theta, and AdamW (Loshchilov and Hutter, arXiv 1711.05101) of the head.

    Args:
      total_steps: of the whole training.
      lr: peak learning rate of everything but the head. Of a rate-free optimizer a factor of the rate that it finds.
      head_lr: peak learning rate of the leaves under trainable["head"].
      name: "adamw"; "prodigy" (arXiv 2306.06101) or "dog" (arXiv 2302.12022), which estimate their rate from the distance moved.
      start: of those, the first estimate: Prodigy's of each coordinate's distance, DoG's of the whole.
      weight_decay: on theta and on matrices; never on biases, norms and VeRA's vectors, stacked over layers or not. Prodigy's is on
        everything but the head.
      schedule: "linear" or "cosine" decay to zero, or "constant".
      warmup: fraction of the steps in which the rate rises linearly from zero.
      clip: longest norm of the whole gradient; a longer one is scaled down to it. None: any.

    A gradient with a NaN or an infinity changes nothing, neither what is trained nor the optimizer's state.

    Raises:
      ValueError: an unknown schedule or name, or a warmup outside [0, 1].
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"Unknown schedule {schedule!r}. Choose one of {', '.join(SCHEDULES)}.")
    if name not in NAMES:
        raise ValueError(f"Unknown optimizer {name!r}. Choose one of {', '.join(NAMES)}.")
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup = {warmup} is a fraction of the steps; it must be in [0, 1].")
    rate = functools.partial(_schedule, schedule, total=total_steps, warmup=round(warmup * total_steps))

    def adamw(peak):
        return optax.adamw(rate(peak), weight_decay=weight_decay, mask=_decays)

    main = {
        "adamw": adamw,
        # Without the safeguard a first rate of 0, as a warm-up has it, would make its estimate NaN.
        "prodigy": lambda peak: contrib.prodigy(
            rate(peak), estim_lr0=start or START, weight_decay=weight_decay, safeguard_warmup=True
        ),
        "dog": lambda peak: contrib.dog(rate(peak), ("distance", start or START), weight_decay=weight_decay, mask=_decays),
    }[name](lr)
    optimizer = optax.partition({"head": adamw(head_lr), "main": main}, _labels)
    if clip is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer)
    return optax.apply_if_finite(optimizer, max_consecutive_errors=2**31 - 1)


def options_of(config: ml_collections.ConfigDict, method: Method, params=None) -> dict:
    """config.optimizer as `make_optimizer` takes it: a step's length as a rate, a share of |W0| as a first estimate.

    Args:
      params: the frozen model; None where it isn't there, for an optimizer whose state alone is asked for.

    Raises:
      ValueError: not exactly one of lr and step; either of them for a rate-free optimizer; a step of what is no isometry.
    """
    options = dict(config.optimizer)
    name, step, start = options.get("name", "adamw"), options.pop("step", None), options.pop("start", None)
    given = [key for key, value in (("lr", options["lr"]), ("step", step)) if value is not None]
    if name in RATE_FREE:
        if given:
            raise ValueError(f"{name} finds its own rate: leave out config.optimizer.{given[0]} (set it to None).")
        options["lr"] = 1.0
        if start is not None and method.isometric and params is not None:
            distance = start * base_norm(params, method.options["targets"])
            options["start"] = distance / math.sqrt(method.options["d"]) if name == "prodigy" else distance
        return options
    if len(given) != 1:
        raise ValueError(
            "Set one of config.optimizer.lr, a rate, and config.optimizer.step, the length of a step in weight space, and the other "
            f"to None. {'Both are' if given else 'Neither is'} set."
        )
    if step is not None:
        if not method.isometric:
            why = "with isometric=False" if method.name == "gpart" else "whose map stretches lengths"
            raise ValueError(
                f"config.optimizer.step is a length in weight space, and {method.name}, {why}, has no one rate for it: that takes an "
                "isometry (gpart, fastfood). Set config.optimizer.lr, and step to None."
            )
        options["lr"] = rate_of_step(step, method.options["d"])
    return options


def rate_at(step: int, total_steps: int, *, lr: float, schedule: str, warmup: float, **_) -> float:
    """That of a step, counted from 0, of all but the head, as `make_optimizer` has it."""
    return float(_schedule(schedule, lr, total_steps, round(warmup * total_steps))(step))


def _schedule(name: str, peak: float, total: int, warmup: int) -> optax.Schedule:
    decay = {
        "linear": lambda steps: optax.linear_schedule(peak, 0.0, steps),
        "cosine": lambda steps: optax.cosine_decay_schedule(peak, steps),
        "constant": lambda steps: optax.constant_schedule(peak),
    }[name](max(1, total - warmup))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), decay], [warmup])


def _labels(trainable):
    return {name: "head" if name == "head" else "main" for name in trainable}


def _decays(trainable):
    def decays(path, x):
        group, name = path[0].key, path[-1].key.rpartition("/")[-1]
        if group in ("theta", "vera"):
            return group == "theta"
        return x.ndim > 1 and name not in ("bias", "scale")  # which are matrices too where layers are stacked

    return jax.tree.map_with_path(decays, trainable)
