"""The review's page in a real browser, by keyboard: Debian's Chromium without a screen. Skipped where it is missing."""

import os
import signal
import time

import pytest

from loop.config import ReviewConfig
from tests.loop.review.made import PAYLOADS, Served, write_made

pytestmark = pytest.mark.slow
WAIT_MS = 120_000
RULES = ReviewConfig(least_votes=2)


class Tab:
    """A page of the review; `asked` has every address that it asked for, and `problems` what its console said."""

    def __init__(self, context, link):
        self.page = context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.asked, self.problems = [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.problems.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(link)
        self.page.wait_for_selector("article")

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def says(self, text, where="#status"):
        self.page.wait_for_function("([where, text]) => document.querySelector(where).textContent.includes(text)",
                                    arg=[where, text], polling=50)  # ms; frames are not drawn while a machine is busy

    def text(self, where):
        return self.page.eval_on_selector(where, "node => node.textContent")

    def vote(self, *keys):
        self.press(*keys, "Enter")
        self.says("Saved.")


@pytest.fixture
def review(tmp_path):
    run_dir = tmp_path / "run"
    texts = [(text, f"Plain comment {number}: Nf3 and e5.") for number, text in enumerate(PAYLOADS)]
    return run_dir, write_made(run_dir, texts, RULES)


def test_a_whole_session_by_keyboard(browser, review):
    run_dir, made = review
    context = browser.new_context()
    with Served(run_dir) as served:
        tab = Tab(context, served.link)
        assert tab.text("#count") == f"0 of {len(PAYLOADS)} voted; a verdict takes 2"
        assert "token" not in tab.page.url, "the address bar, which may be photographed, holds no key"
        tab.press("v")
        tab.says("takes 2 votes")
        tab.press("Enter")
        tab.says("Choose first")
        for number, (name, text) in enumerate(zip(made.pairs, PAYLOADS), start=1):
            tab.says(f"Position {number} of", "#choice")
            shown = tab.page.eval_on_selector_all(".text", "nodes => nodes.map(node => node.textContent)")
            assert text in shown, "shown as it was written"
            assert tab.page.locator(".text *:not(button)").count() == 0, "and nothing of it is HTML"
            assert not tab.page.evaluate("document.documentElement.textContent").count("the untuned model")
            tab.press("b")
            tab.says("B is best. The others count as even, unless a second letter", "#choice")
            tab.press("c", "3", "ArrowLeft", "1", "1", "7", "n")
            tab.page.keyboard.type("Abc 123 tx")  # no key of the page while a note is written
            tab.press("Escape")
            tab.vote()
            assert tab.page.locator(".told").count() == 3
            assert tab.page.evaluate("document.querySelector('#answers').getBoundingClientRect().top") >= 0, "seen from its top"
            tab.press("Enter")
        tab.says("Every position has a vote")
        assert tab.page.title() == "Blind review", "no payload has run"
        tab.press("v")
        tab.says("NO GO")
        assert tab.page.locator("#conclusion li").count() > 5
        assert not tab.problems
        assert all(asked.startswith((served.site, "data:")) for asked in tab.asked)
        votes = [line for line in served.votes if "pair" in line]
    assert [vote["pair"] for vote in votes] == list(made.pairs)
    for vote in votes:
        assert (vote["best"], vote["second"], vote["note"]) == ("B", "C", "Abc 123 tx")
        assert {key: tags for key, tags in vote["tags"].items() if tags} == {"B": ["great"], "C": ["vague"]}
        assert vote["systems"] == made.pairs[vote["pair"]].by_letter
    context.close()


def test_right_to_left_text_stays_within_its_comment(browser, review):
    run_dir, made = review
    context = browser.new_context()
    with Served(run_dir) as served:
        tab = Tab(context, served.link + "#" + list(made.pairs)[-1])
        tab.press("]", "]", "]", "]", "]")
        tab.says("Position 6", "#choice")
        styles = tab.page.eval_on_selector_all(
            ".text", "nodes => nodes.map(getComputedStyle).map(style => [style.direction, style.unicodeBidi])")
        assert sorted(styles) == [["ltr", "plaintext"], ["ltr", "plaintext"], ["rtl", "plaintext"]]
    context.close()


def test_a_server_killed_between_click_and_write_loses_nothing(browser, review):
    run_dir, made = review
    context = browser.new_context()
    with Served(run_dir) as served:
        tab = Tab(context, served.link)
        os.kill(served.process.pid, signal.SIGSTOP)  # the vote arrives, and is never written
        tab.press("a", "5", "Enter")
        tab.says("saving")
        time.sleep(0.5)
        served.kill()
        tab.says("The server does not answer")
        assert served.votes == []
    with Served(run_dir, served.port) as served:
        tab.vote()  # the same key again
        assert [(line["best"], line["tags"]) for line in served.votes] == [("A", {"A": ["repeats"]})]
        served.kill()
        tab.press("u")
        tab.says("The server does not answer")
    with Served(run_dir, served.port) as served:
        tab.press("u")
        tab.says("taken back")
        assert "undo" in served.votes[1] and len(served.votes) == 2
        tab.says("Position 1 of 6: no choice yet", "#choice")
        tab.vote("b")
        assert [(line["best"], line["tags"]) for line in served.votes[2:]] == [("B", {"A": ["repeats"]})], "tags are kept"
    context.close()


def test_a_reload_keeps_what_is_not_sent_yet(browser, review):
    run_dir, made = review
    context = browser.new_context()
    with Served(run_dir) as served:
        tab = Tab(context, served.link)
        tab.press("c", "a", "2", "n")
        tab.page.keyboard.type("half a note")
        tab.page.reload()
        tab.page.wait_for_selector("article")
        tab.says("C is best, then A", "#choice")
        assert tab.page.input_value("#note") == "half a note"
        tab.vote()
        tab.page.reload()
        tab.says("Position 1 of 6: your vote is saved", "#choice")
        assert tab.page.locator(".told").count() == 3
        assert [(line["best"], line["second"], line["note"]) for line in served.votes] == [("C", "A", "half a note")]
    context.close()


def test_two_tabs_count_nothing_twice_and_undo_is_seen(browser, review):
    run_dir, made = review
    context = browser.new_context()
    with Served(run_dir) as served:
        one, two = Tab(context, served.link), Tab(context, served.link)
        one.vote("a")
        assert one.page.is_disabled("#previous") and not one.page.is_disabled("#next")
        two.press("b", "Enter")
        two.says("has a vote already")
        assert [line["best"] for line in served.votes] == ["A"]
        two.press("u")
        two.says("taken back")
        two.vote("b")
        one.press("Enter")
        one.says("Position 2", "#choice")
        one.vote("t")
        assert [line.get("best", "undo") for line in served.votes] == ["A", "undo", "B", "tie"]
        assert [line.get("again") for line in served.votes] == [False, None, True, False]
        one.page.reload()
        one.says(f"2 of {len(PAYLOADS)} voted", "#count")
    context.close()


def test_moves_and_squares_are_shown_on_the_board(browser, review):
    run_dir, made = review
    context = browser.new_context()
    with Served(run_dir) as served:
        tab = Tab(context, served.link)
        letter = next(letter for letter, system in list(made.pairs.values())[0].by_letter.items() if system == "tuned")
        tab.press(*["ArrowRight"] * "ABC".index(letter))
        plain = tab.page.get_attribute("#board", "src")
        tab.press("m")
        tab.says("shown: Nf3", "#shown")
        assert tab.page.get_attribute("#board", "src") != plain
        tab.press("m")
        tab.says("shown: e5", "#shown")
        assert "Shown: e5" in tab.page.get_attribute("#board", "alt")
        tab.page.wait_for_function("() => document.querySelector('#board').naturalWidth > 0")
        tab.press("Escape")
        assert tab.page.get_attribute("#board", "src") == plain and tab.page.is_hidden("#shown")
        tab.page.click(f"article[data-letter=\"{letter}\"] .text button >> nth=1")
        tab.says("shown: e5", "#shown")
    context.close()
