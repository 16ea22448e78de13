"""A thin slice of the kill sweep; `python -m tests.kill_sweep` goes through all calls, in minutes."""

import shutil

import pytest

from tests import strace
from tests.kill_sweep import Sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    if strace.is_missing():
        pytest.skip("strace is missing")
    sweep = Sweep(tmp_path_factory.mktemp("sweep"), ranks=1)
    sweep.prepare(["rotation", "resume"])
    return sweep


@pytest.mark.slow
@pytest.mark.parametrize("phase, least", [("rotation", 30), ("resume", 40)])
def test_a_run_killed_at_system_calls_loses_nothing_and_resumes_to_the_same_result(sweep, phase, least):
    every = len(sweep.targets(phase)) // 3
    assert every >= least // 3, "the phase changes its directory in many calls"
    row = sweep.sweep(phase, every)
    assert row.kills >= 3 and not any(row.counts.values()), row.problems


@pytest.mark.slow
def test_a_lost_checkpoint_is_noticed(sweep):
    calls = sweep.targets("rotation")
    run_dir = sweep.saving.run_dir("doctored")
    shutil.copytree(sweep.saving.run_dir("torn"), run_dir)  # killed before step 2 was committed
    assert sweep.lost("save", run_dir, sweep.targets("save")) == []
    assert sweep.lost("rotation", run_dir, calls) == ["step-00000002 is gone"]
    (run_dir / "step-00000001/state.json").write_text("{}")
    assert "step-00000001/state.json: 2 bytes" in sweep.lost("save", run_dir, sweep.targets("save"))[0]
    shutil.rmtree(run_dir / "step-00000001")
    assert sweep.lost("resume", run_dir, []) == ["step-00000001 is gone"]


def test_calls_are_read_from_a_trace_also_where_threads_cut_each_other_short(tmp_path):
    (tmp_path / "trace").write_text(
        '11 openat(AT_FDCWD</x>, "runs/a/new", O_WRONLY|O_CREAT|O_CLOEXEC, 0666 <unfinished ...>\n'
        '12 rename("runs/a/new", "runs/a/old") = 0\n'
        "11 <... openat resumed>) = 5</x/runs/a/new>\n"
        '11 write(5</x/runs/a/new>, ""..., 3) = 3\n'
        '11 openat(AT_FDCWD</x>, "runs/a/new", O_RDONLY|O_CLOEXEC) = 6</x/runs/a/new>\n'
        '11 write(5</x/runs/a/new>, ""..., 4) = 4\n'
        "12 --- SIGCHLD ---\n"
        "12 +++ killed by SIGKILL +++\n")
    calls = strace.read_trace(tmp_path / "trace")
    assert [(call.thread, call.name) for call in calls] == [
        (11, "openat"), (12, "rename"), (11, "write"), (11, "openat"), (11, "write")]
    assert calls[0].text.endswith("= 5</x/runs/a/new>") and calls[1].renamed == ("new", "old")
    targets = strace.targets(calls, "runs/a")
    assert [(target.met.name, target.path, target.number) for target in targets] == [
        ("openat", "runs/a/new", 1), ("rename", "runs/a/new", 1), ("write", "/x/runs/a/new", 1), ("write", "/x/runs/a/new", 2)]
