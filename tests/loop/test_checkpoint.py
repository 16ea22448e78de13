"""A checkpoint is there whole and verified, or it is not there."""

import json
import os
import re
import shutil
import stat

import pytest
import torch

from loop import checkpoint
from loop.checkpoint import Saved


def saved(step, eval_loss=1.0):
    return Saved({"step": step, "eval_loss": eval_loss, "settings": {}}, {"w": torch.full((4,), float(step))}, {"r": 4},
                 {"w/exp_avg": torch.ones(4), "w/step": torch.tensor(3.0)})


def steps(run_dir):
    return [int(path.name[5:]) for path in checkpoint.list_checkpoints(run_dir)]


def test_what_was_just_saved_stays_whatever_stood_in_its_way(tmp_path):
    checkpoint.save(tmp_path, saved(20, 2.0), keep=2)
    damaged = checkpoint.save(tmp_path, saved(40, 1.9), keep=2)
    (damaged / checkpoint.STATE).write_text("{")
    assert checkpoint.newest(tmp_path, lambda _: None).name == "step-00000020"
    assert (tmp_path / ".step-00000040.damaged").is_dir(), "kept, but out of the way"
    assert checkpoint.save(tmp_path, saved(30, 2.5), keep=2).is_dir()
    assert steps(tmp_path) == [20, 30]


