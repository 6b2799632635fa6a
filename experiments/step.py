"""One training step, for every method and task: the loss, its gradient, the update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from experiments.data import INPUTS, Task
from gpart_jax.methods import Method


def make_loss(model: nn.Module, method: Method, task: Task) -> Callable:
    """loss(trainable, frozen, batch, key=None) -> float32 (): the mean over a batch, with dropout if there is a key.

    Cross-entropy; for a regression the squared error, as in the authors' release.
    """

    def loss(trainable, frozen, batch, key=None):
        method_key, model_key = (None, None) if key is None else jax.random.split(key)
        params = method.apply(frozen, trainable, method_key)
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        rngs = None if key is None else {"dropout": model_key}
        logits = model.apply({"params": params}, **inputs, train=key is not None, rngs=rngs)  # (batch, outputs)
        if task.labels is None:
            return optax.squared_error(logits[:, 0], batch["label"]).mean()
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    return loss


def make_train_step(loss: Callable, optimizer: optax.GradientTransformation, accumulate: int = 1) -> Callable:
    """step(trainable, optimizer_state, frozen, batch, key_data, number) -> (trainable, optimizer_state, loss).

    The first two are donated. `key_data` is that of the run's key; folding in the step's `number` makes the step's own.
    With `accumulate` > 1 a batch goes through the model in so many equal parts, one after another: activations take that
    much less memory, and only gradients of the trained numbers are added up. Each part draws its own dropout.
    """

    value_and_gradient = jax.value_and_grad(loss)

    def accumulated(trainable, frozen, batch, key):
        def add(total, part):
            return jax.tree.map(jnp.add, total, value_and_gradient(trainable, frozen, *part)), None

        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), trainable))
        total, _ = jax.lax.scan(add, zeros, (parts, jax.random.split(key, accumulate)))
        return jax.tree.map(lambda x: x / accumulate, total)

    def step(trainable, optimizer_state, frozen, batch, key_data, number):
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), number)
        gradient_of = value_and_gradient if accumulate == 1 else accumulated
        value, gradient = gradient_of(trainable, frozen, batch, key)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, trainable)
        return optax.apply_updates(trainable, updates), optimizer_state, value

    return jax.jit(step, donate_argnums=(0, 1))
