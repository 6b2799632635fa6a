"""What the pictures show: the points and bars of a line, labels that don't overlap, theta's numbers."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.text import Text
from safetensors.numpy import save_file

from experiments import plots, report
from gpart_jax.methods import METHODS, SIZES, Method, from_spec
from gpart_jax.methods.base import registered

COLUMN = ("glue/sst2", "accuracy")


def run(method, seed, test, folder=pathlib.Path("nowhere"), **options):
    config = {
        "model.source": "m",
        "method.name": method,
        **{f"method.{name}": value for name, value in options.items()},
    }
    results = {"method": method, "seed": seed, "task": COLUMN[0], "metric": COLUMN[1], "test": test}
    return report.Run(folder, config, results | {"trained_numbers": 1234})


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, kept open."""
    monkeypatch.setattr(plots.plt, "close", lambda figure: None)
    yield lambda: [plt.figure(number) for number in plt.get_fignums()]
    monkeypatch.undo()
    plt.close("all")


def test_a_line_over_d(figures, tmp_path):
    runs = [run("gpart", seed, test, d=d) for d, tests in ((64, (0.5, 0.7, 0.6)), (256, (0.8,)), (1024, (0.9, 0.86)))
            for seed, test in enumerate(tests)]  # fmt: skip
    runs += [run("lora", 0, 0.88, rank=8), run("uni_lora", 0, 0.83, d=256, rank=4)]
    plots.draw_over_d(report.rows(runs), COLUMN, tmp_path / "picture.png")
    axes = figures()[0].axes[0]
    (line,) = axes.containers  # uni_lora has one d only: a dashed line
    points, _, (bars,) = line
    np.testing.assert_allclose(points.get_xydata(), [(64, 60), (256, 80), (1024, 88)])
    np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], [(50, 70), (80, 80), (86, 90)])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["64", "256", "1,024"]
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [88, 83]
    assert {line.get_color() for line in dashed} == {plots.color_of("lora"), plots.color_of("uni_lora")}
    texts = [text.get_text() for text in axes.texts]
    assert "lora, r = 8\n(1,234 numbers)" in texts and "uni_lora, d = 256\n(1,234 numbers)" in texts


def test_a_line_for_each_variant(figures, tmp_path):
    runs = [run("gpart", 0, 0.5, d=d, scheme=scheme) for d in (64, 128) for scheme in ("balanced-v1", "splitmix64")]
    runs.append(run("gpart", 0, 0.5, d=256, scheme="balanced-v1"))
    plots.draw_over_d(report.rows(runs), COLUMN, tmp_path / "picture.png")
    lines = [line[0] for line in figures()[0].axes[0].containers]
    assert [list(line.get_xdata()) for line in lines] == [[64, 128, 256], [64, 128]]
    assert lines[0].get_marker() != lines[1].get_marker()


def test_labels_do_not_overlap(figures, tmp_path):
    runs = [run(method, 0, 0.8 + 0.001 * d / 64, d=d) for method in ("gpart", "uni_lora", "fastfood") for d in (64, 128)]
    runs += [run(method, 0, 0.8) for method in ("bitfit", "head", "full")]
    runs += [run(method, 0, 0.8, rank=8) for method in ("lora", "vera")] + [run("lora", 0, 0.3, rank=1)]
    plots.draw_over_d(report.rows(runs), COLUMN, tmp_path / "picture.png")
    axes = figures()[0].axes[0]
    boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == 9
    for lower, upper in zip(boxes, boxes[1:]):
        assert lower.y1 <= upper.y0


def test_theta(figures, tmp_path):
    theta = np.random.default_rng(0).normal(0.5, 2, 1000).astype(np.float32)
    save_file({"theta": theta}, tmp_path / "adapter.safetensors")
    plots.draw_theta(run("gpart", 7, 0.8, tmp_path, d=1000), "gpart, d = 1,000", tmp_path / "picture.png")
    axes = figures()[0].axes[0]
    assert f"‖theta‖ = {np.linalg.norm(theta):.3g}: how far" in axes.get_title() and "seed 7" in axes.get_title()
    assert f"sd {theta.std():.3g}" in axes.texts[0].get_text()
    bars = axes.patches
    assert sum(bar.get_width() * bar.get_height() for bar in bars) == pytest.approx(1)
    assert axes.lines[0].get_ydata().max() == pytest.approx(1 / np.sqrt(2 * np.pi) / theta.std(), rel=1e-3)
    plots.draw_theta(run("gpart", 7, 0.8, tmp_path, d=1000, isometric=False), "gpart", tmp_path / "picture.png")
    assert "how far" not in figures()[1].axes[0].get_title()  # it isn't, without the isometry


