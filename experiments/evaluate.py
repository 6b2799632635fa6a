"""Scores a finished run's adapter, read from disk onto a freshly loaded model, on a split of its task or on a benchmark.

python -m experiments.evaluate --workdir=runs/quickstart/gpart
python -m experiments.evaluate --workdir=runs/smollm2 --benchmark=gsm8k --limit=200 [--base]
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags
from flax import linen as nn
from jax.sharding import NamedSharding
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from experiments import data, reasoning
from experiments.checkpoint import write_json
from experiments.logger import quiet
from experiments.processes import cache_programs
from experiments.step import make_outputs
from experiments.tasks import IMAGES, LANGUAGE, TEXT, load_task, task_kind
from experiments.tasks.math import NEW_TOKENS
from gpart_jax import load_adapter, sharding
from gpart_jax.methods import Method, chain
from gpart_jax.models import decoder, pretrained, storage
from gpart_jax.models.attention import choose
from gpart_jax.models.pretrained_decoder import load_decoder
from gpart_jax.models.vit import ViTClassifier, ViTConfig
from gpart_jax.models.vocabulary import load_vocabulary


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
    params: Any  # on the host; a decoder's on the mesh
    task: data.Task
    rules: sharding.Rules  # how a mesh divides the params


def build(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None = None) -> Experiment:
    """Loads the pretrained model of a config, or makes a fresh one of `config.model.shape`, and its task.

    Args:
      mesh: where a decoder's weights go; None: the first device.

    Raises:
      ValueError: a model and a task that don't go together, besides what loading raises.
    """
    source = config.model.source
    where = storage.locate(source) if source else None
    takes, gives = model_kind(where), task_kind(config.task.name)
    if takes != gives:
        raise ValueError(
            f"config.task.name = {config.task.name!r} gives {gives}, but config.model.source = {source!r} is a model of "
            f"{takes}. Change one of them."
        )
    task = load_task(config.task.to_dict(), where, config.seed)
    key, dtype = jax.random.key(config.seed), jnp.dtype(config.model.dtype)
    if takes == LANGUAGE:
        model, params = load_decoder(source, mesh=mesh, dtype=dtype)
        rules, longest = sharding.DECODER_TIED if model.config.tied else sharding.DECODER, model.config.max_positions
    elif takes == TEXT:
        model, params = pretrained.load_encoder(where, task.outputs, key=key, dtype=dtype)
        rules, longest = sharding.ENCODER, model.config.max_length
    else:
        rules, longest = sharding.VIT, None
        if where is None:
            model = ViTClassifier(ViTConfig(**config.model.shape.to_dict()), task.outputs, dtype)
            params = jax.jit(model.init)(key, jnp.zeros(model.config.example.shape))["params"]
        else:
            model, params = pretrained.load_vit(where, task.outputs, key=key, dtype=dtype)
    if longest is not None and task.max_length > longest:
        raise ValueError(f"config.task.max_length = {task.max_length}, but {source} takes {longest} tokens.")
    mesh = sharding.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    if takes == LANGUAGE:
        return Experiment(fitted(model, config.model, mesh), params, task, rules)
    if config.model.get("dropout") is not None:
        rates = {"hidden_dropout", "attention_dropout", "classifier_dropout"} & vars(model.config).keys()
        rated = dataclasses.replace(model.config, **dict.fromkeys(rates, config.model.dropout))
        model = model.clone(config=rated)
    return Experiment(fitted(model, config.model, mesh), jax.tree.map(np.asarray, params), task, rules)


def fitted(model: nn.Module, options: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> nn.Module:
    """The model with the attention and the remat that config.model asks for, or that suit a mesh."""
    shape, platform = model.config, mesh.devices.flat[0].platform
    attention = choose(
        options.get("attention", "auto"), platform, model.dtype, shape.head_dim, shape.pattern,
        getattr(shape, "attention_dropout", 0.0),
    )  # fmt: skip
    # An encoder whose weights "fsdp" divides would else gather all of them at once.
    suited = "full" if isinstance(model, decoder.Decoder) or mesh.shape["fsdp"] > 1 else "none"
    return model.clone(attention=attention, remat=options.get("remat") or suited)


def model_kind(where: pathlib.Path | None) -> str:
    """What a model at a place (None: a fresh one) is of: TEXT, IMAGES or LANGUAGE."""
    if where is None:
        return IMAGES
    if where.suffix == ".gguf":
        return LANGUAGE
    family = storage.read_config(where).get("model_type")
    return IMAGES if family == "vit" else LANGUAGE if family in decoder.FAMILIES else TEXT


def outputs_of(experiment: Experiment, method: Method, trainable, mesh: jax.sharding.Mesh) -> Callable:
    """outputs(batch) of the experiment's model with what a method trained, for `predict`."""
    shardings = sharding.param_shardings(experiment.params, mesh, experiment.rules)
    trainable, params, tables = _on_mesh(experiment, method, trainable, shardings)
    outputs = make_outputs(experiment.model, experiment.task, method, shardings)
    return lambda batch: outputs(trainable, params, batch, tables)


