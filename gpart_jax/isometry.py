"""What P^T P = I says about the length of a step: one length serves every d.

An optimizer of Adam's kind moves each of d coordinates by about its rate, so a step of theta is about rate * sqrt(d) long. P keeps
lengths, so the weights move as far. With one rate for all d a small theta hardly moves: d = 64 goes an eighth as far as d = 4,096.
"""

import math

import jax
import jax.numpy as jnp

from gpart_jax.targets import Layout, Params, Targets, named_leaves, select


def learning_rate(step: float, d: int) -> float:
    """The rate of Adam (or Lion, or another whose update has entries of about 1) for steps of a length in weight space.

    An update u of d entries of about 1 has |u| of about sqrt(d), and |P (rate u)| = rate |u| since P^T P = I: so rate = step /
    sqrt(d). With warm-up and decay this is the peak, and `step` the length of the longest steps. True of `gpart_transform` and
    `gpart` unless isometric=False, and on average of `fastfood`; not of LoRA and its kin, whose maps stretch lengths.

        optimizer = optax.adamw(gpart_jax.learning_rate(2.56, d))

    Args:
      step: the length, in the units of the weights; a share of `base_norm` carries over between models.
      d: the length of theta.
    """
    return step / math.sqrt(d)


def base_norm(params: Params, targets: Targets | Layout = None) -> float:
    """|W0|: the Euclidean norm of all adapted weights together, the unit for |theta| and for the length of a step.

    Args:
      params, targets: as in `gpart_transform`; arrays, on one device or on several.
    """
    if isinstance(targets, Layout):
        leaves = dict(named_leaves(params))
        chosen = [leaves[leaf.path] for leaf in targets.leaves]
    else:
        chosen = list(select(params, targets).values())
    return float(jax.jit(_norm)(chosen))


def _norm(leaves):
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves))
