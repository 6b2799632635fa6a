"""What people run: training, evaluation, sweeps, reports, and the tasks and data behind them."""

from gpart_jax import requirements

requirements.check_flax()