def _on_mesh(experiment, method, trainable, shardings):
    mesh = jax.tree.leaves(shardings)[0].mesh
    trainable, tables = sharding.replicate((trainable, method.tables(experiment.params)), mesh)
    return trainable, sharding.place(experiment.params, shardings), tables


def predict(task: data.Task, outputs: Callable, mesh: jax.sharding.Mesh, examples: Sequence[dict], batch_size: int) -> np.ndarray:
    """Logits of a model, float32 (examples, outputs).

    Of a decoder, for each text: the negative log-likelihood of its tokens, those that loss_mask names, and their number.

    Args:
      outputs: of a batch that lies on the mesh, as `step.make_outputs` gives them.
    """
    batch_size += -batch_size % (mesh.shape["data"] * mesh.shape["fsdp"])
    rows = NamedSharding(mesh, sharding.BATCH)
    logits = np.zeros((len(examples), 2 if task.metrics == ("loss",) else task.outputs), np.float32)
    sizes = [task.size(example) for example in examples] if task.size else range(len(examples))
    order = np.argsort(sizes, kind="stable")  # little padding

    def collate(chosen):
        filled = np.resize(chosen, batch_size)  # repeats some, so that the last batch has the shape of the others
        batch = task.collate([examples[n] for n in filled])
        return chosen, {name: batch[name] for name in task.inputs if name in batch}

    chunks = [order[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    for chosen, inputs in grain.MapDataset.source(chunks).map(collate).to_iter_dataset(grain.ReadOptions(8, 8)):
        logits[chosen] = np.asarray(outputs(sharding.place(inputs, rows)))[: len(chosen)]
    return logits


def predictions(task: data.Task, logits: np.ndarray) -> np.ndarray:
    """The predicted labels, or the scores of a regression: (examples,)."""
    return logits[:, 0] if task.labels is None else logits.argmax(-1)


def score(task: data.Task, examples: Sequence[dict], logits: np.ndarray) -> dict[str, float]:
    """The task's metrics by name."""
    if task.metrics == ("loss",):
        return {"loss": float(logits[:, 0].sum(dtype=np.float64) / logits[:, 1].sum(dtype=np.float64))}
    labels = [example["label"] for example in examples]
    return {name: float(METRICS[name](labels, predictions(task, logits))) for name in task.metrics}


def by_class(task: data.Task, examples: Sequence[dict], logits: np.ndarray) -> dict[str, float]:
    """The share of each label's examples that are predicted right: its recall. Labels without an example are left out."""
    labels = np.array([example["label"] for example in examples])
    right = predictions(task, logits) == labels
    return {name: float(right[labels == n].mean()) for n, name in enumerate(task.labels) if (labels == n).any()}


def main(_):
    quiet()
    workdir, benchmark = pathlib.Path(flags.FLAGS.workdir), flags.FLAGS.benchmark
    if not (workdir / "results.json").is_file():
        raise app.UsageError(f"{workdir} holds no finished run (no results.json). Train there first.")
    config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
    cache_programs(config.train.get("compiled"))
    if benchmark and task_kind(config.task.name) != LANGUAGE:
        raise app.UsageError(f"--benchmark is for decoders, but {workdir} is a run of {config.task.name}.")
    mesh = sharding.make_mesh(config.mesh.to_dict() if benchmark else None)
    experiment = build(config, mesh)
    method, trainable = load_adapter(workdir / "adapter.safetensors").on(experiment.params)
    if flags.FLAGS.base:
        method, trainable = chain(), {}
    if benchmark:
        shardings = sharding.param_shardings(experiment.params, mesh, experiment.rules)
        arguments = _on_mesh(experiment, method, trainable, shardings)
        adapt = jax.jit(
            lambda trainable, params, tables: method.apply(params, trainable, None, tables),
            out_shardings=shardings, donate_argnums=1,  # the base's memory becomes the adapted model's
        )  # fmt: skip
        _answer(config, experiment._replace(params=None), adapt(*arguments), mesh, workdir, benchmark)
    else:
        _score(config, experiment.task, outputs_of(experiment, method, trainable, mesh), mesh, flags.FLAGS.split)


def _score(config, task: data.Task, outputs: Callable, mesh, split: str) -> None:
    examples = getattr(task, split)
    if not examples:
        raise app.UsageError(f"This run held out no {split} examples (config.task.holdout).")
    logits = predict(task, outputs, mesh, examples, config.train.eval_batch_size)
    for name, value in score(task, examples, logits).items():
        print(f"{split} {name} {value:.4f} on {len(examples)} examples")
    if task.labels is not None:
        for label, value in by_class(task, examples, logits).items():
            print(f"  {label}: {value:.4f}")


def _answer(config, experiment: Experiment, params, mesh, workdir: pathlib.Path, benchmark: str) -> None:
    base, vocab_size = flags.FLAGS.base, experiment.model.config.vocab_size
    vocabulary = load_vocabulary(config.model.source, vocab_size)
    limit = flags.FLAGS.limit
    if benchmark == config.task.name == "problems":  # the first ones are those that it didn't train on
        limit = limit or config.task.test_examples
        if limit > config.task.test_examples:
            raise app.UsageError(f"This run trained on all but {config.task.test_examples} problems: ask for no more.")
    examples = reasoning.load_benchmark(benchmark, flags.FLAGS.data_dir, limit, config.seed)
    digest = hashlib.sha256((workdir / "adapter.safetensors").read_bytes()).hexdigest()[:16]
    folder = workdir / (f"{benchmark}-base" if base else benchmark)
    rows = reasoning.answer_all(
        experiment.model, params, mesh, vocabulary, benchmark, examples, folder,
        settings={"model": config.model.source, "dtype": config.model.dtype, "adapter": None if base else digest},
        batch_size=flags.FLAGS.batch, max_new_tokens=flags.FLAGS.max_new_tokens or NEW_TOKENS[benchmark],
    )  # fmt: skip
    share, low, high = reasoning.accuracy(rows)
    print(f"{benchmark} accuracy {share:.4f} ({low:.4f} to {high:.4f}) on {len(rows)} problems: {folder}")
    results = json.loads((workdir / "results.json").read_text())
    kept = {name: results[name] for name in ("method", "seed", "trained_numbers", "adapter_bytes")}
    if base:
        config.method = ml_collections.ConfigDict(dict(name="base"))
        kept |= {"method": "base", "trained_numbers": 0, "adapter_bytes": 0}
    # As of a run, so that a report has them beside it.
    write_json(folder / "config.json", json.loads(config.to_json()))
    found = {"task": benchmark, "metric": "accuracy", "test": share, "interval": [low, high], "problems": len(rows)}
    write_json(folder / "results.json", kept | found | {"device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}"})


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a finished run.", required=True)
    flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Which split to score.")
    flags.DEFINE_bool("base", False, "The base model, without what the run trained.")
    flags.DEFINE_enum("benchmark", None, list(reasoning.BENCHMARKS), "Of decoders: answer these problems instead.")
    flags.DEFINE_string("data_dir", None, "Of a benchmark: where TFDS keeps GSM8K; MATH's file or folder.")
    flags.DEFINE_integer("limit", None, "Of a benchmark: only the first so many problems.", lower_bound=1)
    flags.DEFINE_integer("batch", 16, "Of a benchmark: how many problems are answered at a time.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", None, "Of a benchmark: of each answer; none: the recipe's.", lower_bound=1)
    app.run(main)