def test_a_full_disk_is_said_in_a_line(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, saved(1), keep=2)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ValueError, match="step-00000002: could not be written.*No space left.*GB are free.*same command"):
        checkpoint.save(tmp_path, saved(2), keep=2)
    assert steps(tmp_path) == [1] and [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_what_is_saved_is_loaded(tmp_path):
    path = checkpoint.save(tmp_path, saved(7), keep=3)
    assert checkpoint.verify(path) is None and checkpoint.newest(tmp_path) == path
    back = checkpoint.load(path)
    assert back.state["step"] == 7 and back.adapter_config == {"r": 4}
    assert torch.equal(back.adapter["w"], torch.full((4,), 7.0)) and back.optimizer["w/step"] == 3
    assert sorted(os.listdir(path)) == [
        "adapter_config.json", "adapter_model.safetensors", "manifest.json", "optimizer.safetensors", "state.json",
    ]


def test_rotation_keeps_the_best_by_loss_and_the_newest_by_step(tmp_path):
    for step, loss in ((1, 0.5), (2, 0.9), (3, 0.4), (4, 0.8), (5, 0.7)):
        path = checkpoint.save(tmp_path, saved(step, loss), keep=2)
        os.utime(path, (10 - step, 10 - step))  # the clock says the opposite
    assert steps(tmp_path) == [1, 3, 5]
    assert checkpoint.best(tmp_path).name == "step-00000003"
    checkpoint.save(tmp_path, saved(6, float("nan")), keep=2)
    assert steps(tmp_path) == [1, 3, 6], "a loss that is no number is never among the best"
    checkpoint.save(tmp_path, saved(7, 0.1), keep=2)
    assert steps(tmp_path) == [3, 7] and checkpoint.best(tmp_path).name == "step-00000007"


@pytest.mark.parametrize("name", [checkpoint.ADAPTER, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, name, damage):
    good = checkpoint.save(tmp_path, saved(1), keep=3)
    file = checkpoint.save(tmp_path, saved(2), keep=3) / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    warnings = []
    assert checkpoint.newest(tmp_path, warnings.append) == good
    assert len(warnings) == 1 and "step-00000002" in warnings[0]


@pytest.mark.parametrize("call", ["rename", "fsync", "save_file"])
def test_a_crash_while_saving_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, call):
    good = checkpoint.save(tmp_path, saved(1), keep=3)

    def crash(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if call == "rename":
            patch.setattr(type(tmp_path), "rename", crash)
        else:
            patch.setattr(os if call == "fsync" else checkpoint, call, crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, saved(2), keep=3)
    assert steps(tmp_path) == [1] and checkpoint.newest(tmp_path) == good
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "what was left half done is cleared"
    assert checkpoint.save(tmp_path, saved(2), keep=3).name == "step-00000002"


def test_the_manifest_holds_sizes_and_hashes_of_all_other_files(tmp_path):
    path = checkpoint.save(tmp_path, saved(1), keep=1)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    assert manifest.keys() == {p.name for p in path.iterdir()} - {checkpoint.MANIFEST}
    assert all(len(entry["sha256"]) == 64 and entry["size"] > 0 for entry in manifest.values())


def rewrite(path, name, content):
    """Changes a file of a checkpoint, and its manifest with it: damage that no checksum shows."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest[name] = {"size": len(content), "sha256": checkpoint.sha256(path / name)}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def state(**changes):
    return json.dumps({"version": 1, "step": 2, "eval_loss": 1.0, "settings": {}} | changes).encode()


@pytest.mark.parametrize("content, said", [
    (state(settings=None), "settings is None"), (b'{"step": 2}', "settings is None"), (state(step="2"), "step is '2'"),
    (state(step=-1), "step is -1"), (state(step=True), "step is True"), (state(step=7), "step is 7.*a copy of another"),
    (state(eval_loss="low"), "eval_loss is low"), (b"[]", "found list"), (b"[" * 100_000, "not readable JSON"),
    (b'{"step": ' + b"2" * 10_000 + b"}", "not readable JSON"), (b"\xff", "not readable JSON"),
], ids=range(11))
def test_a_state_that_is_none_is_passed_over_and_named(tmp_path, content, said):
    """Found: tracebacks, a run that began at step "2", and one that was finished without training, by a step 7 in step 2."""
    good = checkpoint.save(tmp_path, saved(1), keep=3)
    rewrite(checkpoint.save(tmp_path, saved(2), keep=3), checkpoint.STATE, content)
    warnings = []
    assert checkpoint.newest(tmp_path, warnings.append) == good
    (warning,) = warnings
    assert re.search(f"step-00000002.*state.json: .*{said}", warning), warning


@pytest.mark.parametrize("content, said", [
    ("[" * 100_000, "not readable JSON"), ('{"../x": {"size": 1, "sha256": ""}}', "does not list"), ("[1]", "found list"),
    ('{"state.json": 1}', "does not list"),
])
def test_a_manifest_that_is_none_is_passed_over_and_named(tmp_path, content, said):
    good = checkpoint.save(tmp_path, saved(1), keep=3)
    (checkpoint.save(tmp_path, saved(2), keep=3) / checkpoint.MANIFEST).write_text(content)
    warnings = []
    assert checkpoint.newest(tmp_path, warnings.append) == good and said in warnings[0]


@pytest.mark.parametrize("entry", [{"/etc/passwd": {"size": 1, "sha256": ""}}, {"x": {"size": 1}}, {"x": 7}])
def test_a_manifest_names_files_of_its_own_directory(tmp_path, entry):
    path = checkpoint.save(tmp_path, saved(2), keep=3)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    (path / checkpoint.MANIFEST).write_text(json.dumps(entry | manifest))
    assert "expected a file name and its" in checkpoint.verify(path)


def test_a_pipe_in_a_checkpoint_is_not_waited_for(tmp_path):
    path = checkpoint.save(tmp_path, saved(2), keep=3)
    (path / checkpoint.OPTIMIZER).unlink()
    os.mkfifo(path / checkpoint.OPTIMIZER)
    assert "not a regular file" in checkpoint.verify(path)
    (path / checkpoint.MANIFEST).unlink()
    os.mkfifo(path / checkpoint.MANIFEST)
    assert "not a regular file" in checkpoint.verify(path)


def test_a_copy_under_another_name_is_no_checkpoint(tmp_path):
    path = checkpoint.save(tmp_path, saved(2), keep=3)
    shutil.copytree(path, tmp_path / "step-00000099")
    warnings = []
    assert checkpoint.newest(tmp_path, warnings.append) == path and "is this a copy of another checkpoint?" in warnings[0]


def test_a_file_in_a_checkpoints_place_is_moved_aside(tmp_path):
    """Found: "could not be written, make room"."""
    (tmp_path / "step-00000002").write_text("notes")
    assert checkpoint.verify(checkpoint.save(tmp_path, saved(2), keep=3)) is None
    assert (tmp_path / ".step-00000002.damaged").read_text() == "notes"


def test_a_newer_version_is_not_taken_for_damage(tmp_path):
    path = checkpoint.save(tmp_path, saved(2), keep=3)
    rewrite(path, checkpoint.STATE, state(version=2))
    with pytest.raises(ValueError, match="version 2, written by a newer version of this program"):
        checkpoint.newest(tmp_path)
    assert path.is_dir()


def test_a_checkpoint_that_is_evaluated_later_takes_the_place_of_itself(tmp_path, monkeypatch):
    """Whichever of the two renames is the last, one of both is found."""
    checkpoint.save(tmp_path, saved(1, 0.5), keep=1)
    checkpoint.save(tmp_path, saved(2, None), keep=1)
    assert steps(tmp_path) == [1, 2]
    honest, num_renames = type(tmp_path).rename, []

    def rename(self, target):
        num_renames.append(target)
        if len(num_renames) == 2:
            raise KeyboardInterrupt
        return honest(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, saved(2, 0.4), keep=1)
    assert steps(tmp_path) == [1]
    assert checkpoint.load(checkpoint.newest(tmp_path)).state["eval_loss"] == 0.4
    assert steps(tmp_path) == [1, 2] and not list(tmp_path.glob(".*"))
    checkpoint.save(tmp_path, saved(3, None), keep=1)
    assert steps(tmp_path) == [2, 3], "the best and the newest"


def test_others_may_read_a_checkpoint_as_the_umask_says(tmp_path):
    """Found: adapter_model.safetensors was the owner's alone, and a server's user could not read it."""
    before = os.umask(0o022)
    try:
        path = checkpoint.save(tmp_path, saved(1), keep=1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o644}
