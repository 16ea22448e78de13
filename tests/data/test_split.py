"""Rows that are held out of one file, and rows as others write them."""

import json
import random
import re

import pytest

from data.config import DataConfig
from data.records import Dropped, read_rows, read_split
from data.tokenized import tokenize


def config(path, **changes):
    return DataConfig(**{"train": path, "eval": "0.2", "sources": ("textbook",), **changes})


def asked(data, split):
    return [row.messages[0]["content"] for row in read_split(data, split)]


@pytest.fixture
def rows(make_row):
    return [make_row(f"question {i}", f"answer {i}") for i in range(300)]


def test_every_row_is_on_one_side_and_about_the_share_is_held_out(write_rows, rows):
    data = config(write_rows(rows))
    train, held_out = asked(data, "train"), asked(data, "eval")
    assert 40 <= len(held_out) <= 80 and sorted(train + held_out) == sorted(f"question {i}" for i in range(300))


def test_shuffling_and_adding_rows_moves_no_row(write_rows, rows, make_row):
    before = set(asked(config(write_rows(rows)), "eval"))
    more = rows + [make_row(f"another {i}", "answer") for i in range(100)]
    random.Random(0).shuffle(more)
    for record in more:  # what stands beside the messages does not count
        record["metadata"]["game"] = random.random()
    after = set(asked(config(write_rows(more)), "eval"))
    assert before <= after and not any(question.startswith("question") for question in after - before)


def test_equal_rows_are_never_on_both_sides(write_rows, rows):
    data = config(write_rows(rows + rows))
    assert not set(asked(data, "train")) & set(asked(data, "eval"))
    assert len(asked(data, "train")) + len(asked(data, "eval")) == 600


def test_a_number_holds_out_so_many(write_rows, rows, make_row):
    data = config(write_rows(rows), eval="25")
    before = asked(data, "eval")
    assert len(before) == 25 and len(asked(data, "train")) == 275
    after = asked(config(write_rows([*rows, *(make_row(f"another {i}", "a") for i in range(3))]), eval="25"), "eval")
    assert len(after) == 25 and len(set(before) - set(after)) <= 3
    with pytest.raises(ValueError, match="data.eval is 300, but .* has 300 rows that could be trained on"):
        asked(config(write_rows(rows), eval="300"), "eval")


def test_bad_rows_count_as_training_rows_once(write_rows, rows, tiny_tokenizers):
    data = config(write_rows([*rows, "{", "[]"]), bad_rows="skip")
    train, held_out = (tokenize(split, tiny_tokenizers["llama"], data) for split in ("train", "eval"))
    assert [row.line for row in train.problems] == [301, 302] and held_out.problems == []
    assert train.counts["textbook"].kept + held_out.counts["textbook"].kept == 300


@pytest.mark.parametrize("value", ["0", "1.5", "-3", "1e30"])
def test_what_is_neither_a_share_nor_a_number_is_said(value):
    with pytest.raises(ValueError, match="data.eval is .*, expected a file of held-out rows, or how many"):
        DataConfig("rows.jsonl", value, None)


# Rows as others write them


def conversations(row, **more):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[message["role"]], "value": message["content"]} for message in row["messages"]]
    return {"conversations": turns, **more}


def test_sharegpt_rows_give_the_same_ids_and_masks(write_rows, rows, tiny_tokenizers):
    system = {"role": "system", "content": "You are a coach."}
    plain = [{**row, "messages": [system, *row["messages"], *row["messages"]]} for row in rows[:5]]
    others = [conversations(row, metadata=row["metadata"], id=i) for i, row in enumerate(plain)]
    one, other = (tokenize("train", tiny_tokenizers["qwen3"], DataConfig(path, path, ("textbook",)))
                  for path in (write_rows(plain, "plain.jsonl"), write_rows(others, "others.jsonl")))
    assert one.ids_N.tolist() == other.ids_N.tolist() and one.supervised_N.tolist() == other.supervised_N.tolist()
    assert one.supervised_N.sum() > 0


def test_rows_without_a_source_are_taken_where_all_sources_are(write_rows, rows, tiny_tokenizers):
    path = write_rows([conversations(rows[0]), rows[1]])
    made = tokenize("train", tiny_tokenizers["llama"], DataConfig(path, path, None))
    assert made.sources == ["(none)", "textbook"] and made.counts["(none)"].kept == 1 and made.counts["textbook"].kept == 1
    refused = next(read_rows(DataConfig(path, path, ("textbook",)), "train"))
    assert isinstance(refused, Dropped) and "data.sources=null" in refused.detail


@pytest.mark.parametrize("row, found", [
    ({"prompt": "Why?", "completion": "So."}, "the row has prompt, completion; expected {.*messages.*role.*user.*content"),
    ({"text": "Why? So."}, "the row has text; expected {.*messages"),
    ({"conversations": []}, r"conversations is \[\]; expected {.*messages"),
    ({"conversations": [{"from": "tool", "value": "x"}]}, r"conversations\[0\].from is 'tool', expected one of human, gpt"),
    ({"conversations": [{"from": "human"}]}, r"conversations\[0\].value is None, expected a string"),
    ({"conversations": ["hello"]}, r"conversations\[0\] is hello"),
    ({"messages": "hello"}, "messages is hello; expected {"),
])
def test_other_shapes_are_told_what_is_expected(write_rows, row, found):

    path = write_rows([json.dumps(row)])
    (dropped,) = read_rows(DataConfig(path, path, None), "train")
    assert re.search(found, f"{dropped.reason}: {dropped.detail}"), dropped
