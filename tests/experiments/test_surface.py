"""The planes around what runs learned: their centre, their distances, their losses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from experiments import report, surface
from experiments.build import build
from gpart_jax import load_adapter, save_adapter
from gpart_jax.methods import from_spec


@pytest.fixture
def make_run(make_config, tmp_path):
    """(method, seed) -> a finished run on the tiny model; what it learned is made up."""

    def make(method, seed=0, task="lexicon", **options):
        config = make_config(method)
        config.seed = seed
        config.method.update(options)
        experiment = build(config)
        trained = from_spec(config.method.to_dict(), config.head_targets)
        like = trained.init(experiment.params, jax.random.key(seed))
        leaves, tree = jax.tree.flatten(like)
        random = np.random.default_rng(seed)
        learned = tree.unflatten([leaf + 0.3 * random.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])
        workdir = tmp_path / f"{method}{seed}{task}{len(options)}"
        workdir.mkdir()
        (workdir / "config.json").write_text(config.to_json())
        results = {"method": method, "seed": seed, "task": task, "metric": "accuracy", "test": 0.5}
        (workdir / "results.json").write_text(json.dumps(results))
        save_adapter(workdir / "adapter.safetensors", trained, learned, experiment.params)
        return report.find_runs(workdir)[0], experiment

    return make


def distance(one, other):
    """In float64, leaf by leaf."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other))
    return np.sqrt(sum(np.square(np.float64(a) - np.float64(b)).sum() for a, b in pairs))


def test_a_grid_point_of_gpart_lies_as_far_away_as_its_theta(make_run):
    run, (_, params, *_) = make_run("gpart")
    plane = surface.make_plane(params, run.workdir / "adapter.safetensors", 2.0)
    adapt = jax.jit(plane.adapt)
    np.testing.assert_allclose(plane.directions @ plane.directions.T, np.eye(2), atol=1e-5)
    assert plane.halfway == pytest.approx(0.5, abs=1e-4)
    centre = adapt(params, plane.trained)
    for x, y in ((2.0, 0.0), (0.3, 0.0), (-1.2, 0.9)):
        step = x * plane.directions[0] + y * plane.directions[1]
        there = adapt(params, plane.trained + step)
        assert distance(there, centre) == pytest.approx(np.hypot(x, y), rel=1e-4)
        jax.tree.map(np.testing.assert_array_equal, there["classifier"], centre["classifier"])


@pytest.mark.parametrize("method, linear", [("lora", False), ("bitfit", True)])
def test_the_edge_lies_at_the_radius_in_weight_space(make_run, method, linear):
    run, (_, params, *_) = make_run(method)
    plane = surface.make_plane(params, run.workdir / "adapter.safetensors", 20.0)
    adapt = jax.jit(plane.adapt)
    centre = adapt(params, plane.trained)
    edges = [distance(adapt(params, plane.trained + 20 * way), centre) for way in plane.directions]
    np.testing.assert_allclose(edges, 20, rtol=1e-4)
    halfway = distance(adapt(params, plane.trained + 10 * plane.directions[0]), centre)
    assert plane.halfway == pytest.approx(halfway / 20, rel=1e-4)
    assert (abs(halfway - 10) < 1e-2) == linear


def test_the_centre_has_the_loss_of_what_was_learned(make_run, tmp_path):
    runs, experiments = zip(make_run("gpart"), make_run("lora", seed=1))
    radius, found = surface.surfaces(runs, None, 3, 64)
    path = tmp_path / "surface.png"
    surface.draw(radius, found, path)
    assert path.read_bytes().startswith(b"\x89PNG")

    theta = load_adapter(runs[0].workdir / "adapter.safetensors").on(experiments[0].params)[1]["theta"]
    assert radius == pytest.approx(float(jnp.linalg.norm(theta)), rel=1e-4)  # as far as the first run moved
    for run, (model, params, task, *_), (_, plane, losses) in zip(runs, experiments, found):
        examples = [task.test[row] for row in np.linspace(0, len(task.test) - 1, 64).astype(int)]
        batch = task.collate(examples)
        method, trainable = load_adapter(run.workdir / "adapter.safetensors").on(params)

        def loss(params):
            logits = jax.jit(model.apply)({"params": params}, batch["input_ids"], batch["attention_mask"])
            return -log_softmax(np.asarray(logits), axis=1)[np.arange(64), batch["label"]].mean()

        assert losses.shape == (3, 3)
        assert losses[1, 1] == pytest.approx(loss(jax.jit(method.apply)(params, trainable)), rel=1e-4)
        corner = plane.trained + radius * (plane.directions[0] - plane.directions[1])
        assert losses[0, 2] == pytest.approx(loss(jax.jit(plane.adapt)(params, corner)), rel=1e-4)
        assert len(np.unique(losses)) == 9


def test_which_two_runs(make_run):
    low, high, lora, other = (
        make_run("gpart", d=128, scheme="balanced-v1")[0], make_run("gpart")[0], make_run("lora")[0],
        make_run("gpart", seed=1, task="other")[0],
    )  # fmt: skip
    assert surface.choose([low, high, lora, other]) == [high, lora]
    with pytest.raises(ValueError, match="No GPart run has a LoRA run of the same model and task"):
        surface.choose([lora, other])
    with pytest.raises(ValueError, match="are of different models or tasks"):
        surface.surfaces([lora, other], 1.0, 3, 8)


def test_a_head_alone_has_no_plane(make_run):
    run, (_, params, *_) = make_run("head")
    with pytest.raises(ValueError, match="is a head alone"):
        surface.make_plane(params, run.workdir / "adapter.safetensors", 1.0)
