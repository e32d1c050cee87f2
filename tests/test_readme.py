"""README.md against the code. .ci/run runs the commands that it marks; here is the rest."""
import importlib
import re
import shutil
import subprocess
import sys
from operator import attrgetter

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
# rows of the table "The paper in the code": (step, file, functions)
ROWS = re.findall(r"^\| (.+?) \| \[(\w+)\.py\]\(\2\.py\) \| (.+) \|$", README, re.MULTILINE)
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
DIFFS = re.findall(r"^```diff\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("step, file, names", ROWS, ids=[row[0][:30] for row in ROWS])
def test_the_paper_in_the_code(step, file, names):
    """Catches a function that was renamed, moved or removed, and is still shown to the reader."""
    for name in re.findall(r"`([\w.]+)`", names):
        attrgetter(name)(importlib.import_module(file))


def test_all_is_found():
    """Catches a page that is no longer read here: the other tests would then pass by being empty."""
    assert len(ROWS) >= 12 and len(re.findall(r"`[\w.]+`", str(ROWS))) >= 18 and len(DIFFS) == 1


@pytest.mark.parametrize("script", ["train", "infer", "eval"])
def test_options(script, capsys):
    """Catches an option that was renamed or removed, also in commands that need several nodes."""
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    commands = re.findall(rf"{script}\.py ([^#|;&\n]*)", "".join(BLOCKS).replace("\\\n", " "))
    used = set(re.findall(r"--\w+", " ".join(commands)))
    assert len(used) >= 2 and used <= known, used - known


@pytest.mark.parametrize("page", ["README.md", "data/README.md", "data/RESULTS.md", "data/PAPER.md"])
def test_links(page):
    """Catches a figure or page that was moved or not committed, and a number that was never filled in."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not re.search(r"@[A-Z]+@", text)
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_table_of_tests():
    """Catches a file of tests that the table in conftest.py does not explain."""
    names = {path.name for path in [*(ROOT / "tests").glob("*.py"), *(ROOT / "tests" / "tools").glob("*.py")]}
    table = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8").split('"""')[1]
    assert not {name for name in names if name not in table}


@pytest.mark.slow
@pytest.mark.parametrize("diff", DIFFS, ids=range(len(DIFFS)))
def test_recipes(tmp_path, diff):
    """Catches a recipe whose lines the code no longer has, or that breaks it."""
    before, after = (re.sub(rf"^[^{sign}].*\n", "", diff, flags=re.MULTILINE) for sign in "-+")
    before, after = (re.sub("^.", "", lines, flags=re.MULTILINE) for lines in (before, after))
    for path in [*ROOT.glob("*.py"), ROOT / "data" / "dev.jsonl"]:
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "data" / "base", tmp_path / "data" / "base")
    shutil.copy(ROOT / "data" / "connected.py", tmp_path / "data")
    path, = (path for path in tmp_path.glob("*.py") if before in path.read_text())
    path.write_text(path.read_text().replace(before, after))
    options = "--out=out --epochs=1 --batch_size=550 --micro_batch=8 --max_length=16 --matrix_prompts=8"
    command = [sys.executable, "train.py", "--model=data/base", "--data=dev.jsonl", *options.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
