"""Directories that are written: a model whole or not at all, and never over what it is made from.

A merged model is its base's directory with other weights: every other file goes along, byte for byte.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from gpart_jax.models.storage import WEIGHTS, Tensor, read_json

Lazy = Mapping[str, Callable[[], np.ndarray]]  # tensors by name, each made when it is written

# Weights in any format, and what lists or divides them. An adapter's config without its weights would keep a model from loading.
_FORMATS = "safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|ggml|tflite|npz|npy|ot|pdparams|nemo|mlmodel|pkl"
_WEIGHTS = re.compile(rf"(\.({_FORMATS})(-\d+)?(\.index(\.json)?|\.meta|[._]data\S*)?|^adapter_config\.json)$", re.IGNORECASE)


def check_inputs(output: str | os.PathLike, inputs: Iterable[str | os.PathLike]) -> pathlib.Path:
    """Where `output` really lies, once it is known that writing it changes none of the inputs.

    Raises:
      ValueError: it is an input, holds one, or is a part of one.
    """
    target = pathlib.Path(output).resolve()
    for source in map(pathlib.Path, inputs):
        root = source.resolve()
        within = [pathlib.Path(at, name).resolve() for at, _, names in os.walk(root) for name in names]  # a snapshot's are links
        above = {path for file in (root, *within) for path in (file, *file.parents)}
        holds = target in above or (target.exists() and any(path.exists() and path.samefile(target) for path in above))
        if holds or (root in target.parents and _is_filled(target)):
            raise ValueError(f"{output} would be written over {source}, which it is made from. Give another place.")
    return target


def _is_filled(path: pathlib.Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def check_directory(
    directory: str | os.PathLike, *, overwrite: bool, inputs: Iterable[str | os.PathLike] = (), described: str = "config.json"
) -> pathlib.Path:
    """Where a directory really lies, once it is known that it may be written.

    Args:
      overwrite: whether another one of its kind may be replaced.
      inputs: files and directories that must stay as they are.
      described: the file by which that kind is known.

    Raises:
      ValueError: there is something already, or it is an input.
    """
    target = check_inputs(directory, inputs)
    there = next(path for path in (target, *target.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{directory} can't be a directory: {there} is a file. Give another name.")
    if _is_filled(target):
        if not overwrite:
            raise ValueError(f"{directory} isn't empty. Give a new directory, or say that it is to be replaced (--overwrite).")
        if not (target / described).is_file() or (target / ".git").exists():
            raise ValueError(f"{directory} isn't replaced: it holds no {described}, or a .git beside it. Give a new directory.")
    return target


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike, **options: Any) -> Iterator[pathlib.Path]:
    """A folder to fill that then takes its place in one step; where filling it fails, nothing is left.

    Args:
      **options: as of `check_directory`, which raises as it does.
    """
    target = check_directory(directory, **options)
    beside, old = (target.with_name(f".{target.name}.{os.getpid()}{ending}") for ending in ("", ".old"))
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        if _is_filled(target):
            os.replace(target, old)
        try:
            os.replace(beside, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def copy_side_files(source: pathlib.Path, directory: pathlib.Path) -> None:
    """Every file of a model's directory but its weights; not what is hidden, nor a folder that is a model of its own."""
    for at, folders, names in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_model(pathlib.Path(at, name))]
        for name in names:
            if not name.startswith(".") and not _WEIGHTS.search(name):
                file = pathlib.Path(at, name)
                to = directory / file.relative_to(source)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)


def _is_model(folder: pathlib.Path) -> bool:
    return (folder / "config.json").is_file() and any(_WEIGHTS.search(file.name) for file in folder.iterdir())


def write_weights_like(stored: Mapping[str, Tensor], new: Lazy, directory: pathlib.Path, recast: tuple[str, str]) -> None:
    """Weights in files as they are stored in, with no more than one in memory.

    Args:
      new: those that change. The others stay, and are cast if they are of the dtype recast[0] and that isn't recast[1].
    """
    old, dtype = recast
    files: dict[pathlib.Path, list[Tensor]] = {}
    for tensor in stored.values():
        files.setdefault(tensor.file, []).append(tensor)
    total = 0
    for file, tensors in files.items():
        arrays = {}
        for name, opened in ((tensor.name, tensor.opened) for tensor in tensors):
            kept = None if name in new else opened.get_tensor(name)
            arrays[name] = new[name]() if kept is None else kept.astype(dtype) if str(kept.dtype) == old else kept
        total += sum(array.nbytes for array in arrays.values())
        safetensors.numpy.save_file(arrays, directory / file.name, tensors[0].opened.metadata())
    index = file.with_name(f"{WEIGHTS}.index.json")
    if file.name != WEIGHTS:
        described = read_json(index).get("metadata")
        known = described if isinstance(described, dict) else {}
        change_json(index, directory / index.name, {"metadata": known | {"total_size": total}} if "total_size" in known else {})


def change_json(file: pathlib.Path, to: pathlib.Path, changes: dict[str, Any]) -> None:
    """A copy of a JSON object with other fields; byte for byte where none of them is another."""
    read = read_json(file)
    if (read | changes) == read:
        shutil.copyfile(file, to)
    else:
        to.write_text(json.dumps(read | changes, indent=2) + "\n", encoding="utf-8")
