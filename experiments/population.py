"""Several runs of one config trained together, in one program with one copy of the frozen model.

Members may differ in what `config.FREE` names: seeds, learning rates, weight decay. Each has its own trainable, optimizer,
data order, dropout and partition, its own workdir, and the result that the same run has alone. The step is `jax.vmap` over
the members, who are divided over the devices: nothing is communicated between them.

`python -m experiments.sweep --population=5` puts the runs of a sweep together so.
"""

import contextlib
import json
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import data, evaluate
from experiments.checkpoint import EXIT_CODES, Checkpoints, Interrupt, claim_workdir, clear_disk_errors
from experiments.config import FREE, check_config, differences
from experiments.logger import Logger
from experiments.optimizer import make_optimizer
from experiments.processes import cache_programs
from experiments.step import make_loss, make_outputs
from experiments.tasks import LANGUAGE, task_kind
from experiments.train import Stopwatch, finish, finite_mean, initial_state, keep_best
from gpart_jax import sharding
from gpart_jax.methods import from_spec
from gpart_jax.targets import named_leaves, replace_leaves

RATES = ("lr", "head_lr", "weight_decay")
MEMBERS = P("data")


def train_population(
    configs: Sequence[ml_collections.ConfigDict], workdirs: Sequence[pathlib.Path], devices: Sequence | None = None
) -> list[dict]:
    """Trains all members to the end, or goes on where they stopped; leaves in each workdir what a run alone does.

    Args:
      configs: of the members.
      workdirs: one for each. Finished ones are left as they are.
      devices: as many are used as divide the members evenly; all by default.

    Returns:
      The results of each, as written to its `results.json`.

    Raises:
      ValueError: members that differ in more than FREE, a mesh with other axes than "data", or as `train.train`.
      FloatingPointError, SystemExit: as `train.train`, of all members together.
    """
    for config in configs:
        check_config(config)
        cache_programs(config.train.get("compiled"))
        if different := differences(configs[0], config):
            raise ValueError(
                f"Members of a population differ in {', '.join(different)}. They may differ in {', '.join(FREE)}; "
                f"run others apart."
            )
    if jax.process_count() > 1 or configs[0].mesh.fsdp != 1 or configs[0].mesh.tensor != 1:
        raise ValueError("A population runs in one process, its members along 'data'. Run this config alone.")
    if task_kind(configs[0].task.name) == LANGUAGE:
        raise ValueError("A population is of encoders or ViTs. Run decoders one by one, without --population.")
    with contextlib.ExitStack() as claims:
        claims.enter_context(clear_disk_errors(workdirs[0].parent))
        for config, workdir in zip(configs, workdirs):
            claims.enter_context(claim_workdir(config, workdir))
        open_ = [pair for pair in zip(configs, workdirs) if not (pair[1] / "results.json").exists()]
        if open_:
            _train(*zip(*open_), devices)
    return [json.loads((workdir / "results.json").read_text()) for workdir in workdirs]


