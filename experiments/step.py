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
    if task.language:
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
        if task.language:
            learned = batch["loss_mask"].astype(jnp.float32)
            return jnp.stack([_token_losses(model, adapt, frozen, batch, learned), learned[:, 1:].sum(1)], axis=1)
        return _logits(model, task, adapt, frozen, batch, None)

    everywhere = NamedSharding(jax.tree.leaves(shardings)[0].mesh, P())
    return jax.jit(sharding.of_rows(outputs, method, shardings), out_shardings=everywhere)


def _logits(model, task, adapt, frozen, batch, key):
    """float32 (rows, outputs); a key turns on the model's dropout."""
    inputs = {name: batch[name] for name in task.inputs if name in batch}
    rngs, train = (None, False) if key is None else ({"dropout": key}, batch.get("row", True))
    if model.remat == "none":  # P theta of all layers at once costs least
        return model.apply({"params": adapt(frozen)}, **inputs, train=train, rngs=rngs)
    layers = {name: part for name, part in frozen.items() if name.startswith("layer_")}
    params = adapt({name: part for name, part in frozen.items() if name not in layers}) | layers
    return model.apply({"params": params}, **inputs, train=train, rngs=rngs, adapt=adapt)


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
    """step(trainable, optimizer_state, frozen, batch, key_data, number, tables) -> (trainable, optimizer_state, numbers).

    The first two are donated; the numbers are those of `take_step`. Any `loss_mask` of the batch becomes `weights`. `key_data` is that of the run's key; folding
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
        return take_step(optimizer, trainable, optimizer_state, *gradient_of(trainable, frozen, batch, key, tables))

    return jax.jit(step, donate_argnums=(0, 1))


def trained_shardings(trainable, optimizer_state, shardings) -> tuple:
    """Where a trainable and its optimizer's state lie: of a leaf that is sharded, as of `full`, so are the moments.

    Args:
      shardings: of the frozen params.
    """
    placed = sharding.of_trained(trainable, shardings)
    by_path, everywhere = dict(jax.tree.leaves_with_path(placed)), NamedSharding(jax.tree.leaves(shardings)[0].mesh, P())

    def place_of(path, _):  # a moment's path ends with that of what it is of
        return next((by_path[path[n:]] for n in range(len(path)) if path[n:] in by_path), everywhere)

    return placed, jax.tree.map_with_path(place_of, optimizer_state)


def take_step(optimizer: optax.GradientTransformation, trainable, optimizer_state, loss: jax.Array, gradient):
    """(trainable, optimizer_state, numbers) after a step. A loss or a gradient that isn't finite changes nothing.

    The numbers, each float32 (): loss; gradient_norm; step_length, that of the update of all but the head; of methods that train
    it theta_norm, |theta|. Of an isometric GPart the last two are distances in weight space (P^T P = I).
    """
    norm = optax.global_norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    gradient = jax.tree.map(lambda g: jnp.where(finite, g, jnp.nan), gradient)  # which `make_optimizer` passes over
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, trainable)
    trainable = optax.apply_updates(trainable, updates)
    length = optax.global_norm({name: part for name, part in updates.items() if name != "head"})
    numbers = {"loss": loss, "gradient_norm": norm, "step_length": length}
    if "theta" in trainable:
        numbers["theta_norm"] = optax.global_norm(trainable["theta"])
    return trainable, optimizer_state, numbers
