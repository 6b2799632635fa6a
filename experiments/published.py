"""Figures that others published, each with its source and its protocol, to set beside ours.

  python -m experiments.report --published            all of them, and the commands that would fill ours
  python -m experiments.report --published --out=...  as published.md

published.csv has a row for each figure, read in a text that `where` names; a figure nobody was seen to state is in no row.
"""

import collections
import csv
import json
import pathlib
import re
from typing import NamedTuple

from configs import math
from experiments.config import identity

FOLDER = pathlib.Path(__file__).parent
MODELS = {  # what papers call a base model: what the configs do
    "RoBERTa-base": "FacebookAI/roberta-base",
    "RoBERTa-large": "FacebookAI/roberta-large",
    "ViT-base": "google/vit-base-patch16-224-in21k",
    "ViT-large": "google/vit-large-patch16-224-in21k",
    "Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "Llama-3.2-3B": "meta-llama/Llama-3.2-3B",
    "Gemma-7B": "google/gemma-7b",
}
DATA = {  # likewise of data, as (task, metric)
    "CoLA": ("glue/cola", "matthews"), "SST-2": ("glue/sst2", "accuracy"), "MRPC": ("glue/mrpc", "accuracy"),
    "QNLI": ("glue/qnli", "accuracy"), "RTE": ("glue/rte", "accuracy"), "STS-B": ("glue/stsb", "pearson"),
    "OxfordPets": ("pets", "accuracy"), "StanfordCars": ("cars", "accuracy"), "CIFAR10": ("cifar10", "accuracy"),
    "CIFAR100": ("cifar100", "accuracy"), "DTD": ("dtd", "accuracy"), "EuroSAT": ("eurosat", "accuracy"),
    "FGVC": ("aircraft", "accuracy"), "RESISC45": ("resisc45", "accuracy"), "Flowers102": ("flowers102", "accuracy"),
}  # fmt: skip
METHODS = {  # how a paper's name of a method begins: ours
    "uni-lora": "uni_lora", "unilora": "uni_lora", "gpart": "gpart", "vera": "vera", "lora": "lora", "bitfit": "bitfit",
    "full ft": "full", "head only": "head", "linear probe": "head",
}  # fmt: skip
SCORED, HELD_OUT, LAST = "best epoch on the scored set", "epoch chosen on held-out data", "last epoch"
# What decides whether two figures may be compared: on what the epoch was chosen, where papers and their code say it.
PROTOCOLS = {
    "GLUE-LoRA-T2": f"{SCORED}; MRPC, RTE, STS-B from MNLI", "GLUE-VeRA-T2": SCORED, "GLUE-FourierFT-T2": SCORED,
    "GLUE-VBLoRA-T1": SCORED, "GLUE-C3A-T2 (held-out split)": HELD_OUT, "GLUE-ReFT-T13 (held-out split)": HELD_OUT,
    "GLUE-DeLoRA-T8 (held-out split)": HELD_OUT, "ViT-VeRA-T5 (few-shot)": "10 train images a class",
    "ViT-C3A-TA2": HELD_OUT, "ViT-UniLoRA-T5 (transcribed)": HELD_OUT, "ViT-replication": f"{LAST}, one seed",
    "Math-PEFT-bench": f"{LAST}, one seed", "Math-PEFT-PR": "one seed", "Math-Llama3.1-replication": "one seed",
    "Math-PiSSA-T2": "MetaMathQA 100K, 1 epoch, mean of 3", "Math-SVFT-T1": "MetaMathQA 40K", "Math-PSOFT-T4": "MetaMathQA 40K",
    "Math-PSOFT-T13": "MetaMathQA 40K", "Math-MiSS-T5": "MetaMathQA 395K", "Math-C3A-T4": "MetaMathQA 395K, 2 epochs",
}  # fmt: skip
NAMED = ("model.source", "task.name", "method.name", "method.rank")  # by what a row of published.csv is known to be a run's
PLAIN = re.compile(r"(accuracy|matthews|pearson)(\(m\+mm\))?$")  # a metric without a protocol of its own
COMMANDS = {  # what fills the rows of a table of ours, on the machine that its config names
    ("GLUE", "RoBERTa-base"): "python -m experiments.sweep --config=configs/glue.py:{word},base --seeds=5 --workdir=runs/glue",
    ("GLUE", "RoBERTa-large"): "python -m experiments.sweep --config=configs/glue.py:{word},large --seeds=5 --workdir=runs/glue",
    ("ViT", "ViT-base"): "python -m experiments.sweep --config=configs/vision.py:{word},base --seeds=5 --workdir=runs/vision",
    ("ViT", "ViT-large"): "python -m experiments.sweep --config=configs/vision.py:{word},large --seeds=5 --workdir=runs/vision",
    ("Math", "Llama-3.1-8B"): "python -m experiments.train --config=configs/math.py:llama31_8b --workdir=runs/llama31_8b",
    ("Math", "Llama-3.2-3B"): "python -m experiments.train --config=configs/math.py:peft_bench --workdir=runs/bench/gpart",
    ("Math", "Gemma-7B"): "python -m experiments.train --config=configs/math.py:gemma_7b --workdir=runs/gemma_7b",
}

