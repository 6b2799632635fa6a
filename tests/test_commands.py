"""What commands say of an error in one line, and of which they leave the traceback."""

import errno
import json
import os
import re
import subprocess
import sys

import pytest

from gpart_jax.commands import explain


def error_of(code: str, module: str) -> Exception:
    try:
        exec(code, {"__name__": module, "json": json, "re": re, "open": open, "os": os})
    except Exception as error:
        return error


@pytest.mark.parametrize(
    "code, said",
    [
        ("raise ValueError('d = 0 must be positive.')", "d = 0 must be positive."),
        ("raise FloatingPointError('The loss is nan.')", "The loss is nan."),
        ("raise FileNotFoundError('There is no run. Train there first.')", "There is no run. Train there first."),
        ("open('/nowhere/x')", "No such file or directory: /nowhere/x. Check the path."),
        ("open('/')", "Is a directory: /. A folder lies where a file should: move it away, or choose another path."),
        ("open('/' + 300 * 'x')", f"File name too long: /{300 * 'x'}. Choose a shorter path."),
        (f"raise OSError({errno.ENOSPC}, 'No space: make room')", "No space: make room"),
        ("import a_missing_package", "No module named 'a_missing_package'"),
        ("re.compile('[')", "The pattern '[' is no regular expression: unterminated character set."),
        ("int('x')", None),  # of an operation, not of a raise
        ("a, b = 1, 2, 3", None),
        ("json.loads('{')", None),  # of someone else's code: a reader of ours would have named the file
        ("{}['x']", None),
        ("None.x", None),
        ("raise TypeError('x')", None),
        ("import gpart_jax.missing", None),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_a_fault_of_ours_is_none(code, said):
    assert explain(error_of(code, "experiments.x")) == said


def test_a_value_error_of_other_code_is_a_fault():
    assert explain(error_of("raise ValueError('shapes differ')", "jax.numpy")) is None


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["gpart_jax.adapter", "inspect", "/"], "error: .*"),
        (["launch.local", "--processes=x"], "invalid int value"),
        (["experiments.train", "--config=configs/quickstart.py", "--workdir=/x", "--config.method.dd=4"], "error: the config has no key 'dd'"),
        (["experiments.train", "--config=README.md", "--workdir=/x"], "error: README.md, line .* Is this a config file"),
        (["experiments.train", "--config=configs/vision.py:foo", "--workdir=/x"], "error: .* has no data set 'foo'"),
        (["experiments.report", "--workdir=/nowhere"], "error: There is no finished run"),
    ],
)
def test_commands_end_with_one_line(arguments, said):
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr and re.search(said, done.stderr), done.stderr
