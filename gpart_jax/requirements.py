"""The releases of JAX and Flax that this library was tried with. Imports neither, so that it can speak before they fail."""

import importlib.metadata
import re
import warnings

OLDEST_JAX, NEWEST_JAX = "0.9.2", "0.12.0"  # .ci/run runs the core tests with both
FLAX_FOR = {"0.11.2": "0.12.10", "0.11.1": "0.12.9", "0.11.0": "0.12.7"}  # from this JAX on, the oldest Flax that can be imported


def _release(version: str) -> tuple[int, ...]:
    """ "0.12.0.dev2" -> (0, 12, 0)."""
    return tuple(map(int, re.findall(r"\d+(?:\.\d+)*", version)[0].split(".")))


def warn_of_old_jax(version: str) -> None:
    """Warns once where JAX is older than any that was tried."""
    if _release(version) < _release(OLDEST_JAX):
        warnings.warn(
            f"gpart_jax was tried with JAX {OLDEST_JAX} to {NEWEST_JAX}, and this is JAX {version}: some functions may "
            f"fail. To upgrade: pip install 'jax>={OLDEST_JAX}'",
            stacklevel=3,
        )


def check_flax() -> None:
    """Raises an ImportError that says what to do where Flax is missing, or can't be imported with this JAX."""
    try:
        flax, jax = (importlib.metadata.version(name) for name in ("flax", "jax"))
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"The models of gpart_jax need {error.name}, which isn't installed. "
            "To install all that they need: pip install 'gpart_jax[experiments]'"
        ) from None
    for newer, needed in FLAX_FOR.items():
        if _release(jax) >= _release(newer) and _release(flax) < _release(needed):
            raise ImportError(
                f"Flax {flax} can't be imported with JAX {jax}, which needs Flax {needed} or newer. "
                f"To upgrade: pip install 'flax>={needed}'. To keep this Flax: pip install 'jax<{newer}'"
            )
