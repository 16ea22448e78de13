"""Shows what will be trained on, as counts and as coloured text: a person can check the mask before a long run."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import Any, Iterator

import numpy as np

from data.batches import Batches
from data.limits import bounded_lines
from data.records import open_rows
from data.tokenized import TokenizedRows

PERCENTILES = (5, 50, 95, 100)
MAX_BARS = 40  # of a histogram
MAX_STEPS = 500  # that are packed to see how full microbatches are: an epoch's rows are shuffled, so its first steps tell
MAX_TEXT = 1000  # characters that are shown of a row that cannot be trained on
SUPERVISED, CONTEXT, RESET = "\033[1;32m", "\033[2m", "\033[0m"


def audit(splits: dict[str, TokenizedRows], stop_id: int) -> dict[str, Any]:
    """What `splits` hold, for machines.

    Returns:
        sources: counts per source over all splits; splits: each split's own.
        lengths: of each split, as `histogram`.
        problems: of each split, the rows that cannot be trained on, with the beginning of their text.
    """
    by_split = {name: audit_split(rows, stop_id) for name, rows in splits.items()}
    together: dict[str, Any] = {}
    for sources in by_split.values():
        for source, counts in sources.items():
            together[source] = add(together[source], counts) if source in together else counts
    return {"sources": {name: without_percentiles(c) for name, c in together.items()}, "splits": by_split,
            "lengths": {name: histogram(rows.lengths_E.numpy()) for name, rows in splits.items()},
            "problems": {name: untrainable(rows) for name, rows in splits.items()}}


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


def histogram(lengths_E: np.ndarray) -> dict[str, Any]:
    """Bar i counts the examples of more than `width` * i and at most `width` * (i + 1) tokens; at most MAX_BARS bars."""
    widths = (digit * 10**power for power in range(10) for digit in (1, 2, 5))
    width = next(width for width in widths if lengths_E.max() <= width * MAX_BARS)
    return {"width": width, "examples": np.bincount((lengths_E - 1) // width).tolist()}


def untrainable(rows: TokenizedRows) -> list[dict[str, Any]]:
    """The rows of a split that cannot be trained on: what is said of them, and the beginning of their lines."""
    problems = sorted(rows.problems, key=lambda problem: problem.line)
    wanted, texts = {problem.line for problem in problems}, {}
    if wanted:
        with open_rows(rows.path) as file:
            for line, (raw, _) in enumerate(bounded_lines(file), start=1):
                if line in wanted:
                    text = raw[: 4 * MAX_TEXT + 4].decode(errors="replace").rstrip("\r\n")
                    texts[line] = text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " ... (the rest is not shown)"
    return [asdict(problem) | {"text": texts.get(problem.line, "")} for problem in problems]


def fullness(rows: TokenizedRows, rows_per_step: int, microbatch_tokens: int, seed: int) -> dict[str, Any]:
    """How full the microbatches of the first epoch are, on one device; of its first MAX_STEPS steps, if it has more.

    Returns:
        steps: how many were packed; steps_per_epoch: how many there are.
        microbatches_per_step: mean, least and most.
        tokens_share: of all positions of all microbatches, those that hold a token; the rest is padding.

    Raises:
        ValueError: a row is longer than a microbatch.
    """
    batches = Batches(rows, rows_per_step, microbatch_tokens)
    numbers, num_tokens, num_positions = [], 0, 0
    for step in range(1, min(batches.steps_per_epoch, MAX_STEPS) + 1):
        examples, packing = batches.packing(batches.rows_of(step, seed))
        numbers.append(len(packing.microbatches[0]))
        num_tokens += sum(batches.lengths[e] for e in examples)
        num_positions += packing.length * numbers[-1]
    return {"steps": len(numbers), "steps_per_epoch": batches.steps_per_epoch, "tokens_share": num_tokens / num_positions,
            "microbatches_per_step": {"mean": sum(numbers) / len(numbers), "least": min(numbers), "most": max(numbers)}}


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