def _train(configs, workdirs, devices) -> None:
    config, count = configs[0], len(configs)
    devices = jax.devices() if devices is None else list(devices)
    used = max(n for n in range(1, len(devices) + 1) if count % n == 0)
    mesh = sharding.make_mesh({"data": used}, devices[:used])
    methods = [from_spec(member.method.to_dict(), member.head_targets) for member in configs]
    experiments = _share([evaluate.build(member) for member in configs], methods)
    model, params, task, _ = experiments[0]
    pad = getattr(model.config, "pad_token_id", None)
    steps_per_epoch = len(task.train) // config.train.batch_size
    total_steps = config.train.epochs * steps_per_epoch
    optimizers = [make_optimizer(total_steps, **member.optimizer) for member in configs]
    batches = [
        data.train_batches(experiment.task, config.train.batch_size, config.train.epochs, member.seed)
        for member, experiment in zip(configs, experiments)
    ]
    states = [
        initial_state(member, method, optimizer, experiment.params)
        for member, method, optimizer, experiment in zip(configs, methods, optimizers, experiments)
    ]
    along, everywhere = NamedSharding(mesh, MEMBERS), NamedSharding(mesh, P())
    frozen = sharding.place(params, everywhere)
    own_tables = [method.tables(experiment.params) for method, experiment in zip(methods, experiments)]
    tables = sharding.place(_stack(own_tables), along)
    rates = sharding.place({rate: np.array([c.optimizer[rate] for c in configs], np.float32) for rate in RATES}, along)
    step_all = _make_step(make_loss(model, task), methods[0], config, total_steps, mesh)
    outputs = make_outputs(model, task, methods[0], jax.tree.map(lambda _: everywhere, params))

    def score(number, examples, trainable):
        experiment = experiments[number]
        own, own_table = sharding.replicate((trainable, own_tables[number]), mesh)
        of_batch = lambda batch: outputs(own, frozen, batch, own_table)
        logits = evaluate.predict(experiment.task, of_batch, mesh, examples, config.train.eval_batch_size)
        return evaluate.score(experiment.task, examples, logits), logits

    with contextlib.ExitStack() as stack:
        checkpoints = [stack.enter_context(Checkpoints(workdir)) for workdir in workdirs]
        interrupt = stack.enter_context(Interrupt())
        # A kill may come between two members' saves, and one may be damaged: the newest step that all have.
        step = max(set.intersection(*(saved.intact(state) for saved, state in zip(checkpoints, states))), default=0)
        states = [
            jax.tree.map(np.array, saved.restore(state, own, step))
            for saved, state, own in zip(checkpoints, states, batches)
        ]
        loggers = [
            stack.enter_context(Logger(workdir, f"{count} x {config.method.name}", step, total_steps, show=not number))
            for number, workdir in enumerate(workdirs)
        ]
        say = loggers[0].say
        say(f"{'goes on after' if step else 'starts at'} step {step} of {total_steps}")
        trained = sharding.place(_stack([(state["trainable"], state["optimizer"]) for state in states]), along)
        keys = sharding.place(_stack([state["key"] for state in states]), along)
        watch, losses = Stopwatch(config.train.get("step_timeout")), []
        while step < total_steps:
            batch = sharding.place(_stack_batches([next(own) for own in batches], pad), along)
            *trained, loss = step_all(*trained, frozen, batch, keys, step, tables, rates)
            step += 1
            losses.append(loss)
            loggers[0].advance(step)
            watch.step()

            if step % config.train.log_every == 0 or step % steps_per_epoch == 0:
                each, seconds = np.asarray(jnp.stack(losses)), watch.lap()["seconds_per_step"] / count
                means = [
                    finite_mean(own, step, steps_per_epoch, config.train, say, f" of {workdir}")
                    for own, workdir in zip(each.T, workdirs)
                ]
                for mean, logger in zip(means, loggers):
                    logger.write(step, loss=mean, seconds_per_step=seconds)
                losses = []
            if step % steps_per_epoch == 0:
                epoch, shown = step // steps_per_epoch, []
                for number, (experiment, state, logger) in enumerate(zip(experiments, states, loggers)):
                    trainable = _member(trained[0], number)
                    validation = experiment.task.validation
                    scores = score(number, validation, trainable)[0] if validation else {}
                    keep_best(state, trainable, experiment.task, scores, epoch)
                    if scores:
                        logger.write(step, **{f"validation_{name}": value for name, value in scores.items()})
                        shown.append(f"{scores[task.metrics[0]]:.4f}")
                end = f"  validation {task.metrics[0]} {', '.join(shown)}" if shown else ""
                say(f"epoch {epoch} of {config.train.epochs}  loss {', '.join(f'{x:.4f}' for x in means)}{end}")
                watch.restart()
            stop = interrupt.requested(step)
            if stop or step % config.train.checkpoint_every == 0 or step == total_steps:
                for own, workdir in zip(np.asarray(jnp.stack(losses)).T if losses else (), workdirs):
                    finite_mean(own, step, steps_per_epoch, config.train, lambda _: None, f" of {workdir}")
                for number, (saved, state, own) in enumerate(zip(checkpoints, states, batches)):
                    trainable, optimizer = _member(trained, number)
                    saved.save(state | {"trainable": trainable, "optimizer": optimizer, "step": step}, own)
                watch.restart()
            if stop:
                for saved in checkpoints:
                    saved.wait()
                say(f"{stop}: saved step {step}. Run the same command to go on.")
                sys.exit(EXIT_CODES[stop])

        watch.stop()
        for number, (member, workdir, experiment, state, logger) in enumerate(
            zip(configs, workdirs, experiments, states, loggers)
        ):
            finish(
                member, workdir, experiment, state["best"], total_steps,
                lambda examples, trainable: score(number, examples, trainable), logger, mesh, population=count,
            )  # fmt: skip


