"""Pictures of an evaluation, drawn by `eval.py --plot DIR` (needs matplotlib)."""
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def draw_scores(folder, rows, columns):
    """scores.png: the score of each column per language, with 95 % intervals, a panel per task.

    rows: [(task, language, a summary per column)] as eval.averages returns them.
    """
    tasks = [task for task in dict.fromkeys(task for task, _, _ in rows) if task != "all"]
    figure, axes_of = panels(len(tasks))
    for task, axes in zip(tasks, axes_of, strict=True):
        shown = [(lang, cells) for t, lang, cells in rows if t == task and not lang.startswith("mean")]
        width = 0.8 / len(columns)
        for i, column in enumerate(columns):
            scores = 100 * np.array([[cells[i]["score"], *cells[i]["interval"]] for _, cells in shown])
            axes.bar(np.arange(len(shown)) + width * i, scores[:, 0], width, label=column,
                     yerr=np.abs(scores[:, 1:] - scores[:, :1]).T, error_kw={"linewidth": 0.8})
        axes.set_xticks(np.arange(len(shown)) + 0.4 - width / 2, [lang for lang, _ in shown])
        axes.set_title(task, fontsize=9)
        axes.set_ylabel("%")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes_of[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=7,
                  frameon=False)
    figure.savefig(Path(folder) / "scores.png", dpi=130)


def draw_layers(folder, layers):
    """layers.png: how often each layer was chosen. layers: {column: {"task lang": chosen layers}}."""
    figure, axes_of = panels(len(layers))
    for (column, chosen), axes in zip(layers.items(), axes_of, strict=True):
        count = 1 + max(max(found) for found in chosen.values())
        shares = [np.bincount(found, minlength=count) / len(found) for found in chosen.values()]
        image = axes.imshow(np.array(shares).T, aspect="auto", origin="lower", vmin=0, vmax=1)
        axes.set_xticks(range(len(chosen)), list(chosen), fontsize=7, rotation=30)
        axes.set_ylabel("layer")
        axes.set_title(f"share of each chosen layer, {column}", fontsize=9)
        figure.colorbar(image, ax=axes)
    figure.savefig(Path(folder) / "layers.png", dpi=130)


def panels(count):
    figure, axes = plt.subplots(count, figsize=(9, 2.6 * count), squeeze=False, constrained_layout=True)
    return figure, axes[:, 0]
