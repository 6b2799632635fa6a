"""The loss of a language model over blocks of tokens, so that the logits of a whole batch never exist.

In the comments B is the batch, L the length, H the hidden size and V the vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

NUMBERS = 2**27  # logits of a block at most, 512 MiB


def token_losses(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array, soft_cap: float | None = None
) -> jax.Array:
    """Each row's sum of weighted cross-entropies of softmax(hidden head).

    The gradient costs no more than that of logits at once. Where `head` is frozen, a block's gradient of the hidden states is
    made with its loss, while its logits are there; else its logits are made again. No forward-mode derivative.

    Args:
      hidden: (B, L, H), in the dtype of the products.
      head: (H, V); "tensor" may divide V.
      labels: int (B, L), the token to predict at each place.
      weights: (B, L), float32 in effect; 0 where nothing is to be predicted. Without a derivative.
      soft_cap: logits z become cap * tanh(z / cap).

    Returns:
      float32 (B,).
    """
    return _losses(hidden, head.astype(hidden.dtype), labels, weights.astype(jnp.float32), soft_cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _losses(hidden, head, labels, weights, soft_cap):
    def block(total, part):
        return total + _block(head, soft_cap, *part)[0], None

    return jax.lax.scan(block, jnp.zeros_like(weights[:, 0]), _cut(head, hidden, labels, weights))[0]


def _forward(hidden, head, labels, weights, soft_cap):
    trained = head.perturbed
    hidden, head, labels, weights = (x.value for x in (hidden, head, labels, weights))
    if trained:
        return _losses(hidden, head, labels, weights, soft_cap), (hidden, head, labels, weights)

    def block(total, part):
        losses, gradient = _block(head, soft_cap, *part)
        return total + losses, _times_head(gradient, head)

    losses, gradient = jax.lax.scan(block, jnp.zeros_like(weights[:, 0]), _cut(head, hidden, labels, weights))
    return losses, (_joined(gradient, hidden.shape),)


def _backward(soft_cap, kept, cotangent):
    if len(kept) == 1:
        return (kept[0] * cotangent[:, None, None]).astype(kept[0].dtype), None, None, None
    hidden, head, labels, weights = kept

    def block(total, part):
        gradient = _block(head, soft_cap, *part)[1] * cotangent[:, None, None]
        wide = jnp.einsum("blh,blv->hv", part[0], gradient.astype(head.dtype), preferred_element_type=jnp.float32)
        return total + wide, _times_head(gradient, head)

    of_head, gradient = jax.lax.scan(block, jnp.zeros(head.shape, jnp.float32), _cut(head, hidden, labels, weights))
    return _joined(gradient, hidden.shape), of_head.astype(head.dtype), None, None


_losses.defvjp(_forward, _backward, symbolic_zeros=True)


def _block(head, soft_cap, hidden, labels, weights):
    """float32 (B,), each row's weighted loss in a block of W columns; and (B, W, V), its gradient to the logits."""
    logits = jnp.einsum("blh,hv->blv", hidden, head, preferred_element_type=jnp.float32)
    capped = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    right = labels[:, :, None] == jnp.arange(head.shape[1])  # not a gather, which would make a divided V whole
    total = jax.nn.logsumexp(capped, axis=-1)
    losses = total - jnp.where(right, capped, 0).sum(-1)
    gradient = (jnp.exp(capped - total[:, :, None]) - right) * weights[:, :, None]
    if soft_cap is not None:
        gradient *= 1 - (capped / soft_cap) ** 2
    return (losses * weights).sum(1), gradient


def _times_head(gradient, head):
    return jnp.einsum("blv,hv->blh", gradient.astype(head.dtype), head)


def _cut(head, *arrays):
    """Arrays (B, L, ...) as blocks of columns, (blocks, B, W, ...), the last filled up with zeros."""
    rows, length = arrays[0].shape[:2]
    blocks = min(length, -(-rows * length * head.shape[1] // NUMBERS))
    width = -(-length // blocks)
    padded = [jnp.pad(x, ((0, 0), (0, blocks * width - length), *[(0, 0)] * (x.ndim - 2))) for x in arrays]
    return [x.reshape(rows, blocks, width, *x.shape[2:]).swapaxes(0, 1) for x in padded]


def _joined(blocks, shape):
    """The inverse of `_cut`, for an array of that shape."""
    return blocks.swapaxes(0, 1).reshape(shape[0], -1, *shape[2:])[:, : shape[1]]