COLUMNS = {  # of PEFT's benchmark, and how the names of its metrics begin
    "GSM8K (%)": "test accuracy", "forgetting (nats a token)": "forgetting", "memory (GiB)": "max accelerator memory",
    "training (s)": "train time",
}  # fmt: skip
PROBLEMS = 1319  # of GSM8K's test split
FREE = ("method.", "optimizer.lr", "optimizer.step", "task.test_examples")  # what its runs may differ in: a method's own, and our other test
THEIRS = (
    "Theirs: one run each, seed 0; they vary by about a point. PEFT's own ran on one L40S: memory is the most reserved, training includes "
    "the test, forgetting is of 100 Wikipedia articles. An answer counts where a marker such as 'The answer is' names it."
)
OURS = (
    "Ours: memory is the most in use, where the device tells; training is of the steps alone; forgetting is of the text that the run was "
    "given. An answer without a marker counts too, by its last number, and ends at a new question (experiments/answers.py)."
)


class Figure(NamedTuple):
    """A published figure of an experiment that ours can be."""

    value: float  # in percent
    spread: str
    source: str
    protocol: str  # empty: not stated
    named: tuple[str, ...]  # the fields of a run's config that it is known to be of


def read() -> list[dict[str, str]]:
    """The rows of published.csv, each with its protocol."""
    with (FOLDER / "published.csv").open(newline="") as file:
        return [row | {"protocol": protocol(row)} for row in csv.DictReader(file)]


def protocol(row: dict[str, str]) -> str:
    """On what the epoch was chosen, or what else sets a figure apart; empty where nobody says."""
    _, comma, own = row["metric"].partition(", ")
    return own if comma and not PLAIN.match(own) else PROTOCOLS.get(row["table"], "")


def of_run(config: dict, metric: str, rows: list[dict[str, str]]) -> list[Figure]:
    """What is published of the same model, data and method as a run's, of the same size where that is stated.

    Args:
      config: of the run, flat.
      metric: its first.
      rows: of `read`.
    """
    found = []
    for entry in json.loads((FOLDER / "published.json").read_text()):
        if entry["config"].items() <= config.items():
            found.append(Figure(100 * entry["test"], "", entry["source"], entry["protocol"], tuple(entry["config"])))
    for row in rows:
        method, rank = method_of(row["method"])
        if (
            MODELS.get(row["model"]) == config["model.source"]
            and DATA.get(row["dataset"]) == (config["task.name"], metric)
            and method == config["method.name"]
            and rank in (None, config.get("method.rank"))
        ):
            source = f"{row['source']} ({row['whose']})"
            found.append(Figure(float(row["value"]), row["spread"], source, row["protocol"], NAMED))
    return found


def method_of(name: str) -> tuple[str | None, int | None]:
    """A method's name here and its rank where one is stated: of "LoRA r=8 qv" ("lora", 8). A variant is none of ours: (None, None)."""
    match = re.fullmatch(rf"({'|'.join(METHODS)})( r=(\d+))?( qv)?", name.lower())
    return (METHODS[match[1]], int(match[3]) if match[3] else None) if match else (None, None)


def benchmark(runs: list[tuple[str, dict, dict]]) -> str:
    """PEFT's public benchmark (`configs/math.py:peft_bench`) with ours among its runs, by accuracy; empty where none is ours.

    A run of another model or other data is of no experiment that the benchmark has, and gets a table of its own.

    Args:
      runs: what to call each, its config, flat, and its results; those that aren't answers to GSM8K after the benchmark's prompt
        are passed over.
    """
    recipe = identity(math.get_config("peft_bench"))
    ours: dict = {True: [], False: []}
    for label, config, results in runs:
        if config.get("task.template") == recipe["task.template"] and (results["task"], results["metric"]) == ("gsm8k", "accuracy"):
            same = all(config.get(key) == recipe[key] for key in ("model.source", "task.name"))
            ours[same].append((100 * results["test"], _own_cells(label, config, results, recipe)))
    texts = []
    if ours[True]:
        texts += [_table(ours[True] + _their_cells()), f"{THEIRS}\n{OURS}"]
    if ours[False]:
        texts += [_table(ours[False]), "No published run is the same experiment: the model or the data is another."]
    return "\n\n".join(["**PEFT's benchmark of MetaMathQA, tested on GSM8K**", *texts]) + "\n" if texts else ""


