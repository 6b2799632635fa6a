"""The adapter file: trained numbers, and what they mean, in one safetensors file. docs/adapters.md has it in prose.

    8 bytes   the length of the header, little-endian
    header    JSON: where each tensor lies, its dtype and shape; and {"__metadata__": {"gpart_jax": text}}
    the rest  the tensors

`text` is JSON too, and starts with {"sha256": "...", "format": 2, ...}. The digest is that of the whole file with zeros for
its own 64 digits, so that there is no byte it doesn't cover. It tells of damage, not of malice: who changes a file can
change its digest. What is read is therefore never trusted, only compared; nothing in a file is run, or opened as a path.
"""

import hashlib
import json
import os
import pathlib
import struct

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT = 2
LONGEST_HEADER = 2**20  # in bytes; the header of an adapter has about a thousand
FIELDS: dict[str, type | tuple[type, ...]] = {  # and the types of their values
    "method": dict,
    "head_targets": (str, list, type(None)),
    "n": int,
    "layout": str,
    "base": str,
    "metadata": dict,
}
_DTYPES = ("F32", "F16", "BF16", "F64")
_ZEROS = "0" * 64
_MARK = rb"{\"sha256\": \""  # as it lies in the file, where quotes within text are escaped


def write(path: str | os.PathLike, fields: dict, tensors: dict[str, np.ndarray]) -> None:
    """Writes a file beside `path`, then puts it in its place in one step: a save that is cut short harms nothing.

    Raises:
      ValueError: fields that aren't plain data, or too many of them.
    """
    path = pathlib.Path(path)
    try:
        text = json.dumps({"sha256": _ZEROS, "format": FORMAT, **fields}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"An adapter's method must be plain data, with targets as patterns or a Layout, and so must its metadata: "
            f"{error}."
        ) from None
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, beside, metadata={"gpart_jax": text})
        with open(beside, "r+b") as file:
            header = _header(file, beside)
            at = 8 + header.index(_MARK) + len(_MARK)
            digest = _digest(file, at)
            file.seek(at)
            file.write(digest.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: str | os.PathLike) -> tuple[dict, dict[str, np.ndarray]]:
    """The fields and the tensors of a file, in no more memory than the file is long and its header may cost.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, one of another format, or one that isn't an adapter of this library.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no adapter at {path}.")
    with open(path, "rb") as file:
        header = _header(file, path)
        fields = _fields(header, path)
        at = 8 + header.find(_MARK) + len(_MARK)
        if fields.pop("sha256", None) != _digest(file, at):
            raise ValueError(
                f"{path} is damaged: its bytes don't have the digest that it was saved with. Copy or download it again."
            )
    fields.pop("format")
    for name, kind in FIELDS.items():
        if not isinstance(fields.get(name, ...), kind):
            found = f"is {type(fields[name]).__name__}" if name in fields else "is missing"
            raise ValueError(f"{path} is damaged: its field {name!r} {found}. Copy or download it again.")
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():
                if (dtype := file.get_slice(name).get_dtype()) not in _DTYPES:
                    raise ValueError(
                        f"{path}: tensor {name!r} is {dtype}, but trained numbers are {', '.join(_DTYPES)}."
                    )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}.") from None
    return fields, tensors


def _header(file, path: pathlib.Path) -> bytes:
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if not 2 <= length <= size - 8:
        raise ValueError(f"{path} is damaged, or no safetensors file: it has {size} bytes, its header {length}.")
    if length > LONGEST_HEADER:
        raise ValueError(f"{path} has a header of {length} bytes; an adapter's has at most {LONGEST_HEADER}.")
    return file.read(length)


def _fields(header: bytes, path: pathlib.Path) -> dict:
    try:
        text = json.loads(header)["__metadata__"]["gpart_jax"]
    except (KeyError, TypeError):
        raise ValueError(f"{path} is a safetensors file, but not one that gpart_jax.adapter wrote.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: its header is no JSON ({error}).") from None
    try:
        fields = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: what it says of itself is no JSON object ({error}).") from None
    if fields.get("format") != FORMAT:
        raise ValueError(
            f"{path} has adapter format {str(fields.get('format'))[:20]}; this version of gpart_jax reads {FORMAT}. Read it "
            f"with the version that wrote it."
        )
    return fields


def _digest(file, at: int) -> str:
    """SHA-256 of a file with zeros for the 64 bytes at `at`."""
    digest, position = hashlib.sha256(), 0
    file.seek(0)
    while block := bytearray(file.read(2**20)):
        first, last = max(at - position, 0), min(at + 64 - position, len(block))
        if first < last:
            block[first:last] = b"0" * (last - first)
        digest.update(block)
        position += len(block)
    return digest.hexdigest()
