"""What the fields of a model's config may be: a config.json is written by many hands."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

LARGEST = {"num_layers": 1000}  # an encoder's layers are built one by one; no published model has as many
LEAST = {"pad_token_id": 0}
RATES = ("hidden_dropout", "attention_dropout", "classifier_dropout")


def check_fields(config: Any, hf_names: Mapping[str, str]) -> None:
    """Raises a ValueError that names the first field of a config, a dataclass, whose value isn't of its type or out of range.

    Args:
      hf_names: fields that config.json calls otherwise.
    """
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type
        if value is None and kind in (int | None, float | None):
            continue
        if kind in (int, int | None):
            least, largest = LEAST.get(field.name, 1), LARGEST.get(field.name, 2**31 - 1)
            wanted = f"a whole number from {least} to {largest}"
            right = is_number(value) and isinstance(value, numbers.Integral) and least <= int(value) <= largest
        elif kind in (float, float | None):
            most = 1 if field.name in RATES else 2**31 - 1  # JAX takes a whole number as an int32
            wanted = f"a number from 0 to {most}"
            right = is_number(value) and 0 <= value <= most
        elif kind in (bool, str):
            wanted, right = {bool: "true or false", str: "a text"}[kind], isinstance(value, kind)
        else:
            continue  # a part that checks itself
        if not right:
            raise ValueError(f"{hf_names.get(field.name, field.name)} {str(value)[:60]!r} must be {wanted}.")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and not true or false, which Python counts among them."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that say something: null is as if the field weren't there."""
    return {name: value for name, value in config.items() if value is not None}
