"""Reads chat rows from JSONL and says exactly what is wrong with the ones that cannot be trained on.
Holds one row at a time."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence, TypeVar

from data.config import DataConfig
from data.files import open_regular
from data.limits import MAX_RENDERED, MAX_ROW_BYTES, MAX_TURNS, bounded_lines

Item = TypeVar("Item")


class Turn(NamedTuple):
    """One assistant answer, separated from its thought."""

    thought: str | None  # None where the row has no <think> block, or where blocks are stripped
    answer: str


@dataclass(frozen=True)
class Row:
    """One chat row: all its messages, and every assistant turn parsed."""

    line: int  # from 1, in its file
    source: str
    messages: tuple[dict[str, str], ...]  # role and content; assistant contents in canonical form
    turns: tuple[Turn, ...]  # one for each assistant message, in order
    place: float = 0.0  # from 0 to 1, by a hash of the messages alone; decides whether the row is held out

    @property
    def rendered_characters(self) -> int:
        """An upper bound of the text that is rendered: the prompt of every turn repeats all before it."""
        return len(self.turns) * sum(len(message["content"]) for message in self.messages)


@dataclass(frozen=True)
class Dropped:
    """A row that is not trained on, and why."""

    line: int
    source: str  # "(unknown)" if the row's source could not be read
    reason: str  # a short phrase, the same for all rows of its kind
    detail: str  # what was found in this row
    bad: bool  # False: left out as configured (another source); True: the row is broken


def described(path: str, dropped: Dropped) -> str:
    """Where a row stands, and what was found."""
    return f"{path}:{dropped.line}: {dropped.reason}" + (f": {dropped.detail}" if dropped.detail else "")


def refuse(config: DataConfig, split: str, problems: Sequence[Dropped]) -> None:
    """Raises:
        ValueError: the run refuses some of these rows; says where they are, what was found, and what to do.
    """
    refused = [problem for problem in sorted(problems, key=lambda p: p.line) if config.refuses(problem.reason == OVERLONG)]
    if not refused:
        return
    path = config.file(split)
    lines = [described(path, problem) for problem in refused[:MAX_SHOWN]]
    if len(refused) > MAX_SHOWN:
        lines.append(f"and {len(refused) - MAX_SHOWN:,} more: `python -m loop.inspect` with the same configuration lists all")
    remedies = {True: "Raise data.max_tokens, or choose data.overlong=drop or data.overlong=truncate",
                False: "Mend what is wrong, or leave such rows out with data.bad_rows=skip"}
    what_to_do = [remedies[is_overlong] for is_overlong in dict.fromkeys(row.reason == OVERLONG for row in refused)]
    if len(refused) == 1:
        raise ValueError(f"{lines[0]}. {what_to_do[0]}")
    raise ValueError("\n".join([f"{len(refused):,} rows of {path} cannot be trained on:", *lines, *what_to_do]))


class BadRow(Exception):
    """A row cannot be used; whoever reads or renders rows turns this into a `Dropped`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **ROLES}
OVERLONG = "over max_tokens"  # the reason of rows that are longer than data.max_tokens
MAX_SHOWN = 20  # rows that an error lists
NO_SOURCE = "(none)"  # the source of a row without metadata.source, where all sources are trained on
EXPECTED = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
THINK_BLOCK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def read_split(config: DataConfig, split: str) -> Iterator[Row | Dropped]:
    """The rows of a split, `train` or `eval`, in the order of its file.

    Where `data.eval` is a share or a number, rows of the training file are held out by the hash of their messages: shuffling
    the file or adding rows moves no other row (a number moves as many as were added at most), and equal rows stay together.
    Rows that cannot be read then count as training rows.

    Raises:
        ValueError: as `read_rows`; or the number leaves no rows to train on.
    """
    rows, number = read_rows(config, split), config.held_out
    if number is None:
        yield from rows
        return
    bound = number if number < 1 else place_of(int(number), config)
    for row in rows:
        if (isinstance(row, Row) and row.place < bound) == (split == "eval"):
            yield row


