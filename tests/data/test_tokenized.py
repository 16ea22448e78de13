"""Counting, limits and the cache."""

import pytest

from data.audit import audit, coloured, table
from data.chat import ChatFormat
from data.config import DataConfig
from data.records import Dropped, Row, read_rows
from data.tokenized import ROWS_AT_ONCE, TokenizedRows, load_rows, tokenize


def config(path, **changes):
    return DataConfig(**{"train": path, "eval": path, "sources": ("textbook",), **changes})


@pytest.fixture
def tokenizer(tiny_tokenizers):
    return tiny_tokenizers["llama"]  # a byte a token


def test_counts_say_what_became_of_every_row(tokenizer, write_rows, make_row):
    rows = [make_row("a", "b"), make_row("a", "b", source="forum"), "{", make_row("a", "<think>x"), make_row("a", "x" * 300)]
    path = write_rows(rows)
    made = tokenize("train", tokenizer, config(path, bad_rows="skip", overlong="drop", max_tokens=200))
    textbook = made.counts["textbook"]
    assert (textbook.rows, textbook.kept, textbook.examples) == (3, 1, 1)
    assert textbook.dropped == {"unclosed <think>": 1, "over max_tokens": 1}
    assert made.counts["forum"].dropped == {"source not in data.sources": 1}
    assert made.counts["(unknown)"].dropped == {"not JSON": 1}
    assert textbook.supervised_tokens == int(made.supervised_N.sum()) == 2
    assert textbook.tokens == len(made.ids_N)


@pytest.mark.parametrize("line, row", [(2, "{"), (2, '{"metadata": {"source": "textbook"}}')])
def test_bad_rows_stop_with_file_and_line(tokenizer, write_rows, make_row, line, row):
    path = write_rows([make_row("a", "b"), row])
    with pytest.raises(ValueError, match=f"{path}:{line}: .*data.bad_rows=skip"):
        tokenize("train", tokenizer, config(path))


def test_batches_beside_each_other_give_what_one_row_at_a_time_gives(tokenizer, write_rows, make_row):
    """Ids, flags, lines and counts, in file order, over the ends of batches; some rows are unreadable or refused."""
    rows = ["{" if i % 50 == 7 else make_row(f"q{i}", "<|im_end|>" if i % 50 == 9 else "x" * (i % 23 + 1))
            for i in range(3 * ROWS_AT_ONCE + 5)]
    path = write_rows(rows)
    made, chat = tokenize("train", tokenizer, config(path, bad_rows="skip")), ChatFormat(tokenizer, "strip")
    expected = [chat.examples([row])[0] for row in read_rows(config(path), "train") if isinstance(row, Row)]
    examples = [example for row in expected if not isinstance(row, Dropped) for example in row]
    assert made.ids_N.tolist() == [number for example in examples for number in example.ids]
    assert made.supervised_N.tolist() == [flag for example in examples for flag in example.supervised]
    assert made.lines_E.tolist() == [example.row.line for example in examples]
    assert made.counts["textbook"].dropped == {"control token in text": sum(isinstance(row, Dropped) for row in expected)}
    assert made.counts["(unknown)"].dropped == {"not JSON": rows.count("{")}


def test_overlong_rows_are_all_named(tokenizer, write_rows, make_row):
    path = write_rows([make_row("a", "x" * 300), make_row("a", "b"), make_row("a", "x" * 400)])
    with pytest.raises(ValueError) as error:
        tokenize("train", tokenizer, config(path, max_tokens=200))
    assert f"2 rows of {path} cannot be trained on:\n{path}:1: over max_tokens: 3" in str(error.value)
    assert f"{path}:3: over max_tokens: 4" in str(error.value) and "data.overlong=drop" in str(error.value)


def test_all_bad_rows_are_named_at_once(tokenizer, write_rows, make_row):
    """One at a time took as many starts as there were bad rows."""
    path = write_rows([make_row("a", "b"), "{", make_row("a", "<think>x"), *["[]"] * 30, make_row("a", "x" * 300)])
    with pytest.raises(ValueError) as error:
        tokenize("train", tokenizer, config(path))
    first, *lines, last = str(error.value).splitlines()
    assert first == f"32 rows of {path} cannot be trained on:" and lines[0].startswith(f"{path}:2: not JSON: ")
    assert lines[1].startswith(f"{path}:3: unclosed <think>: ") and len(lines) == 21 and lines[20].startswith("and 12 more")
    assert "data.bad_rows=skip" in last
    left_out = tokenize("train", tokenizer, config(path, bad_rows="skip", overlong="drop", max_tokens=200)).problems
    assert [row.line for row in left_out] == [*range(2, 34), 34] and left_out[-1].reason == "over max_tokens"


