"""Names of files as people mean them: what systems leave beside data doesn't count, and "é" is one letter however it is written."""

import os
import pathlib
import unicodedata


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
