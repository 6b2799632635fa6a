"""The tokenizer of a pretrained model, and its two tokens that begin and end a text. Needs the package `tokenizers`."""

import json
import os
import pathlib
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers

from gpart_jax.models.storage import locate

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE_TOKENIZERS = {  # by GGUF's name: how a text is divided before merges are made
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
}
CONTROL, USER_DEFINED = 3, 4  # GGUF's types of tokens that are no pieces of text


class Vocabulary(NamedTuple):
    tokenizer: tokenizers.Tokenizer
    bos: int | None  # where the tokenizer puts one before a text
    eos: int


def load_vocabulary(source: str | os.PathLike, vocab_size: int) -> Vocabulary:
    """The vocabulary of a model.

    Args:
      source: as in `locate`: a directory with tokenizer.json and tokenizer_config.json, or a GGUF file.
      vocab_size: of the model. It may have more tokens than the tokenizer, as some are padded, but not fewer.

    Raises:
      FileNotFoundError: nothing is there, or a file is missing.
      ValueError: a damaged file, no end-of-sequence token, or a tokenizer of another model.
    """
    where = locate(source)
    vocabulary = _from_gguf(where) if where.suffix == ".gguf" else _from_directory(where)
    last = max(vocabulary.tokenizer.get_vocab(with_added_tokens=True).values())
    if last >= vocab_size:
        raise ValueError(
            f"{where}: the tokenizer's ids reach {last}, but the model has {vocab_size} tokens (vocab_size). They are of "
            "different models: take both from one place."
        )
    return vocabulary


def _from_directory(directory: pathlib.Path) -> Vocabulary:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} holds no {name}. Save the model's fast tokenizer beside its weights.")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        described = json.loads((directory / "tokenizer_config.json").read_text())
    except Exception as error:  # the tokenizer's are plain Exceptions
        raise ValueError(f"{directory}: its tokenizer cannot be read ({error}). Download or copy it again.") from error

    def number(name):
        token = described.get(name)
        token = token["content"] if isinstance(token, dict) else token
        return None if token is None else tokenizer.token_to_id(token)

    bos, eos = number("bos_token"), number("eos_token")
    if eos is None:
        raise ValueError(
            f"{directory / 'tokenizer_config.json'} has eos_token {described.get('eos_token')!r}, which is no token of "
            "tokenizer.json. Save the model's fast tokenizer again."
        )
    if not described.get("add_bos_token", tokenizer.encode("").ids[:1] == [bos]):
        bos = None
    return Vocabulary(tokenizer, bos, eos)


def _from_gguf(file: pathlib.Path) -> Vocabulary:
    from gpart_jax.models import gguf_file  # here, because a directory needs no gguf

    reader = gguf_file.open_file(file)
    read = {
        name: gguf_file.field(reader, f"tokenizer.ggml.{name}")
        for name in (
            "model", "pre", "tokens", "token_type", "merges", "add_bos_token", "bos_token_id", "eos_token_id",
        )
    }  # fmt: skip
    if read["model"] != "gpt2" or read["pre"] not in PRE_TOKENIZERS:
        raise ValueError(
            f"{file} has a tokenizer {read['model']!r} with pre-tokenizer {read['pre']!r}; of GGUF files only 'gpt2' with "
            f"{' or '.join(map(repr, PRE_TOKENIZERS))} is read. Load the model from a directory with tokenizer.json."
        )
    if missing := [name for name in ("tokens", "token_type", "merges", "eos_token_id") if read[name] is None]:
        raise ValueError(f"{file} lacks tokenizer.ggml.{missing[0]}. Download or convert it again.")
    merges = [tuple(merge.split(" ")) for merge in read["merges"]]
    ids = {token: number for number, token in enumerate(read["tokens"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[read["pre"]]
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(read["tokens"], read["token_type"]))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == USER_DEFINED])
    return Vocabulary(tokenizer, read["bos_token_id"] if read["add_bos_token"] else None, read["eos_token_id"])
