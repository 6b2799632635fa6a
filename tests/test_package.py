"""What is published: the wheel in an environment without Flax, the versions that it asks for, the command on the path."""

import email
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import venv
import warnings
import zipfile

import numpy as np
import pytest
from packaging.requirements import Requirement

from gpart_jax import requirements
from gpart_jax.adapter import Adapter
from gpart_jax.methods import from_spec

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
BESIDE = ("jax", "jaxlib", "safetensors", "optax")  # optax is README's, not the library's

FIVE_LINES = re.search(r"```python\n(.*?gpart_transform\(.*?)```", README, re.DOTALL)[1]
AROUND = """
import sys
import numpy as np

class model:
    def apply(variables, x):
        return x @ variables["params"]["kernel"]

frozen_params = {"kernel": np.ones((80, 80), np.float32)}
batch = {"x": np.ones((2, 80), np.float32), "y": np.zeros((2, 80), np.float32)}
loss_fn = lambda outputs, y: ((outputs - y) ** 2).mean()
"""
AFTER = """
assert grads.shape == (4096,) and bool(jnp.any(grads != 0))
import gpart_jax
assert "site-packages" in gpart_jax.__file__, gpart_jax.__file__
assert "flax" not in sys.modules
print(gpart_jax.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, capture_output=True)
    assert [path.suffix for path in sorted(folder.iterdir())] == [".whl", ".gz"]
    return next(folder.glob("*.whl"))


def needed_by(names) -> set[str]:
    """Those distributions and all that they need, without extras."""
    found, rest = set(), list(names)
    while rest:
        name = rest.pop()
        if name not in found:
            found.add(name)
            needs = map(Requirement, importlib.metadata.requires(name) or ())
            rest += [one.name for one in needs if not one.marker or one.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """An environment with the wheel, and beside it jax, safetensors and optax alone, which are those of this one."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    paths = subprocess.run([python, "-c", "import site; print(site.getsitepackages()[0])"], check=True, capture_output=True)
    packages = pathlib.Path(paths.stdout.decode().strip())
    for name in needed_by(BESIDE):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    return folder


def run(clean, *command):
    return subprocess.run(
        [clean / "bin" / command[0], *map(str, command[1:])], cwd=clean, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""}
    )  # fmt: skip


def test_the_wheel_runs_the_five_lines_of_the_readme(clean):
    done = run(clean, "python", "-W", "error::UserWarning", "-c", AROUND + FIVE_LINES + AFTER)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == PROJECT["version"]


def test_the_wheel_has_a_licence_and_types(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        metadata = email.message_from_bytes(file.read(next(name for name in names if name.endswith("METADATA"))))
    assert metadata["License"] == "Apache-2.0" and any(name.endswith("licenses/LICENSE") for name in names)
    assert "gpart_jax/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"gpart_jax", f"gpart_jax-{PROJECT['version']}.dist-info"}
    assert set(PROJECT["optional-dependencies"]) >= {"experiments", "test", "tpu", "cuda12", "cuda13", "docs"}
    assert not any("<" in one for one in PROJECT["dependencies"])


def test_pip_shows_the_licence(clean):
    assert "License: Apache-2.0" in run(clean, "python", "-m", "pip", "show", "gpart_jax").stdout


def test_the_command_inspects_without_flax_and_says_what_else_needs_it(clean, tmp_path):
    params = {"kernel": np.ones((8, 8), np.float32)}
    spec = {"name": "gpart", "d": 16, "seed": 1, "targets": "kernel"}
    Adapter.of(from_spec(spec), {"theta": np.ones(16, np.float32)}, params).save(tmp_path / "a")
    done = run(clean, "gpart-adapter", "inspect", tmp_path / "a")
    assert done.returncode == 0 and "gpart, 16 trained numbers" in done.stdout, done.stderr
    done = run(clean, "gpart-adapter", "merge", tmp_path / "a", "base", "merged")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "need flax, which isn't installed" in done.stderr and "pip install 'gpart_jax[experiments]'" in done.stderr


def test_versions_agree():
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"\n## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text())[1] == PROJECT["version"]
    bounds = {one.name: str(one.specifier) for one in map(Requirement, PROJECT["dependencies"])}
    assert bounds.keys() == {"jax", "numpy", "safetensors"}
    assert bounds["jax"] == f">={requirements.OLDEST_JAX}"
    minors = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert PROJECT["requires-python"] == f">={minors[0]}"
    assert f"Python {minors[0]} to {minors[-1]}, JAX {requirements.OLDEST_JAX} to {requirements.NEWEST_JAX}" in README


@pytest.mark.parametrize("version, warns", [("0.4.30", True), ("0.9.1", True), ("0.9.2", False), ("0.12.0.1", False), ("1.0", False)])  # fmt: skip
def test_an_older_jax_gets_one_warning_at_import_that_names_the_tried_range(version, warns):
    code = f"import jax; jax.__version__ = '{version}'; import gpart_jax"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning") == warns
    if warns:
        assert f"JAX {requirements.OLDEST_JAX} to {requirements.NEWEST_JAX}, and this is JAX {version}" in done.stderr
        assert "pip install 'jax>=" in done.stderr


@pytest.mark.parametrize(
    "flax, jax, message",
    [
        ("0.12.9", "0.12.0.1", "Flax 0.12.9 can't be imported with JAX 0.12.0.1, which needs Flax 0.12.10 or newer"),
        ("0.12.8", "0.11.1", "pip install 'flax>=0.12.9'. To keep this Flax: pip install 'jax<0.11.1'"),
        ("0.12.6", "0.11.0", "pip install 'flax>=0.12.7'"),
        ("0.12.8", "0.11.2", "pip install 'flax>=0.12.10'. To keep this Flax: pip install 'jax<0.11.2'"),
        ("0.12.10", "0.12.0", None),
        ("0.12.9", "0.11.1", None),
        ("0.12.7", "0.11.0", None),
        ("0.12.3", "0.10.2", None),
        (None, "0.12.0", "need flax, which isn't installed"),
    ],
)
def test_a_flax_that_this_jax_breaks_is_named(monkeypatch, flax, jax, message):
    def version(name):
        found = {"flax": flax, "jax": jax}[name]
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    if message is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            requirements.check_flax()
    else:
        with pytest.raises(ImportError, match=re.escape(message)):
            requirements.check_flax()
