"""Shows what will be trained on, as counts and as coloured text: a person can check the mask before a long run."""

from __future__ import annotations

from dataclasses import asdict
from html import escape
from itertools import groupby
from typing import Any, Iterator

import numpy as np

from data.tokenized import TokenizedRows

PERCENTILES = (5, 50, 95, 100)
SUPERVISED, CONTEXT, RESET = "\033[1;32m", "\033[2m", "\033[0m"


def audit(splits: dict[str, TokenizedRows], stop_id: int) -> dict[str, Any]:
    """Counts per source over all splits, each split's own, and the rows that cannot be trained on, by split:
    `{"sources": {...}, "splits": {NAME: {...}}, "problems": {NAME: [...]}}`."""
    by_split = {name: audit_split(rows, stop_id) for name, rows in splits.items()}
    problems = {name: [asdict(problem) for problem in rows.problems] for name, rows in splits.items()}
    together: dict[str, Any] = {}
    for sources in by_split.values():
        for source, counts in sources.items():
            together[source] = add(together[source], counts) if source in together else counts
    return {"sources": {name: without_percentiles(c) for name, c in together.items()}, "splits": by_split, "problems": problems}


def audit_split(rows: TokenizedRows, stop_id: int) -> dict[str, Any]:
    """One split's counts per source."""
    lengths_E = rows.lengths_E.numpy()
    sources_E = rows.sources_E.numpy()
    supervised_E = np.add.reduceat(rows.supervised_N.numpy().astype(np.int64), rows.starts_E1[:-1].numpy())
    stopped_E = examples_with_all_stops(rows, stop_id)
    report = {}
    for name, counts in rows.counts.items():
        entry: dict[str, Any] = asdict(counts)
        if counts.kept:
            mine = sources_E == rows.sources.index(name)
            entry["supervised_share"] = counts.supervised_tokens / counts.tokens
            entry["answers_without_stop_token"] = int((~stopped_E[mine]).sum())
            entry["tokens_percentiles"] = percentiles(lengths_E[mine])
            entry["supervised_percentiles"] = percentiles(supervised_E[mine])
        report[name] = entry
    return report


def examples_with_all_stops(rows: TokenizedRows, stop_id: int) -> np.ndarray:
    """Which examples end every run of supervised tokens with a supervised stop token: [E]."""
    supervised_N = rows.supervised_N.numpy().astype(bool)
    starts_E1 = rows.starts_E1.numpy()
    continues_N = np.append(supervised_N[1:], False)
    continues_N[starts_E1[1:] - 1] = False  # a run ends with its example
    unstopped_N = supervised_N & ~continues_N & (rows.ids_N.numpy() != stop_id)
    return np.add.reduceat(unstopped_N.astype(np.int64), starts_E1[:-1]) == 0


def percentiles(values: np.ndarray) -> dict[str, int]:
    return {f"p{p}": int(np.percentile(values, p)) for p in PERCENTILES}


def add(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The sum of two sources' counts."""
    total: dict[str, Any] = {}
    for key in a | b:
        if isinstance(a.get(key), dict) or isinstance(b.get(key), dict):
            total[key] = add(a.get(key, {}), b.get(key, {}))
        else:
            total[key] = a.get(key, 0) + b.get(key, 0)
    if total.get("tokens"):
        total["supervised_share"] = total["supervised_tokens"] / total["tokens"]
    return total


def without_percentiles(counts: dict[str, Any]) -> dict[str, Any]:
    """The counts that can be added over splits; percentiles cannot."""
    return {key: value for key, value in counts.items() if not key.endswith("_percentiles")}


def table(report: dict[str, Any]) -> str:
    """The audit as text for a person."""
    lines = []
    for split, sources in report["splits"].items():
        for source, counts in sources.items():
            lines.append(f"{split} / {source}: {counts['rows']:,} rows read, {counts['kept']:,} kept")
            lines += [f"    dropped {number:,}: {reason}" for reason, number in counts["dropped"].items()]
            if counts["kept"]:
                lines += kept_lines(counts)
    return "\n".join(lines)


def kept_lines(counts: dict[str, Any]) -> list[str]:
    def spread(name: str) -> str:
        return "  ".join(f"{p} {value:,}" for p, value in counts[name].items())

    stops = counts["answers_without_stop_token"]
    return [
        f"    {counts['tokens']:,} tokens in {counts['examples']:,} examples, each {spread('tokens_percentiles')}",
        f"    {counts['supervised_tokens']:,} supervised ({counts['supervised_share']:.1%}), "
        f"each {spread('supervised_percentiles')}",
        f"    {counts['truncated']:,} truncated; {counts['with_thought']:,} rows with a supervised thought; "
        + ("every answer's stop token is supervised" if not stops else f"{stops:,} EXAMPLES LACK A SUPERVISED STOP TOKEN"),
    ]


def runs(rows: TokenizedRows, index: int, tokenizer: Any) -> Iterator[tuple[bool, str]]:
    """An example's text, cut where supervision begins and ends: (is supervised, text) of each part."""
    ids, supervised = rows.example(index)
    for flag, pairs in groupby(zip(supervised.tolist(), ids.tolist()), key=lambda pair: pair[0]):
        yield bool(flag), tokenizer.decode([token for _, token in pairs], skip_special_tokens=False)


def coloured(rows: TokenizedRows, index: int, tokenizer: Any) -> str:
    """For a terminal: supervised text bold green, the rest dim."""
    head = f"--- {rows.path}:{int(rows.lines_E[index])}, {int(rows.lengths_E[index]):,} tokens ---"
    return head + "\n" + "".join(
        f"{SUPERVISED if flag else CONTEXT}{text}{RESET}" for flag, text in runs(rows, index, tokenizer)
    )


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>What will be trained on</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere}} pre.row{{background:#f6f6f4;color:#777;padding:1em;border-radius:6px}}
mark{{background:#c9f2cf;color:#0a4d18;border-radius:3px}} h2{{font-size:1rem;margin-top:2em}}</style>
<h1>What will be trained on</h1><pre>{table}</pre><p><mark>Marked text</mark> is supervised, the rest is context.</p>
{rows}</html>
"""


def html_page(report: dict[str, Any], shown: list[tuple[TokenizedRows, int]], tokenizer: Any) -> str:
    """The audit and the shown examples as one self-contained HTML page."""
    blocks = []
    for rows, index in shown:
        text = "".join(
            f"<mark>{escape(text)}</mark>" if flag else escape(text) for flag, text in runs(rows, index, tokenizer)
        )
        title = f"{rows.path}:{int(rows.lines_E[index])}, {int(rows.lengths_E[index]):,} tokens"
        blocks.append(f'<h2>{escape(title)}</h2><pre class="row">{text}</pre>')
    return PAGE.format(table=escape(table(report)), rows="\n".join(blocks))
