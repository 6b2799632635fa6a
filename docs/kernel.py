"""Draws kernel.png, the picture of docs/performance.md: python docs/kernel.py"""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle

LANES, ROWS, SHIFT = 16, 5, 6  # drawn smaller than they are: 128 lanes
COLORS = plt.get_cmap("viridis")(np.linspace(0.15, 0.95, LANES * ROWS))
GREY = "#d9d9d9"


def rows(axes, x, y, colors, title, below=""):
    """Rows of `LANES` numbers, each in its colour, the first on top."""
    for k, color in enumerate(colors):
        row, lane = divmod(k, LANES)
        axes.add_patch(Rectangle((x + lane * 0.1, y - row * 0.28), 0.1, 0.24, facecolor=color, edgecolor="white", linewidth=0.4))
    axes.text(x + LANES * 0.05, y + 0.36, title, ha="center", va="bottom", fontsize=9)
    axes.text(x + LANES * 0.05, y - (len(colors) // LANES - 1) * 0.28 - 0.12, below, ha="center", va="top", fontsize=7.5)


def arrow(axes, start, end):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color="#444444", linewidth=1))


figure, axes = plt.subplots(figsize=(11, 3.1), dpi=150)
grey = [GREY] * LANES
piece = list(COLORS[: LANES * (ROWS - 2)])
table = [GREY] * SHIFT + piece + [GREY] * (2 * LANES - SHIFT)
rows(axes, 0, 2, table, "a table in VMEM", "a piece of a chunk begins\nin the midst of a row")

one, after = table[: 3 * LANES], table[LANES : 4 * LANES]
rows(axes, 2.3, 2.75, one, "rows q, q + 1, ...")
rows(axes, 2.3, 1.05, after, "rows q + 1, q + 2, ...", "two loads, one row apart")
chosen = [(one if k % LANES >= SHIFT else after)[k] for k in range(3 * LANES)]
rows(axes, 4.6, 2, chosen, "chosen by lane", "lanes from the shift on of\nthe one, else of the other")
rows(axes, 6.9, 2, piece, "lanes turned", "the block, laid flat")
arrow(axes, (1.66, 2.1), (2.24, 2.6))
arrow(axes, (1.66, 1.75), (2.24, 0.95))
arrow(axes, (3.96, 2.5), (4.54, 2.0))
arrow(axes, (3.96, 0.95), (4.54, 1.6))
arrow(axes, (6.26, 1.84), (6.84, 1.84))
arrow(axes, (8.56, 1.84), (9.14, 1.84))

columns, per_row = 8, 2  # a matrix of two flat rows to a row, of which every second one is the first column of tiles
matrix = piece[:LANES], piece[2 * LANES :]
for k, colors in enumerate(matrix):
    for lane, color in enumerate(colors):
        axes.add_patch(Rectangle((9.2 + lane * 0.1, 2 - k * 0.28), 0.1, 0.24, facecolor=color, edgecolor="white", linewidth=0.4))
axes.text(10, 2.36, "every n-th flat row:\na column of tiles", ha="center", va="bottom", fontsize=9)
axes.text(10, 1.6, "+ W, which is read once;\nthe sum is written once", ha="center", va="top", fontsize=7.5)
axes.set_xlim(-0.2, 11)
axes.set_ylim(-0.1, 3.5)
axes.axis("off")
figure.savefig(pathlib.Path(__file__).with_suffix(".png"), bbox_inches="tight")
