"""The plane through a model and what two runs made of it: its distances, its losses."""

import json

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from experiments import report, surface
from experiments.build import build
from gpart_jax import load_adapter, save_adapter
from gpart_jax.methods import from_spec
from gpart_jax.targets import named_leaves, replace_leaves


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


def adapted(run, params):
    method, trainable = load_adapter(run.workdir / "adapter.safetensors").on(params)
    return jax.jit(method.apply)(params, trainable)


@pytest.mark.parametrize("methods", [("gpart", "lora"), ("lora", "gpart"), ("gpart", "full"), ("bitfit", "head")])
def test_the_plane_holds_three_models_at_their_distances(make_run, methods):
    (one, (_, params, *_)), (other, _) = make_run(methods[0]), make_run(methods[1], seed=1)
    plane = surface.make_plane(params, [run.workdir / "adapter.safetensors" for run in (one, other)])
    there = [adapted(run, params) for run in (one, other)]
    lengths = np.linalg.norm(plane.at, axis=1)
    np.testing.assert_allclose(lengths, [distance(model, params) for model in there], rtol=1e-4)
    assert np.linalg.norm(plane.at[0] - plane.at[1]) == pytest.approx(distance(*there), rel=1e-4)
    assert plane.at[0, 1] == 0 < plane.at[1, 1]
    base = dict(named_leaves(params))
    for model, (x, y) in zip(there, plane.at):
        for path, leaf in named_leaves(model):
            if path in plane.up:
                np.testing.assert_allclose(base[path] + x * plane.across[path] + y * plane.up[path], leaf, atol=2e-5)
            else:
                np.testing.assert_array_equal(base[path], leaf)


def test_the_loss_is_that_of_the_models_on_training_examples(make_run, tmp_path):
    runs, experiments = zip(make_run("gpart"), make_run("lora", seed=1))
    found = surface.surface(list(runs), 5, 64)
    path = tmp_path / "surface.png"
    surface.draw(list(runs), found, path)
    assert path.read_bytes().startswith(b"\x89PNG")

    model, params, task, *_ = experiments[0]
    batch = task.collate([task.train[row] for row in np.linspace(0, len(task.train) - 1, 64).astype(int)])

    def loss(params):
        logits = jax.jit(model.apply)({"params": params}, batch["input_ids"], batch["attention_mask"])
        return -log_softmax(np.asarray(logits), axis=1)[np.arange(64), batch["label"]].mean()

    models = params, *(adapted(run, params) for run in runs)
    np.testing.assert_allclose(found.known, [loss(model) for model in models], rtol=1e-4)
    assert found.losses.shape == (5, 5) and len(np.unique(found.losses)) == 25
    corners = np.concatenate([[[0, 0]], found.plane.at])
    assert (corners > [found.xs[0], found.ys[0]]).all() and (corners < [found.xs[-1], found.ys[-1]]).all()
    x, y = found.xs[3], found.ys[1]
    base = dict(named_leaves(params))
    there = {name: base[name] + x * found.plane.across[name] + y * up for name, up in found.plane.up.items()}
    assert found.losses[1, 3] == pytest.approx(loss(replace_leaves(params, there)), rel=1e-4)



def test_which_two_runs(make_run):
    low, high, lora, other = (
        make_run("gpart", d=128, scheme="balanced-v1")[0], make_run("gpart")[0], make_run("lora")[0],
        make_run("gpart", seed=1, task="other")[0],
    )  # fmt: skip
    assert surface.choose([low, high, lora, other]) == [high, lora]
    with pytest.raises(ValueError, match="No GPart run has a LoRA run of the same model and task"):
        surface.choose([lora, other])
    with pytest.raises(ValueError, match="are of different models or tasks"):
        surface.surface([lora, other], 3, 8)

def test_one_line_has_no_plane(make_run):
    run, (_, params, *_) = make_run("gpart")
    adapter = run.workdir / "adapter.safetensors"
    with pytest.raises(ValueError, match="lie on one line with the base model"):
        surface.make_plane(params, [adapter, adapter])
