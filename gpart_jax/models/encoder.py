"""A BERT or RoBERTa encoder under a classification or regression head, in Flax Linen.

BERT: arXiv 1810.04805. RoBERTa: arXiv 1907.11692. It computes what Hugging Face's `BertForSequenceClassification` and
`RobertaForSequenceClassification` compute. Every projection is an `nn.Dense`, so an adapted weight has a path such as
`layer_3/attention/query/kernel` and the shape (in, out).

In the comments B is the batch, L the length, H the hidden size, A the number of heads and D = H / A the size of one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from gpart_jax.models.attention import Pattern, attend, choose
from gpart_jax.models.fields import check_fields, stated
from gpart_jax.models.linear import Dense
from gpart_jax.models.remat import remat_layer

if TYPE_CHECKING:
    from gpart_jax.models.vit import ViTConfig  # which imports this module


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution's function (arXiv 1606.08415), by erf: JAX's own, by erfc, takes a CPU twice as long.

    Its slope is made on the way forward and kept instead of x: on the way back XLA's CPU compiler would write each of its constants
    to memory, as large as x.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (dot,) = primals, tangents
    wide = x.astype(jnp.float32)
    share = 0.5 * (1 + jax.lax.erf(wide * 0.5**0.5))
    slope = share + wide * jnp.exp(-0.5 * wide * wide) * (2 * np.pi) ** -0.5
    return (wide * share).astype(x.dtype), dot * jax.lax.optimization_barrier(slope.astype(x.dtype))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}
FAMILIES = ("bert", "roberta")
HF_NAMES = {  # fields of EncoderConfig that config.json calls otherwise
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "family": "model_type",
}


HF_DEFAULTS: dict[str, Any] = {  # of their classes, for what a file leaves out; a model's sizes are always there
    "position_embedding_type": "absolute", "is_decoder": False, "initializer_range": 0.02, "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "type_vocab_size": 2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder and its rates of dropout; hashable, so it can be a static argument of `jax.jit`.

    Raises:
      ValueError: an unknown family or activation, or heads that do not divide the hidden size.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int  # rows of the position table; RoBERTa cannot use the first pad_token_id + 1 of them
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float | None = None  # None: as hidden_dropout
    initializer_range: float = 0.02  # standard deviation of fresh weights
    hidden_act: str = "gelu"
    family: str = "bert"

    def __post_init__(self):
        check_fields(self, HF_NAMES)
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is not supported. Use one of {', '.join(FAMILIES)}.")
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is beyond the vocabulary of {self.vocab_size} (vocab_size).")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported. Use one of {', '.join(ACTIVATIONS)}.")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}.")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def pattern(self) -> Pattern:
        return Pattern(causal=False, packed=False)

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens: 512 for the published BERT and RoBERTa models."""
        return self.max_positions - (self.pad_token_id + 1 if self.family == "roberta" else 0)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "EncoderConfig":
        """The config that a Hugging Face `config.json`, read as a dict, describes.

        Raises:
          ValueError: it describes a model that this file does not compute, or leaves out one of its sizes.
        """
        family = config.get("model_type")
        config = HF_DEFAULTS | {"pad_token_id": 1 if family == "roberta" else 0} | stated(config)
        supported = {"model_type": FAMILIES, "position_embedding_type": ("absolute",), "is_decoder": (False,)}
        for name, values in supported.items():
            if config.get(name) not in values:
                known = " or ".join(map(repr, values))
                raise ValueError(f"config.json has {name} {config.get(name)!r}; this encoder supports {known}.")
        fields = {field.name: HF_NAMES.get(field.name, field.name) for field in dataclasses.fields(cls)}
        missing = [name for name in fields.values() if config.get(name) is None and name != "classifier_dropout"]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}. Add what the model was trained with.")
        arguments: dict[str, Any] = {field: config.get(name) for field, name in fields.items()}
        return cls(**arguments)


class EncoderClassifier(nn.Module):
    """Token ids to the logits of each sequence, or to its score when num_labels is 1.

    Call it as `model.apply({"params": params}, input_ids, attention_mask)`; to train, add `train=True` and
    `rngs={"dropout": key}`. Weights are float32; `dtype` is what all but the head compute in.

    Args:
      input_ids: int (B, L); L is at most `config.max_length`.
      attention_mask: int or bool (B, L); zero where a token is padding.
      token_type_ids: int (B, L), which sentence of a pair a token is of; all 0 by default. BERT only.
      train: whether dropout is on; or, likewise, the number of each row in the whole batch, int (B,), which decides its masks.

      adapt: a bound method (`Method.bind`), that adapts the params of the layers one by one, each where it is used; the other params
        are adapted already. None: all are.

    Returns:
      float32 (B, num_labels).

    Raises:
      ValueError: sequences that are too long, or token types given to RoBERTa.
    """

    config: EncoderConfig
    num_labels: int
    dtype: Any = jnp.float32
    attention: str = "auto"  # of attention.CHOICES; "auto" is for JAX's default devices
    remat: str = "none"  # of remat.CHOICES

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        *,
        train: bool | jax.Array = False,
        adapt: Callable | None = None,
    ) -> jax.Array:
        config, rows = self.config, numbers(train, len(input_ids))
        hidden = Embeddings(config, self.dtype, name="embeddings")(input_ids, token_type_ids, rows)  # (B, L, H)
        for index in range(config.num_layers):
            name = f"layer_{index}"
            layer = remat_layer(Layer, name, self.remat, adapt)(config, self.dtype, self.attention, name=name)
            hidden = layer(hidden, attention_mask, rows)
        first = hidden[:, 0]  # (B, H), of [CLS] or <s>
        rate = config.hidden_dropout if config.classifier_dropout is None else config.classifier_dropout
        if config.family == "roberta":
            return RobertaHead(config, self.num_labels, rate, name="classifier")(first, rows)
        pooled = nn.tanh(dense(config, config.hidden_size, self.dtype, "pooler")(first))
        # The head is float32 whatever dtype is: it is a sliver of the work, and bfloat16 leaves a score 3 digits.
        return dense(config, self.num_labels, jnp.float32, "classifier")(dropout(rate, pooled, rows))


