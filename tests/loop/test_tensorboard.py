"""A run in TensorBoard: its own numbers, one curve whatever interrupted it, and no harm from a writer that fails."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from loop.tensorboard import NAMES


def curves(run_dir):
    """The points of every curve, in the order in which they were written."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_the_curves_are_those_of_metrics_jsonl_after_a_resume_too(write_config, run_train, tmp_path, monkeypatch):
    config = write_config(log_to="tensorboard", train__max_steps=6)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power"):
        patch.setattr("loop.fit.sync_and_clip", stopping(after=5))  # the checkpoint is of step 4
        run_train(config)
    run_train(config)
    run_dir = tmp_path / "checkpoints/tiny"
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = curves(run_dir)
    for name, key in {name: key for key, name in NAMES.items()}.items():  # of two keys the last, tensors_gib
        expected = [(record["step"], record[key]) for record in records if key in record]
        assert [step for step, _ in found[name]] == [step for step, _ in expected], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in expected])
    tokens = [record["tokens"] for record in records if "tokens" in record]
    assert [value for _, value in found["n_tokens_seen"]] == [sum(tokens[: i + 1]) for i in range(len(tokens))]
    assert found["validation_metrics/loss/book"] and found["validation_metrics/loss/game"]


def stopping(after):
    """`sync_and_clip` of the loop, which raises once so many steps are done."""
    from loop.optim import sync_and_clip

    calls = []

    def stop(*arguments):
        calls.append(1)
        if len(calls) > after:
            raise RuntimeError("power")
        return sync_and_clip(*arguments)

    return stop


def test_a_writer_that_fails_is_said_once_and_the_run_goes_on(write_config, run_train, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    lines = run_train(write_config(log_to="tensorboard", train__max_steps=3))
    assert lines[-1]["step"] == 3
    assert capsys.readouterr().out.count("nothing more is written for TensorBoard: OSError: [Errno 28] No space") == 1
