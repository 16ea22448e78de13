"""The audit's commands, as a user runs them."""

import json
import sys

import pytest

from loop import inspect


@pytest.fixture
def run_inspect(write_config, monkeypatch, capsys):
    def run(*arguments, **changes):
        monkeypatch.setattr(sys, "argv", ["inspect", "--config", str(write_config(**changes)), *arguments])
        inspect.main()
        return capsys.readouterr().out

    return run


def test_numbers_and_colour(run_inspect, tmp_path):
    shown = run_inspect("--rows", "2", "data.sources=book")
    assert "train / book: 20 rows read, 20 kept" in shown and "dropped 20: source not in data.sources" in shown
    assert "of the positions in microbatches hold tokens" in shown and "over an epoch's 3 steps" in shown
    assert shown.count("\033[1;32mIt eyes") == 2
    assert run_inspect().count("\033[1;32mIt eyes") == 3
    assert "\033" not in run_inspect("--html", str(tmp_path / "page.html")), "in the page alone"


def test_json_and_dump(run_inspect, tmp_path):
    dump = tmp_path / "dump.jsonl"
    report = json.loads(run_inspect("--json", "--dump", str(dump)))
    assert report["sources"]["book"]["rows"] == 26 and report["sources"]["book"]["dropped"] == {}
    assert {split: sum(found["examples"]) for split, found in report["lengths"].items()} == {"train": 40, "eval": 12}
    assert report["microbatches"]["steps"] == 5 and 0.5 < report["microbatches"]["tokens_share"] <= 1
    lines = [json.loads(line) for line in dump.read_text().splitlines()]
    numbered = [("train", i + 1) for i in range(40)] + [("eval", i + 1) for i in range(12)]
    assert [(line["split"], line["line"]) for line in lines] == numbered
    total = sum(counts["supervised_tokens"] for counts in report["sources"].values())
    assert sum(sum(line["supervised"]) for line in lines) == total
    assert all(len(line["ids"]) == len(line["supervised"]) and set(line["supervised"]) == {0, 1} for line in lines)


def test_every_bad_row_of_both_files_is_listed(run_inspect, tmp_path, write_rows, make_row):
    """A run refuses them; the audit goes on, so that all are seen at once."""
    train = write_rows([make_row("a", "b"), "{", "[]", make_row("a", "word " * 400)], "mine.jsonl")
    held_out = write_rows([make_row("a", "b"), make_row("a", "<think>")], "held-out.jsonl")
    data = [f"data.train={train}", f"data.eval={held_out}", "data.sources=textbook", "data.max_tokens=100"]
    shown = run_inspect("--rows", "0", *data)
    assert "3 train row(s) cannot be trained on, a run refuses them; data.bad_rows=skip and data.overlong=drop" in shown
    for found in (f"{train}:2: not JSON: ", f"{train}:3: not a JSON object: ", f"{train}:4: over max_tokens: ",
                  "1 eval row(s)", f"{held_out}:2: unclosed <think>: "):
        assert found in shown
    problems = json.loads(run_inspect("--json", *data))["problems"]
    assert [(row["line"], row["text"][:3]) for row in problems["train"]] == [(2, "{"), (3, "[]"), (4, '{"m')]
    assert problems["eval"][0]["reason"] == "unclosed <think>"
    shown = run_inspect("--rows", "0", *data, "data.bad_rows=skip", "data.overlong=drop")
    assert "3 train row(s) cannot be trained on, they are left out:" in shown


def test_a_microbatch_that_is_too_small_for_a_row_is_said_and_ends_nothing(run_inspect, write_rows, make_row):
    rows = write_rows([make_row("word " * 30, "b")])
    shown = run_inspect(f"data.train={rows}", f"data.eval={rows}", "data.sources=textbook", "train.microbatch_tokens=128")
    assert "tokens do not fit into train.microbatch_tokens=128. Raise it" in shown and "train / textbook: 1 rows" in shown


# The page in a browser

EVIL = "</script><script>document.title = 'owned'</script><!--<script> <b onclick=1>"


@pytest.fixture
def open_page(run_inspect, open_file, tmp_path):
    def opened(*arguments, width=1280):
        run_inspect("--html", str(tmp_path / "page.html"), *arguments)
        return open_file(tmp_path / "page.html", width)

    return opened


@pytest.mark.slow
def test_what_rows_hold_is_shown_as_text_and_runs_nowhere(open_page, write_rows, make_row):
    good = make_row(f"q {EVIL}", f"a {EVIL}", source=f"s {EVIL}")
    rows = write_rows([good, EVIL], "<i>mine.jsonl")
    data = [f"data.train={rows}", f"data.eval={write_rows([good])}", "data.sources=null", "data.bad_rows=skip"]
    page = open_page(*data, width=420)
    assert page.title() == "What will be trained on" == page.inner_text("h1")
    assert EVIL in page.text_content("#problems .text") and f"{rows}:2: not JSON" in page.text_content("#problems .problem")
    assert "1 row(s), they are left out." in page.inner_text("#problems")
    for where, text in (("article", "s"), (".context", "q"), ("article mark", "a")):
        assert f"{text} {EVIL}" in page.text_content(f"#rows {where}")
    assert [page.locator(tag).count() for tag in ("b", "i", "script")] == [0, 0, 3]
    assert page.evaluate("document.documentElement.scrollWidth") <= 420


@pytest.mark.slow
def test_the_numbers_and_pictures_of_the_page(open_page):
    page = open_page("data.max_tokens=150", "data.overlong=drop")
    assert page.locator("#sources tr").nth(1).locator("td").all_inner_texts()[:5] == ["train", "book", "20", "20", "0"]
    assert page.locator("#sources tr").count() == 5, "two splits of two sources, and the head"
    assert page.locator("#lengths svg").count() == 2
    assert page.locator("#lengths .limit").all_text_contents()[:2] == ["data.max_tokens 150", "train.microbatch_tokens 512 →"]
    assert page.locator("#lengths svg").first.locator("line").count() == 1, "512 is far beyond the longest row"
    tallest = max(float(bar.get_attribute("height")) for bar in page.locator("#lengths rect").all())
    assert tallest == 120 and "over an epoch's 5 steps." in page.inner_text("#fullness")
    assert page.is_hidden("#problems")


@pytest.mark.slow
def test_of_2000_rows_a_few_are_shown_and_all_are_searched(open_page, write_rows, make_row):
    texts = [f"row {number} " + "word " * 20 for number in range(2010)]
    rows = write_rows([make_row(text, f"answer {number}") for number, text in enumerate(texts)])
    page = open_page("--rows", "2000", f"data.train={rows}", "data.eval=10", "data.sources=null")
    assert page.locator("#rows article").count() == 20 and "20 shown of 2,000" in page.inner_text("#rows [role=status]")
    assert page.locator("#rows article mark").first.text_content().startswith("answer ")
    page.click("#rows button")
    assert page.locator("#rows article").count() == 40
    page.fill("#rows input", "ANSWER 19")
    said = page.inner_text("#rows [role=status]")
    assert said.startswith("20 shown of 1") and said.endswith(" found in 2,000")
    page.fill("#rows input", "nowhere")
    assert page.inner_text("#rows [role=status]") == "0 shown of 0 found in 2,000" and page.is_hidden("#rows button")
    page.fill("#rows input", "")
    assert page.locator("#rows article").count() == 20
