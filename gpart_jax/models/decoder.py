"""A decoder-only language model in Flax Linen: Llama, Mistral, Qwen2 and Gemma by configuration.

Llama 3: arXiv 2407.21783. Mistral: 2310.06825. Qwen2.5: 2412.15115. Gemma: 2403.08295. It computes what Hugging Face's
`LlamaForCausalLM` and its like compute. The layers are stacked and scanned: a weight of all of them is one leaf, such as
`layers/attention/query/kernel` of shape (layers, in, out).

In the comments B is the batch, L the length, H the hidden size, A the number of heads, K that of key and value heads, and D
the size of one head.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from gpart_jax.linear import merged
from gpart_jax.models.attention import Pattern, attend, choose
from gpart_jax.models.cross_entropy import token_losses
from gpart_jax.models.fields import check_fields, stated
from gpart_jax.models.linear import Dense
from gpart_jax.models.remat import remat
from gpart_jax.sharding import undivided

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
}
FAMILIES = ("llama", "mistral", "qwen2", "gemma")
HF_NAMES = {  # fields of DecoderConfig that config.json calls otherwise
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "family": "model_type",
}

FULL, SLIDING = "full_attention", "sliding_attention"  # config.json's names of what a layer sees
HF_DEFAULTS: dict[str, Any] = {  # of their classes, for what a file leaves out; a model's sizes are always there
    "rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "initializer_range": 0.02, "tie_word_embeddings": False,
}  # fmt: skip
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
    "gemma": {"num_key_value_heads": 16, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's: frequencies of long wavelengths are divided by `factor`, those between two bounds by something less.

    Raises:
      ValueError: a factor below 1, or bounds that don't follow one another.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        check_fields(self, {})
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(f"{self}: the factor must be at least 1, and low_freq_factor between 0 and high_freq_factor.")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; hashable, so it can be a static argument of `jax.jit`.

    Raises:
      ValueError: an unknown family or activation, or heads that the key and value heads do not divide.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int  # the longest sequence, in tokens
    norm_eps: float
    rope_theta: float
    family: str
    tied: bool  # whether the output layer is the embedding
    hidden_act: str = "silu"
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # a token sees so many, itself included; None: all before it
    initializer_range: float = 0.02

    def __post_init__(self):
        check_fields(self, HF_NAMES)
        if self.rope_theta <= 0 or self.head_dim % 2:
            raise ValueError(f"rope_theta {self.rope_theta} must be above 0, and head_dim {self.head_dim} even.")
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is not supported. Use one of {', '.join(FAMILIES)}.")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported. Use one of {', '.join(ACTIVATIONS)}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}.")

    @property
    def pattern(self) -> Pattern:
        return Pattern(causal=True, window=self.sliding_window)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "DecoderConfig":
        """The config that a Hugging Face `config.json`, read as a dict, describes.

        Raises:
          ValueError: it describes a model that this file does not compute, or leaves out one of its sizes.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"config.json has model_type {family!r}; this decoder is {', '.join(FAMILIES)}.")
        for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
            if config.get(name) not in (None, False):
                raise ValueError(f"config.json has {name} {config[name]!r}; this decoder computes it only without.")
        defaults = HF_DEFAULTS | FAMILY_DEFAULTS[family]
        for name in {"num_key_value_heads", "sliding_window"} & config.keys() - stated(config).keys():
            defaults.pop(name, None)  # to these null says something: as many as heads, and no window
        config = defaults | stated(config)
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
            if type(config.get(name, 1)) is not int or config.get(name, 1) < 1:
                raise ValueError(f"config.json has {name} {config[name]!r}; it must be a whole number above 0.")
        heads = config.get("num_attention_heads", 1)
        config.setdefault("num_key_value_heads", heads)
        config.setdefault("head_dim", config.get("hidden_size", 0) // heads)
        if family == "gemma":
            config["hidden_act"] = _gemma_act(config)
        config["sliding_window"] = _window(config, family)
        config["rope_theta"], config["rope_scaling"] = _rope_of(config)
        optional = {"sliding_window", "rope_scaling"}
        fields = {field.name: HF_NAMES.get(field.name, field.name) for field in dataclasses.fields(cls)}
        missing = [name for name in fields.values() if config.get(name) is None and name not in optional]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}. Add what the model was trained with.")
        arguments: dict[str, Any] = {field: config.get(name) for field, name in fields.items()}
        return cls(**arguments)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of which `from_hf` makes this."""
        config = {HF_NAMES.get(name, name): value for name, value in dataclasses.asdict(self).items()}
        if self.rope_scaling is not None:
            config["rope_scaling"]["rope_type"] = "llama3"
        if self.family == "qwen2":
            config |= {"use_sliding_window": self.sliding_window is not None, "max_window_layers": 0}
        if self.family == "gemma":
            config["hidden_activation"] = self.hidden_act
        return config


def _gemma_act(config: dict[str, Any]) -> str:
    """Their first files say "gelu" and mean its approximation; some have a second field for what is meant."""
    said = [config[name] for name in ("hidden_act", "hidden_activation") if name in config]
    meant = ["gelu_pytorch_tanh" if act == "gelu" else act for act in said]
    if len(said) == 2 and meant[0] != meant[1]:
        raise ValueError(f"config.json has hidden_act {said[0]!r} and hidden_activation {said[1]!r}. Leave the right one.")
    return meant[0]


def _window(config: dict[str, Any], family: str) -> int | None:
    """The sliding window of all layers, as the family's class in transformers has it."""
    if family == "mistral":
        return config.get("sliding_window")
    if family != "qwen2":
        return None  # whatever the file says
    layers, kinds, unlimited, use = (
        config.get(name) for name in ("num_hidden_layers", "layer_types", "max_window_layers", "use_sliding_window")
    )
    if not isinstance(use, bool) or type(unlimited) is not int:
        raise ValueError(f"config.json has use_sliding_window {use!r} and max_window_layers {unlimited!r}: not a bool and an int.")
    window = config.get("sliding_window") if use else None
    if kinds is None:
        first = layers or 0 if window is None else min(max(unlimited, 0), layers or 0)
        kinds, said = [FULL] * first + [SLIDING] * ((layers or 0) - first), f"max_window_layers {unlimited} of {layers}"
    else:
        said = f"layer_types {str(kinds)[:80]}"
        if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in (FULL, SLIDING) for kind in kinds):
            raise ValueError(f"config.json has {said}; it must name {FULL} or {SLIDING} for each of {layers} layers.")
    if FULL in kinds and SLIDING in kinds:
        raise ValueError(f"config.json has {said}; in this decoder a sliding window is of all layers or none.")
    if SLIDING in kinds and window is None:
        raise ValueError(f"config.json has {said}, but no sliding window (use_sliding_window, sliding_window).")
    return window if SLIDING in kinds else None


