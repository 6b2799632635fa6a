"""Floating-point operations of a step, and the share of the devices' peak that they are (MFU, arXiv 2204.02311)."""

import math

import jax

PEAKS = {  # bfloat16 operations a second in matrix products, by a part of jax.Device.device_kind; from the makers' pages
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}


def peak(device: jax.Device) -> float | None:
    """Operations a second that a device does at most; None: it isn't known."""
    return next((flops for name, flops in PEAKS.items() if name in device.device_kind), None)


def matmul_flops(jaxpr, share: int) -> float:
    """Operations of one device in matrix products outside of its kernels, all of its loops' trips counted.

    Args:
      jaxpr: of the step; inside its shard_map over "data" and "fsdp" shapes are those of one device, but for "tensor".
      share: the size of "tensor", which divides the matrix products evenly.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += (
                2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted) / share
            )
        if equation.primitive.name == "pallas_call":
            continue
        trips = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(equation.params):
            if hasattr(inner, "eqns"):  # a jaxpr, as the body of a loop or of a function
                total += trips * matmul_flops(inner, share)
    return total
