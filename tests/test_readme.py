"""README.md against the code. The commands it marks are run by .ci/run; here is what that does not show."""
import importlib
import re
import shutil
import subprocess
import sys
from functools import reduce

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
# the rows of the table "The paper in the code": (step, file, functions)
ROWS = re.findall(r"^\| (.+?) \| \[(\w+)\.py\]\(\2\.py\) \| (.+) \|$", README, re.MULTILINE)
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
            for line in re.findall(r"(\w+)\.py ([^#|;&\n]*)", block.replace("\\\n", " "))]


@pytest.mark.parametrize("step, file, names", ROWS, ids=[row[0][:30] for row in ROWS])
def test_the_paper_in_the_code(step, file, names):
    """Catches a function that was renamed, moved to another file or removed, and is still shown to the
    reader."""
    for name in re.findall(r"`([\w.]+)`", names):
        reduce(getattr, name.split("."), importlib.import_module(file))


def test_every_step_is_shown():
    """Catches a table that can no longer be read here: the test above would then pass by being empty."""
    assert len(ROWS) >= 12 and len(re.findall(r"`[\w.]+`", " ".join(row[2] for row in ROWS))) >= 18


@pytest.mark.parametrize("script", ["train", "infer", "eval"])
def test_options(script, capsys):
    """Catches an option that was renamed or removed, also in commands that need several nodes."""
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    used = {flag for name, arguments in COMMANDS if name == script
            for flag in re.findall(r"--\w+", arguments)}
    assert len(used) >= 3 and used <= known, used - known


def test_links():
    """Catches a figure or page that was moved or not committed, and a figure that was never filled in."""
    for page in (ROOT / name for name in ("README.md", "data/README.md", "data/RESULTS.md")):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"@[A-Z]+@", text)
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), (page, link)


DIFFS = re.findall(r"^```diff\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("diff", DIFFS, ids=range(len(DIFFS)))
def test_recipes(tmp_path, diff):
    """Catches a recipe whose lines the code no longer has, or that breaks it."""
    lines = diff.splitlines()
    before, after = ("".join(line[1:] + "\n" for line in lines if line[0] == sign) for sign in "-+")
    files = [ROOT / name for name in ("model.py", "cctuning.py") if before in (ROOT / name).read_text()]
    assert len(files) == 1 and files[0].read_text().count(before) == 1, before
    for path in [*ROOT.glob("*.py"), ROOT / "data" / "base", ROOT / "data" / "dev.jsonl"]:
        shutil.copytree(path, tmp_path / "data" / "base") if path.is_dir() else shutil.copy(path, tmp_path)
    (tmp_path / files[0].name).write_text(files[0].read_text().replace(before, after))
    command = [sys.executable, "train.py", "--model=data/base", "--data=dev.jsonl", "--out=out", "--epochs=1",
               "--batch_size=550", "--micro_batch=8", "--max_length=16", "--matrix_prompts=8", "--template=plain"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_recipes_are_found():
    """Catches a page whose recipes the test above no longer sees."""
    assert len(DIFFS) == 2
