"""The house itself: who may import whom, lint, types, and that the README's tree is the tree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {"data": {"data"}, "model": {"model"}, "loop": {"data", "model", "loop"}}
OURS = {"data", "model", "loop", "train", "pipeline_train", "bench", "tests"}
# Whatever stands on a floor of loop/ imports only from floors below it.
FLOORS = [
    {"errors", "config", "checkpoint", "line_file", "pages", "tensorboard"},
    {"distributed"},
    {"memory", "optim", "identity", "curves", "compiling"},
    {"accumulate", "evaluate", "metrics", "state", "planned", "paths", "rates", "samples"},
    {"fit", "pipeline", "run"},
    {"plan", "review", "export", "check", "inspect", "out_of_memory"},
]
TRACKED = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
SOURCES = [ROOT / name for name in TRACKED if (ROOT / name).exists()]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}


def imported_modules(path):
    """Full names, as far as they are this project's."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (name if (name := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


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


def test_loop_has_six_floors_and_no_arrow_up():
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    wrong, seen = [], set()
    for name, path in MODULES.items():
        parts = name.split(".")
        if parts[0] != "loop" or len(parts) == 1:
            continue
        seen.add(parts[1])
        for other in imported_modules(path):
            target = other.split(".")
            if target[0] == "loop" and len(target) > 1 and target[1] != parts[1] and floor_of[target[1]] >= floor_of[parts[1]]:
                wrong.append(f"{name} (floor {floor_of[parts[1]] + 1}) imports {other} (floor {floor_of[target[1]] + 1})")
    assert not wrong
    assert seen == floor_of.keys() and len(FLOORS) == 6


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: [other for other in imported_modules(path) if other in MODULES and other != name and other.count(".")]
             for name, path in MODULES.items()}
    done, path = set(), []

    def visit(name):
        assert name not in path, " imports ".join([*path[path.index(name):], name])
        if name not in done:
            path.append(name)
            for other in graph[name]:
                visit(other)
            done.add(path.pop())

    for name in graph:
        visit(name)


def test_training_never_imports_the_plan_and_entry_points_no_other():
    for name in ("train", "pipeline_train"):
        reached, todo = set(), [name]
        while todo:
            current = todo.pop()
            if current in MODULES and current not in reached:
                reached.add(current)
                todo += imported_modules(MODULES[current])
        assert not [module for module in reached if module.startswith("loop.plan.") or module == "loop.plan"]
        assert reached & {"train", "pipeline_train"} == {name} and "loop.fit" in reached


def test_settings_are_read_without_torch():
    """So that a typo is answered in a moment. train.py checks them before it imports anything else."""
    for script, config in (("train.py", "4b"), ("pipeline_train.py", "35b")):
        code = (f"import runpy, sys; sys.argv = [{script!r}, '--config', 'configs/{config}.yaml', 'train.sead=1']\n"
                f"try: runpy.run_path({script!r}, run_name='__main__')\n"
                "except SystemExit as stop: print(stop.code, sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stdout == "2 []\n", done.stdout + done.stderr
        assert re.match(r"error: train.sead=1: .*sead.*\n$", done.stderr), done.stderr


def test_no_file_and_no_function_is_long():
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] in ("tests", "bench"):
            continue
        assert len(path.read_text().splitlines()) <= 300, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                limit = 50 if node.name == "main" and path.parent == ROOT else 60
                assert length <= limit, f"{path}: {node.name} has {length} lines, expected at most {limit}"


def test_no_pickle_is_read_and_no_remote_code_run():
    forbidden = ("import pickle", "trust_remote_code=True", "weights_only=False", "torch.load(")
    for path in SOURCES:
        if path.parts[len(ROOT.parts)] != "tests":
            assert not [word for word in forbidden if word in path.read_text()], path


def test_every_automatic_class_is_told_to_run_no_remote_code():
    """Left out, transformers asks whether it may run code that lies beside a model, and `y` runs it."""
    calls = [(path, node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
             and re.match(r"(?:\w+\.)*Auto\w+\.from_\w+$", ast.unparse(node.func))]
    asking = [f"{path.relative_to(ROOT)}:{node.lineno}" for path, node in calls
              if "trust_remote_code=False" not in [ast.unparse(keyword) for keyword in node.keywords]]
    assert not asking
    assert len(calls) > 20 and {path.relative_to(ROOT).parts[0] for path, _ in calls} == {"bench", "loop", "model", "tests"}


@pytest.mark.slow
@pytest.mark.parametrize("tool", [["flake8"], ["isort", "--check-only", "--diff", "."], ["mypy"]], ids=lambda tool: tool[0])
def test_linters_find_nothing(tool):
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_names_every_module():
    readme = (ROOT / "README.md").read_text()
    for path in [path for package in ("data", "model", "loop") for path in (ROOT / package).glob("**/*.py")]:
        if not path.name.startswith("__") and path.parent.name not in ("demo", "tiny"):
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


@pytest.mark.parametrize("command", ["4b", "35b"])
def test_launch_names_a_typing_error_before_all_else(tmp_path, command):
    """It used to be named only after the extras were installed, and never without a GPU."""
    for name in ("configs", "data", "model", "loop", "train.py", "pipeline_train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "launch.sh").write_text((ROOT / "launch.sh").read_text())
    done = subprocess.run(["bash", str(tmp_path / "launch.sh"), command, "train.sead=1"], capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}, timeout=60)
    assert done.returncode == 2 and re.match(r"error: train.sead=1: Key 'sead' .*\n", done.stderr), done.stderr
    assert done.stdout == "", "nothing was set up"
