"""Runs over several hosts: network namespaces on this machine, of which host0 alone has the rows and writes checkpoints."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from model.tiny.write import write_tiny
from tests import conftest, processes
from tests.hosts import Hosts, run_on_host, why_not

ROOT = Path(__file__).parents[1]
PORT = "29500"
WITHOUT_HOSTS = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WITHOUT_HOSTS), reason=WITHOUT_HOSTS)]


class Cluster(Hosts):
    """Two hosts, each with a configuration, and the processes that were started on them.

    Args:
        number: of hosts.
        root: an empty directory.
        rows: directory of the rows, which host0 gets.
        settings: of the configuration on all hosts.
    """

    def __init__(self, number, root, rows, settings):
        super().__init__(number, root)
        self.started = []
        shutil.copytree(rows, root / "host0/rows")
        for host in range(number):
            self.configure(host, settings)

    def configure(self, host, settings):
        (self.root / f"host{host}/config.yaml").write_text(yaml.safe_dump(settings))

    def rank(self, host, rank, world_size, *arguments, script=ROOT / "train.py", local_rank=0):
        """Starts one rank without a launcher; ranks alone then find each other."""
        launched = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "host0",
                    "MASTER_PORT": PORT}
        environment = processes.ENVIRONMENT | {name: str(value) for name, value in launched.items() if world_size > 1}
        directory = self.root / f"host{host}"
        files = [str(directory / f"rank{rank}.{kind}") for kind in ("out", "err")]
        arguments = ["--config", "config.yaml", *map(str, arguments)]
        process = processes.FORKS.Process(target=run_on_host, daemon=True, args=(
            self.place(host), str(directory), processes.run_script, str(script), arguments, environment, str(directory), files))
        with patch.dict(os.environ, processes.ENVIRONMENT):  # the server that the first process starts keeps it
            process.start()
        self.started.append(process)
        return process

    def launch(self, host, launcher, *arguments):
        """Starts a launcher on one host by its literal command."""
        directory = self.root / f"host{host}"
        environment = os.environ | processes.ENVIRONMENT | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        with open(directory / "launcher.out", "a") as out, open(directory / "launcher.err", "a") as err:
            process = subprocess.Popen(self.command(host, sys.executable, "-m", launcher, *arguments), stdout=out, stderr=err,
                                       cwd=directory, env=environment, start_new_session=True)
        self.started.append(process)
        return process

    def said(self, host, name):
        path = self.root / f"host{host}/{name}"
        return path.read_text() if path.exists() else ""

    def everything(self):
        return "\n".join(f"{path}:\n{path.read_text()}" for path in sorted(self.root.glob("host*/*.[oe]*[rt]")))

    def wait(self, *started, seconds=240):
        """The exit status of each."""
        deadline = time.monotonic() + seconds
        while any(status(process) is None for process in started):
            assert time.monotonic() < deadline, f"still running after {seconds} s: {self.everything()}"
            time.sleep(0.02)
        return [status(process) for process in started]

    def until(self, condition, seconds=240):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain: {self.everything()}"
            time.sleep(0.02)

    def metrics(self, run):
        """What steps and evaluations found."""
        lines = conftest.metrics(self.root / "host0/checkpoints" / run)
        kept = ("step", "loss", "lr", "grad_norm", "eval_loss", "rows", "supervised_tokens")
        return [{key: line[key] for key in kept if key in line} for line in lines if line.keys() & {"loss", "eval_loss"}]

    def assert_same(self, run, expected="alone"):
        ours, theirs = self.metrics(run), self.metrics(expected)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs], self.everything()
        for mine, other in zip(ours, theirs):
            assert mine == pytest.approx(other, rel=1e-5)

    def only_host0_wrote(self):
        assert not list(self.root.glob("host[1-9]/checkpoints")) and not list(self.root.glob("host[1-9]/rows"))

    def close(self):
        for process in getattr(self, "started", []):
            if status(process) is None:
                if isinstance(process, subprocess.Popen):
                    process.send_signal(signal.SIGTERM)
                    try:
                        process.wait(20)
                    except subprocess.TimeoutExpired:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
                else:
                    process.kill()
                    process.join()
        super().close()


def status(process):
    return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode


@pytest.fixture
def cluster(tiny_llama, tiny_rows, tmp_path):
    """Makes hosts for a run of 5 steps."""
    made = []

    def make(number=2, **changes):
        changes = {"train__epochs": 1, "distributed": {"timeout_s": 60}, **changes}
        settings = conftest.tiny_settings(tiny_llama, Path("rows"), "train.log", changes)
        made.append(Cluster(number, tmp_path, tiny_rows, settings))
        made[0].settings = settings
        return made[0]

    yield make
    for hosts in made:
        hosts.close()


@pytest.fixture(scope="module")
def tiny_35b(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "35b", layout="fp8", num_hidden_layers=4)


def test_the_launchers_find_each_other_by_torchruns_rendezvous(cluster):
    hosts = cluster()
    alone = hosts.rank(0, 0, 1, "run=alone")
    command = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"host0:{PORT}",
               ROOT / "train.py", "--config", "config.yaml"]
    both = [hosts.launch(host, "torch.distributed.run", *command) for host in (0, 1)]
    assert hosts.wait(alone, *both) == [0, 0, 0], hosts.everything()
    assert "2 rank(s) on cpu" in hosts.said(0, "launcher.out")
    hosts.assert_same("tiny")
    hosts.only_host0_wrote()


def test_a_model_is_split_over_two_hosts_whose_link_is_slow(cluster, tiny_35b):
    """25 ms each way, what `tc netem delay 50ms` on one side adds to an answer: the same losses, later."""
    hosts = cluster(model__path=str(tiny_35b), train__max_steps=2, lora__target=["q_proj", "out_proj", "gate_proj"])
    alone = hosts.rank(0, 0, 1, "run=alone")
    hosts.delay_s = 0.025
    script = ROOT / "pipeline_train.py"
    both = [hosts.rank(host, host, 2, "--split", "3", script=script) for host in (0, 1)]
    assert hosts.wait(alone, *both) == [0, 0, 0], hosts.everything()
    hosts.assert_same("tiny")
    hosts.only_host0_wrote()
    steps = [[line["step_s"] for line in map(json.loads, (hosts.root / f"host0/checkpoints/{run}/metrics.jsonl").open())
              if "step_s" in line] for run in ("alone", "tiny")]
    assert min(steps[1]) > 0.1, "an output and a gradient and sums cross the link in turn"


def test_two_replicas_of_two_stages_on_two_hosts(cluster, tiny_35b):
    hosts = cluster(model__path=str(tiny_35b), train__max_steps=2, lora__target=["q_proj", "out_proj", "gate_proj"])
    alone = hosts.rank(0, 0, 1, "run=alone")
    four = [hosts.rank(rank // 2, rank, 4, "--split", "3", script=ROOT / "pipeline_train.py", local_rank=rank % 2)
            for rank in range(4)]
    assert hosts.wait(alone, *four) == [0] * 5, hosts.everything()
    assert "4 rank(s)" in hosts.said(0, "rank0.out")
    hosts.assert_same("tiny")
    hosts.only_host0_wrote()


def test_a_late_host_is_named_and_a_cut_link_ends_both_sides_in_time(cluster):
    """By the README's command. In mid-training the link is cut: both sides end, each naming the other, and only host0 wrote.
    The run then resumes as if nothing had been."""
    timeout_s = 24
    hosts = cluster(train__max_steps=24, checkpoint__every=3, distributed={"timeout_s": timeout_s})
    alone = hosts.rank(0, 0, 1, "run=alone")
    command = "--nnodes 2 --node-rank 0 --master-addr host0 --master-port 29500 --nproc-per-node 1"
    readme = (ROOT / "README.md").read_text()
    assert f"python -m loop.distributed.launch {command} train.py --config configs/4b.yaml\n" in readme
    script = [ROOT / "train.py", "--config", "config.yaml"]
    first = hosts.launch(0, "loop.distributed.launch", *command.split(), *script)
    hosts.until(lambda: "waiting for rank 1 of 2 (signed in: rank 0 on host0)\n" in hosts.said(0, "launcher.out"))
    hosts.delay_s = 0.03  # so that steps take long enough to be cut
    command = command.replace("--node-rank 0", "--node-rank 1")
    second = hosts.launch(1, "loop.distributed.launch", *command.split(), *script)
    hosts.until(lambda: (hosts.root / "host0/checkpoints/tiny/step-00000003").is_dir())
    hosts.cut(1)
    cut = time.monotonic()
    assert hosts.wait(alone, first, second) == [0, 1, 1], hosts.everything()
    assert time.monotonic() - cut < timeout_s, "the launchers too"
    for rank in (0, 1):
        line = (f"error: rank {rank} on host{rank} waited for rank {1 - rank} on host{1 - rank} to join in a sum: "
                r"no answer in 14 s \(see distributed.timeout_s\)")
        assert re.search(line, hosts.said(rank, "launcher.err")), hosts.everything()
        assert "Traceback" not in hosts.said(rank, "launcher.err")
    hosts.only_host0_wrote()
    assert max(line["step"] for line in hosts.metrics("tiny")) < 24

    hosts.join(1)
    hosts.delay_s = 0
    assert hosts.wait(*(hosts.rank(rank, rank, 2) for rank in (0, 1))) == [0, 0], hosts.everything()
    assert "continuing from checkpoints/tiny/step-" in hosts.said(0, "rank0.out")
    hosts.assert_same("tiny")


def test_a_signal_to_one_host_saves_on_the_first_and_stops_all(cluster):
    """As when a batch system takes a host away."""
    hosts = cluster(train__max_steps=5000, eval__every=5000, checkpoint__every=5000)
    both = [hosts.rank(rank, rank, 2) for rank in (0, 1)]
    hosts.until(lambda: '"step": 3' in hosts.said(0, "checkpoints/tiny/metrics.jsonl"))
    both[1].terminate()
    assert hosts.wait(*both) == [143, 143], hosts.everything()
    said = hosts.said(0, "rank0.out") + hosts.said(0, "rank0.err")
    (saved,) = re.findall(r"stopped by SIGTERM on rank 1 on host1: saved checkpoints/tiny/step-(\d{8})", said)
    assert [path.name for path in hosts.root.glob("host0/checkpoints/tiny/step-*")] == [f"step-{saved}"]
    assert max(line["step"] for line in hosts.metrics("tiny")) == int(saved) >= 3
    hosts.only_host0_wrote()


def test_a_host_that_never_joins_is_missed_on_every_other(cluster):
    hosts = cluster(number=3, distributed={"timeout_s": 20})
    started = time.monotonic()
    two = [hosts.rank(rank, rank, 4) for rank in (0, 2)]
    assert hosts.wait(*two) == [1, 1], hosts.everything()
    assert time.monotonic() - started < 20 + 20, "and what the processes take to start"
    line = r"waited for ranks 1, 3 of 4 \(signed in: rank 0 on host0; rank 2 on host2\) to sign in: "
    assert re.search(f"error: rank 0 {line}no answer in 10 s", hosts.said(0, "rank0.err")), hosts.everything()
    assert re.search(f"error: rank 2 {line}(no answer in 10 s|the connection is gone)", hosts.said(2, "rank2.err"))
    assert not (hosts.root / "host0/checkpoints").exists()


def test_a_head_that_never_comes_is_missed(cluster):
    hosts = cluster(distributed={"timeout_s": 12})
    assert hosts.wait(hosts.rank(1, 1, 2)) == [1]
    assert hosts.said(1, "rank1.out") == f"waiting for rank 0's host to open port {PORT} at host0\n"
    assert (f"error: rank 1 waited for rank 0's host to open port {PORT} at host0: no answer in 6 s"
            in hosts.said(1, "rank1.err")), hosts.everything()


@pytest.mark.parametrize("differs", ["code", "configuration"])
def test_a_host_that_differs_is_found_before_training(cluster, differs, edited_copy, tmp_path):
    hosts = cluster()
    script = ROOT / "train.py"
    if differs == "code":
        script = edited_copy({"loop/optim.py": [("import math\n", "import math  # mended here alone\n")]}) / "train.py"
        shutil.copy(ROOT / "pipeline_train.py", script.parent)
        message = (r"rank 1 on host1 has other code than rank 0 on host0: loop/optim.py \(\w+, on rank 0 \w+\)\. "
                   "Bring all hosts to the same commit, without local changes")
    else:
        changed = hosts.settings | {"log": "other.log", "train": hosts.settings["train"] | {"learning_rate": 0.02}}
        changed["data"] = hosts.settings["data"] | {"train": "nowhere.jsonl"}  # read on rank 0 alone
        hosts.configure(1, changed)
        message = ("rank 1 on host1 has other settings than rank 0 on host0: "
                   r"train.learning_rate \(0.02, on rank 0 0.01\)\. Give all hosts the same file and arguments")
    both = [hosts.rank(0, 0, 2), hosts.rank(1, 1, 2, script=script)]
    assert hosts.wait(*both) == [2, 2], hosts.everything()
    for rank in (0, 1):  # on both hosts, since each may have its own console
        errors = [line for line in hosts.said(rank, f"rank{rank}.err").splitlines() if not line.startswith("[W")]
        assert len(errors) == 1 and re.fullmatch(f"error: {message}", errors[0]), errors
    assert not list(hosts.root.glob("host*/checkpoints"))