class Embeddings(nn.Module):
    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, input_ids, token_type_ids, rows):
        config = self.config
        length = input_ids.shape[1]
        if length > config.max_length:
            raise ValueError(f"Sequences have {length} tokens, but the model takes {config.max_length}. Truncate them.")
        if config.family == "roberta":
            if token_type_ids is not None:
                raise ValueError("RoBERTa has no token types; it tells a pair by its separators. Drop token_type_ids.")
            real = (input_ids != config.pad_token_id).astype(jnp.int32)
            positions = jnp.cumsum(real, axis=1) * real + config.pad_token_id  # (B, L); padding sits at pad_token_id
        else:
            positions = jnp.arange(length)[None]  # (1, L)
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)  # (B, L)

        def embed(rows, name):
            init = nn.initializers.normal(config.initializer_range)
            return nn.Embed(rows, config.hidden_size, dtype=self.dtype, embedding_init=init, name=name)

        total = embed(config.vocab_size, "word")(input_ids)  # (B, L, H)
        total += embed(config.type_vocab_size, "token_type")(token_type_ids)
        total += embed(config.max_positions, "position")(positions)
        return dropout(config.hidden_dropout, norm(config, self.dtype, "norm")(total), rows)


class Layer(nn.Module):
    config: EncoderConfig
    dtype: Any
    attention: str

    @nn.compact
    def __call__(self, hidden, attention_mask, rows):
        config, dtype = self.config, self.dtype
        attended = Attention(config, dtype, self.attention, name="attention")(hidden, attention_mask, rows)  # (B, L, H)
        hidden = norm(config, dtype, "attention_norm")(hidden + dropout(config.hidden_dropout, attended, rows))
        inner = dense(config, config.intermediate_size, dtype, "intermediate")(hidden)  # (B, L, intermediate)
        outer = dense(config, config.hidden_size, dtype, "output")(ACTIVATIONS[config.hidden_act](inner))  # (B, L, H)
        return norm(config, dtype, "output_norm")(hidden + dropout(config.hidden_dropout, outer, rows))


class Attention(nn.Module):
    config: "EncoderConfig | ViTConfig"
    dtype: Any
    attention: str = "auto"

    @nn.compact
    def __call__(self, hidden, attention_mask, rows):
        config, rate = self.config, self.config.attention_dropout
        heads = (*hidden.shape[:2], config.num_heads, config.head_dim)  # (B, L, A, D)
        query, key, value = (
            dense(config, config.hidden_size, self.dtype, name)(hidden).reshape(heads)
            for name in ("query", "key", "value")
        )
        kernel = self.attention
        if kernel == "auto":
            kernel = choose(kernel, jax.default_backend(), self.dtype, config.head_dim, config.pattern, rate)
        drop = functools.partial(dropout, rate, rows=rows)
        mixed = attend(query, key, value, attention_mask, config.pattern, kernel, drop=drop)
        return dense(config, config.hidden_size, self.dtype, "out")(mixed.reshape(hidden.shape))


class RobertaHead(nn.Module):
    config: EncoderConfig
    num_labels: int
    dropout: float

    @nn.compact
    def __call__(self, first, rows):
        first = dropout(self.dropout, first, rows)
        inner = nn.tanh(dense(self.config, self.config.hidden_size, jnp.float32, "dense")(first))  # (B, H)
        return dense(self.config, self.num_labels, jnp.float32, "out_proj")(dropout(self.dropout, inner, rows))


def dense(config: "EncoderConfig | ViTConfig", features: int, dtype: DTypeLike, name: str) -> Dense:
    init = nn.initializers.normal(config.initializer_range)
    return Dense(features, dtype=dtype, kernel_init=init, name=name)


def norm(config: "EncoderConfig | ViTConfig", dtype: DTypeLike, name: str) -> nn.LayerNorm:
    # Flax's fast variance, E[x^2] - E[x]^2, cancels badly where the mean is large.
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name)


def numbers(train: bool | jax.Array, batch: int) -> jax.Array | None:
    """The rows' numbers, int (B,), of a model's argument `train`; None: without dropout."""
    if isinstance(train, bool):
        return jnp.arange(batch) if train else None
    return train


class Dropout(nn.Module):
    """Dropout of which a row's mask depends on the row's number alone: neither on the device that has it nor on its padding.

    Args:
      x: (B, H), (B, L, H), or attention weights (B, A, L, L).
      rows: int (B,), the rows' numbers; None: there is no dropout.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, rows: jax.Array | None) -> jax.Array:
        if rows is None or self.rate == 0:
            return x
        fold, keep = jax.vmap(jax.random.fold_in, (None, 0)), 1 - self.rate

        def mask(key):  # random bits are numbered in row-major order: more tokens leave those of the first as they are
            if x.ndim < 4:
                return jax.random.bernoulli(key, keep, x.shape[1:])
            heads, queries, columns = x.shape[1:]
            of_query = jax.vmap(lambda key: jax.random.bernoulli(key, keep, (columns, heads)))
            return of_query(fold(key, jnp.arange(queries))).transpose(2, 0, 1)

        return jnp.where(jax.vmap(mask)(fold(self.make_rng("dropout"), rows)), x / keep, 0)


def dropout(rate: float, x: jax.Array, rows: jax.Array | None) -> jax.Array:
    return Dropout(rate)(x, rows)
