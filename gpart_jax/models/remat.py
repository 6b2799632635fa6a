"""What the backward pass finds of a model's layers, and what it makes again (`jax.checkpoint`)."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from gpart_jax.models.attention import KEPT

_policies = jax.checkpoint_policies
_attention = _policies.save_only_these_names(KEPT)
POLICIES: dict[str, Callable] = {
    "full": _policies.nothing_saveable,  # a layer's input alone is kept
    # And what its projections gave, and a TPU's attention kernel.
    "dots": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _attention),
    "offload": _policies.offload_dot_with_no_batch_dims("device", "pinned_host"),  # the former lie in the host's memory meanwhile
}
CHOICES = ("none", *POLICIES)  # "none": all is kept


def remat(function: Any, choice: str, wrap: Callable = jax.checkpoint, **options: Any) -> Any:
    """`function`, a layer, under the choice's policy. The layer's adapted weights are always made again, but for "none".

    Args:
      choice: of CHOICES.
      wrap: `jax.checkpoint`, or Flax's.
      options: of `wrap`.

    Raises:
      ValueError: an unknown choice.
    """
    if choice not in CHOICES:
        raise ValueError(f"config.model.remat = {choice!r} must be one of {', '.join(CHOICES)}.")
    return function if choice == "none" else wrap(function, policy=POLICIES[choice], **options)


def remat_layer(layer: type[nn.Module], name: str, choice: str, adapt: Callable | None) -> type[nn.Module]:
    """The class of a model's layer `name`, called with (hidden, mask, rows), under the choice's policy.

    Args:
      adapt: a bound method (`Method.bind`), that adapts its params within, where they are gathered too; None: they are adapted.
    """
    if adapt is not None:
        layer = nn.map_variables(layer, "params", lambda params: {"params": adapt({name: params["params"]})[name]})
    return remat(layer, choice, nn.remat)