def _table(lines: list[tuple[float, list[str]]]) -> str:
    header = ["method", "trained numbers", *COLUMNS, "model", "data", "whose"]
    cells = [header, *(cells for _, cells in sorted(lines, key=lambda line: -line[0]))]
    first, *rest = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([first, "|---|" + "---:|" * (1 + len(COLUMNS)) + "---|---|---|", *rest])


def _own_cells(label: str, config: dict, results: dict, recipe: dict) -> list[str]:
    mine, told = identity(config), ("model.source", "task.name")
    keys = [key for key in sorted(mine.keys() | recipe.keys()) if mine.get(key) != recipe.get(key) and not key.startswith(FREE)]
    differs = [f"{key} = {config.get(key)}" for key in keys if key not in told]  # `identity` leaves out what is off, such as 0
    asked = {"max_new_tokens": math.get_config("peft_bench").task.new_tokens, "problems": PROBLEMS}
    differs += [f"{name} = {results.get(name)}" for name, value in asked.items() if results.get(name) != value]
    accuracy = f"{100 * results['test']:.2f}"
    if interval := results.get("interval"):
        accuracy += " ({:.1f} to {:.1f})".format(*(100 * end for end in interval))
    measured = {"forgetting": ("{:.4f}", 1), "device_memory": ("{:.2f}", 2**30), "training_seconds": ("{:.0f}", 1)}
    numbers = [form.format(results[name] / unit) if name in results else "" for name, (form, unit) in measured.items()]
    whose = "ours" + (f", but {', '.join(differs)}" if differs else "")
    line = [label, f"{results['trained_numbers']:,}", accuracy, *numbers, *(config.get(key) or "" for key in told), whose]
    return [f"**{cell}**" if cell else "" for cell in line]


def _their_cells() -> list[tuple[float, list[str]]]:
    """(accuracy, cells) of each of the benchmark's runs."""
    found: dict = collections.defaultdict(dict)
    for row in read():
        whose = {"Math-PEFT-bench": "PEFT", "Math-PEFT-PR": row["source"].removeprefix("huggingface/")}.get(row["table"])
        for column, metric in COLUMNS.items():
            if whose and row["metric"].startswith(metric):
                found[row["method"], row["trained_params"], whose][column] = row["value"]
    return [
        (
            float(values["GSM8K (%)"]),
            [method, f"{int(size.replace(',', '')):,}" if size else "", *(values.get(column, "") for column in COLUMNS),
             math.MODELS["llama32_3b"][0], "metamathqa", whose],
        )
        for (method, size, whose), values in found.items()
    ]  # fmt: skip


def markdown() -> str:
    """Every figure: a table for each task and model, a row for each method of a source; then what fills ours."""
    tables: dict = collections.defaultdict(lambda: collections.defaultdict(dict))
    sources: dict[str, int] = {}
    for row in read():
        number = sources.setdefault(f"{row['source']}, by {row['whose']}; read in {row['where']}", len(sources) + 1)
        line = row["method"], row["trained_params"], row["protocol"], number
        metric = re.split(", |[(]m", row["metric"])[0]
        column = metric if metric.startswith("mean of") else f"{row['dataset']}, {metric}"
        cell = row["value"] + (f" ± {row['spread']}" if row["spread"] else "")
        cells = tables[row["table"].partition("-")[0], row["model"]][line]
        cells[column] = f"{cells[column]}; {cell}" if column in cells else cell
    texts = []
    for (family, model), lines in tables.items():
        columns = list(dict.fromkeys(column for cells in lines.values() for column in cells))
        text = [f"## {family}: {model}", ""]
        header = ["method", "trained numbers", "protocol", *columns, "source"]
        text += [f"| {' | '.join(header)} |", "|---|---:|---|" + "---:|" * len(columns) + "---|"]
        for (method, size, chosen, number), cells in lines.items():
            values = [method, size, chosen, *(cells.get(column, "") for column in columns), f"[{number}]"]
            text.append(f"| {' | '.join(value.replace('|', '/') for value in values)} |")
        if command := COMMANDS.get((family, model)):
            words = [DATA[name][0].removeprefix("glue/") for name in DATA if any(column.split(",")[0] == name for column in columns)]
            text += ["", "Ours, one command for each column:" if "{word}" in command else "Ours:", ""]
            text += [f"    {command.format(word=word)}" for word in (words if "{word}" in command else [""])]
        texts.append("\n".join(text))
    texts.append("\n".join(["## Sources", "", *(f"[{number}] {source}" for source, number in sources.items())]))
    return "\n\n".join(texts) + "\n"
