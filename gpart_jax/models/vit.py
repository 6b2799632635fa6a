"""A Vision Transformer under a classification head, in Flax Linen (arXiv 2010.11929).

It computes what Hugging Face's `ViTForImageClassification` computes: pre-norm layers, a class token, learned positions,
which are interpolated where an image isn't of the size that they were learned for. Leaves have the encoder's paths, such as
`layer_3/attention/query/kernel`.

In the comments B is the batch, L the number of patches and the class token, H the hidden size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gpart_jax.models.attention import Pattern
from gpart_jax.models.encoder import ACTIVATIONS, Attention, dense, dropout, norm, numbers
from gpart_jax.models.fields import check_fields, is_number, stated
from gpart_jax.models.remat import remat_layer

HF_NAMES = {  # fields of ViTConfig that config.json calls otherwise
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "channels": "num_channels",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "family": "model_type",
}
HF_DEFAULTS: dict[str, Any] = {  # of their class, which older files leave out
    "image_size": 224, "patch_size": 16, "num_channels": 3, "layer_norm_eps": 1e-12, "initializer_range": 0.02,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_act": "gelu", "qkv_bias": True,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The shape of a ViT and its rates of dropout; hashable, so it can be a static argument of `jax.jit`.

    Raises:
      ValueError: an unknown activation, heads that do not divide the hidden size, patches that do not divide the image.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int = 224  # of the learned positions, in pixels
    patch_size: int = 16
    channels: int = 3
    pooler: bool = False  # a tanh layer between the class token and the head
    image_mean: tuple[float, ...] = (0.5,)  # what images of whole numbers, 0 to 255, are normalised by, as
    image_std: tuple[float, ...] = (0.5,)  # shares of 255, one a channel or one for all
    layer_norm_eps: float = 1e-12
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02  # standard deviation of fresh weights
    hidden_act: str = "gelu"
    family: str = "vit"

    def __post_init__(self):
        check_fields(self, HF_NAMES)
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) not in (1, self.channels) or not all(map(is_number, values)) or (name == "image_std" and 0 in values):
                raise ValueError(f"{name} {list(values)} must be a number, or one for each of {self.channels} channels; no std is 0.")
        if self.family != "vit":
            raise ValueError(f"family {self.family!r} is not supported; this model is a 'vit'.")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported. Use one of {', '.join(ACTIVATIONS)}.")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}.")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def pattern(self) -> Pattern:
        return Pattern(causal=False)

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """What one image of the learned size is, as input."""
        return jax.ShapeDtypeStruct((1, self.image_size, self.image_size, self.channels), jnp.float32)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ViTConfig":
        """The config that a Hugging Face `config.json`, read as a dict, describes.

        Raises:
          ValueError: it describes a model that this file does not compute, or leaves out one of its sizes.
        """
        config = HF_DEFAULTS | stated(config)
        for name in ("image_size", "patch_size"):
            if isinstance(size := config[name], list):
                if len(size) != 2 or size[0] != size[1]:
                    raise ValueError(f"config.json has {name} {str(size)[:60]}; this ViT supports squares.")
                config[name] = size[0]
        for name, value in {"model_type": "vit", "qkv_bias": True}.items():
            if config.get(name) != value:
                raise ValueError(f"config.json has {name} {config.get(name)!r}; this ViT supports {value!r}.")
        own = {"pooler", "image_mean", "image_std"}
        fields = {f.name: HF_NAMES.get(f.name, f.name) for f in dataclasses.fields(cls) if f.name not in own}
        missing = [name for name in fields.values() if config.get(name) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}. Add what the model was trained with.")
        return cls(**{field: config[name] for field, name in fields.items()})


def normalisation(described: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    """image_mean and image_std of a `ViTConfig`, by a preprocessor_config.json: its flags and its factor are folded into them.

    Raises:
      ValueError: a flag that isn't true or false, a factor or a mean that is no number.
    """
    described = {"do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255} | stated(described)
    for name in ("do_rescale", "do_normalize"):
        if not isinstance(described[name], bool):
            raise ValueError(f"preprocessor_config.json has {name} {str(described[name])[:60]!r}; it must be true or false.")
    factor = described["rescale_factor"] if described["do_rescale"] else 1.0
    if not is_number(factor) or factor <= 0:
        raise ValueError(f"preprocessor_config.json has rescale_factor {str(factor)[:60]!r}; it must be a number above 0.")
    found = {}
    for name, unchanged in (("image_mean", 0.0), ("image_std", 1.0)):
        values = described.get(name, 0.5) if described["do_normalize"] else unchanged
        values = values if isinstance(values, list) else [values]
        if not all(map(is_number, values)):
            raise ValueError(f"preprocessor_config.json has {name} {str(values)[:60]}; it must be numbers.")
        found[name] = tuple(value / (255 * factor) for value in values)
    return found


class ViTClassifier(nn.Module):
    """Images to the logits of each.

    Call it as `model.apply({"params": params}, pixel_values)`; to train, add `train=True` and `rngs={"dropout": key}`.
    Weights are float32; `dtype` is what all but the head compute in.

    Args:
      pixel_values: (B, height, width, channels), float as the model was trained on, or uint8, which is normalised here;
        height and width are multiples of the patch size.
      train: whether dropout is on; or, likewise, the number of each row in the whole batch, int (B,), which decides its masks.

      adapt: a bound method (`Method.bind`), that adapts the params of the layers one by one, each where it is used; the other params
        are adapted already. None: all are.

    Returns:
      float32 (B, num_labels).

    Raises:
      ValueError: images whose size is no multiple of the patch size, or of another number of channels.
    """

    config: ViTConfig
    num_labels: int
    dtype: Any = jnp.float32
    attention: str = "auto"  # of attention.CHOICES; "auto" is for JAX's default devices
    remat: str = "none"  # of remat.CHOICES

    @nn.compact
    def __call__(self, pixel_values: jax.Array, *, train: bool | jax.Array = False, adapt: Callable | None = None) -> jax.Array:
        config, rows = self.config, numbers(train, len(pixel_values))
        hidden = Embeddings(config, self.dtype, name="embeddings")(pixel_values, rows)  # (B, L, H)
        for index in range(config.num_layers):
            name = f"layer_{index}"
            layer = remat_layer(Layer, name, self.remat, adapt)(config, self.dtype, self.attention, name=name)
            hidden = layer(hidden, None, rows)
        first = norm(config, self.dtype, "norm")(hidden[:, 0])  # (B, H), of the class token
        if config.pooler:
            first = nn.tanh(dense(config, config.hidden_size, self.dtype, "pooler")(first))
        return dense(config, self.num_labels, jnp.float32, "classifier")(first)


class Embeddings(nn.Module):
    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixel_values, rows):
        config, size = self.config, self.config.patch_size
        batch, height, width, channels = pixel_values.shape
        if height % size or width % size or channels != config.channels:
            raise ValueError(
                f"Images of {height} x {width} x {channels} don't divide into patches of {size} x {size} x "
                f"{config.channels}. Resize them to a multiple, with as many channels."
            )
        if pixel_values.dtype == jnp.uint8:
            mean, std = (255 * np.array(x, np.float32) for x in (config.image_mean, config.image_std))
            pixel_values = (pixel_values - mean) / std
        init = nn.initializers.normal(config.initializer_range)
        patches = nn.Conv(
            config.hidden_size, (size, size), (size, size), "VALID", dtype=self.dtype, kernel_init=init, name="patch"
        )(pixel_values)  # (B, rows, columns, H)
        first = self.param("class_token", init, (1, 1, config.hidden_size))
        learned = config.image_size // size
        position = self.param("position", init, (1, 1 + learned**2, config.hidden_size))
        position = resize_positions(position, learned, (height // size, width // size))
        first = jnp.broadcast_to(first, (batch, 1, config.hidden_size)).astype(self.dtype)
        hidden = jnp.concatenate([first, patches.reshape(batch, -1, config.hidden_size)], axis=1)
        return dropout(config.hidden_dropout, hidden + position.astype(self.dtype), rows)


def resize_positions(position: jax.Array, learned: int, grid: tuple[int, int]) -> jax.Array:
    """Positions of a learned x learned grid, and the class token's before them, for another grid: (1, L, H)."""
    if grid == (learned, learned):
        return position
    square = position[:, 1:].reshape(learned, learned, -1)
    down, across = (jnp.asarray(_bicubic(learned, n), position.dtype) for n in grid)  # (rows, learned)
    resized = jnp.einsum("ra,cb,abh->rch", down, across, square, precision="highest")
    return jnp.concatenate([position[:, :1], resized.reshape(1, -1, position.shape[-1])], axis=1)


