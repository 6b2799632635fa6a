"""GPart beside LoRA and a trained head alone, on the quickstart task: three runs, one table, one picture.

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

METHODS = ("gpart", "lora", "head")


def main(_):
    quiet()
    workdir = local(flags.FLAGS.workdir)
    for method in METHODS:
        train(quickstart.get_config(method), workdir / method)
    runs = [run for method in METHODS for run in report.find_runs(workdir / method)]
    report.print_table(runs)
    picture = workdir / "quickstart.png"
    plots.draw(runs, picture)
    print(f"Picture: {picture}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/quickstart", "Directory for the three runs and the picture.")
    run_command(main)
