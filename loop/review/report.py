"""Writes the verdict as a page that stands alone and can be sent: counts, and every position with its comments and vote.
Some 30 KB a position, most of it the board."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any, Iterable

from data.files import write_text
from loop.pages import document
from loop.review.pairs import Pair, Review
from loop.review.verdict import CALLED, as_lines
from loop.review.votes import Vote, Votes

REPORT = "report.html"
CSS = Path(__file__).parent / "page" / "page.css"


def write_report(review: Review, votes: Votes, verdict: dict[str, Any]) -> Path:
    standing = votes.standing
    title = f"Review of {' and '.join(str(Path(checkpoint).parent) for checkpoint in review.described['checkpoints'])}"
    comparisons = [[CALLED[one["first"]], CALLED[one["second"]], one["won"], one["lost"], one["even"], interval(one),
                    f"{one['p']:.2g}"] for one in verdict["comparisons"]]
    checks = [[CALLED[system], interval(one),
               ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in one["flagged"].items())]
              for system, one in verdict["checks"].items()]
    tags = [[CALLED[system], ", ".join(f"{tag} {count}" for tag, count in one.items() if count)]
            for system, one in verdict["tags"].items() if any(one.values())]
    decided, *reasons = as_lines(verdict)
    parts = [
        f"<style>\n{CSS.read_text(encoding='utf-8')}</style>",
        f"<h1>{escape(title)}</h1><p>{escape(verdict['reviewer'])}, {escape(verdict['date'])}</p>",
        f'<p class="decided">{escape(decided)}</p>', items(reasons),
        table("Systems", ["system", "is"], [[CALLED[system], name] for system, name in verdict["systems"].items()]),
        table("Votes", ["system", "against", "better", "worse", "even", "share of those decided", "p, one-sided"], comparisons),
        table("Automatic checks", ["system", "comments with wrong facts", "comments flagged, by check"], checks),
        *(table(name, ["", "positions", "tuned better", "worse", "even", "comments with wrong facts"],
                [[key, one["pairs"], one["won"], one["lost"], one["even"],
                  ", ".join(f"{CALLED[system]} {count}" for system, count in one["wrong"].items())]
                 for key, one in verdict[kind].items()])
          for name, kind in (("By phase of the game", "phases"), ("By classification", "classifications")) if verdict[kind]),
        *([table("Tags", ["system", "given to"], tags)] if tags else []),
        "<h2>Positions</h2>", *(position(review, pair, standing.get(pair.id)) for pair in review.pairs.values()),
        table("Made from", ["what", "SHA-256"], [list(item) for item in verdict["seal"].items()]),
    ]
    write_text(review.directory / REPORT, document(title, "\n".join(parts)))
    return review.directory / REPORT


def interval(one: dict[str, Any]) -> str:
    return f"{one['share']:.0%} (95% interval: {one['low']:.0%} to {one['high']:.0%})"


def items(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f'<li dir="auto">{escape(line)}</li>' for line in lines) + "</ul>"


def table(title: str, heads: list[str], rows: list[list[Any]]) -> str:
    kinds = [' class="n"' if isinstance(cell, int) else "" for cell in (rows or [heads])[0]]

    def line(tag: str, cells: list[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}{kind}>{escape(str(cell))}</{tag}>" for cell, kind in zip(cells, kinds)) + "</tr>"

    body = line("th", heads) + "".join(line("td", row) for row in rows)
    return f'<h2>{title}</h2><div class="wide"><table>{body}</table></div>'


def position(review: Review, pair: Pair, vote: Vote | None) -> str:
    """One row: the board, the prompt, each comment with what it was, its tags and checks."""
    board = ""
    if pair.position[0] is not None:  # drawn by python-chess; `desc`, the board as a text, would be read out twice
        board = f'<div class="board">{re.sub(r"<desc>.*?</desc>", "", pair.board_svg(), flags=re.DOTALL)}</div>'
    cards = []
    for letter, system in pair.by_letter.items():
        place = "" if not vote else "best" if vote["best"] == letter else "second best" if vote["second"] == letter else ""
        tags = ", ".join(vote["tags"].get(letter, [])) if vote else ""
        cards.append(f'<article class="{"best" if place == "best" else ""}"><p><strong>{letter}, {escape(review.names[system])}'
                     f'</strong> {escape(" · ".join(filter(None, (place, tags))))}</p><div class="text" dir="auto">'
                     f'{escape(pair.comments[system]["text"].strip() or "(no words)")}</div>'
                     + items(f"{flag.check.replace('_', ' ')}: “{flag.quote}” ({flag.why})" for flag in pair.flags[system])
                     + "</article>")
    best = vote["best"] if vote else ""
    said = {"": "no vote", "tie": "equally good", "bad": "none is good"}.get(best, f"{best} is best")
    note = f'<p dir="auto">{escape(vote["note"])}</p>' if vote and vote["note"] else ""
    return (f'<main><section>{board}<pre dir="auto">{escape(pair.prompt)}</pre>'
            f'<p>{escape(pair.strength_text)}</p></section><section>'
            f'<h2>Line {pair.line}: {said}</h2>{note}{"".join(cards)}</section></main>')
