"""A batch whose examples name their adapters gives each what its adapter alone would give it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpart_jax import serving
from gpart_jax.adapter import Adapter
from gpart_jax.methods import from_spec
from gpart_jax.models.decoder import Decoder, DecoderConfig
from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig

ROWS, LENGTH, ADAPTERS, D = 6, 5, 7, 300
IDS = np.random.default_rng(0).integers(1, 16, (ROWS, LENGTH)).astype(np.int32)
BATCH = {"input_ids": IDS, "attention_mask": (np.arange(LENGTH) < [[5], [3], [4], [5], [1], [2]]).astype(np.int32)}


@functools.cache
def case(family):
    """(frozen, adapters, forward, spec) of a small model."""
    if family == "encoder":
        model = EncoderClassifier(EncoderConfig(16, 16, 1, 2, 32, 8, initializer_range=0.3), 2)
        spec, head = {"targets": "(query|value)/kernel$"}, "^classifier/"

        def forward(adapt, frozen, batch):
            return model.apply({"params": adapt(frozen)}, **batch)
    else:
        config = DecoderConfig(16, 16, 2, 2, 1, 8, 32, 8, 1e-6, 1e4, "llama", False, initializer_range=0.3)
        model, spec, head = Decoder(config), {"targets": "^layers/.*kernel$", "stacked": "^layers"}, None

        def forward(adapt, frozen, batch):  # the layers are adapted within their scan
            outside = adapt({name: part for name, part in frozen.items() if name != "layers"})
            return model.apply({"params": outside | {"layers": frozen["layers"]}}, **batch, adapt=adapt)

    frozen = jax.jit(model.init)(jax.random.key(0), IDS, IDS)["params"]
    spec |= {"name": "gpart", "d": D, "seed": 1}
    return frozen, [adapter(n, spec, frozen, head) for n in range(ADAPTERS)], forward, spec


def adapter(seed, spec, frozen, head):
    random = np.random.default_rng(seed)
    trainable = {"theta": random.standard_normal(D).astype(np.float32)}
    if head:
        leaves = {"classifier/kernel": (16, 2), "classifier/bias": (2,)}
        trainable["head"] = {path: random.standard_normal(shape).astype(np.float32) for path, shape in leaves.items()}
    return Adapter.of(from_spec(spec, head), trainable, frozen)


@functools.cache
def server(family):
    """(run, stacked, tables, what each adapter alone gives for the batch)."""
    frozen, adapters, forward, _ = case(family)
    method, _ = adapters[0].on(frozen)
    alone = jax.jit(lambda trainable: forward(method.bind(frozen, trainable), frozen, BATCH))
    outputs = np.stack([alone(one.on(frozen)[1]) for one in adapters])
    return jax.jit(serving.serve(forward, method)), serving.stack(adapters), method.tables(frozen), outputs


@settings(max_examples=8)
@given(st.lists(st.integers(0, ADAPTERS - 1), min_size=ROWS, max_size=ROWS), st.just(1))
@example([3] * ROWS, 1)
@example([0, 1, 2, 3, 4, 5], 4)
def test_each_row_gets_its_own_adapter(which, together):
    run, stacked, tables, alone = server("encoder")
    plan = serving.plan(which, ADAPTERS, together=together)
    outputs = run(stacked, case("encoder")[0], BATCH, plan, tables)
    np.testing.assert_allclose(outputs, [alone[number, row] for row, number in enumerate(which)], atol=1e-5)


def test_a_decoder_adapts_its_layers_within_the_scan():
    run, stacked, tables, alone = server("decoder")
    which = [4, 0, 4, 1, 4, 0]
    outputs = run(stacked, case("decoder")[0], BATCH, serving.plan(which, ADAPTERS), tables)
    assert outputs.shape == (ROWS, LENGTH, 16)
    np.testing.assert_allclose(outputs, [alone[number, row] for row, number in enumerate(which)], atol=1e-5)


def test_another_adapter_compiles_nothing():
    frozen, adapters, forward, spec = case("encoder")
    _, stacked, tables, _ = server("encoder")
    run = jax.jit(serving.serve(forward, adapters[0].on(frozen)[0]))
    stacked = jax.tree.map(jnp.copy, stacked)
    new = adapter(99, spec, frozen, "^classifier/")
    for which in ([0, 1, 2, 3, 4, 5], [6, 6, 1, 2, 3, 0]):
        assert serving.plan(which, ADAPTERS, tile_cost=0).rows.shape[-1] == 1
        run(stacked, frozen, BATCH, serving.plan(which, ADAPTERS, tile_cost=0), tables)
    stacked = serving.put(stacked, 2, new)
    outputs = run(stacked, frozen, BATCH, serving.plan([2, 1, 0, 2, 4, 5], ADAPTERS, tile_cost=0), tables)
    assert run._cache_size() == 1
    method, trainable = new.on(frozen)
    expected = jax.jit(lambda trainable: forward(method.bind(frozen, trainable), frozen, BATCH))(trainable)
    np.testing.assert_allclose(outputs[jnp.array([0, 3])], expected[jnp.array([0, 3])], atol=1e-5)
    with pytest.raises(IndexError, match="no place 7 among 7"):
        serving.put(stacked, 7, new)


def test_the_weights_of_one_tile_alone_are_alive():
    frozen, adapters, forward, _ = case("encoder")
    run, stacked, tables, _ = server("encoder")

    def temporaries(rows):
        batch = jax.tree.map(lambda x: np.tile(x, (rows // ROWS, 1)), BATCH)
        plan = serving.plan(np.arange(rows) % ADAPTERS, ADAPTERS, tile_cost=0)._replace(
            rows=np.zeros((rows, 1, 1), np.int32), adapter=np.zeros((rows, 1), np.int32)
        )
        return run.lower(stacked, frozen, batch, plan, tables).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(96) - temporaries(6) < 90 * 64  # the weights of a row would be 2 kB each


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.integers(1, 5), st.floats(0, 10))
def test_a_plan_takes_each_row_once_to_its_adapter(which, together, tile_cost):
    plan = serving.plan(which, 9, together=together, tile_cost=tile_cost)
    steps, group, size = plan.rows.shape
    assert plan.adapter.shape == (steps, group) and group <= together and size & (size - 1) == 0
    taken = []
    for adapter, rows in zip(plan.adapter[: plan.steps].reshape(-1), plan.rows[: plan.steps].reshape(-1, size)):
        real = [row for row in rows if row < len(which)]
        assert all(which[row] == adapter for row in real)
        taken += real
    assert sorted(taken) == list(range(len(which)))
    assert (plan.rows[plan.steps :] == len(which)).all()


def test_what_cannot_be_served_is_refused():
    frozen, adapters, _, spec = case("encoder")
    other = adapter(0, spec | {"seed": 2}, frozen, "^classifier/")
    with pytest.raises(ValueError, match="seed is 1 and 2"):
        serving.stack([*adapters, other])
    for which in ([], [7], [-1], [[0]]):
        with pytest.raises(ValueError, match="one of the adapters 0 ... 6"):
            serving.plan(which, ADAPTERS)
