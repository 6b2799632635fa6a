"""GPart at two sizes beside LoRA and a trained head alone, on the quickstart task: four runs, one table, one picture.

  python -m experiments.quickstart

Stop it at any time and run it again: finished runs are kept, and an unfinished one goes on.
"""

from absl import flags

from configs import quickstart
from experiments import plots, report
from experiments.command import run_command
from experiments.logger import quiet
from experiments.train import train
from experiments.workdir import local

RUNS = {  # by folder: a method, and its d where it isn't the config's
    "gpart": ("gpart", None),
    "gpart-d256": ("gpart", 256),  # a theta of 1 KB
    "lora": ("lora", None),
    "head": ("head", None),
}


def main(_):
    quiet()
    workdir = local(flags.FLAGS.workdir)
    for folder, (method, d) in RUNS.items():
        config = quickstart.get_config(method)
        if d:
            config.method.d = d
        train(config, workdir / folder)
    runs = [run for folder in RUNS for run in report.find_runs(workdir / folder)]
    report.print_table(runs)
    picture = workdir / "quickstart.png"
    plots.draw(runs, picture)
    print(f"Picture: {picture}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/quickstart", "Directory for the four runs and the picture.")
    run_command(main)
