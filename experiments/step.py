"""One step, for every method, task and mesh: of training the loss, its gradient, the update; of evaluation the outputs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.data import Task
from gpart_jax import sharding
from gpart_jax.methods import Method
from gpart_jax.models.decoder import Decoder
from gpart_jax.sharding import value_and_grad


def make_loss(model: nn.Module, task: Task) -> Callable:
    """loss(adapt, frozen, batch, key=None) -> float32 (): the mean over a batch, with the model's dropout if there is a key.

    `adapt` is a bound method. Cross-entropy; for a regression the squared error, as in the authors' release; for a decoder
    `make_language_loss`.
    """
    if isinstance(model, Decoder):
        return make_language_loss(model)

    def loss(adapt, frozen, batch, key=None):
        logits = _logits(model, task, adapt, frozen, batch, key)
        if task.labels is None:
            return optax.squared_error(logits[:, 0], batch["label"]).mean()
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    return loss


def make_language_loss(model: Decoder) -> Callable:
    """loss(adapt, frozen, batch, key=None) -> float32 (): the mean cross-entropy of the tokens that `loss_mask` names.

    `batch` holds `input_ids` and `attention_mask`, int (rows, length), and `weights`, float32 (rows, length), by which the
    mean over rows is one over the tokens of the whole batch: see `token_weights`.
    """

    def loss(adapt, frozen, batch, key=None):
        del key  # these models have no dropout
        return _token_losses(model, adapt, frozen, batch, batch["weights"]).mean()

    return loss


def make_outputs(model: nn.Module, task: Task, method: Method, shardings) -> Callable:
    """outputs(trainable, frozen, batch, tables) -> what evaluation needs of each row, float32, on every device.

    Logits (rows, outputs); of a decoder (rows, 2): the sum of the cross-entropies of the tokens that loss_mask names, and their
    number. It needs the memory of a training step at most: layers are adapted one by one.
    """

    def outputs(adapt, frozen, batch):
        if isinstance(model, Decoder):
            learned = batch["loss_mask"].astype(jnp.float32)
            return jnp.stack([_token_losses(model, adapt, frozen, batch, learned), learned[:, 1:].sum(1)], axis=1)
        return _logits(model, task, adapt, frozen, batch, None)

    everywhere = NamedSharding(jax.tree.leaves(shardings)[0].mesh, P())
    return jax.jit(sharding.of_rows(outputs, method, shardings), out_shardings=everywhere)


def _logits(model, task, adapt, frozen, batch, key):
    """float32 (rows, outputs); a key turns on the model's dropout."""
    inputs = {name: batch[name] for name in task.inputs if name in batch}
    rngs = None if key is None else {"dropout": key}
    if model.remat == "none":  # P theta of all layers at once costs least
        return model.apply({"params": adapt(frozen)}, **inputs, train=key is not None, rngs=rngs)
    layers = {name: part for name, part in frozen.items() if name.startswith("layer_")}
    params = adapt({name: part for name, part in frozen.items() if name not in layers}) | layers
    return model.apply({"params": params}, **inputs, train=key is not None, rngs=rngs, adapt=adapt)


def _token_losses(model: Decoder, adapt, frozen, batch, weights):
    outside = adapt({name: part for name, part in frozen.items() if name != "layers"})
    params = outside | {"layers": frozen["layers"]}  # those are adapted one by one, within the scan
    return model.apply({"params": params}, batch["input_ids"], batch["attention_mask"], adapt, weights=weights)


def token_weights(loss_mask: jax.Array) -> jax.Array:
    """1 / tokens for each token that the mask names, times rows: float32 (rows, length), from the mask of a whole batch."""
    mask = loss_mask.astype(jnp.float32)
    return mask * (len(mask) / jnp.maximum(mask[:, 1:].sum(), 1))  # nothing predicts a row's first token


def make_train_step(
    loss: Callable, method: Method, optimizer: optax.GradientTransformation, shardings, accumulate: int = 1
) -> Callable:
    """step(trainable, optimizer_state, frozen, batch, key_data, number, tables) -> (trainable, optimizer_state, loss).

    The first two are donated. Any `loss_mask` of the batch becomes `weights`. `key_data` is that of the run's key; folding
    in the step's `number` makes the step's own. `tables` are `method.tables(params)`.
    `shardings`: of `frozen`, and so the mesh. With `accumulate` > 1 a batch goes through the model in so many equal parts,
    one after another: activations take that much less memory, and only gradients of the trained numbers are added up.
    Each part draws its own dropout.
    """
    gradient_of = value_and_grad(loss, method, shardings, accumulate)

    def step(trainable, optimizer_state, frozen, batch, key_data, number, tables=None):
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), number)
        if "loss_mask" in batch:
            batch = dict(batch)
            batch["weights"] = token_weights(batch.pop("loss_mask"))
        value, gradient = gradient_of(trainable, frozen, batch, key, tables)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, trainable)
        return optax.apply_updates(trainable, updates), optimizer_state, value

    return jax.jit(step, donate_argnums=(0, 1))
