"""What the model wrote before and after, from the files of a run alone."""

import sys

from loop.review import samples


def test_before_after_and_reference_are_shown(write_config, run_train, tmp_path, monkeypatch, capsys):
    run_train(write_config(train__epochs=4))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["samples", "checkpoints/tiny", "--rows", "2", "--max-tokens", "24"])
    samples.main()
    shown = capsys.readouterr().out
    assert shown.count("before:") == shown.count("after:") == shown.count("reference:") == 2
    before, after = (shown.split(f"{word}:\n")[1].split("\n\n")[0] for word in ("before", "after"))
    assert before != after
    assert "eval.jsonl:1" in shown and "eval.jsonl:7" in shown
