"""The comments whose truth was written by hand, and the table of what checks find in them.

Each line of comments.jsonl has a position, a move, a text, and all that is wrong in the text as pairs of a check's name and the
words; `other` is wrong in a way for which there is no check. The truth is what a strong player would say, not what checks say.
"""

import json
from collections import Counter
from pathlib import Path

import chess

from loop.review.comment import Comment

BY_HAND = [json.loads(line) for line in (Path(__file__).parent / "comments.jsonl").read_text(encoding="utf-8").splitlines()]


def comment_by_hand(row, trained_on=frozenset()):
    return Comment(row["text"], chess.Board(row["fen"]), chess.Move.from_uci(row["move_uci"]), row.get("metadata", {}),
                   row.get("at_limit", False), trained_on)


def after(moves):
    """The position before the last of the moves, and that move."""
    board = chess.Board()
    *before, last = moves.split()
    for san in before:
        board.push_san(san)
    return board, board.parse_san(last)


def count_flags(flags_of, names):
    """Compares flags with what is wrong by hand: flags, right, wrong, missed for each check, and the wrong ones."""
    table, false_alarms = Counter(), []
    for row in BY_HAND:
        missed = [(name, words) for name, words in row["wrong"] if name in names]
        for flag in flags_of(row):
            hits = [(name, words) for name, words in row["wrong"] if name == flag.check and overlaps(words, flag, row["text"])]
            table[flag.check, "flags"] += 1
            table[flag.check, "right" if hits else "wrong"] += 1
            if not hits:
                false_alarms.append(f"{flag.check} {flag.quote!r} in {row['text']!r}: {flag.why}")
            missed = [pair for pair in missed if pair not in hits[:1]]
        for name, _ in missed:
            table[name, "missed"] += 1
    columns = ("flags", "right", "wrong", "missed")
    sums = {word: sum(table[name, word] for name in names) for word in columns}
    print("\n" + f"{'check':28}" + "".join(f"{word:>8}" for word in columns))
    for name in names:
        print(f"{name:28}" + "".join(f"{table[name, word]:8}" for word in columns))
    print(f"{'all':28}" + "".join(f"{sums[word]:8}" for word in columns))
    return table, sums, false_alarms


def overlaps(words, flag, text):
    start = text.lower().find(words.lower())
    while start >= 0:
        if start < flag.end and flag.start < start + len(words) or not words:
            return True
        start = text.lower().find(words.lower(), start + 1)
    return False
