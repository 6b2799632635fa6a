"""The tokenizer of a pretrained model, and its tokens that begin and end a text. Needs the package `tokenizers`."""

import itertools
import os
import pathlib
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers

from gpart_jax.models.storage import locate, read_json

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE_TOKENIZERS = {  # by GGUF's name: how a text is divided before merges are made
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
}
CONTROL, USER_DEFINED = 3, 4  # GGUF's types of tokens that are no pieces of text


class Vocabulary(NamedTuple):
    tokenizer: tokenizers.Tokenizer
    bos: int | None  # where the tokenizer puts one before a text
    eos: int  # what a text ends with
    others: tuple[int, ...] = ()  # that end what the model writes, too

    @property
    def ends(self) -> tuple[int, ...]:
        return (self.eos, *self.others)


def load_vocabulary(source: str | os.PathLike, vocab_size: int) -> Vocabulary:
    """The vocabulary of a model.

    Args:
      source: as in `locate`: a directory with tokenizer.json and tokenizer_config.json, or a GGUF file.
      vocab_size: of the model. It may have more tokens than the tokenizer, as some are padded, but not fewer.

    Raises:
      FileNotFoundError: nothing is there, or a file is missing.
      ValueError: a damaged file, no end-of-sequence token, a tokenizer of another model, or one that puts several tokens before a
        text.
    """
    where = locate(source)
    vocabulary = _from_gguf(where) if where.suffix == ".gguf" else _from_directory(where, vocab_size)
    last = max(vocabulary.tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if last >= vocab_size:
        raise ValueError(
            f"{where}: the tokenizer's ids reach {last}, but the model has {vocab_size} tokens (vocab_size). They are of "
            "different models: take both from one place."
        )
    return vocabulary


def _from_directory(directory: pathlib.Path, vocab_size: int) -> Vocabulary:
    if not (directory / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"{directory} holds no tokenizer_config.json. Save the model's fast tokenizer beside its weights.")
    tokenizer = read_tokenizer(directory / "tokenizer.json")
    described = read_json(directory / "tokenizer_config.json")
    before, after = _added(tokenizer)
    stated = _stated_ends(directory, vocab_size)
    token = described.get("eos_token")
    if token is None and (directory / "special_tokens_map.json").is_file():
        token = read_json(directory / "special_tokens_map.json").get("eos_token")
    eos = next(iter((*stated, *after)), None) if token is None else _number(tokenizer, token, "eos_token", directory)
    if eos is None:
        raise ValueError(
            f"{directory / 'tokenizer_config.json'} has eos_token {token!r}, which is no token of tokenizer.json. Save the "
            "model's fast tokenizer again."
        )
    adds = described.get("add_bos_token")
    if not isinstance(adds, bool | None):
        raise ValueError(f"{directory / 'tokenizer_config.json'} has add_bos_token {adds!r}; it must be true, false or null.")
    bos = described.get("bos_token")
    if adds is False:
        before = []
    elif adds and bos is not None:
        before = [number for number in [_number(tokenizer, bos, "bos_token", directory)] if number is not None]
    if len(before) > 1:
        raise ValueError(f"{directory}: the tokenizer puts the tokens {before} before a text, but only one can be put there here.")
    return Vocabulary(tokenizer, before[0] if before else None, eos, tuple(end for end in stated if end != eos))


def read_tokenizer(file: pathlib.Path) -> tokenizers.Tokenizer:
    """A tokenizer.json.

    Raises:
      FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} holds no {file.name}. Save the model's fast tokenizer beside its weights.")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        for text in ("a", "ab ba", ""):  # some damage shows only here
            tokenizer.encode(text)
        return tokenizer
    except BaseException as error:  # the tokenizer's are plain Exceptions, and panics, which are none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{file}: its tokenizer cannot be read ({error}). Download or copy it again.") from error


def _number(tokenizer: tokenizers.Tokenizer, token: Any, field: str, directory: pathlib.Path) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ValueError(f"{directory}: its tokenizer has {field} {str(token)[:60]!r}, which is no token. Save it again.")
    return tokenizer.token_to_id(text)


def _added(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that tokenizer.json's post-processor puts before a text, and after it."""
    for text in ("a", *itertools.islice(tokenizer.get_vocab(), 100)):
        encoded = tokenizer.encode(text)
        flagged = list(zip(encoded.special_tokens_mask, encoded.ids))
        if not all(encoded.special_tokens_mask):  # so that there is something between the two
            break

    def run(flags):
        return [number for flag, number in itertools.takewhile(lambda entry: entry[0], flags)]

    return run(flagged), run(reversed(flagged))[::-1] if not all(encoded.special_tokens_mask) else []


def _stated_ends(directory: pathlib.Path, vocab_size: int) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json, one or several; those that the model has."""
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file() and (ends := read_json(directory / name).get("eos_token_id")) is not None:
            ends = ends if isinstance(ends, list) else [ends]
            if not all(type(end) is int for end in ends):
                raise ValueError(f"{directory / name} has eos_token_id {str(ends)[:60]}; they must be whole numbers.")
            return [end for end in dict.fromkeys(ends) if 0 <= end < vocab_size]
    return []


def _from_gguf(file: pathlib.Path) -> Vocabulary:
    from gpart_jax.models import gguf_file  # here, because a directory needs no gguf

    reader = gguf_file.open_file(file)
    read = {
        name: gguf_file.field(reader, f"tokenizer.ggml.{name}")
        for name in (
            "model", "pre", "tokens", "token_type", "merges", "add_bos_token", "bos_token_id", "eos_token_id",
            "eot_token_id", "eom_token_id",
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
    others = {read[name] for name in ("eot_token_id", "eom_token_id")} - {None, read["eos_token_id"]}
    bos = read["bos_token_id"] if read["add_bos_token"] else None
    return Vocabulary(tokenizer, bos, read["eos_token_id"], tuple(sorted(others)))
