"""Fine-tuning methods, each a few pure functions as in Optax, and the only thing that training code sees of them.

method = gpart(d=23_040, seed=42, targets=r"attention/(query|value)/kernel")
trainable = method.init(params, key)             # a dict of small pytrees: what is trained and saved
params = method.apply(params, trainable, key)    # the adapted model; a key turns on dropout
"""

import jax

from gpart_jax.methods.base import METHODS, SIZES, Method, chain
from gpart_jax.methods.fastfood import fastfood
from gpart_jax.methods.gpart import gpart
from gpart_jax.methods.leaves import bitfit, full, head
from gpart_jax.methods.lora import lora, uni_lora, vera
from gpart_jax.targets import PyTree, Targets

__all__ = [
    "METHODS",
    "SIZES",
    "Method",
    "bitfit",
    "chain",
    "fastfood",
    "from_spec",
    "full",
    "gpart",
    "head",
    "lora",
    "trained_numbers",
    "uni_lora",
    "vera",
]


def from_spec(spec: dict, head_targets: Targets = None) -> Method:
    """A method from plain data: {"name": "gpart", "d": 4096, ...}, with the leaves of `head_targets` trained beside it.

    Raises:
      ValueError: an unknown method, or an option that the method doesn't have.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name not in METHODS:
        raise ValueError(f"Unknown method {name!r}. Choose one of {', '.join(sorted(METHODS))}.")
    if name == "head" and options.get("targets") is None:
        options["targets"] = head_targets
    without_head = name == "bitfit" and options.get("exclude") is None
    try:
        method = METHODS[name](**options | ({"exclude": head_targets} if without_head else {}))
    except TypeError as error:
        raise ValueError(f"Method {name!r} with options {options}: {error}.") from None
    if without_head:
        method.options["exclude"] = None  # an adapter says so of a head that it names itself
    if name == "full":
        return method._replace(head_targets=head_targets)  # already among its leaves
    return method if head_targets is None or name == "head" else chain(method, head(head_targets))


def trained_numbers(trainable: PyTree) -> int:
    """How many numbers a trainable holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(trainable))