def test_what_an_audit_cached_is_refused_by_a_run_and_kept(tokenizer, write_rows, make_row, tmp_path):
    path = write_rows([make_row("a", "b"), "{"])
    audited = load_rows("train", tokenizer, config(path, bad_rows="skip"), tmp_path)
    with pytest.raises(ValueError, match=f"{path}:2: not JSON"):
        load_rows("train", tokenizer, config(path), tmp_path)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    again = load_rows("train", tokenizer, config(path, bad_rows="skip"), tmp_path)
    assert again.problems == audited.problems and written == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


def test_truncation_keeps_what_fits_and_never_leaves_a_row_without_targets(tokenizer, write_rows, make_row):
    path = write_rows([make_row("a", "x" * 300), make_row("q" * 300, "short")])
    made = tokenize("train", tokenizer, config(path, overlong="truncate", max_tokens=200))
    counts = made.counts["textbook"]
    assert (counts.kept, counts.truncated, counts.dropped) == (1, 1, {"truncated before any answer": 1})
    assert made.lengths_E.tolist() == [200]
    report = audit({"train": made}, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert report["sources"]["textbook"]["answers_without_stop_token"] == 1


def test_no_row_left_says_what_was_found(tokenizer, write_rows, make_row):
    path = write_rows([make_row("a", "b", source="forum")])
    with pytest.raises(ValueError, match="no row is left.*sources is .textbook.*forum: 1 read, 1 source not in"):
        tokenize("train", tokenizer, config(path))


def test_the_cache_is_read_until_anything_that_matters_changes(tokenizer, write_rows, make_row, tmp_path, monkeypatch):
    path = write_rows([make_row("a", "<think>t</think>b")])
    cache = tmp_path / "cache"
    first = load_rows("train", tokenizer, config(path), cache)
    with monkeypatch.context() as patch:
        patch.setattr("data.tokenized.tokenize", lambda *_: pytest.fail("tokenized again"))
        again = load_rows("train", tokenizer, config(path), cache)
    assert again.path == path and again.ids_N.tolist() == first.ids_N.tolist() and again.counts == first.counts

    kept = load_rows("train", tokenizer, config(path, think="keep"), cache)
    assert kept.counts["textbook"].with_thought == 1
    (cached,) = cache.glob("train-*.safetensors")
    cached.write_bytes(cached.read_bytes()[:100])  # as a crash of the file system leaves it
    assert load_rows("train", tokenizer, config(path, think="keep"), cache).ids_N.tolist() == kept.ids_N.tolist()
    write_rows([make_row("a", "changed")])
    assert load_rows("train", tokenizer, config(path), cache).counts["textbook"].tokens != first.counts["textbook"].tokens


def test_tensors_carry_everything(tokenizer, write_rows, make_row):
    path = write_rows([make_row("a", "b"), make_row("a", "c", source="forum")])
    rows = tokenize("train", tokenizer, config(path))
    back = TokenizedRows.from_tensors(rows.to_tensors())
    assert back.counts == rows.counts and back.path == path and back.lines_E.tolist() == rows.lines_E.tolist()


def test_the_audit_shows_what_is_supervised(tokenizer, write_rows, make_row):
    path = write_rows([make_row("<b>&", "answer"), make_row("q", "other")])
    rows = tokenize("train", tokenizer, config(path))
    report = audit({"train": rows, "eval": rows}, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert report["sources"]["textbook"]["rows"] == 4 and report["splits"]["eval"]["textbook"]["rows"] == 2
    assert report["sources"]["textbook"]["supervised_tokens"] == 2 * (len("answer") + 1 + len("other") + 1)
    assert "every answer's stop token is supervised" in table(report)
    assert "\033[1;32manswer<|im_end|>\033[0m" in coloured(rows, 0, tokenizer)


def test_a_tokenizer_that_pads_or_truncates_does_neither_here(tokenizer, write_rows, make_row):
    path = write_rows([make_row("q" * 50, "short"), make_row("q", "a much longer answer")])
    plain = tokenize("train", tokenizer, config(path))
    tokenizer.backend_tokenizer.enable_padding(length=100)
    tokenizer.backend_tokenizer.enable_truncation(20)
    assert tokenize("train", tokenizer, config(path)).ids_N.tolist() == plain.ids_N.tolist()


def test_a_cache_that_cannot_be_written_is_named(tokenizer, write_rows, make_row, tmp_path):
    (tmp_path / "taken").write_text("")
    path = write_rows([make_row("a", "b")])
    with pytest.raises(ValueError, match="taken.*could not be written"):
        load_rows("train", tokenizer, config(path), tmp_path / "taken")


def test_what_a_killed_writer_left_is_cleared_also_when_the_cache_is_there(tokenizer, write_rows, make_row, tmp_path):
    path = write_rows([make_row("a", "b")])
    load_rows("train", tokenizer, config(path), tmp_path / "cache")
    (tmp_path / "cache/.train-x.safetensors.partial").mkdir()
    load_rows("train", tokenizer, config(path), tmp_path / "cache")
    assert [p.name[:6] for p in (tmp_path / "cache").iterdir()] == ["train-"]
