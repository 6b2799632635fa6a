"""Others' figures: all of them are printed with their sources, and a run gets those of its own experiment alone."""

import re

import pytest

from experiments import published

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


@pytest.mark.parametrize(
    "name, expected",
    [("LoRA r=8 qv", ("lora", 8)), ("LoRA", ("lora", None)), ("Uni-LoRA r=4 qv", ("uni_lora", 4)), ("full FT", ("full", None)),
     ("linear probe", ("head", None)), ("LoRA-XS r=48", (None, None)), ("LoRA r=8 qv (restricted setup, no MNLI start)", (None, None)),
     ("lora rank32-dora (lr 0.0001)", (None, None)), ("VeRA all linear", (None, None))],
)  # fmt: skip
def test_a_variant_is_another_method(name, expected):
    assert published.method_of(name) == expected
