"""The evidence kit on a CPU: every part runs, its tables are whole, and what is done isn't done again."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest
from absl import app

from benchmarks import check, device

ROOT = pathlib.Path(__file__).parents[2]


def run(folder, *arguments):
    command = [sys.executable, "-m", "benchmarks.device", *arguments]
    where = [f"--figures={folder / 'device.json'}", f"--docs={folder}"]
    return subprocess.run([*command, *where], cwd=ROOT, capture_output=True, text=True)


FIRST = {part.module: name for name, part in reversed(device.PARTS.items())}  # of each module one part: `--smoke` alone does all
FIRST = [name for name in device.PARTS if name in {*FIRST.values(), "check-bf16"}]


def test_the_smoke_run_does_each_part_once_and_leaves_no_empty_cell(tmp_path):
    done = run(tmp_path, "--smoke", f"--parts={','.join(FIRST)}")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "device.json").read_text())
    assert figures["smoke"] and figures["machine"]["platform"] == "cpu"
    parts = figures["runs"]["1"]
    assert list(parts) == FIRST
    for name, part in parts.items():
        if "left_out" in part:
            assert name.startswith("pytorch") and part["left_out"] == device.missing(name)
        else:
            assert part["table"] and not part["wrong"]
            assert all(str(cell).strip() for row in part["table"] for cell in row.values()), name
    checks = parts["check"]["table"] + parts["check-bf16"]["table"]
    assert len(checks) == 24 and all(cell in ("equal", "within") for row in checks for cell in list(row.values())[4:7])
    page = (tmp_path / "device-cpu.md").read_text()
    assert "smoke run" in page and all(f"## {device.PARTS[name].what}\n" in page for name in FIRST)
    assert "| |" not in page and page.count("\n| --- |") == sum("table" in part for part in parts.values())

    parts.pop("transform")
    (tmp_path / "device.json").write_text(json.dumps(figures))
    done = run(tmp_path, "--smoke", "--parts=check,transform")
    assert done.returncode == 0 and done.stdout.count("has it already") == 1
    again = json.loads((tmp_path / "device.json").read_text())["runs"]["1"]
    assert again.keys() == set(FIRST) and again["check"] == parts["check"]


def test_a_part_that_takes_too_long_is_ended_and_named(tmp_path):
    done = run(tmp_path, "--smoke", "--parts=check", "--timeout=1")
    assert done.returncode == 1
    assert "Failed: check (it was not done after 1 s). The same command does these again." in done.stderr


def test_what_a_failed_part_found_is_kept_and_shown():
    part = {"date": "now", "version": "1", "took": 2.0, "wrong": "it ended with code 1", "command": "c", "peak": None}
    page = device.page({"machine": {"device": "x"}, "smoke": False, "runs": {"1": {"check": part | {"table": [{"a": 1}]}}}})
    assert "**Not all of it: it ended with code 1.**" in page and "| a |\n| --- |\n| 1 |" in page


def test_without_an_accelerator_it_says_what_to_install(tmp_path):
    done = run(tmp_path, "--parts=check")
    assert done.returncode == 1 and "jax[cuda12], jax[cuda13] or jax[tpu]" in done.stderr and "--smoke" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "doesn't hold figures of this kit"),
        ('{"table": []}', "doesn't hold figures of this kit"),
        ('{"machine": {"device": "TPU v5e"}, "smoke": false, "runs": {}}', "device is TPU v5e there and cpu here"),
        ('{"machine": {"device": "cpu"}, "smoke": true, "runs": {}}', "of a smoke run"),
    ],
)
def test_figures_of_another_machine_or_kind_are_left_alone(tmp_path, text, message):
    (tmp_path / "device.json").write_text(text)
    with pytest.raises(app.UsageError, match=message):
        device.read(tmp_path / "device.json", {"device": "cpu"}, False)
    assert (tmp_path / "device.json").read_text() == text


def test_the_check_finds_a_wrong_group(monkeypatch):
    assert jax.device_count() % 2 == 0  # so that the mesh divides the weights too
    right = check.check("mesh", "balanced-v1", "float32", 300, 2, 32)
    assert right[:3] == ["equal", "within", "equal"] and float(right[3]) <= 2
    group_ids = check.group_ids
    monkeypatch.setattr(check, "group_ids", lambda scheme, d, seed, index, rho: (group_ids(scheme, d, seed, index, rho) + (index == 0)) % d)
    wrong = check.check("leaves", "balanced-v1", "float32", 300, 2, 32)
    assert wrong[0].startswith("wrong in 1 of") and wrong[1].startswith("wrong in 1 of")
    assert wrong[2] == "wrong in 2 of 300" and wrong[3].startswith("wrong")