def place_of(number: int, config: DataConfig) -> float:
    """The bound below which so many of the training rows have their place."""
    places = sorted(row.place for row in read_rows(config, "train") if isinstance(row, Row))
    if len(places) <= number:
        raise ValueError(f"data.eval is {number:,}, but {config.train} has {len(places):,} rows that could be trained on. Hold "
                         "fewer of them out, or name a file of held-out rows")
    return places[number]


def read_rows(config: DataConfig, split: str) -> Iterator[Row | Dropped]:
    """Reads the JSONL file of a split row by row; skips blank lines, but counts them as lines.

    Raises:
        ValueError: the file is missing, is no regular file, or may not be read.
    """
    with open_rows(config.file(split)) as file:
        for line, (raw, num_bytes) in enumerate(bounded_lines(file), start=1):
            if raw.isspace():
                continue
            source = "(unknown)"
            try:
                if num_bytes > MAX_ROW_BYTES:
                    raise BadRow("row too long", f"the line has {num_bytes:,} bytes, allowed are {MAX_ROW_BYTES:,}")
                record = parse_json(raw, first=line == 1)
                source = read_source(record, config)
                if config.takes(source):
                    yield read_row(record, line, source, config.think)
                else:
                    yield Dropped(line, source, "source not in data.sources", f"metadata.source is {source!r}", bad=False)
            except BadRow as bad:
                yield Dropped(line, source, bad.reason, bad.detail, bad=True)


def one_answer_rows(config: DataConfig) -> list[Row]:
    """The held-out rows of one question and one answer.

    Raises:
        ValueError: there is none.
    """
    rows = [row for row in read_split(config, "eval") if isinstance(row, Row) and len(row.turns) == 1]
    if not rows:
        wanted = f" from {', '.join(config.sources)}" if config.sources else ""
        raise ValueError(f"{config.file('eval')}: no held-out row of one question and one answer{wanted}")
    return rows


