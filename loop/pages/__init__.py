"""What the pages have in common: one style, one script, and that a page is a single file that asks for nothing from outside.
Holds a page as text."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

STYLE, SCRIPT = Path(__file__).with_name("style.css"), Path(__file__).with_name("make.js")
HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{style}</style>
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
DATA = '<script type="application/json" id="report">{data}</script>\n<script>\n{script}</script>\n'


def document(title: str, body: str, data: Any = None) -> str:
    """A page in the common style. A browser lets it load nothing, and runs scripts in it only where there are `data`.

    Args:
        title: plain text.
        body: HTML, in which everything from rows and models is escaped; also styles and scripts of its own.
        data: whatever JSON can hold, for the scripts of `body`: what is inside the element #report.
    """
    head = HEAD.format(policy=POLICY + ("; script-src 'unsafe-inline'" if data is not None else ""), title=escape(title),
                       style=STYLE.read_text(encoding="utf-8"))
    if data is not None:
        # "</script>" would end the element, and after "<!--<script>" its own end would not; JSON needs "<" only inside texts
        text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        head += DATA.format(data=text, script=SCRIPT.read_text(encoding="utf-8"))
    return head + body + "</html>\n"
