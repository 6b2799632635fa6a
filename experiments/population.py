"""Several runs of one config trained together, in one program with one copy of the frozen model.

Members may differ in what `config.OF_ONE_PROGRAM` names: seeds, learning rates, weight decay. Each has its own trainable, optimizer,
data order, dropout and partition, its own workdir, and the result that the same run has alone. The step is `jax.vmap` over
the members, who are divided over the devices: nothing is communicated between them.

`python -m experiments.sweep --population=5` puts the runs of a sweep together so.
"""

import contextlib
import pathlib
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import data, loop, metrics
from experiments.build import Experiment, build
from experiments.config import OF_ONE_PROGRAM, check_config, differences
from experiments.evaluate import predict
from experiments.optimizer import make_optimizer, options_of
from experiments.processes import cache_programs
from experiments.step import make_loss, make_outputs, take_step
from experiments.tasks import LANGUAGE, task_kind
from experiments.train import finish
from experiments.workdir import claim_workdir, clear_disk_errors, keep_origin, read_json
from gpart_jax import sharding
from gpart_jax.methods import Method, from_spec
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
      ValueError: members that differ in more than OF_ONE_PROGRAM, a mesh with other axes than "data", or as `train.train`.
      FloatingPointError, SystemExit: as `train.train`, of all members together.
    """
    for config in configs:
        check_config(config)
        cache_programs(config.train.get("compiled"))
        if different := differences(configs[0], config):
            raise ValueError(
                f"Members of a population differ in {', '.join(different)}. They may differ in {', '.join(OF_ONE_PROGRAM)}; "
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
    return [read_json(workdir / "results.json") for workdir in workdirs]


def _train(configs, workdirs, devices) -> None:
    config, count = configs[0], len(configs)
    devices = jax.devices() if devices is None else list(devices)
    used = max(n for n in range(1, len(devices) + 1) if count % n == 0)
    mesh = sharding.make_mesh({"data": used}, devices[:used])
    methods = [from_spec(member.method.to_dict(), member.head_targets) for member in configs]
    built = [build(member) for member in configs]
    for workdir, experiment in zip(workdirs, built):
        keep_origin(workdir, experiment.origin())
    experiments = _share(built, methods)
    schedule = loop.Schedule.from_options(config.train, experiments[0].task)
    options = [options_of(*of_member) for of_member in zip(configs, methods, (one.params for one in experiments))]
    members = [
        loop.Member(
            member, workdir, experiment, own,
            data.train_batches(experiment.task, config.train.batch_size, schedule.epochs, member.seed),
            loop.initial_state(member, method, make_optimizer(schedule.total, **own), experiment.params),
        )
        for member, workdir, experiment, method, own in zip(configs, workdirs, experiments, methods, options)
    ]  # fmt: skip
    engine = Together(members, methods, schedule, mesh)

    def finish_member(member, number, logger, step, poll):
        score = lambda *arguments: engine.score(number, *arguments, poll)
        finish(member, methods[number], schedule, step, score, logger, mesh, population=count)

    loop.run(members, engine, schedule, finish_member, f"{count} x {config.method.name}")


class Together:
    """A `loop.Engine` of several runs: `jax.vmap` over the members, who are divided over the mesh."""

    parts = 1

    def __init__(self, members: list[loop.Member], methods: list[Method], schedule: loop.Schedule, mesh):
        (model, params, task, *_) = members[0].experiment
        self._mesh, self._along, everywhere = mesh, NamedSharding(mesh, MEMBERS), NamedSharding(mesh, P())
        self._members, self._pad = members, getattr(model.config, "pad_token_id", None)
        self._frozen = sharding.place(params, everywhere)
        self._own_tables = [method.tables(member.experiment.params) for method, member in zip(methods, members)]
        self._tables = sharding.place(_stack(self._own_tables), self._along)
        rates = {rate: np.array([member.optimizer[rate] for member in members], np.float32) for rate in RATES}
        self._rates = sharding.place(rates, self._along)
        self._step = _make_step(make_loss(model, task), methods[0], members[0], schedule.total, mesh)
        self._outputs = make_outputs(model, task, methods[0], jax.tree.map(lambda _: everywhere, params))

    def place(self, states):
        stacked = _stack([{name: state[name] for name in ("trainable", "optimizer", "key")} for state in states])
        return sharding.place(stacked, self._along)

    def flops(self, batches):
        return 0.0

    def step(self, trained, batches, number):
        batch = sharding.place(_stack_batches(batches, self._pad), self._along)
        trainable, optimizer, numbers = self._step(
            trained["trainable"], trained["optimizer"], self._frozen, batch, trained["key"], number, self._tables, self._rates
        )
        return trained | {"trainable": trainable, "optimizer": optimizer}, numbers

    def trainable(self, trained, number):
        return jax.tree.map(lambda x: np.asarray(x[number]), trained["trainable"])

    def optimizer(self, trained, number):
        return jax.tree.map(lambda x: np.asarray(x[number]), trained["optimizer"])

    def score(self, number, examples, trainable, poll):
        member = self._members[number]
        own, tables = sharding.replicate((trainable, self._own_tables[number]), self._mesh)
        of_batch = lambda batch: self._outputs(own, self._frozen, batch, tables)
        task, size = member.experiment.task, member.config.train.eval_batch_size
        logits = predict(task, of_batch, self._mesh, examples, size, poll)
        return metrics.score(task, examples, logits), logits


def _make_step(loss, method, member: loop.Member, total_steps, mesh):
    """`step.make_train_step` for each member, with its own tables and rates."""
    fixed = {name: value for name, value in member.optimizer.items() if name not in RATES}

    def one(trainable, optimizer_state, batch, key_data, tables, rates, frozen, number):
        optimizer = make_optimizer(total_steps, **fixed, **rates)
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), number)

        def own_loss(trainable, batch, key):
            method_key, model_key = jax.random.split(key)
            return loss(method.bind(frozen, trainable, method_key, False, tables, batch["row"]), frozen, batch, model_key)

        gradient_of = sharding.in_parts(own_loss, member.config.train.accumulate)
        return take_step(optimizer, trainable, optimizer_state, *gradient_of(trainable, batch, key))

    def step(trainable, optimizer_state, frozen, batch, key_data, number, tables, rates):
        return jax.shard_map(
            jax.vmap(one, in_axes=(0,) * 6 + (None, None)),
            mesh=mesh,
            in_specs=(MEMBERS,) * 6 + (P(), P()),
            out_specs=MEMBERS,
            check_vma=False,
        )(trainable, optimizer_state, batch, key_data, tables, rates, frozen, number)

    return jax.jit(step, donate_argnums=(0, 1))


def _share(experiments: list[Experiment], methods) -> list[Experiment]:
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
