"""One run at a time in a workdir."""

import errno
import fcntl
import logging
import subprocess
import sys

import pytest

from experiments import train
from experiments.checkpoint import claim_workdir

HOLD = """
import pathlib, sys
from configs import quickstart
from experiments.checkpoint import claim_workdir
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
