"""The rows of a step, whatever the number of replicas; whole streams; resuming."""

import pytest
import torch

from data.batches import Batches
from data.config import DataConfig
from data.tokenized import tokenize


@pytest.fixture(scope="module")
def rows(tiny_tokenizers, tmp_path_factory):
    import json

    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    turns = [["q" * (i % 7 + 1), "a" * (i % 11 + 1)] + (["more", "b" * (i % 3 + 1)] if i % 5 == 0 else []) for i in range(50)]
    path.write_text("".join(
        json.dumps({"messages": [{"role": ("user", "assistant")[j % 2], "content": c} for j, c in enumerate(turn)],
                    "metadata": {"source": ("x", "y")[i % 2]}}) + "\n"
        for i, turn in enumerate(turns)
    ))
    # qwen3 renders history otherwise than the last turn, so that some rows become two examples
    return tokenize("train", tiny_tokenizers["qwen3"], DataConfig(str(path), str(path), ("x", "y")))


def lines(batch):
    return sorted(line for slot in batch.lines_by_slot for line in slot)


def test_an_epoch_sees_every_row_once_and_each_epoch_its_own_order(rows):
    batches = Batches(rows, 8, 1024)
    assert batches.num_rows == 50 and len(rows) == 60 and batches.steps_per_epoch == 7
    epochs = [[lines(b) for b in batches.train_steps(7 * e, 7 * (e + 1), seed=3)] for e in range(2)]
    for epoch in epochs:
        assert sorted(line for step in epoch for line in step) == list(range(1, 51))
    assert epochs[0] != epochs[1]


def test_resuming_continues_with_the_same_rows(rows):
    batches = Batches(rows, 8, 1024)
    whole = [lines(b) for b in batches.train_steps(0, 14, seed=3)]
    assert [lines(b) for b in batches.train_steps(5, 14, seed=3)] == whole[5:]


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_replicas_split_the_rows_that_one_would_see(rows, num_replicas):
    alone = Batches(rows, 8, 512)
    shares = [Batches(rows, 8, 512, replica, num_replicas) for replica in range(num_replicas)]
    for whole, *parts in zip(alone.train_steps(0, 7, 1), *(share.train_steps(0, 7, 1) for share in shares)):
        assert all(lines(part) == lines(whole) for part in parts)
        dealt = [line for part in parts for microbatch in part.microbatches for line in microbatch.lines]
        assert sorted(set(dealt)) == lines(whole)
        assert len({part.length for part in parts}) == 1, "one shape a step"
        assert [slot for part in parts for slot in part.slots] == list(range(len(parts[0].lines_by_slot)))
        assert {p.num_supervised_tokens for p in parts} == {whole.num_supervised_tokens}
        supervised = sum(len(m.labels_N) for part in parts for m in part.microbatches)
        assert supervised == whole.num_supervised_tokens


def test_a_microbatch_is_its_rows_end_to_end(rows):
    (batch,) = list(Batches(rows, 6, 1024).eval_steps(6))
    for microbatch in batch.microbatches:
        assert len(microbatch.ids_T) == sum(microbatch.lengths) == batch.length == microbatch.cu_seqlens_R1[-1]
        for start, stop in zip(microbatch.cu_seqlens_R1[:-1], microbatch.cu_seqlens_R1[1:]):
            assert microbatch.positions_T[start:stop].tolist() == list(range(stop - start))
        assert microbatch.num_tokens == sum(microbatch.lengths[: len(microbatch.lines)])
        assert torch.equal(microbatch.ids_T[microbatch.predict_N + 1], microbatch.labels_N)
        ends = microbatch.cu_seqlens_R1[1:] - 1
        assert not set(microbatch.predict_N.tolist()) & set(ends.tolist()), "no row predicts the next row's first token"


def test_eval_reads_the_first_rows_in_file_order(rows):
    seen = [line for batch in Batches(rows, 8, 1024).eval_steps(20) for line in lines(batch)]
    assert seen == list(range(1, 21))


def test_a_row_that_no_microbatch_holds_is_named(rows):
    with pytest.raises(ValueError, match=r"rows.jsonl:\d+: \d+ tokens do not fit into train.microbatch_tokens=20"):
        Batches(rows, 8, 20)
