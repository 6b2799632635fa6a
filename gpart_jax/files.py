"""Files as people mean them: hidden ones don't count, "é" is one letter however it is written, and a damaged JSON file is named."""

import json
import os
import pathlib
import unicodedata
from typing import Any


def hidden(name: str) -> bool:
    """Whether a file or folder is one that systems leave beside data: ._a.png, .git, .ipynb_checkpoints, .Trash-1000."""
    return name.startswith(".")


def find(folder: str | os.PathLike, pattern: str) -> list[pathlib.Path]:
    """The paths below a folder whose name fits, sorted; hidden ones, and those in hidden folders below it, are passed over."""
    found = pathlib.Path(folder).rglob(pattern)
    return sorted(path for path in found if not any(map(hidden, path.relative_to(folder).parts)))


def same(name: str) -> str:
    """The form in which names are compared: macOS and zip files mix Unicode's NFC and NFD (Unicode Annex 15)."""
    return unicodedata.normalize("NFC", name)


def read_json(path: pathlib.Path, *, missing: str, damaged: str) -> dict[str, Any]:
    """The JSON object in a file; the other arguments say what to do where there is none.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: it holds no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. {missing}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not a JSON object ({error}). {damaged}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object, but a {type(found).__name__}. {damaged}")
    return found
