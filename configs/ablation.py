"""Ablations of GPart (arXiv 2605.14841), each one grid for experiments.sweep around the recipe of a small task.

Config:   --config=configs/ablation.py:<what>[,task]
          what: d, scheme, scope, isometric, targets, dropout, init_bound    task: quickstart (default), sst2, rte (MiniLM)
Expected: docs/ablation.md has d after one epoch, measured; the other figures are not at hand.
Command:  python -m experiments.sweep --config=configs/ablation.py:scheme --seeds=5 --workdir=runs/ablation
          python -m experiments.sweep --config=configs/ablation.py:d --seeds=5 --population=5 --workdir=runs/ablation
Device:   two CPU cores.
"""

import ml_collections

from configs import glue, quickstart

GRIDS = {
    "d": (64, 256, 1024, 4096, 16_384),
    "scheme": ("balanced-v1", "splitmix64", "signed_magnitude"),
    "scope": ("global", "block"),
    "isometric": (True, False),  # False: a step of theta moves the weights sqrt(N / d) times as far
    "targets": (
        r"attention/query/kernel$",
        r"attention/(query|value)/kernel$",
        r"attention/(query|key|value|out)/kernel$",
        r"layer_\d+/.*kernel$",  # and the feed-forward layers
    ),
    "dropout": (0.0, 0.05, 0.1, 0.2),  # on the delta
    "init_bound": (0.0, 0.01, 0.02, 0.1),
}
TASKS = ("quickstart", "sst2", "rte")


def get_config(arguments: str = "d") -> ml_collections.ConfigDict:
    what, _, task = arguments.partition(",")
    task = task or "quickstart"
    if what not in GRIDS:
        raise ValueError(f"configs/ablation.py has no ablation {what!r}. Choose one of {', '.join(GRIDS)}.")
    if task not in TASKS:
        raise ValueError(f"configs/ablation.py has no task {task!r}. Choose one of {', '.join(TASKS)}.")
    config = quickstart.get_config() if task == "quickstart" else glue.get_config(f"{task},minilm")
    config.method.d = 4096
    config.sweep = [(f"method.{what}", GRIDS[what])]
    return config
