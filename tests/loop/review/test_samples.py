"""What the model wrote before and after, from the files of a run alone."""

import sys

import pytest

from loop.review import samples


def test_before_after_and_reference_are_shown(write_config, run_train, tmp_path, monkeypatch, capsys):
    run_train(write_config(train__epochs=4), "eval.samples=2")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["samples", "checkpoints/tiny"])
    samples.main()
    shown = capsys.readouterr().out
    assert shown.count("before:") == shown.count("after:") == shown.count("reference:\n    It eyes") == 2
    before, after = (shown.split(f"{word}:\n")[1].split("\n\n")[0] for word in ("before", "after"))
    assert before != after
    assert "held-out line 1\n" in shown and "held-out line 7\n" in shown and "at step 0 and at step" in shown
    question = shown.split("held-out line 1\n")[1].split("before:")[0]
    assert "Knight to" in question and "<|im_" not in question


def test_a_run_without_answers_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["samples", str(tmp_path)])
    with pytest.raises(ValueError, match="samples.jsonl: no answers there"):
        samples.main()