def _rope_of(config: dict[str, Any]) -> tuple[Any, RopeScaling | None]:
    """(rope_theta, the scaling). transformers 5 has both in rope_parameters."""
    described = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(described, dict) or any(isinstance(value, dict) for value in described.values()):
        raise ValueError(f"config.json has rotary parameters {str(described)[:80]}; this decoder has one set for all layers.")
    described = stated(described)
    theta = described.pop("rope_theta", config["rope_theta"])
    if (share := described.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1))) != 1:
        raise ValueError(f"config.json has partial_rotary_factor {share!r}; this decoder turns whole heads.")
    kind = described.get("rope_type", described.get("type"))
    if not described or kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"config.json has rope_scaling {kind!r}; this decoder supports 'llama3' or none.")
    original = "original_max_position_embeddings"
    described[original] = config.get(original, described.get(original, config.get("max_position_embeddings")))
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    if missing := [name for name in names if described.get(name) is None]:
        raise ValueError(f"config.json's rope_scaling lacks {', '.join(missing)}. Add what the model was trained with.")
    return theta, RopeScaling(**{name: described[name] for name in names})


class Cache(NamedTuple):
    """The keys and values of the tokens so far, so that each is computed once: a row's token n lies in column n."""

    key: jax.Array  # (layers, B, S, K, D), S columns in all
    value: jax.Array  # likewise
    filled: jax.Array  # int (B,), how many columns of each row are written

    @classmethod
    def empty(cls, config: DecoderConfig, rows: int, columns: int, dtype: DTypeLike) -> "Cache":
        shape = (config.num_layers, rows, columns, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(rows, jnp.int32))


