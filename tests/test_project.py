"""The house itself: who may import whom, lint, types, and that the README's tree is the tree."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {"data": {"data"}, "model": {"model"}, "loop": {"data", "model", "loop"}, "train": {"data", "model", "loop"}}
OURS = {"data", "model", "loop", "train", "pipeline_train", "bench", "tests"}
SOURCES = sorted(path for path in ROOT.glob("**/*.py") if ".venv" not in path.parts and "build" not in path.parts)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)


@pytest.mark.parametrize("package", ["data", "model", "loop"])
def test_imports_go_one_way(package):
    files = sorted((ROOT / package).glob("**/*.py"))
    assert files
    wrong = [f"{path.name} imports {name}" for path in files for name in imported(path) if name in OURS - ALLOWED[package]]
    assert not wrong


def test_entry_points_import_no_other_entry_point():
    for name in ("train", "pipeline_train"):
        path = ROOT / f"{name}.py"
        if path.exists():
            assert not set(imported(path)) & {"train", "pipeline_train"}
            assert len(path.read_text().splitlines()) < 130


def test_no_pickle_is_read_and_no_remote_code_run():
    forbidden = ("import pickle", "trust_remote_code=True", "weights_only=False", "torch.load(")
    for path in SOURCES:
        if path.parts[len(ROOT.parts)] != "tests":
            assert not [word for word in forbidden if word in path.read_text()], path


@pytest.mark.parametrize("tool", [["flake8"], ["isort", "--check-only", "--diff", "."], ["mypy"]], ids=lambda tool: tool[0])
def test_linters_find_nothing(tool):
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_names_every_module():
    readme = (ROOT / "README.md").read_text()
    for path in [path for package in ("data", "model", "loop") for path in (ROOT / package).glob("*.py")]:
        if path.name != "__init__.py" and not path.name.startswith(("demo_", "tiny_")):
            assert path.name in readme, f"{path.relative_to(ROOT)} is missing in the README's tree"


@pytest.mark.parametrize("command", ["4b", "35b"])
def test_launch_says_all_that_is_missing_before_it_installs_anything(tmp_path, command):
    copy = tmp_path / "launch.sh"
    copy.write_text((ROOT / "launch.sh").read_text())
    (tmp_path / "configs").mkdir()
    (tmp_path / f"configs/{command}.yaml").write_text((ROOT / f"configs/{command}.yaml").read_text())
    done = subprocess.run(["bash", str(copy), command, "data.eval=elsewhere.jsonl"], capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}, timeout=30)
    assert done.returncode == 2
    assert "no NVIDIA GPU is visible" in done.stderr
    assert "data/processed/train.jsonl is missing" in done.stderr and "elsewhere.jsonl is missing" in done.stderr
    assert not (tmp_path / ".venv").exists()
