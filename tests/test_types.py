"""Every public function and method says what it takes and gives."""

import importlib
import inspect
import pkgutil

import pytest

import gpart_jax
from gpart_jax.models.decoder import Decoder
from gpart_jax.models.encoder import EncoderClassifier
from gpart_jax.models.vit import ViTClassifier

MODULES = ["gpart_jax", *(found.name for found in pkgutil.walk_packages(gpart_jax.__path__, "gpart_jax."))]
MODELS = (Decoder, EncoderClassifier, ViTClassifier)  # called by users, unlike the modules that they are made of


def functions(module):
    """(name, function) of all that a module or a class of its own defines without a leading underscore."""
    own = {name: x for name, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__}
    for name, x in own.items():
        if name.startswith("_") or not callable(x):
            continue
        if not inspect.isclass(x):
            yield name, x
            continue
        for method, member in vars(x).items():
            if method.startswith("_") and not (method == "__call__" and x in MODELS):
                continue
            member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(member) and member.__module__ == module.__name__:
                yield f"{name}.{method}", member


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_have_annotations(name):
    lacking = []
    for function, x in functions(importlib.import_module(name)):
        signature = inspect.signature(x)
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        lacking += [f"{function}({p.name})" for p in parameters if p.annotation is p.empty]
        lacking += [f"{function} -> ?"] * (signature.return_annotation is signature.empty)
    assert not lacking, f"{name}: {', '.join(lacking)}"
