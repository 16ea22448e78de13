"""What a run keeps, in its directory and in each checkpoint, and that checkpoints are written while the loop goes on."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch

from data.chat import ChatFormat
from data.template import tokenizer_files
from loop import checkpoint
from loop.checkpoint import Saved
from loop.run import load_tokenizer
from loop.state import Writer
from tests.processes import ROOT

FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}


def test_a_run_and_its_checkpoints_have_the_files_that_were_trained_with(finished_run, tiny_llama):
    expected = tokenizer_files(ChatFormat(load_tokenizer(tiny_llama), "strip"))
    path = finished_run / "step-00000010"
    manifest = checkpoint.read_json(path / checkpoint.MANIFEST)
    assert expected.keys() == FILES < manifest.keys() == {file.name for file in path.iterdir()} - {checkpoint.MANIFEST}
    for name, content in expected.items():
        assert (finished_run / name).read_bytes() == (path / name).read_bytes() == content


def test_a_resumed_run_writes_only_what_has_changed_and_says_so(finished_run, write_config, run_train, tmp_path, capsys):
    run_dir = tmp_path / "checkpoints/tiny"
    shutil.copytree(finished_run, run_dir)
    shutil.rmtree(run_dir / "step-00000010")
    (run_dir / "chat_template.jinja").write_text("edited")
    (run_dir / "generation_config.json").unlink()
    before = (run_dir / "tokenizer.json").stat()
    run_train(write_config())
    assert capsys.readouterr().out.count(" is not what this run's model and settings make of it") == 1
    for name in FILES:
        assert (run_dir / name).read_bytes() == (finished_run / name).read_bytes()
    after = (run_dir / "tokenizer.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.slow
def test_a_checkpoint_of_an_older_version_is_resumed(write_config, run_train, tmp_path, capsys):
    """It holds adapters and states alone, and its manifest lists no more."""
    config = write_config(checkpoint__keep=9)
    whole = run_train(config)
    run_dir = tmp_path / "checkpoints/tiny"
    shutil.rmtree(run_dir / "step-00000010")
    manifest = checkpoint.read_json(run_dir / "step-00000008" / checkpoint.MANIFEST)
    for name in FILES:
        del manifest[name]
        (run_dir / "step-00000008" / name).unlink()
        (run_dir / name).unlink()
    (run_dir / "step-00000008" / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    capsys.readouterr()
    assert run_train(config) == whole
    assert "continuing from checkpoints/tiny/step-00000008" in capsys.readouterr().out
    assert FILES < {file.name for file in (run_dir / "step-00000010").iterdir()}


@pytest.fixture
def gate(monkeypatch):
    """Checkpoints are written when it is set."""
    gate, honest = threading.Event(), checkpoint.save

    def save(*arguments):
        assert gate.wait(60)
        return honest(*arguments)

    monkeypatch.setattr(checkpoint, "save", save)
    yield gate
    gate.set()


def saved(step):
    return Saved({"step": step, "eval_loss": 1.0, "settings": {}}, {"w": torch.full((4,), float(step))}, {},
                 {"w/exp_avg": torch.ones(4)})


def test_the_loop_goes_on_while_a_checkpoint_is_written_and_its_end_waits(
        write_config, run_train, read_metrics, tmp_path, gate, capsys):
    """The gate opens when step 10 of 10 is recorded: by then checkpoint 8, with what step 8 has made, waits to be written."""
    gate.set()
    whole = run_train(write_config(checkpoint__every=8, checkpoint__keep=9), run="whole")
    gate.clear()
    run_dir, seen = tmp_path / "checkpoints/beside", []

    def open_when_trained():
        while not (run_dir / "metrics.jsonl").exists() or '"step": 10, "epoch"' not in (run_dir / "metrics.jsonl").read_text():
            gate.wait(0.01)
        seen.extend(checkpoint.list_checkpoints(run_dir))
        gate.set()

    opener = threading.Thread(target=open_when_trained)
    opener.start()
    assert run_train(write_config(checkpoint__every=8, checkpoint__keep=9), run="beside") == whole
    opener.join()
    assert seen == []
    for name in ("step-00000008", "step-00000010"):
        for file in (checkpoint.ADAPTER, checkpoint.OPTIMIZER):
            assert (run_dir / name / file).read_bytes() == (tmp_path / "checkpoints/whole" / name / file).read_bytes()
    out = capsys.readouterr().out.splitlines()
    assert out.index("saved checkpoints/beside/step-00000010") < out.index("finished: checkpoints/beside")


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path, gate):
    writer, said = Writer(), []
    writer.write(tmp_path, saved(1), 9, said.append)
    writer.check()
    next_one = threading.Thread(target=writer.write, args=(tmp_path, saved(2), 9, said.append))
    next_one.start()
    next_one.join(0.2)
    assert next_one.is_alive() and said == []
    gate.set()
    next_one.join(60)
    assert writer.wait() == said[1] == f"saved {tmp_path / 'step-00000002'}"
    assert said[0] == f"saved {tmp_path / 'step-00000001'}"


def test_a_checkpoint_that_could_not_be_written_ends_the_run_at_the_next_chance(tmp_path):
    writer, before = Writer(), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        writer.write(tmp_path, saved(1), 9, print)
        with pytest.raises(ValueError, match="step-00000001: could not be written .*Make room and give the same command again"):
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    for chance in (writer.check, writer.wait, lambda: writer.write(tmp_path, saved(2), 9, print)):
        with pytest.raises(ValueError, match="could not be written"):
            chance()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("end, committed", [
    ("end_process(3, lambda: 'memory is full')", True), ("raise ValueError('rows')", True), ("os.kill(os.getpid(), 9)", False)])
def test_a_process_that_ends_finishes_its_checkpoint_unless_it_is_killed(tmp_path, end, committed):
    code = f"""
import os, sys, time
from pathlib import Path
from loop import checkpoint, state
from loop.errors import end_process, run_command
from tests.loop.test_state import saved
honest = checkpoint.save
checkpoint.save = lambda *arguments: (time.sleep(0.5), honest(*arguments))[1]

def main():
    state.Writer().write(Path(sys.argv[1]), saved(1), 9, print)
    {end}

run_command(main)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert (f"saved {tmp_path}" in done.stdout) == committed == (tmp_path / "step-00000001").exists(), done.stderr
