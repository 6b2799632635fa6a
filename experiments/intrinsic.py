"""The intrinsic dimension of a task: the smallest d, a power of two, with which GPart has a share of full fine-tuning's gain.

  python -m experiments.intrinsic --config=configs/quickstart.py --share=0.9 --workdir=runs/intrinsic

After Aghajanyan et al. (arXiv 2012.13255), whose d90 it is with the share 0.9. The gain is that of the held-out metric, over training the
head alone. Which d to try next follows by bisection from what the finished runs say, so that the command can be stopped at any time
and run again. It prints each run, and leaves curve.json and curve.png. The metric of the test set stands beside it, and chooses nothing.
"""

import copy
import pathlib
import statistics
from collections.abc import Callable

import matplotlib
import ml_collections
from absl import flags
from ml_collections import config_flags

from configs import common
from experiments.build import build
from experiments.command import run_command
from experiments.config import from_flags, settle_rate
from experiments.logger import quiet
from experiments.sweep import parse_seeds
from experiments.train import train
from experiments.workdir import local, write_json
from gpart_jax import canonical_layout

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt  # noqa: E402


def configs_of(
    config: ml_collections.ConfigDict, method: str, rate: dict[str, float], seeds: list[int], **changes
) -> list[ml_collections.ConfigDict]:
    """The config with another method, or d, and its own rate, for each seed."""
    found = []
    for seed in seeds:
        own = copy.deepcopy(config)
        with own.unlocked():
            if method != own.method.name:
                own.method = common.method(method, own.method.targets, 0)
            own.method.update(changes)
            own.seed = seed
            if "seed" in own.method:
                own.method.seed = seed
            own.optimizer.update(rate)
            settle_rate(own, [f"optimizer.{key}" for key in rate])
        found.append(own.copy_and_resolve_references())
    return found


def smallest(scores: Callable[[int], float], wanted: float, most: int) -> int | None:
    """The smallest power of two up to `most` whose score is at least `wanted`, if scores rise with d; None: not even `most`'s.

    Asks for the score of about log2(log2(most)) numbers.
    """
    low, high = -1, most.bit_length() - 1  # exponents: of none that is known to reach it, of one that is
    if scores(1 << high) < wanted:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if scores(1 << middle) >= wanted:
            high = middle
        else:
            low = middle
    return 1 << high


def intrinsic(config, share: float, seeds: list[int], step: float, full_lr: float, workdir: pathlib.Path) -> dict:
    """Trains what is needed, or goes on; the curve, as written to `workdir/curve.json`.

    Args:
      config: of GPart on a task with held-out examples.
      share: of full fine-tuning's gain over the head alone.
      seeds: of each d, and of the two it is compared with; a score is their mean.
      step: the length of GPart's steps in weight space, one for every d.
      full_lr: the rate of full fine-tuning.
      workdir: for the runs.

    Raises:
      ValueError: a method other than gpart; a task without held-out examples; full fine-tuning that gains nothing.
    """
    if config.method.name != "gpart":
        raise ValueError(f"The intrinsic dimension is found with gpart, not with {config.method.name}.")
    found: dict[str, dict] = {}

    def run(name: str, method: str, rate: dict, **changes) -> float:
        results = [
            train(own, workdir / name / f"seed{own.seed}") for own in configs_of(config, method, rate, seeds, **changes)
        ]
        if results[0]["validation"] is None:
            raise ValueError("The intrinsic dimension is found by held-out examples, and this task holds none out.")
        mean = {key: statistics.mean(one[key] for one in results) for key in ("validation", "test")}
        found[name] = mean | {"trained_numbers": results[0]["trained_numbers"], "metric": results[0]["metric"]}
        return mean["validation"]

    head = run("head", "head", {"lr": config.optimizer.lr or 0.0})
    full = run("full", "full", {"lr": full_lr})
    if full <= head:
        raise ValueError(
            f"Full fine-tuning reaches {full:.4f} on held-out examples, the head alone {head:.4f}: there is no gain to have a "
            "share of. Set --full_lr, or train longer."
        )
    wanted = head + share * (full - head)
    sizes = {}

    def score(d: int) -> float:
        sizes[d] = run(f"d{d}", "gpart", {"step": step}, d=d)
        print(f"d = {d:,}: {sizes[d]:.4f} on held-out examples, {(sizes[d] - head) / (full - head):.1%} of the gain", flush=True)
        return sizes[d]

    most = canonical_layout(build(config).params, config.method.targets).size
    dimension = smallest(score, wanted, most)
    curve = {"share": share, "wanted": wanted, "step": step, "dimension": dimension, "runs": found}
    write_json(workdir / "curve.json", curve)
    draw(curve, workdir / "curve.png")
    return curve


def draw(curve: dict, path: pathlib.Path) -> None:
    """The held-out metric over d, between the head's and full fine-tuning's."""
    runs = curve["runs"]
    points = sorted((int(name[1:]), run["validation"]) for name, run in runs.items() if name[1:].isdecimal())
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*points), "o-", color="#0b6e4f")
    for name, style in (("head", ":"), ("full", "-")):
        axes.axhline(runs[name]["validation"], color="#3d405b", linestyle=style, linewidth=1)
        axes.annotate(name, (1, runs[name]["validation"]), xycoords=axes.get_yaxis_transform(), ha="right", va="bottom")
    axes.axhline(curve["wanted"], color="#c1666b", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.margins(y=0.12)  # room for the names above the lines
    found = f"d{100 * curve['share']:g} = {curve['dimension']:,}" if curve["dimension"] else "no d reaches it"
    title, metric = f"{found} (dashed: {curve['share']:.0%} of the gain)", runs["full"]["metric"]
    axes.set(xlabel="d", ylabel=f"{metric} on held-out examples", title=title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(_):
    quiet()
    options = flags.FLAGS
    workdir = local(options.workdir)
    curve = intrinsic(from_flags(), options.share, parse_seeds(options.seeds), options.step, options.full_lr, workdir)
    names = sorted(curve["runs"], key=lambda name: curve["runs"][name]["trained_numbers"])
    for name in names:
        run = curve["runs"][name]
        print(f"{name:>10}  {run['trained_numbers']:>12,} numbers  held-out {run['validation']:.4f}  test {run['test']:.4f}")
    reached = f"d = {curve['dimension']:,}" if curve["dimension"] else "no d up to N"
    print(f"The smallest with {options.share:.0%} of the gain: {reached}. {workdir / 'curve.png'}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/quickstart.py", "Of GPart on a task: a file of configs/.")
    flags.DEFINE_string("workdir", None, "Folder for the runs.", required=True)
    flags.DEFINE_float("share", 0.9, "Of full fine-tuning's gain over the head alone.", lower_bound=0, upper_bound=1)
    flags.DEFINE_string("seeds", "1", "How many, or which: 3, or 42,43.")
    flags.DEFINE_float("step", 2.56, "The length of GPart's steps in weight space, for every d.", lower_bound=0)
    flags.DEFINE_float("full_lr", 1e-4, "Full fine-tuning's rate.", lower_bound=0)
    run_command(main)
