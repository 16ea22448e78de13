"""A checkpoint is there whole and verified, or it is not there."""

import json
import os

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
            patch.setattr(checkpoint.os if call == "fsync" else checkpoint, call, crash)
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
