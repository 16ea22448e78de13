"""What launch.sh and the batch file make of several hosts: the literal scripts, with a Python and a Slurm that only note."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path):
    """launch.sh beside a Python that notes how it is called, and a nvidia-smi that lists two GPUs."""
    for name in ("launch.sh", "setup.cfg", "constraints.txt", "configs/4b.yaml", "configs/35b.yaml", "configs/slurm.sbatch"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    programs = {".venv/bin/python": 'echo "$GROUP_RANK: $*" >> calls', "bin/nvidia-smi": "echo GPU 0; echo GPU 1"}
    for name, text in programs.items():
        program(tmp_path / name, text)
    return tmp_path


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def launch(checkout, *arguments, **environment):
    (checkout / "calls").unlink(missing_ok=True)
    environment = {"PATH": f"{checkout}/bin:/usr/bin:/bin", **environment}
    done = subprocess.run(["bash", "launch.sh", *arguments], cwd=checkout, env=environment, capture_output=True, text=True,
                          timeout=60)
    calls = (checkout / "calls").read_text().splitlines() if (checkout / "calls").exists() else [""]
    return done.returncode, calls[-1], done.stderr


def test_each_host_gets_its_number_and_only_the_first_needs_rows(checkout):
    hosts = {"NNODES": "3", "HEAD": "host0:29500"}
    status, _, said = launch(checkout, "4b", NODE_RANK="0", **hosts)
    assert status == 2 and "data/processed/train.jsonl is missing" in said and "eval.jsonl is missing" in said
    across = "--nnodes 3 --node-rank 2 --master-addr host0 --master-port 29500 --nproc-per-node 2"
    for command, script in (("4b", "train.py"), ("35b", "pipeline_train.py")):
        expected = f"2: -m loop.distributed.launch {across} {script} --config configs/{command}.yaml train.seed=1"
        assert launch(checkout, command, "train.seed=1", NODE_RANK="2", **hosts)[:2] == (0, expected)
        assert launch(checkout, command, "train.seed=1", SLURM_NODEID="2", **hosts)[:2] == (0, expected)
    program(checkout / "data/processed/train.jsonl", "")
    started = "0: -m loop.distributed.launch --nproc-per-node 2 train.py --config configs/4b.yaml"
    assert launch(checkout, "4b", "data.eval=0.1")[:2] == (0, f"{started} data.eval=0.1")
    program(checkout / "data/processed/eval.jsonl", "")
    assert launch(checkout, "4b")[:2] == (0, started)
    assert launch(checkout, "35b")[:2] == (0, "0: pipeline_train.py --config configs/35b.yaml")


def test_the_35b_says_whether_there_is_a_go_for_the_4b_and_goes_on(checkout):
    for split in ("train", "eval"):
        program(checkout / f"data/processed/{split}.jsonl", "")
    program(checkout / ".venv/bin/python", 'echo "$*" >> calls; [[ $* != *review.seal* ]]')  # as if it could not be read
    asked = "-m loop.review.seal checkpoints/chess-tutor-4b-poc"
    status, last, _ = launch(checkout, "35b")
    assert status == 0 and last == "pipeline_train.py --config configs/35b.yaml"
    assert (checkout / "calls").read_text().splitlines().count(asked) == 1
    assert launch(checkout, "4b")[0] == 0 and asked not in (checkout / "calls").read_text()


def test_a_review_needs_a_run(checkout):
    status, _, said = launch(checkout, "review")
    assert status == 2 and "bash launch.sh review checkpoints/demo" in said
    program(checkout / ".venv/bin/python", 'echo "$*" >> calls')
    assert launch(checkout, "review", "checkpoints/demo", "--verify")[:2] == (0, "-m loop.review checkpoints/demo --verify")


@pytest.mark.parametrize("environment, wrong", [
    ({"NNODES": "two"}, "NNODES is 'two'"), ({"NNODES": "2", "HEAD": "host0:1"}, "NODE_RANK is '' of 2 hosts"),
    ({"NNODES": "2", "NODE_RANK": "2", "HEAD": "host0:1"}, "NODE_RANK is '2' of 2 hosts"),
    ({"NNODES": "2", "NODE_RANK": "1", "HEAD": "host0"}, "HEAD is 'host0'"), ({"NNODES": "2", "NODE_RANK": "1"}, "HEAD is ''")])
def test_what_is_wrong_about_the_hosts_is_said_first(checkout, environment, wrong):
    status, _, said = launch(checkout, "4b", **environment)
    assert status == 2
    assert said.startswith(f"error: {wrong}, expected NNODES=2 NODE_RANK=0 HEAD=host0:29500") and said.count("\n") == 1


@pytest.mark.parametrize("told, ends, requeued", [(True, 143, True), (True, 0, False), (True, 2, False), (False, 1, False)])
def test_a_job_is_queued_again_if_the_signal_stopped_it(checkout, told, ends, requeued):
    """Slurm tells the batch shell; its step hears of it and takes a moment to save."""
    stop = "sleep 0.2; echo saved >> notes; exit" if told else "exit"
    program(checkout / "bin/srun", 'echo "$NNODES $HEAD $*" >> notes\n'
            f"trap '{stop} {ends}' TERM\ntouch started\n" + (f"[ {int(told)} = 1 ] || exit {ends}\n")
            + "for i in $(seq 600); do sleep 0.1; done")
    program(checkout / "bin/scontrol", '[ "$1" = show ] && printf "alpha\\nbeta\\n" || echo "scontrol $*" >> notes')
    environment = {"PATH": f"{checkout}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "40007", "SLURM_JOB_NODELIST": "alpha,beta",
                   "SLURM_JOB_NUM_NODES": "2"}
    command = ["bash", "configs/slurm.sbatch", "4b", "run=x"]
    job = subprocess.Popen(command, cwd=checkout, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (checkout / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        if told:
            job.send_signal(signal.SIGTERM)
        assert job.wait(60) == ends
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    expected = ["2 alpha:20007 --kill-on-bad-exit=0 bash launch.sh 4b run=x", *["saved"] * told,
                *["scontrol requeue 40007"] * requeued]
    assert (checkout / "notes").read_text().splitlines() == expected
