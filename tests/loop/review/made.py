"""A review without a model: what answers.py would have written, by hand. Run as a script it serves one."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from data.files import write_text
from loop import checkpoint
from loop.config import ReviewConfig
from loop.errors import run_command
from loop.review.pairs import RULES, begin, open_review

ROOT = Path(__file__).parents[3]
SCRIPT = "<script>document.title='owned'</script>"
PAYLOADS = (
    SCRIPT, "<img src=x onerror=\"document.title='owned'\">", "<svg onload=\"document.title='owned'\"><circle r=9></svg>",
    "<template><b>hidden</b></template>{{7*7}}${7*7}", "long " * 2000, "הצריח \u202eon e4\u202c נמצא בטור הפתוח. Nf3!",
)


def row(number, fen="r1bqkbnr/pppp1ppp/2n5/4p3/4P3/5N2/PPPP1PPP/RNBQKB1R w KQkq - 2 3", move="f1b5", said="White plays 3. Bb5",
        **metadata):
    return {"messages": [{"role": "user", "content": f"FEN: {fen}\n{said} ({number})"},
                         {"role": "assistant", "content": f"Bb5 pins nothing yet, but asks the knight on c6. Row {number}."}],
            "metadata": {"source": "textbook", "fen": fen, "move_uci": move, **metadata}}


def comment(text, at_limit=False):
    return {"text": text, "at_limit": at_limit, "trained_on": False}


def write_made(run_dir, comments, rules=ReviewConfig(), rows=None):
    """Writes a run's directory with a checkpoint, a review and its held-out rows.

    Args:
        comments: for each row the texts of base and tuned, and of the second run if there is one.
    """
    rows = rows or [row(number) for number in range(len(comments))]
    path = run_dir / "step-00000007"
    path.mkdir(parents=True)
    (path / checkpoint.ADAPTER).write_bytes(b"weights")
    checkpoint.write_json(path / checkpoint.MANIFEST, {checkpoint.ADAPTER: {"size": 7, "sha256": "0"}})
    (run_dir / "config.yaml").write_text("run: made\n")
    held_out = run_dir / "eval.jsonl"
    held_out.write_text("".join(json.dumps(one) + "\n" for one in rows))
    begin(run_dir / "review", rules)
    pairs = []
    for number, (one, texts) in enumerate(zip(rows, comments), start=1):
        made = {system: comment(text) for system, text in zip(("base", "tuned", "rival"), texts)}
        pairs.append({"line": number, "row": one,
                      "comments": made | {"reference": comment(one["messages"][-1]["content"])}})
    systems = {"base": "the untuned model", "tuned": f"the tuned model ({path})", "rival": "the tuned model (other)"}
    described = {"systems": systems, "max_tokens": 9, "eval": str(held_out), "model": "gone/model", "checkpoints": [str(path)],
                 "pairs": pairs}
    write_text(run_dir / "review/review.json", json.dumps(described))
    return open_review(run_dir)


class Served:
    """A review's page in a process of its own; `link` is what it printed."""

    def __init__(self, run_dir, port=0):
        self.run_dir = run_dir
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(run_dir), str(port)], stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)})
        self.said = ""
        while "http://" not in self.said and self.process.poll() is None:
            self.said += self.process.stdout.readline()
        self.link = re.search(r"http://\S+", self.said)[0]
        self.site, self.token = self.link.split("/?token=")
        self.port = int(self.site.rsplit(":", 1)[1])
        self.cookie = ""

    def ask(self, path, given=None, **headers):
        """Status, headers and body of an answer; `given` is sent as a POST."""
        named = {"Cookie": self.cookie, "Host": self.site[7:], **({"Origin": self.site} if given is not None else {})}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = given if given is None or isinstance(given, bytes) else json.dumps(given).encode()
        request = urllib.request.Request(f"{self.site}/{path}", data, {key: value for key, value in named.items() if value})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def log_in(self):
        status, headers, _ = self.ask(f"?token={self.token}")
        assert status == 200
        self.cookie = headers["set-cookie"].split(";")[0]
        return headers

    def json(self, path, given=None):
        return json.loads(self.ask(path, given)[2])

    @property
    def votes(self):
        file = self.run_dir / "review/votes.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.kill()
        self.process.stdout.close()


if __name__ == "__main__":
    from loop.review.__main__ import serve

    directory, port = Path(sys.argv[1]), int(sys.argv[2])
    assert (directory / "review" / RULES).exists()
    options = argparse.Namespace(host=None, port=port, no_browser=True, reviewer="Tester")
    run_command(lambda: serve(open_review(directory), options))
