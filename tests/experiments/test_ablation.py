"""What a search chooses, by what, and what is trained for it."""

import json

import pytest

from experiments import ablation
from experiments.ablation import Budget

BUDGET = Budget((64, 1024), (1.0, 2.0, 4.0), 3)


@pytest.fixture
def trained(monkeypatch):
    """Runs that leave results at once: those held out are best at a step of 2 (d = 64) and 4, or at the lowest rate; test never."""
    done = []

    def run_all(runs, jobs, workdir, population):
        for run in runs:
            if not (run.directory / "results.json").exists():
                done.append(run)
                options, seed = run.config.optimizer, run.config.seed
                best = 2.0 if run.config.method.get("d") == 64 else 4.0
                value = 0.9 - 0.1 * abs(options.step - best) if options.step else 0.8 - (options.lr or 0.0) - options.head_lr
                run.directory.mkdir(parents=True)
                found = {"base_norm": 100.0, "validation": value, "test": 0.5 + 0.01 * seed + (options.step or 0) / 1000, "trained_numbers": 7}
                (run.directory / "results.json").write_text(json.dumps(found))
        return {}

    monkeypatch.setattr(ablation, "run_all", run_all)
    return done


def test_held_out_data_chooses_and_all_seeds_are_trained(trained, tmp_path):
    found = ablation.ablate("vader", BUDGET, tmp_path, 1)
    lines = {line["name"]: line for line in found["lines"]}
    assert lines["gpart, d = 64"]["chosen"] == 2.0 and lines["gpart, d = 1,024"]["chosen"] == 4.0
    assert lines["gpart, d = 64"]["held_out"] == pytest.approx({1.0: 0.8, 2.0: 0.9, 4.0: 0.7})
    assert set(lines["gpart, d = 1,024"]["held_out"]) == {1.0, 2.0, 4.0, 8.0}  # its best lay at an edge
    assert lines["lora"]["chosen"] == 0.25 / 2**ablation.FURTHER * 1e-3 and lines["head"]["key"] == "optimizer.head_lr"
    assert set(lines) == {"gpart, d = 64", "gpart, d = 1,024", *ablation.BASELINES}
    assert found["common_step"] == 2.0  # means over d: 0.7, 0.8, 0.8; the shorter of two
    assert lines["gpart, d = 64"]["test"] == pytest.approx([0.502, 0.512, 0.522])
    assert lines["gpart, d = 1,024"]["test_at_common_step"] == pytest.approx([0.502, 0.512, 0.522])
    searches, seeds = 3 + 4 + (5 + ablation.FURTHER) * 7, 2 * (2 + 7) + 2  # of each line two more seeds; and of one d at the common step
    assert len(trained) == searches + seeds
    assert ablation.ablate("vader", BUDGET, tmp_path, 1) == found and len(trained) == searches + seeds  # it goes on
    table = ablation.markdown(found)
    assert "| gpart, d = 64 | 7 | 1: 80.0, 2: 90.0, 4: 70.0 | 2 | 51.2 ± 1.0 | 51.2 ± 1.0 |" in table
    assert "The common step is 2, 2.0% of |W0| = 100.0: 2 of 2 d within one standard deviation" in table


def test_the_mean_over_d_is_of_the_values_that_all_have():
    assert ablation.mean_over([{1.0: 0.5, 2.0: 0.8, 4.0: 0.2}, {2.0: 0.6, 4.0: 0.4, 8.0: 0.9}]) == pytest.approx({2.0: 0.7, 4.0: 0.3})


def test_optimizers_without_a_rate_beside_the_searched_length(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "RATE_FREE_SIZES", (64, 1024))
    whole = ablation.ablate("vader", BUDGET, tmp_path / "vader", 1)
    before = len(trained)
    found = ablation.compare_rate_free(whole, BUDGET, tmp_path / "free", 1)
    assert [(entry["d"], entry["epochs"], entry["step"]) for entry in found] == [(64, 3, 2), (1024, 3, 4), (64, 1, 2), (1024, 1, 4)]
    assert found[0]["searched"] == pytest.approx([0.502, 0.512, 0.522]) and found[0]["prodigy"] == pytest.approx([0.5, 0.51, 0.52])
    own = trained[before:]  # at full length the searched runs are those that ablate left; a short training is searched again
    assert len(own) == 2 * (2 * 3) + 2 * (3 + 2 + 2 * 3) + 1
    assert all(run.config.optimizer.step is None and run.config.optimizer.lr is None for run in own if run.config.optimizer.name != "adamw")
    table = ablation.rate_free_markdown(found)
    assert "| 64 | 3 | 2 | 51.2 ± 1.0 | 51.0 ± 1.0 | 51.0 ± 1.0 |" in table
    assert "Within one standard deviation of the searched step: prodigy 4 of 4 times, dog 4 of 4 times." in table


@pytest.mark.parametrize("task", ablation.TASKS)
def test_each_task_has_a_config_for_each_method(task):
    assert ablation.TASKS[task]("gpart").task.get("holdout", 0.1) > 0  # held-out data chooses
    for budget in ablation.BUDGETS.values():
        assert len(ablation.lines_of(task, budget)) == len(budget.sizes) + len(ablation.BASELINES)