class Decoder(nn.Module):
    """Token ids to the logits of the token after each.

    Call it as `model.apply({"params": params}, input_ids, attention_mask)`. To adapt the layers within the scan, so that
    the adapted weights of only one are alive at a time, adapt the rest before:

      adapt = method.bind(params, trainable)
      outside = adapt({name: part for name, part in params.items() if name != "layers"})
      logits = model.apply({"params": outside | {"layers": params["layers"]}}, input_ids, attention_mask, adapt)

    Args:
      input_ids: int (B, L); L is at most `config.max_positions`.
      attention_mask: int or bool (B, L); zero where a token is padding, on the left or on the right. Where a row holds several
        texts, 1, 2, ... says of which a token is: they don't see one another, and the positions of each begin at 0.
      adapt: a bound method (`Method.bind`).
      cache: of S columns. The tokens that the mask names, a row's first ones, come after those in it. What has no room in it isn't
        written, and nothing says so.
      weights: float32 (B, L), to have the loss instead of logits: the weight of each token's cross-entropy, given those before
        it. A row's first has none.

    Returns:
      float32 (B, L, vocab_size). With a cache: those after each row's last token alone, (B, vocab_size), and the cache. With weights: (B,),
      each row's weighted sum of cross-entropies, for which the logits of only some tokens exist at a time.

    Raises:
      ValueError: sequences that are too long.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32  # of the computation
    param_dtype: Any = jnp.float32
    remat: str = "full"  # of remat.CHOICES
    attention: str = "auto"  # of attention.CHOICES; "auto" is for JAX's default devices

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        adapt: Callable | None = None,
        cache: Cache | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, Cache]:
        config = self.config
        length = input_ids.shape[1]
        if length > config.max_positions:
            raise ValueError(
                f"Sequences have {length} tokens, but the model takes {config.max_positions}. Truncate them."
            )
        init = nn.initializers.normal(config.initializer_range)
        embed = nn.Embed(
            config.vocab_size, config.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype, embedding_init=init,
            name="embed",
        )  # fmt: skip
        hidden = undivided(embed(input_ids))  # (B, L, H)
        if config.family == "gemma":
            hidden *= jnp.asarray(config.hidden_size**0.5, self.dtype)

        if cache is None:
            segments, start, kernel = attention_mask.astype(jnp.int32), jnp.zeros(1, jnp.int32), self.attention
            positions = _positions(segments)  # (B, L)
        else:
            segments, start, kernel = None, cache.filled, "xla"
            positions = start[:, None] + jnp.arange(length)
        if kernel == "auto":
            kernel = choose(kernel, jax.default_backend(), self.dtype, config.head_dim, config.pattern)
        rope = _rope(config, positions)
        see = functools.partial(attend, segments=segments, pattern=config.pattern, implementation=kernel, start=start)

        layer = Layer(config, self.dtype, self.param_dtype, parent=None)

        def init_layers(key):
            keys = jax.random.split(key, config.num_layers)
            return jax.vmap(lambda key: layer.init(key, hidden, rope, see)["params"])(keys)

        def one_layer(carry, number_and_weights):
            (hidden, cache), (number, weights) = carry, number_and_weights
            if adapt is not None:
                weights = adapt({"layers": weights}, layer=number)["layers"]
            return layer.apply({"params": weights}, hidden, rope, see, cache, number), None

        if self.is_initializing():
            layers = self.param("layers", init_layers)
        else:  # without `param`'s check of shapes: on a mesh these may be shards, which `adapt` makes whole
            layers = self.get_variable("params", "layers")
        one_layer = remat(one_layer, self.remat, prevent_cse=False)  # a scan needs no such barrier
        (hidden, cache), _ = jax.lax.scan(one_layer, (hidden, cache), (jnp.arange(config.num_layers), layers))

        if cache is not None:
            count = attention_mask.astype(bool).sum(axis=1)
            hidden = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        hidden = RMSNorm(config, self.dtype, self.param_dtype, name="norm")(hidden)
        head = None if config.tied else _dense(config.vocab_size, self, "lm_head")
        if weights is not None:
            matrix = embed.embedding.T if head is None else merged(head.variables["params"]["kernel"])  # (H, vocab_size)
            following = jnp.pad(input_ids[:, 1:], ((0, 0), (0, 1))), jnp.pad(weights[:, 1:], ((0, 0), (0, 1)))
            return token_losses(hidden, matrix, *following)
        logits = (head or embed.attend)(hidden).astype(jnp.float32)  # (B, L, vocab_size)
        return logits if cache is None else (logits, cache._replace(filled=cache.filled + count))


class Layer(nn.Module):
    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, hidden, rope, see, cache=None, number=None):
        types = self.config, self.dtype, self.param_dtype
        normed = RMSNorm(*types, name="attention_norm")(hidden)
        attended, cache = Attention(*types, name="attention")(normed, rope, see, cache, number)
        hidden += undivided(attended)
        return hidden + undivided(MLP(*types, name="mlp")(RMSNorm(*types, name="mlp_norm")(hidden))), cache


class Attention(nn.Module):
    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, hidden, rope, see, cache, number):
        config = self.config
        batch, length, _ = hidden.shape

        def project(heads, name):
            out = _dense(heads * config.head_dim, self, name, use_bias=config.family == "qwen2")(hidden)
            return out.reshape(batch, length, heads, config.head_dim)

        query = _rotate(project(config.num_heads, "query"), rope)  # (B, L, A, D)
        key = _rotate(project(config.num_kv_heads, "key"), rope)  # (B, L, K, D)
        value = project(config.num_kv_heads, "value")
        if cache is not None:  # all layers' lies in the scan's carry, where it is written in place
            at = number, jnp.arange(batch)[:, None], cache.filled[:, None] + jnp.arange(length)
            written = [old.at[at].set(new, mode="drop") for old, new in zip(cache, (key, value))]
            key, value = (array[number] for array in written)  # (B, S, K, D)
            cache = Cache(written[0], written[1], cache.filled)
        mixed = see(query, key, value)  # (B, L, A, D)
        return _dense(config.hidden_size, self, "out")(mixed.reshape(batch, length, -1)), cache


class MLP(nn.Module):
    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, hidden):
        gate, up = (_dense(self.config.intermediate_size, self, name)(hidden) for name in ("gate", "up"))
        return _dense(self.config.hidden_size, self, "down")(ACTIVATIONS[self.config.hidden_act](gate) * up)


class RMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467), in float32; Gemma's scale is one more than its weight."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, hidden):
        gemma = self.config.family == "gemma"
        init = nn.initializers.zeros if gemma else nn.initializers.ones
        scale = self.param("scale", init, (hidden.shape[-1],), self.param_dtype)
        wide = hidden.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.config.norm_eps)
        if gemma:
            return (wide * (1 + scale.astype(jnp.float32))).astype(self.dtype)
        return scale.astype(self.dtype) * wide.astype(self.dtype)


def _positions(segments):
    """Of each token in its text, from the first real one on: int (B, S)."""
    count = jnp.cumsum(segments > 0, axis=1)
    before = jnp.pad(jax.lax.cummax(segments, axis=1)[:, :-1], ((0, 0), (1, 0)))
    first = jax.lax.cummax(jnp.where(segments > before, count, 0), axis=1)  # the count at the first token of the text
    return jnp.maximum(count - first, 0)


def _rope(config, positions):
    """Cosine and sine of the rotary angles (arXiv 2104.09864), float32 (B, L, 1, D / 2) each."""
    frequency = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    if (scaling := config.rope_scaling) is not None:
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)  # within the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = jnp.clip((turns - low) / (high - low), 0, 1)  # 1: as it is, 0: divided by the factor
        frequency *= keep + (1 - keep) / scaling.factor
    angles = positions[:, :, None, None] * frequency
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x, rope):
    cos, sin = (part.astype(x.dtype) for part in rope)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _dense(features, module, name, use_bias=False):
    init = nn.initializers.normal(module.config.initializer_range)
    return Dense(features, use_bias, dtype=module.dtype, param_dtype=module.param_dtype, kernel_init=init, name=name)
