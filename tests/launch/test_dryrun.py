"""The dry run: what it reads from compiled programs, and its command."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from absl import app
from jax.sharding import PartitionSpec as P

from configs import glue, math, vision
from gpart_jax import sharding
from gpart_jax.models import decoder, published
from gpart_jax.models.decoder import Decoder, DecoderConfig
from launch import dryrun
from launch.hlo import collectives

ROOT = pathlib.Path(__file__).parents[2]
NUMBERS = {  # of each model, as its card on the hub counts them
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "google/gemma-7b": 8_537_680_896,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
}


def dry_run(*arguments):
    command = [sys.executable, "-m", "launch.dryrun", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=300
    )


def test_it_counts_what_loops_communicate():
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})

    def local(x, weights):
        def layer(x, w):
            return jax.lax.psum(x @ w, "tensor"), None

        return jax.lax.all_gather(jax.lax.scan(layer, x, weights)[0], ("data", "tensor"), tiled=True)

    program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False))
    text = program.lower(jnp.zeros((3, 16)), jnp.zeros((5, 16, 16))).compile().as_text()
    reduced, gathered = sorted(collectives(text), reverse=True)
    assert (reduced.kind, reduced.shapes, reduced.group, reduced.times) == ("all-reduce", (("f32", (3, 16)),), 2, 5)
    assert (reduced.elements, reduced.bytes) == (48, 5 * 4 * 48)
    assert (gathered.kind, gathered.elements, gathered.group, gathered.times) == ("all-gather", 8 * 48, 8, 1)


def test_it_counts_matrix_products():
    def program(x, weights):
        def step(weights):
            return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0].sum()

        return jax.value_and_grad(jax.checkpoint(step))(weights)

    jaxpr = jax.make_jaxpr(program)(jnp.zeros((3, 16)), jnp.zeros((5, 16, 16)))
    one = 2 * 3 * 16 * 16
    assert dryrun.matmul_flops(jaxpr.jaxpr, 1) == 5 * 4 * one  # forward, forward again, and two of the way back
    assert dryrun.matmul_flops(jaxpr.jaxpr, 2) == 5 * 2 * one


@pytest.mark.parametrize("name", NUMBERS)
def test_published_decoders_have_the_numbers_of_their_cards(name):
    config = DecoderConfig.from_hf(published.CONFIGS[name])
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens, tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == NUMBERS[name]


def test_a_full_size_step_is_described_without_a_weight():
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
    step = dryrun.describe(math.get_config("llama31_8b"), mesh)
    trainable, state, frozen, batch, *_ = step.arguments
    assert step.params == NUMBERS["meta-llama/Llama-3.1-8B"]
    assert trainable["theta"].shape == (524_288,) and batch["input_ids"].shape == (16, 2048)
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}
    whole = 2 * step.params  # of which all but the norms is divided by eight
    assert whole / 8 < dryrun.device_bytes(frozen) < whole / 8 * 1.001
    scalars = sum(leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.size == 1)
    assert dryrun.device_bytes((trainable, state)) == 4 * (3 * 524_288) + scalars
    assert dryrun.device_bytes(batch) == 3 * 8 * 2048 * 4


@pytest.mark.parametrize("arguments, numbers", [("peft_bench", 131_072), ("peft_bench,lora", 9_175_040)])
def test_the_benchmark_of_peft_is_described(arguments, numbers):
    trainable, _, _, batch, *_ = dryrun.describe(math.get_config(arguments), sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})).arguments
    assert dryrun.trained_numbers(trainable) == numbers  # of LoRA as the benchmark counts them
    assert batch["input_ids"].shape == (4, 768)


def test_a_step_on_images_is_described_too():
    step = dryrun.describe(vision.get_config("cars,base"), sharding.make_mesh({"data": 8}))
    trainable, _, _, batch, *_ = step.arguments
    assert trainable["theta"].shape == (72_000,) and batch["pixel_values"].shape == (256, 224, 224, 3)
    assert step.params == 85_798_656 + 2 * 768 + 2  # the published model's without its pooler, and a head


def test_the_command_prints_what_a_step_costs(tiny_model):
    options = "--devices=2", "--mesh=data:2", "--length=8", "--config.method.d=300", "--config.model.dropout=0.0"
    done = dry_run("--config=configs/glue.py:rte,base", f"--config.model.source={tiny_model}", *options)
    assert done.returncode == 0, done.stderr
    training, evaluation = (
        dict(re.findall(r"^  (\S.*?) {2,}(\S.*)$", part, re.MULTILINE)) for part in done.stdout.split("evaluation, 64 x 8 tokens:\n")
    )
    rows = training
    assert "training, 32 x 8 tokens:\n" in done.stdout
    assert rows["all-reduce (1 times)"] == f"{4 * (300 + 32 * 2 + 2 + 1) / 1e6:,.3f} MB"  # the loss travels with them
    held = {"frozen weights", "trained numbers", "the method's tables", "batch", "activations and temporaries", "in all"}
    assert held | {"optimizer"} <= rows.keys() and held <= evaluation.keys() and "optimizer" not in evaluation
    assert rows["matrix products"].endswith("TFLOP")
    for chip in dryrun.CHIPS:
        assert f"  fits {chip} (" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles with libtpu, which isn't installed")
def test_the_command_estimates_a_step_on_a_tpu(tiny_model):
    options = "--devices=1", "--chip=v5e", "--length=8", "--parts=train", "--config.method.d=300", "--config.model.dropout=0.0"
    done = dry_run("--config=configs/glue.py:rte,base", f"--config.model.source={tiny_model}", *options)
    assert done.returncode == 0, done.stderr
    found = re.search(r"^  estimated step: ([\d.]+) M cycles \(kernels ([\d.]+) M\), MFU ([\d.]+)%$", done.stdout, re.M)
    cycles, kernels, mfu = map(float, found.groups())
    assert 0 <= kernels < cycles and 0 <= mfu < 100


def test_evaluation_of_a_language_model_needs_no_more_than_training():
    config, mesh = math.get_config("smollm2"), sharding.make_mesh({"data": 2}, jax.devices()[:2])
    config.model.source = "Qwen/Qwen2.5-0.5B"
    sizes = []
    for part in ("train", "evaluate"):
        step = dryrun.describe(config, mesh, 256, part)
        memory = step.function.lower(*step.arguments).compile().memory_analysis()
        sizes.append(memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes)
    assert sizes[1] < sizes[0] < 2 * 8 * 256 * 151_936 * 4, sizes  # float32 logits of all tokens, and their gradient


def test_generation_is_described_too():
    mesh = sharding.make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    step = dryrun.describe(math.get_config("qwen25_05b"), mesh, 512, "generate")
    # 24 layers, 8 of 16 rows, one of 2 heads of 64 numbers, keys and values in bfloat16; and how many columns are filled
    assert dryrun.device_bytes(step.held["cache"]) == 24 * 8 * 512 * 64 * 2 * 2 + 4 * 8
    tokens = step.function.lower(*step.arguments).out_info[0]
    assert tokens.shape == (16, dryrun.NEW_TOKENS)
    with pytest.raises(ValueError, match="roberta-base is no decoder, and generates nothing"):
        dryrun.describe(glue.get_config("rte,base"), mesh, 8, "generate")


def test_what_is_made_again_is_no_work_of_the_model():
    config, mesh = math.get_config("llama31_8b"), sharding.make_mesh(devices=jax.devices()[:1])
    step = dryrun.describe(config, mesh, 16)
    everything = dryrun.matmul_flops(step.function.trace(*step.arguments).jaxpr, 1)
    once = dryrun.model_flops(config, mesh, 16)
    assert 1.25 * once < everything < 1.4 * once  # all layers' way forward twice, instead of 2 ways 3


def test_what_cannot_be_laid_out_is_refused():
    done = dry_run("--config=configs/glue.py:rte,base", "--mesh=data:64")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = "config.train.batch_size = 32 doesn't divide over the mesh: it must be a multiple of 64"
    assert message in done.stderr + done.stdout
    with pytest.raises(app.UsageError, match="--mesh=data must look like data:16,tensor:4."):
        dryrun.parse_mesh("data")
    config = glue.get_config("rte,minilm")
    config.model.source = "my-encoder"
    with pytest.raises(ValueError, match="The shape of my-encoder isn't known: it is no directory"):
        dryrun.describe(config, sharding.make_mesh())


def test_a_slice_that_does_not_exist_is_refused():
    with pytest.raises(app.UsageError, match="--devices=7 is no slice of v5e. Choose one of 1, 4, 8"):
        dryrun.tpu_devices("v5e", 7)


def test_unknown_decoders_are_refused():
    llama = published.CONFIGS["meta-llama/Llama-3.1-8B"]
    for change, message in [
        ({"model_type": "mamba"}, "model_type 'mamba'; this decoder is llama, mistral, qwen2, gemma"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling 'yarn'"),
        ({"hidden_act": "relu6"}, "hidden_act 'relu6'"),
        ({"num_key_value_heads": 5}, "num_heads 32 is not a multiple of num_kv_heads 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            DecoderConfig.from_hf(llama | change)
    assert decoder.DecoderConfig.from_hf(llama).rope_scaling.factor == 8