def _bicubic(old: int, new: int) -> np.ndarray:
    """The (new, old) matrix of PyTorch's bicubic interpolation: Keys' kernel with a = -0.75, edges repeated."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    start = np.floor(at).astype(int) - 1
    weights = np.zeros((new, old))
    for tap in range(4):
        x = np.abs(at - (start + tap))
        near, far = (1.25 * x - 2.25) * x * x + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3
        np.add.at(weights, (np.arange(new), np.clip(start + tap, 0, old - 1)), np.where(x <= 1, near, far))
    return weights


class Layer(nn.Module):
    config: ViTConfig
    dtype: Any
    attention: str

    @nn.compact
    def __call__(self, hidden, attention_mask, rows):
        config, dtype = self.config, self.dtype
        attended = Attention(config, dtype, self.attention, name="attention")(
            norm(config, dtype, "attention_norm")(hidden), attention_mask, rows
        )
        hidden += dropout(config.hidden_dropout, attended, rows)
        inner = dense(config, config.intermediate_size, dtype, "intermediate")(
            norm(config, dtype, "output_norm")(hidden)
        )
        outer = dense(config, config.hidden_size, dtype, "output")(ACTIVATIONS[config.hidden_act](inner))  # (B, L, H)
        return hidden + dropout(config.hidden_dropout, outer, rows)