def evenly(items: Sequence[Item], number: int) -> list[Item]:
    """At most so many of the items, evenly spread over all of them."""
    number = min(number, len(items))
    return [items[i * len(items) // number] for i in range(number)]


def open_rows(path: str | Path) -> BufferedReader:
    return open_regular(path, "a JSONL file of chat rows, one row a line")


def parse_json(raw: bytes, first: bool) -> dict:
    """Decodes one line; skips a byte order mark at the head of the file."""
    try:
        text = raw.rstrip(b"\r\n").decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"byte 0x{raw[error.start]:02x} at position {error.start}") from None
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow("not JSON", f"{error.msg.removesuffix(' at')} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # thousands of digits in a number; a thousand nested brackets
        raise BadRow("not JSON", str(error)) from None
    if not isinstance(record, dict):
        raise BadRow("not a JSON object", f"found {type(record).__name__}; expected {EXPECTED}")
    return record


def read_source(record: dict, config: DataConfig) -> str:
    metadata = record.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("source"), str):
        if config.sources is None:
            return NO_SOURCE
        read_messages(record)  # says first what keeps the row from being trained on with any source
        found = f"metadata is {str(metadata)[:80]}" if "metadata" in record else "the row has no metadata"
        raise BadRow("metadata.source missing", f"{found}; data.sources=null takes rows without it")
    check_unicode("metadata.source", metadata["source"])
    return metadata["source"]


def read_row(record: dict, line: int, source: str, think: str) -> Row:
    """Checks the roles, parses every answer, and puts assistant contents into canonical form."""
    key, messages = messages_key(record), read_messages(record)
    canonical, turns = [], []
    for index, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "assistant":
            turn = parse_answer(content, think, f"{key}[{index}]")
            turns.append(turn)
            content = turn.answer if turn.thought is None else thought_and_answer(turn.thought, turn.answer)
        canonical.append({"role": message["role"], "content": content})
    row = Row(line, source, tuple(canonical), tuple(turns), hashed(messages))
    if row.rendered_characters > MAX_RENDERED:
        raise BadRow("row too long", f"{len(turns)} turns repeat up to {row.rendered_characters:,} characters, allowed are "
                     f"{MAX_RENDERED:,}")
    return row


def messages_key(record: dict) -> str:
    return "conversations" if record.get("messages") is None and "conversations" in record else "messages"


def read_messages(record: dict) -> list[dict[str, str]]:
    """The row's messages as role and content, their roles in order; ShareGPT's `conversations` in the same form."""
    key = messages_key(record)
    found = record.get(key)
    if not isinstance(found, list) or not found:
        there = f"{key} is {str(found)[:80]}" if key in record else f"the row has {', '.join(record)[:80] or 'no key'}"
        raise BadRow("messages missing", f"{there}; expected {EXPECTED}")
    if len(found) > 2 * MAX_TURNS + 1:
        raise BadRow("too many turns", f"found {len(found):,} messages, allowed are {2 * MAX_TURNS + 1}")
    messages = [read_message(f"{key}[{index}]", message) for index, message in enumerate(found)]
    check_order([message["role"] for message in messages])
    return messages


def hashed(messages: list) -> float:
    """A number from 0 to 1 that is the same for the same messages, whatever stands beside them in their row."""
    said = [(message["role"], message["content"].strip()) for message in messages]
    return int.from_bytes(hashlib.sha256(json.dumps(said).encode()).digest()[:6]) / 2**48


def read_message(where: str, message: object) -> dict[str, str]:
    """One message as role and content, which ShareGPT calls `from` and `value`."""
    is_sharegpt = isinstance(message, dict) and "from" in message
    role_key, text_key, roles = ("from", "value", SHAREGPT_ROLES) if is_sharegpt else ("role", "content", ROLES)
    if not isinstance(message, dict) or not isinstance(message.get(role_key), str):
        raise BadRow("message without a role", f"{where} is {str(message)[:80]}")
    role, text = message[role_key], message.get(text_key)
    if role not in roles:
        raise BadRow("unknown role", f"{where}.{role_key} is {role[:80]!r}, expected one of {', '.join(roles)}")
    if not isinstance(text, str):
        raise BadRow("message without text", f"{where}.{text_key} is {str(text)[:80]}, expected a string")
    check_unicode(f"{where}.{text_key}", text)
    return {"role": roles[role], "content": text}


def check_unicode(where: str, text: str) -> None:
    """Raises for an unpaired surrogate, which JSON can spell but no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("not UTF-8", f"{where} holds an unpaired surrogate") from None


def check_order(roles: list[str]) -> None:
    """Raises unless an optional system role is followed by pairs of user and assistant."""
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != expected:
        found = " ".join(roles)[:80]
        raise BadRow("roles out of order", f"found {found}; expected [system] user assistant [user assistant ...]")


def parse_answer(content: str, think: str, where: str) -> Turn:
    """Separates an answer from its <think> block.

    Raises:
        BadRow: a stray or unclosed tag, an empty answer, or (`keep`) a thought that does not open the answer.
    """
    answer = THINK_BLOCK.sub("", content)
    blocks = THINK_BLOCK.findall(content)
    # blocks are checked too, because a block that contains another <think> ends at the first </think>
    if "<think>" in answer or any("<think>" in block for block in blocks):
        raise BadRow("unclosed <think>", f"{where} opens a <think> that is not closed before the next one or the end")
    if "</think>" in answer:
        raise BadRow("stray </think>", f"{where} closes a <think> that was never opened")
    if not answer.strip():
        raise BadRow("empty answer", f"{where} has no text" + (" outside its <think> block" if blocks else ""))
    if think == "strip" or not blocks:
        return Turn(None, answer.strip())
    if len(blocks) > 1 or not content.lstrip().startswith("<think>"):
        raise BadRow("misplaced <think>", f"{where}: think: keep expects one <think> block, at the head of the answer")
    thought = blocks[0].strip()
    return Turn(thought or None, answer.strip())  # an empty block is no thought and is never supervised


def thought_and_answer(thought: str, answer: str) -> str:
    """The form in which Qwen's templates write, and its models generate, a thought and its answer."""
    return f"<think>\n{thought}\n</think>\n\n{answer}"