def _make_step(loss, method, config, total_steps, mesh):
    """`step.make_train_step` for each member, with its own tables and rates."""
    fixed = {name: value for name, value in config.optimizer.items() if name not in RATES}

    def one(trainable, optimizer_state, batch, key_data, tables, rates, frozen, number):
        optimizer = make_optimizer(total_steps, **fixed, **rates)
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), number)

        def own_loss(trainable, batch, key):
            method_key, model_key = jax.random.split(key)
            return loss(method.bind(frozen, trainable, method_key, False, tables), frozen, batch, model_key)

        value, gradient = sharding.in_parts(own_loss, config.train.accumulate)(trainable, batch, key)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, trainable)
        return optax.apply_updates(trainable, updates), optimizer_state, value

    def step(trainable, optimizer_state, frozen, batch, key_data, number, tables, rates):
        return jax.shard_map(
            jax.vmap(one, in_axes=(0,) * 6 + (None, None)),
            mesh=mesh,
            in_specs=(MEMBERS,) * 6 + (P(), P()),
            out_specs=MEMBERS,
            check_vma=False,
        )(trainable, optimizer_state, batch, key_data, tables, rates, frozen, number)

    return jax.jit(step, donate_argnums=(0, 1))


def _share(experiments: list[evaluate.Experiment], methods) -> list[evaluate.Experiment]:
    """The same experiments, with one copy of each frozen leaf.

    Raises:
      ValueError: leaves that differ between members and that are not trained, such as a fresh head without head_targets.
    """
    first = dict(named_leaves(experiments[0].params))
    shapes = jax.eval_shape(methods[0].init, experiments[0].params, jax.random.key(0))
    trained = {
        path for name in ("head", "params", "bias") for path in shapes.get(name, {})
    }  # leaves.py: put in their place
    shared = [experiments[0]]
    for experiment in experiments[1:]:
        same = {}
        for path, leaf in named_leaves(experiment.params):
            if np.array_equal(leaf, first[path]):
                same[path] = first[path]
            elif path not in trained:
                raise ValueError(
                    f"{path!r} is frozen and drawn from the seed, so members with different seeds can't share it. "
                    f"Train it (config.head_targets), or give all members one config.seed."
                )
        shared.append(experiment._replace(params=replace_leaves(experiment.params, same)))
    return shared


def _stack(trees: list):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _member(tree, number: int):
    return jax.tree.map(lambda x: np.asarray(x[number]), tree)


def _stack_batches(batches: list[dict], pad: int | None) -> dict:
    """Batches, those of text of several lengths as of the longest."""
    stacked = {}
    for name in batches[0]:
        rows = [batch[name] for batch in batches]
        if rows[0].ndim == 2:  # tokens
            fill, length = pad if name == "input_ids" else 0, max(x.shape[1] for x in rows)
            rows = [np.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=fill) for x in rows]
        stacked[name] = np.stack(rows)
    return stacked
