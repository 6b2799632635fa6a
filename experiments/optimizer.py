"""AdamW with a learning rate for theta and one for the head, as all recipes of the paper have it."""

import jax
import optax

SCHEDULES = ("linear", "cosine", "constant")


def make_optimizer(
    total_steps: int,
    *,
    lr: float,
    head_lr: float,
    weight_decay: float = 0.0,
    schedule: str = "linear",
    warmup: float = 0.06,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with two learning rates.

    Args:
      total_steps: of the whole training.
      lr: peak learning rate of everything but the head.
      head_lr: peak learning rate of the leaves under trainable["head"].
      weight_decay: on theta and on matrices; never on biases, norms and VeRA's vectors, stacked over layers or not.
      schedule: "linear" or "cosine" decay to zero, or "constant".
      warmup: fraction of the steps in which the rate rises linearly from zero.
      clip: longest norm of the whole gradient; a longer one is scaled down to it. None: any.

    A gradient with a NaN or an infinity changes nothing, neither what is trained nor the optimizer's state.

    Raises:
      ValueError: an unknown schedule, or a warmup outside [0, 1].
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"Unknown schedule {schedule!r}. Choose one of {', '.join(SCHEDULES)}.")
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup = {warmup} is a fraction of the steps; it must be in [0, 1].")

    def adamw(peak):
        return optax.adamw(
            _schedule(schedule, peak, total_steps, round(warmup * total_steps)), weight_decay=weight_decay, mask=_decays
        )

    optimizer = optax.partition({"head": adamw(head_lr), "main": adamw(lr)}, _labels)
    if clip is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer)
    return optax.apply_if_finite(optimizer, max_consecutive_errors=2**31 - 1)


def learning_rate(step: int, total_steps: int, *, lr: float, schedule: str, warmup: float, **_) -> float:
    """That of a step, counted from 0, of all but the head: config.optimizer's, as `make_optimizer` has it."""
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
