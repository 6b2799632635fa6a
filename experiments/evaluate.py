"""Scores a finished run's adapter, read from disk onto a freshly loaded model, on a split of its task.

python -m experiments.evaluate --workdir=runs/quickstart/gpart
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags
from flax import linen as nn
from sklearn.metrics import accuracy_score

from experiments import data
from experiments.logger import quiet
from gpart_jax import load_adapter
from gpart_jax.models import pretrained

METRICS = {"accuracy": accuracy_score}


class Experiment(NamedTuple):
    """What a config describes, apart from how it is trained: the model, its frozen params with a fresh head, the task."""

    model: nn.Module
    params: Any
    task: data.Task


def build(config: ml_collections.ConfigDict) -> Experiment:
    """Loads the pretrained model and the tokenized task of a config."""
    directory = pretrained.locate(config.model.source)
    task = data.load_task(config.task.name, directory, config.task.max_length)
    model, params = pretrained.load_encoder(
        directory, len(task.labels), key=jax.random.key(config.seed), dtype=jnp.dtype(config.model.dtype)
    )
    dropout = {name: config.model.dropout for name in ("hidden_dropout", "attention_dropout", "classifier_dropout")}
    return Experiment(model.clone(config=dataclasses.replace(model.config, **dropout)), params, task)


def predict(experiment: Experiment, params, examples: list[dict], batch_size: int) -> np.ndarray:
    """Logits of a model with adapted params, float32 (examples, labels)."""
    logits = []
    pad = experiment.model.config.pad_token_id
    for start in range(0, len(examples), batch_size):
        rows = examples[start : start + batch_size]
        filled = rows + rows[:1] * (batch_size - len(rows))  # one shape to compile, the last batch too
        logits.append(np.asarray(_logits(experiment.model, params, data.collate(filled, pad)))[: len(rows)])
    return np.concatenate(logits)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, batch):
    return model.apply({"params": params}, batch["input_ids"], batch["attention_mask"])


def score(task: data.Task, examples: list[dict], logits: np.ndarray) -> float:
    """The task's metric."""
    return float(METRICS[task.metric]([example["label"] for example in examples], logits.argmax(-1)))


def main(_):
    quiet()
    workdir, split = pathlib.Path(flags.FLAGS.workdir), flags.FLAGS.split
    if not (workdir / "results.json").is_file():
        raise app.UsageError(f"{workdir} holds no finished run (no results.json). Train there first.")
    config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
    experiment = build(config)
    method, trainable = load_adapter(workdir / "adapter.safetensors", experiment.params)
    params = jax.jit(method.apply)(experiment.params, trainable)
    examples = getattr(experiment.task, split)
    value = score(experiment.task, examples, predict(experiment, params, examples, config.train.eval_batch_size))
    print(f"{split} {experiment.task.metric} {value:.4f} on {len(examples)} examples")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a finished run.", required=True)
    flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Which split to score.")
    app.run(main)
