"""The audit's numbers, by hand."""

import numpy as np
import pytest
import torch

from data.audit import MAX_BARS, MAX_TEXT, fullness, histogram, untrainable
from data.config import DataConfig
from data.tokenized import SourceCounts, TokenizedRows, tokenize


def rows_of(lengths):
    """A row of one example for each length."""
    starts_E1 = torch.tensor([0, *lengths]).cumsum(0)
    ids_N, each_E = torch.zeros(sum(lengths), dtype=torch.int32), torch.arange(len(lengths), dtype=torch.int32)
    return TokenizedRows("rows.jsonl", ids_N, torch.ones_like(ids_N, dtype=torch.uint8), starts_E1, each_E + 1,
                         torch.zeros_like(each_E), ["a"], {"a": SourceCounts()})


def test_a_histogram_counts_every_example_in_bars_of_a_round_width():
    assert histogram(np.array([1, 1, 3])) == {"width": 1, "examples": [2, 0, 1]}
    assert histogram(np.array([40])) == {"width": 1, "examples": [0] * 39 + [1]}
    assert histogram(np.array([1, 100, 101, 4000])) == {"width": 100, "examples": [2, 1] + [0] * 37 + [1]}
    assert histogram(np.array([4001]))["width"] == 200
    for longest in (40, 100, 1730, 8192, 262_144):
        found = histogram(np.arange(1, longest + 1))
        assert sum(found["examples"]) == longest and len(found["examples"]) <= MAX_BARS
        assert set(found["examples"][:-1]) == {found["width"]}


def test_fullness_counts_padding_and_microbatches_of_an_epoch():
    found = fullness(rows_of([128] * 8), rows_per_step=4, microbatch_tokens=256, seed=0)
    assert found == {"steps": 2, "steps_per_epoch": 2, "tokens_share": 1.0,
                     "microbatches_per_step": {"mean": 2.0, "least": 2, "most": 2}}
    found = fullness(rows_of([96, 96, 96, 96, 200]), rows_per_step=5, microbatch_tokens=256, seed=0)
    assert found["tokens_share"] == (4 * 96 + 200) / (3 * 256) and found["microbatches_per_step"]["mean"] == 3
    found = fullness(rows_of([100, 100, 100]), rows_per_step=2, microbatch_tokens=128, seed=0)
    assert found["tokens_share"] == 300 / 384 and found["microbatches_per_step"] == {"mean": 1.5, "least": 1, "most": 2}
    with pytest.raises(ValueError, match="rows.jsonl:2: 300 tokens do not fit into train.microbatch_tokens=256"):
        fullness(rows_of([10, 300]), 2, 256, 0)


def test_of_a_long_epoch_only_the_first_steps_are_packed(monkeypatch):
    monkeypatch.setattr("data.audit.MAX_STEPS", 3)
    found = fullness(rows_of([128] * 10), 1, 128, 0)
    assert (found["steps"], found["steps_per_epoch"]) == (3, 10)


def test_a_broken_row_is_shown_as_it_stands_in_its_file(tiny_tokenizers, write_rows, make_row):
    long = make_row("a", "word " * MAX_TEXT)
    path = write_rows(["{ <b>", make_row("a", "b"), "", long, "[\udcff]".encode("utf-8", "surrogateescape").decode("latin-1")])
    config = DataConfig(train=path, eval=path, sources=None, max_tokens=100, bad_rows="skip", overlong="drop")
    found = {row["line"]: row for row in untrainable(tokenize("train", tiny_tokenizers["qwen3"], config))}
    assert list(found) == [1, 4, 5] and found[1]["text"] == "{ <b>" and found[4]["reason"] == "over max_tokens"
    shown, mark = found[4]["text"][:MAX_TEXT], found[4]["text"][MAX_TEXT:]
    assert shown.startswith('{"messages"') and len(shown) == MAX_TEXT and mark == " ... (the rest is not shown)"
