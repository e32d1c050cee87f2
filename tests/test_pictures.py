"""data/plot.py: what it draws, also from odd files. data/walkthrough.ipynb: its numbers."""
import json
import re

import numpy as np
import pytest

from conftest import ROOT, json_lines, results_of
from reference import Reference, answer_ids, prompt_ids

DATA, TUNED = ROOT / "data", ROOT / "data" / "tuned"


@pytest.mark.optional
def test_pictures(run, tmp_path):
    """Catches a wrong metric, interval, chance or share, names left out or as formulas, boxes in silence."""
    plot = pytest.importorskip("matplotlib") and pytest.importorskip("data.plot")
    cells, summaries, log = [], [], tmp_path / "train_log.jsonl"
    for score, column, layers in ((0.1, "$LR_$SEED", [1, 3]), (0.2, "_模型", None)):
        about = {"column": column, "model": str(tmp_path), "task": "T", "items": 4, "layers": layers,
                 "counts": {"answers": 4, "picked 1": 4, "gold 1": 2, "gold 2": 2, "gold 3": 0}}
        cells += [{**about, "lang": lang} for lang in ("en", "sw")]
        for metric, value in (("accuracy", score), ("likelihood", 0.9)):
            about |= {"metric": metric, "score": value, "interval": [0, 1]}
            summaries += [{**about, "lang": lang} for lang in ("en", "sw", "mean")]
    entries = [{"base_loss": 3}, *({"step": i, "loss": i, "lr": 1} for i in range(1, 31))]
    log.write_text("\n".join(map(json.dumps, [*entries, {"eval_loss": {"none": 4}}])))
    for text in ("[]", "{", '{"results": 3}', json.dumps({"results": cells, "summaries": summaries})):
        (tmp_path / "results.json").write_text(text)
        code, _, err = run("data.plot", tmp_path, tmp_path / "out")
        assert code == 0 or (code == 2 and re.fullmatch("error: .*results.json.*\n", err)), err
    assert code == 0 and re.findall(r"(\w+)\.png: .*\n", err) == ["scores"]
    assert sorted(file.stem for file in (tmp_path / "out").iterdir()) == ["layers", "loss", "scores"]
    scores, losses = plot.draw_scores(summaries, cells).axes[0], plot.draw_losses([log]).axes[0]
    points = np.array([column[0].get_xydata() for column in scores.containers])  # (column, row, 2)
    assert np.allclose(points[:, :, 0].T, [10, 20]) and np.allclose(np.diff(points[0, :, 1]), [1, 1.5])
    assert np.allclose(scores.containers[0][2][0].get_segments()[0][:, 0], [0, 100])
    assert any(np.allclose(line.get_xdata(), 100 / 3) for line in scores.lines)
    assert len(scores.get_legend_handles_labels()[1]) == 2
    assert np.allclose(plot.draw_layers(cells[:1]).axes[0].images[0].get_array(), [[25, 75]])
    assert np.allclose(losses.lines[1].get_xydata(), [[i, i - 1] for i in range(3, 31)])
    assert np.allclose(losses.lines[2].get_xydata(), [[30, 4]])


@pytest.mark.optional
def test_notebook(ran, tmp_path):
    """Catches cells that fail or hide code, stored paths or warnings, old outputs and numbers."""
    nbclient = pytest.importorskip("matplotlib") and pytest.importorskip("nbclient")
    notebook = pytest.importorskip("nbformat").read(DATA / "walkthrough.ipynb", 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(re.search(r"\b(def|class|lambda)\b|(.*\n){10}", cell.source) for cell in cells)
    stored = [json.dumps(cell.outputs) for cell in cells]
    assert not re.search(r'"stderr"|"error"|arning|/(home|root|tmp|usr|Users|work)/', str(stored))
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": ROOT}}).execute()
    old, new = (re.findall(r"-?\d+\.?\d*", text) for text in (stored[-1], json.dumps(cells[-1].outputs)))
    assert np.allclose(np.float64(old), np.float64(new), atol=0.02)
    ran("eval", "--model", TUNED, "--langs=sw", "--connection=matrix", "--dtype=float32", "--out", tmp_path)
    right, probability, *r_squared = map(float, re.findall(r"-?\d+\.?\d*", cells[-1].outputs[0].text))
    assert right == round(96 * results_of(tmp_path)[0]["scores"]["exact"])
    reference, H = Reference(TUNED), []
    own, english = (json_lines(DATA / f"test/facts/split/{lang}.json")[63] for lang in ("sw", "en"))
    own, english = (prompt_ids(TUNED, question["instruction"])[0] for question in (own, english))
    logits, _ = reference.forward(own, reference.vector(own, english=english), len(own) - 1)
    gold = answer_ids(TUNED, json_lines(DATA / "test/facts/ans/sw.json")[63])[0]
    assert abs(logits[-1].softmax(0)[gold] - probability) < 1e-3
    for key in ("instruction", "instruction_en"):
        texts = [sample[key] for sample in json_lines(DATA / "dev.jsonl") if sample["lang"] != "en"]
        H.append(np.stack([reference.activations(prompt_ids(TUNED, t)[0], -1).detach() for t in texts], 1))
    error = (H[1] - H[0] @ reference.tensors["transform_matrix"].detach().numpy()) ** 2  # (L, N, d)
    spread = (H[1] - H[1].mean(1, keepdims=True)) ** 2
    assert np.allclose(1 - error.sum((1, 2)) / spread.sum((1, 2)), r_squared, atol=0.006)
