"""The dense layer of our models, whose kernel may be more than an array."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gpart_jax import linear


class Dense(nn.Module):
    """Flax's Dense, whose kernel may be any `linear.Kernel` when it is applied."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        y = linear.apply(kernel, x, self.dtype)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(self.dtype)
        return y
