"""Scores a finished run's adapter, read from disk onto a freshly loaded model, on a split of its task.

python -m experiments.evaluate --workdir=runs/quickstart/gpart
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from experiments import data
from experiments.logger import quiet
from experiments.tasks import load_task
from gpart_jax import load_adapter, sharding
from gpart_jax.models import pretrained, storage
from gpart_jax.models.vit import ViTClassifier, ViTConfig


def _correlation(function):
    """Of labels and predictions; 0 where all predictions are equal, as Matthews' is, instead of NaN."""
    return lambda labels, scores: 0.0 if np.ptp(scores) == 0 else function(labels, scores).statistic


METRICS = {  # (labels, predictions) -> number
    "accuracy": accuracy_score,
    "f1": f1_score,  # of label 1
    "matthews": matthews_corrcoef,
    "pearson": _correlation(pearsonr),
    "spearman": _correlation(spearmanr),
}


class Experiment(NamedTuple):
    """What a config describes, apart from how it is trained: the model, its frozen params with a fresh head, the task."""

    model: nn.Module
    params: Any  # on the host
    task: data.Task
    rules: sharding.Rules  # how a mesh divides the params


def build(config: ml_collections.ConfigDict) -> Experiment:
    """Loads the pretrained model of a config, or makes a fresh one of `config.model.shape`, and its task.

    Raises:
      ValueError: a model and a task that don't go together, besides what loading raises.
    """
    directory = storage.locate(config.model.source) if config.model.source else None
    vision = directory is None or storage.read_config(directory).get("model_type") == "vit"
    task = load_task(config.task.to_dict(), directory, config.seed)
    if vision != ("pixel_values" in task.inputs):
        raise ValueError(
            f"config.task.name = {config.task.name!r} gives {'text' if vision else 'images'}, but config.model.source = "
            f"{config.model.source!r} is a model of {'images' if vision else 'text'}. Change one of them."
        )
    key, dtype = jax.random.key(config.seed), jnp.dtype(config.model.dtype)
    if directory is None:
        model = ViTClassifier(ViTConfig(**config.model.shape.to_dict()), task.outputs, dtype)
        params = jax.jit(model.init)(key, jnp.zeros(model.config.example.shape))["params"]
    else:
        load = pretrained.load_vit if vision else pretrained.load_encoder
        model, params = load(directory, task.outputs, key=key, dtype=dtype)
    if not vision and task.max_length > model.config.max_length:
        raise ValueError(
            f"config.task.max_length = {task.max_length}, but {config.model.source} takes {model.config.max_length} tokens."
        )
    if config.model.dropout is not None:
        rates = {"hidden_dropout", "attention_dropout", "classifier_dropout"} & vars(model.config).keys()
        rated = dataclasses.replace(model.config, **dict.fromkeys(rates, config.model.dropout))
        model = model.clone(config=rated)
    rules = sharding.VIT if vision else sharding.ENCODER
    return Experiment(model, jax.tree.map(np.asarray, params), task, rules)


def predict(experiment: Experiment, params, examples: Sequence[dict], batch_size: int) -> np.ndarray:
    """Logits of a model with adapted params that lie on a mesh, float32 (examples, outputs)."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    batch_size += -batch_size % (mesh.shape["data"] * mesh.shape["fsdp"])
    rows = NamedSharding(mesh, sharding.BATCH)
    task = experiment.task
    logits = np.zeros((len(examples), task.outputs), np.float32)
    sizes = [task.size(example) for example in examples] if task.size else range(len(examples))
    order = np.argsort(sizes, kind="stable")  # little padding

    def collate(chosen):
        filled = np.resize(chosen, batch_size)  # repeats some, so that the last batch has the shape of the others
        batch = task.collate([examples[n] for n in filled])
        return chosen, {name: batch[name] for name in task.inputs if name in batch}

    chunks = [order[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    for chosen, inputs in grain.MapDataset.source(chunks).map(collate).to_iter_dataset(grain.ReadOptions(8, 8)):
        whole = _logits(experiment.model, mesh, params, sharding.place(inputs, rows))
        logits[chosen] = np.asarray(whole)[: len(chosen)]
    return logits


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(model, mesh, params, inputs):
    logits = model.apply({"params": params}, **inputs)
    return jax.lax.with_sharding_constraint(logits, NamedSharding(mesh, P()))  # so that every process has them


def predictions(task: data.Task, logits: np.ndarray) -> np.ndarray:
    """The predicted labels, or the scores of a regression: (examples,)."""
    return logits[:, 0] if task.labels is None else logits.argmax(-1)


def score(task: data.Task, examples: Sequence[dict], logits: np.ndarray) -> dict[str, float]:
    """The task's metrics by name."""
    labels = [example["label"] for example in examples]
    return {name: float(METRICS[name](labels, predictions(task, logits))) for name in task.metrics}


def by_class(task: data.Task, examples: Sequence[dict], logits: np.ndarray) -> dict[str, float]:
    """The share of each label's examples that are predicted right: its recall. Labels without an example are left out."""
    labels = np.array([example["label"] for example in examples])
    right = predictions(task, logits) == labels
    return {name: float(right[labels == n].mean()) for n, name in enumerate(task.labels) if (labels == n).any()}


def main(_):
    quiet()
    workdir, split = pathlib.Path(flags.FLAGS.workdir), flags.FLAGS.split
    if not (workdir / "results.json").is_file():
        raise app.UsageError(f"{workdir} holds no finished run (no results.json). Train there first.")
    config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
    experiment = build(config)
    method, trainable = load_adapter(workdir / "adapter.safetensors", experiment.params)
    shardings = sharding.param_shardings(experiment.params, sharding.make_mesh(), experiment.rules)
    tables = method.tables(experiment.params)
    params = sharding.place(jax.jit(method.apply)(experiment.params, trainable, None, tables), shardings)
    examples = getattr(experiment.task, split)
    if not examples:
        raise app.UsageError(f"This run held out no {split} examples (config.task.holdout).")
    logits = predict(experiment, params, examples, config.train.eval_batch_size)
    for name, value in score(experiment.task, examples, logits).items():
        print(f"{split} {name} {value:.4f} on {len(examples)} examples")
    if experiment.task.labels is not None:
        for label, value in by_class(experiment.task, examples, logits).items():
            print(f"  {label}: {value:.4f}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a finished run.", required=True)
    flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Which split to score.")
    app.run(main)