def test_which_pictures_and_which_run(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(plots, "draw_over_d", lambda rows, column, path: drawn.update({path.name: column}))
    monkeypatch.setattr(plots, "draw_theta", lambda run, label, path: drawn.update({path.name: (run.results, label)}))
    plots.pictures("m", report.rows([run("lora", 0, 0.1, rank=r) for r in (1, 2)]), tmp_path)
    assert not drawn  # no d
    runs = [run("gpart", seed, test, d=d) for d in (64, 128) for seed, test in ((1, 0.9), (2, 0.5), (3, 0.7))]
    plots.pictures("m", report.rows([*runs, run("gpart", 0, 0.99, d=256)]), tmp_path)
    assert drawn["accuracy-over-d-glue-sst2-m.png"] == COLUMN
    results, label = drawn["theta-m.png"]
    assert label == "gpart, d = 128" and results["seed"] == 3


def test_every_method_has_a_color_and_a_size():
    assert len({plots.color_of(name) for name in [*METHODS, "base"]}) == len(METHODS) + 1
    for name in METHODS:
        assert report.label({"name": name, "d": 4096, "rank": 8}) == {
            "gpart": "gpart, d = 4,096", "uni_lora": "uni_lora, d = 4,096", "fastfood": "fastfood, d = 4,096",
            "lora": "lora, r = 8", "vera": "vera, r = 8",
        }.get(name, name)  # fmt: skip


def test_a_users_method_is_one_function(tmp_path):
    @registered(size="d")
    def shift(d, targets=None):
        init = lambda params, key: {"theta": jnp.zeros(d)}  # noqa: E731
        bind = lambda params, trainable, *_: lambda part, layer=None: part  # noqa: E731
        return Method(init, bind)

    try:
        method = from_spec({"name": "shift", "d": 64})
        assert (method.name, method.options) == ("shift", {"d": 64, "targets": None})
        runs = [run("shift", 0, 0.5 + d / 1000, d=d) for d in (64, 128)]
        assert [row.label for row in report.rows(runs)] == ["shift, d = 64", "shift, d = 128"]
        plots.pictures("m", report.rows(runs), tmp_path)
        assert (tmp_path / "accuracy-over-d-glue-sst2-m.png").is_file()
    finally:
        METHODS.pop("shift"), SIZES.pop("shift")


def searched(method, seed, test, held_out, step=None, lr=None, **options):
    found = run(method, seed, test, **options)
    config = found.config | {"optimizer.step": step, "optimizer.lr": lr}
    rate = step / options["d"] ** 0.5 if step else lr
    return found._replace(config=config, results=found.results | {"validation": held_out, "learning_rate": rate})


def test_of_searched_rates_held_out_data_chooses_by_the_seed_that_all_have(figures, tmp_path):
    runs = [searched("gpart", 0, 0.9, 0.6, step=1.0, d=64), searched("gpart", 0, 0.7, 0.7, step=2.0, d=64)]
    runs += [searched("gpart", 1, 0.8, 0.5, step=2.0, d=64)]  # the chosen one's second seed, worse than what wasn't chosen
    runs += [searched("gpart", 0, 0.8, 0.8, step=step, d=256) for step in (1.0, 2.0)]
    runs += [searched("lora", 0, test, test, lr=lr, rank=8) for lr, test in ((1e-3, 0.6), (2e-3, 0.65))]
    chosen = plots.choose_rates(report.rows(runs), COLUMN)
    assert [(row.label, [run.results["test"] for run in row.cells[COLUMN]]) for row in chosen] == [
        ("gpart, d = 64", [0.7, 0.8]), ("gpart, d = 256", [0.8]), ("lora, r = 8", [0.65]),
    ]  # fmt: skip
    plots.draw_over_numbers(chosen, COLUMN, tmp_path / "picture.png")
    (axes,) = figures()[0].axes
    gpart, lora = axes.containers
    np.testing.assert_allclose(gpart[0].get_xydata(), [(1234, 75), (1234, 80)])
    assert [text.get_text() for text in axes.texts] == ["gpart", "lora"]
    assert "1 to 2 seeds" in axes.get_title()


def test_of_losses_the_lowest_is_chosen():
    runs = [searched("lora", 0, test, test, lr=lr, rank=8) for lr, test in ((1e-3, 1.7), (2e-3, 1.6), (4e-3, 2.0))]
    runs = [run._replace(results=run.results | {"metric": "loss"}) for run in runs]
    (row,) = plots.choose_rates(report.rows(runs), (COLUMN[0], "loss"))
    assert row.cells[COLUMN[0], "loss"][0].results["test"] == 1.6


def test_rows_without_held_out_data_all_stay():
    runs = [searched("lora", 0, test, None, lr=lr, rank=8) for lr, test in ((1e-3, 0.6), (2e-3, 0.65))]
    assert len(plots.choose_rates(report.rows(runs), COLUMN)) == 2


def test_curves_over_the_rate_and_over_the_length(figures, tmp_path):
    runs = [searched("gpart", 0, 0.9, step * d / 1e4, step=step, d=d) for d in (64, 256) for step in (1.0, 2.0, 4.0)]
    runs += [searched("gpart", 1, 0.9, 0.0, step=2.0, d=64), searched("gpart", 0, 0.5, 0.5, lr=1e-2, d=64)]
    lines = plots.searched_steps(report.rows(runs), COLUMN)
    assert lines[64] == [(1 / 8, 1.0, 0.0064), (2 / 8, 2.0, 0.0128), (4 / 8, 4.0, 0.0256)]
    assert not plots.searched_steps(report.rows(runs[:3]), COLUMN)  # of one d
    plots.draw_over_rate(lines, COLUMN, tmp_path / "picture.png")
    rates, steps = figures()[0].axes
    np.testing.assert_allclose(rates.lines[1].get_xdata(), [1 / 16, 2 / 16, 4 / 16])
    np.testing.assert_allclose(steps.lines[1].get_xdata(), [1, 2, 4])
    assert [text.get_text() for text in steps.get_legend().get_texts()] == ["d = 64", "d = 256"]
