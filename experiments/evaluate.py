"""Scores a run's adapter, read from disk onto a freshly loaded model, on a split of its task or on a benchmark.

python -m experiments.evaluate --workdir=runs/quickstart/gpart
python -m experiments.evaluate --workdir=runs/smollm2 --benchmark=gsm8k --limit=200 [--base]
python -m experiments.evaluate --workdir=runs/smollm2 --forgetting=LICENSE

Of a run that isn't finished it scores the best that its newest checkpoint knows of. Any devices will do, in one process or, as
for training, in several; --mesh divides a model that is too large for one.
"""

import collections
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence

import grain
import jax
import ml_collections
import numpy as np
from absl import app, flags, logging
from jax.sharding import NamedSharding

from experiments import data, loop, metrics, processes, reasoning
from experiments.build import Experiment, build
from experiments.checkpoint import Checkpoints
from experiments.command import run_command
from experiments.config import parse_mesh
from experiments.logger import quiet
from experiments.optimizer import make_optimizer, options_of
from experiments.step import make_outputs
from experiments.tasks import LANGUAGE, task_kind
from experiments.tasks.math import NEW_TOKENS
from experiments.workdir import changes, local, read_config, read_json, write_json
from gpart_jax import load_adapter, sharding
from gpart_jax.methods import Method, chain, from_spec, trained_numbers
from gpart_jax.models.vocabulary import load_vocabulary


def outputs_of(experiment: Experiment, method: Method, trainable, mesh: jax.sharding.Mesh) -> Callable:
    """outputs(batch) of the experiment's model with what a method trained, for `predict`."""
    shardings = sharding.param_shardings(experiment.params, mesh, experiment.rules)
    trainable, params, tables = _on_mesh(experiment, method, trainable, shardings)
    outputs = make_outputs(experiment.model, experiment.task, method, shardings)
    return lambda batch: outputs(trainable, params, batch, tables)


def forgetting(experiment: Experiment, mesh: jax.sharding.Mesh, batch_size: int, after: float) -> dict:
    """What training made a model forget: by how much the loss of `task.other_text`, in nats a token, rose to `after`.

    Returns:
      {"forgetting": the rise, "other_text_loss": {"before": of the base model, "after"}}.
    """
    task, base = experiment.task, outputs_of(experiment, chain(), {}, mesh)
    before = metrics.score(task, task.other_text, predict(task, base, mesh, task.other_text, batch_size))["loss"]
    return {"forgetting": after - before, "other_text_loss": {"before": before, "after": after}}


def _on_mesh(experiment, method, trainable, shardings):
    mesh = jax.tree.leaves(shardings)[0].mesh
    trainable = sharding.place(trainable, sharding.of_trained(trainable, shardings))
    return trainable, sharding.place(experiment.params, shardings), sharding.replicate(method.tables(experiment.params), mesh)


