"""One run at a time in a workdir, and checkpoints that are whole or not used."""

import errno
import fcntl
import logging
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from absl import app

from experiments import train
from experiments.checkpoint import Checkpoints
from experiments.workdir import claim_workdir, local

HOLD = """
import pathlib, sys
from configs import quickstart
from experiments.workdir import claim_workdir
with claim_workdir(quickstart.get_config(), pathlib.Path(sys.argv[1])):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_a_workdir_in_use_is_refused_with_the_process_that_has_it(config, tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "claimed\n"
        written = (tmp_path / "config.json").read_text()
        for _ in range(2):  # asking leaves the lock as it is
            with pytest.raises(ValueError, match=f"in use by another run, process {other.pid} on .* stop it"):
                train.train(config, tmp_path)
        assert (tmp_path / "config.json").read_text() == written
        other.kill()
        other.wait()
        with claim_workdir(config, tmp_path):
            assert (tmp_path / "config.json").read_text() == config.to_json(indent=2) + "\n" != written


def test_a_run_has_its_workdir_to_itself_to_its_end(config, tmp_path, monkeypatch):
    def in_the_middle(*_):
        with pytest.raises(ValueError, match="in use"):
            with claim_workdir(config, tmp_path):
                pass
        raise FloatingPointError

    monkeypatch.setattr(train, "_train", in_the_middle)
    for _ in range(2):  # an error ends a run too
        with pytest.raises(FloatingPointError) as error:
            train.train(config, tmp_path)
        assert error.traceback  # and no reference to its frames keeps the workdir


def test_without_file_locks_a_run_is_warned(config, tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING), claim_workdir(config, tmp_path):
        assert (tmp_path / "config.json").exists()
    assert "cannot be locked ([Errno 38] Function not implemented). Start no second run" in caplog.text


class Batches:
    """Data of which only the position is there."""

    def get_state(self):
        return {"next_index": self.at}

    def set_state(self, state):
        self.at = state["next_index"]


def state_of(step):
    return {"step": step, "trainable": {"theta": np.random.default_rng(step).normal(size=64)}}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A workdir with those of steps 10 and 20, where the data is at 1010 and 1020."""
    workdir, batches = tmp_path_factory.mktemp("saved"), Batches()
    with Checkpoints(workdir) as checkpoints:
        for step in (10, 20):
            batches.at = 1000 + step
            checkpoints.save(state_of(step), batches)
    return workdir


def restore_damaged(whole, workdir, file, change):
    """The step that is restored once a file of checkpoint 20 has been changed; all else must fit it."""
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(whole, workdir)
    path, batches = workdir / "checkpoints" / "20" / file, Batches()
    path.write_bytes(change(path.read_bytes()))
    with Checkpoints(workdir) as checkpoints:
        restored = checkpoints.restore(state_of(0), batches)
    step = int(restored["step"])
    assert batches.at == 1000 + step
    np.testing.assert_array_equal(restored["trainable"]["theta"], state_of(step)["trainable"]["theta"])
    assert (workdir / "checkpoints" / "20").exists() == (step == 20)
    assert (workdir / "damaged-checkpoints").exists() == (step == 10)
    return step


def flip(at, bit):
    return lambda content: content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


@pytest.mark.parametrize("name", ["data", "seal"])
def test_any_damage_to_the_position_or_the_seal_is_noticed(two_checkpoints, tmp_path, name):
    file, draw = f"{name}/metadata", np.random.default_rng(0)
    size = (two_checkpoints / "checkpoints" / "20" / file).stat().st_size
    for at in range(0, size, 1 if name == "data" else 7):
        assert restore_damaged(two_checkpoints, tmp_path, file, flip(at, draw.integers(8))) == 10, at
        assert restore_damaged(two_checkpoints, tmp_path, file, lambda content: content[:at]) == 10, at


def test_damage_to_any_file_of_a_checkpoint_is_noticed_or_does_nothing(two_checkpoints, tmp_path):
    folder, draw, steps = two_checkpoints / "checkpoints" / "20", np.random.default_rng(0), set()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        file, size = path.relative_to(folder), path.stat().st_size
        at = int(draw.integers(size))
        steps.add(restore_damaged(two_checkpoints, tmp_path, file, flip(at, draw.integers(8))))
        steps.add(restore_damaged(two_checkpoints, tmp_path, file, lambda content: content[:at]))
    assert steps == {10, 20}  # Orbax writes some files that it never reads


def test_a_bucket_is_refused_and_home_is_home(tmp_path, monkeypatch):
    for path in ("gs://bucket/runs", "s3://bucket/runs", "gs:/bucket"):
        with pytest.raises(app.UsageError, match=r"lies in (gs|s3)://, but locks .* need a disk"):
            local(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local("~/runs") == tmp_path / "runs" and local("runs/a") == pathlib.Path("runs/a")
