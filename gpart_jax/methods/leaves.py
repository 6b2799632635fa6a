"""Methods that train leaves of the model themselves: a head, the biases, everything.

What they train is float32 whatever the model's leaves are: an update below half of bfloat16's last place would be lost. The
adapted leaf has the frozen one's dtype.
"""

import jax.numpy as jnp

from gpart_jax.methods.base import Method, layer_of, one_of, registered
from gpart_jax.targets import Targets, named_leaves, replace_leaves, select, wide


@registered()
def head(targets: Targets) -> Method:
    """Trains the targeted leaves themselves: a task head alone, or beside another method through `chain`.

    Returns:
      A `Method` that trains {"head": {path: array}}, float32, starting from the values in params.
    """
    return _leaves("head", targets)._replace(head_targets=targets)


@registered()
def full(targets: Targets = None) -> Method:
    """Full fine-tuning: trains every floating-point leaf, or the targeted ones.

    Returns:
      A `Method` that trains {"params": {path: array}}, float32, starting from the values in params.
    """
    return _leaves("params", targets)


@registered()
def bitfit(targets: Targets = r"(^|/)bias$", exclude: Targets = None) -> Method:
    """BitFit: trains every bias, those of norms included (Ben Zaken et al., arXiv 2106.10199).

    Args:
      targets: as in `canonical_layout`.
      exclude: leaves to leave out, such as those of a head that another method trains.

    Returns:
      A `Method` that trains {"bias": {path: array}}, float32, starting from the values in params.
    """
    return _leaves("bias", targets, exclude)


def given(targets: Targets) -> Method:
    """Puts leaves into their places that belong to an adapter but were not trained, as a module that no file holds.

    Returns:
      A `Method` of {"given": {path: array}}.
    """
    return _leaves("given", targets)


def _leaves(name: str, targets: Targets, exclude: Targets = None) -> Method:
    def init(params, key):
        del key
        left_out = set() if exclude is None else set(select(params, exclude))
        chosen = {path: leaf for path, leaf in select(params, targets).items() if path not in left_out}
        # Copies: a train step may donate its trainable, and params must survive that.
        return {name: {path: jnp.array(leaf, wide(leaf.dtype), copy=True) for path, leaf in chosen.items()}}

    def bind(params, trainable, key=None, on_mesh=False, tables=None, rows=None):
        del params, key, tables, rows
        trained = one_of(trainable[name], on_mesh)

        def adapt(part, layer=None):
            leaves = {path: leaf for path, leaf in named_leaves(part) if path in trained}
            mine = {path: layer_of(trained[path], layer).astype(leaf.dtype) for path, leaf in leaves.items()}
            return replace_leaves(part, mine)

        return adapt

    return Method(init, bind, linear=True)