def predict(
    task: data.Task,
    outputs: Callable,
    mesh: jax.sharding.Mesh,
    examples: Sequence[dict],
    batch_size: int,
    poll: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Logits of a model, float32 (examples, outputs).

    Of a decoder, for each text: the negative log-likelihood of its tokens, those that loss_mask names, and their number.

    Args:
      outputs: of a batch that lies on the mesh, as `step.make_outputs` gives them.
      poll: called between batches; what it raises ends this.
    """
    batch_size += -batch_size % (mesh.shape["data"] * mesh.shape["fsdp"])
    rows = NamedSharding(mesh, sharding.BATCH)
    logits = np.zeros((len(examples), task.outputs), np.float32)
    sizes = [task.size(example) for example in examples] if task.size else range(len(examples))
    order = np.argsort(sizes, kind="stable")  # little padding

    def collate(chosen):
        filled = np.resize(chosen, batch_size)  # repeats some, so that the last batch has the shape of the others
        batch = task.collate([examples[n] for n in filled])
        return chosen, {name: batch[name] for name in task.inputs if name in batch}

    def fetch(chosen, found):
        logits[chosen] = np.asarray(found)[: len(chosen)]

    chunks = [order[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    pending: collections.deque = collections.deque()  # the host fetches one batch's while the devices compute the next
    for chosen, inputs in grain.MapDataset.source(chunks).map(collate).to_iter_dataset(grain.ReadOptions(8, 8)):
        pending.append((chosen, outputs(sharding.place(inputs, rows))))
        if len(pending) > 1:
            poll()
            fetch(*pending.popleft())
    for one in pending:
        fetch(*one)
    return logits


def main(_):
    quiet()
    processes.join(flags.FLAGS.join_timeout)
    workdir, benchmark = local(flags.FLAGS.workdir), flags.FLAGS.benchmark
    if not (workdir / "config.json").is_file():
        raise app.UsageError(f"{workdir} holds no run (no config.json). Train there first.")
    config = read_config(workdir)
    processes.cache_programs(config.train.get("compiled"))
    if flags.FLAGS.forgetting:
        config.task.forgetting = flags.FLAGS.forgetting
    for name in ("benchmark", "forgetting"):
        if flags.FLAGS[name].value and task_kind(config.task.name) != LANGUAGE:
            raise app.UsageError(f"--{name} is for decoders, but {workdir} is a run of {config.task.name}.")
    mesh = _mesh(config)
    experiment = build(config, mesh)
    origin = experiment.origin(() if benchmark else (flags.FLAGS.split,))
    for change in changes(workdir, origin):
        logging.warning("The run in %s began with another: %s.", workdir, change)
    method, trainable = (chain(), {}) if flags.FLAGS.base else _trained(config, workdir, experiment)
    if benchmark:
        shardings = sharding.param_shardings(experiment.params, mesh, experiment.rules)
        arguments = _on_mesh(experiment, method, trainable, shardings)
        adapt = jax.jit(
            lambda trainable, params, tables: method.apply(params, trainable, None, tables),
            out_shardings=shardings, donate_argnums=1,  # the base's memory becomes the adapted model's
        )  # fmt: skip
        adapted = adapt(*arguments)
        weights = origin["model's weights"]
        _answer(config, experiment._replace(params=None), adapted, trainable, weights, mesh, workdir, benchmark)
    else:
        _score(config, experiment, outputs_of(experiment, method, trainable, mesh), mesh, flags.FLAGS.split)


def _mesh(config) -> jax.sharding.Mesh:
    """That of --mesh; else the run's, where the devices here fit it; else all of them along "data"."""
    if flags.FLAGS.mesh:
        return sharding.make_mesh(parse_mesh(flags.FLAGS.mesh))
    try:
        return sharding.make_mesh(config.mesh.to_dict())
    except ValueError:
        _say(f"The {jax.device_count()} devices here don't fit the run's mesh: each holds the whole model. --mesh divides it.")
        return sharding.make_mesh()


def _trained(config, workdir: pathlib.Path, experiment: Experiment) -> tuple[Method, dict]:
    """The run's method and what it trained: its adapter; of a run without one the best of its newest checkpoint."""
    if (workdir / "adapter.safetensors").is_file():
        return load_adapter(workdir / "adapter.safetensors").on(experiment.params)
    method = from_spec(config.method.to_dict(), config.head_targets)
    optimizer = make_optimizer(1, **options_of(config, method))
    fresh = sharding.fetch(loop.initial_state(config, method, optimizer, experiment.params))
    with Checkpoints(workdir) as checkpoints:
        state = checkpoints.restore(fresh)
    if state is fresh:
        raise app.UsageError(f"{workdir} holds neither an adapter nor a checkpoint yet. Train there first.")
    best = int(state["best"]["epoch"])
    _say(f"{workdir} isn't finished: this is of step {int(state['step'])}{', the best that it validated' if best else ''}.")
    return method, state["best"]["trainable"] if best else state["trainable"]


def _say(text: str) -> None:
    if processes.is_writer():
        print(text)


def _score(config, experiment: Experiment, outputs: Callable, mesh, split: str) -> None:
    task, size = experiment.task, config.train.eval_batch_size
    examples = getattr(task, split)
    if not examples:
        raise app.UsageError(f"This run held out no {split} examples (config.task.holdout).")
    logits = predict(task, outputs, mesh, examples, size)
    for name, value in metrics.score(task, examples, logits).items():
        _say(f"{split} {name} {value:.4f} on {len(examples)} examples")
    if task.labels is not None:
        for label, value in metrics.by_class(task, examples, logits).items():
            _say(f"  {label}: {value:.4f}")
    if task.other_text:
        after = metrics.score(task, task.other_text, predict(task, outputs, mesh, task.other_text, size))["loss"]
        found = forgetting(experiment, mesh, size, after)
        _say(f"forgetting {found['forgetting']:.4f}: {config.task.forgetting} has {after:.4f} nats a token")


def _answer(
    config, experiment: Experiment, params, trainable, weights: str, mesh, workdir: pathlib.Path, benchmark: str
) -> None:
    base, vocab_size = flags.FLAGS.base, experiment.model.config.vocab_size
    vocabulary = load_vocabulary(config.model.source, vocab_size)
    limit = flags.FLAGS.limit
    if benchmark == config.task.name == "problems":  # the first ones are those that it didn't train on
        limit = limit or config.task.test_examples
        if limit > config.task.test_examples:
            raise app.UsageError(f"This run trained on all but {config.task.test_examples} problems: ask for no more.")
    examples = reasoning.load_benchmark(benchmark, flags.FLAGS.data_dir, limit, config.seed)
    adapter = workdir / "adapter.safetensors"
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(sharding.fetch(trainable))]
    content = adapter.read_bytes() if adapter.is_file() else b"".join(leaf.tobytes() for leaf in leaves)  # of a checkpoint
    digest = hashlib.sha256(content).hexdigest()[:16]
    folder = workdir / (f"{benchmark}-base" if base else benchmark)
    new_tokens = flags.FLAGS.max_new_tokens or config.task.get("new_tokens") or NEW_TOKENS[benchmark]
    rows = reasoning.answer_all(
        experiment.model, params, mesh, vocabulary, benchmark, examples, folder,
        settings={
            "model": config.model.source, "dtype": config.model.dtype, "adapter": None if base else digest, "weights": weights,
            "tokenizer": hashlib.sha256(vocabulary.tokenizer.to_str().encode()).hexdigest()[:16],
        },
        batch_size=flags.FLAGS.batch, max_new_tokens=new_tokens, template=config.task.get("template"), say=_say,
    )  # fmt: skip
    share, low, high = reasoning.accuracy(rows)
    _say(f"{benchmark} accuracy {share:.4f} ({low:.4f} to {high:.4f}) on {len(rows)} problems: {folder}")
    if not processes.is_writer():
        return
    kept = {
        "method": config.method.name, "seed": config.seed, "trained_numbers": trained_numbers(trainable),
        "adapter_bytes": adapter.stat().st_size if adapter.is_file() else None,
    }  # fmt: skip
    if not base and (workdir / "results.json").is_file():  # beside the accuracy what it cost
        trained = read_json(workdir / "results.json")
        kept |= {name: trained[name] for name in ("select", "forgetting", "device_memory", "training_seconds") if name in trained}
    if base:
        config.method = ml_collections.ConfigDict(dict(name="base"))
        kept |= {"method": "base", "adapter_bytes": 0, "select": "no training"}
    # As of a run, so that a report has them beside it.
    write_json(folder / "config.json", json.loads(config.to_json()))
    found = {"task": benchmark, "metric": "accuracy", "test": share, "interval": [low, high]}
    found |= {"problems": len(rows), "max_new_tokens": new_tokens}
    write_json(folder / "results.json", kept | found | {"device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}"})


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a run.", required=True)
    flags.DEFINE_string("mesh", None, "Devices along each axis, as in data:4,tensor:2; none: the run's, if it fits those here.")
    flags.DEFINE_float("join_timeout", 300, "Seconds in which all processes must come.", lower_bound=1)
    flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Which split to score.")
    flags.DEFINE_bool("base", False, "The base model, without what the run trained.")
    flags.DEFINE_string("forgetting", None, "Of decoders: a text file whose loss tells what was forgotten; none: the run's own.")
    flags.DEFINE_enum("benchmark", None, list(reasoning.BENCHMARKS), "Of decoders: answer these problems instead.")
    flags.DEFINE_string("data_dir", None, "Of a benchmark: where TFDS keeps GSM8K; MATH's file or folder.")
    flags.DEFINE_integer("limit", None, "Of a benchmark: only the first so many problems.", lower_bound=1)
    flags.DEFINE_integer("batch", 16, "Of a benchmark: how many problems are answered at a time.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", None, "Of a benchmark: of each answer; none: the run's, or the recipe's.", lower_bound=1)
    run_command(main)
