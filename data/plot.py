"""Pictures of an evaluation, drawn by `eval.py --plot DIR` (needs matplotlib)."""
import contextlib
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def draw(folder, results):
    """Draw scores.png, layers.png (if a layer was chosen) and loss.png (if a model has a train_log.jsonl).

    results: the contents of results.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cells = results["results"]
    draw_scores(folder, cells, results["summaries"])
    layers = {}  # {column: {"task lang": number of answers that chose each layer}}
    for cell in cells:
        if cell["layers"]:
            layers.setdefault(cell["column"], {})[f"{cell['task']} {cell['lang']}"] = cell["layers"]
    if layers:
        draw_layers(folder, layers)
    logs = {cell["model"]: Path(cell["model"]) / "train_log.jsonl" for cell in cells}
    logs = {model: read_log(path) for model, path in logs.items() if path.exists()}
    if logs:
        draw_losses(folder, logs)


def read_log(path):
    """The entries of a train_log.jsonl, without a line that was cut short."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def draw_scores(folder, cells, summaries):
    """scores.png: each column's score per language, with 95 % intervals; a panel per task, then the means."""
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    chance = {cell["task"]: cell["details"].get("chance") for cell in cells}
    panels_of = {}  # {title: {bar's name: a summary per column}}
    for s in summaries:
        if s["task"] != "all" and not s["lang"].startswith("mean"):
            panels_of.setdefault(s["task"], {}).setdefault(s["lang"], []).append(s)
    panels_of["mean over languages"] = {
        task: [s for s in summaries if (s["task"], s["lang"]) == (task, "mean")]
        for task in dict.fromkeys(s["task"] for s in summaries)}
    figure, axes_of = panels(len(panels_of))
    for (task, bars), axes in zip(panels_of.items(), axes_of, strict=True):
        width = 0.8 / len(columns)
        for i, column in enumerate(columns):
            scores = 100 * np.array([[found[i]["score"], *found[i]["interval"]] for found in bars.values()])
            axes.bar(np.arange(len(bars)) + width * i, scores[:, 0], width, label=column, color=f"C{i}",
                     edgecolor=f"C{i}",  # so that a bar of height 0 is seen
                     yerr=np.abs(scores[:, 1:] - scores[:, :1]).T, error_kw={"linewidth": 0.8})
        level = chance.get(task.partition(",")[0])
        if level is not None:
            axes.axhline(100 * level, color="grey", linestyle="--", linewidth=0.8)
            axes.text(len(bars) - 0.2, 100 * level, "chance", fontsize=7, color="grey", va="bottom",
                      ha="right")
        axes.set_xticks(np.arange(len(bars)) + 0.4 - width / 2, list(bars))
        axes.set_title(task, fontsize=9)
        axes.set_ylim(0, 100)
        axes.set_ylabel("%")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes_of[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=7,
                  frameon=False)
    figure.savefig(folder / "scores.png", dpi=130)


def draw_layers(folder, layers):
    """layers.png: how often each layer was chosen.

    layers: {column: {"task lang": number of answers that chose each layer}}.
    """
    figure, axes_of = panels(len(layers))
    for (column, chosen), axes in zip(layers.items(), axes_of, strict=True):
        shares = [np.array(counts) / sum(counts) for counts in chosen.values()]
        image = axes.imshow(np.array(shares).T, aspect="auto", origin="lower", vmin=0, vmax=1)
        axes.set_xticks(range(len(chosen)), list(chosen), fontsize=7, rotation=30)
        axes.set_ylabel("layer")
        axes.set_title(f"share of each chosen layer, {column}", fontsize=9)
        figure.colorbar(image, ax=axes)
    figure.savefig(folder / "layers.png", dpi=130)


def draw_losses(folder, logs):
    """loss.png: training and validation loss per answer token, and the learning rate.

    logs: {model: the lines of its train_log.jsonl, as dicts}.
    """
    figure, axes_of = panels(2)
    for i, (model, lines) in enumerate(logs.items()):
        curves = {}  # {(panel, name): [(step, value)]}
        for line in lines:
            values = {(0, f"validation, {name}"): loss for name, loss in line.get("eval_loss", {}).items()}
            values |= {(0, "loss"): line.get("loss"), (1, "learning rate"): line.get("lr")}
            for key, value in values.items():
                if value is not None and "step" in line:
                    curves.setdefault(key, []).append((line["step"], value))
        for (panel, name), points in curves.items():
            is_validation = name.startswith("validation")
            marker = {"marker": "o", "linestyle": "--"} if is_validation else {"color": f"C{i}"}
            axes_of[panel].plot(*zip(*points, strict=True), label=f"{model}: {name}", **marker)
    axes_of[0].set_ylabel("loss")
    axes_of[1].set_ylabel("learning rate")
    axes_of[1].set_xlabel("step")
    for axes in axes_of:
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "loss.png", dpi=130)


def panels(count):
    figure, axes = plt.subplots(count, figsize=(9, 2.6 * count), squeeze=False, constrained_layout=True)
    return figure, axes[:, 0]
