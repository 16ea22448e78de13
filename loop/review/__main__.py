"""Judges what a run has learned: writes answers, serves a page for blind votes, and says whether they make a go.
Costs the model while answers are missing, then some 300 MB while the page is served.

python -m loop.review checkpoints/NAME [checkpoints/OTHER] [--checkpoint best|newest|N] [--rows 50] [--verify]
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import socket
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from loop.errors import run_command

if TYPE_CHECKING:
    from loop.review.pairs import Review

PORT = 8642
LOCAL = ("127.0.0.1", "localhost", "::1")
INSTALL = ".venv/bin/python -m pip install -c constraints.txt -e '.[review]'"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loop.review", description="Blind review of a run, and its verdict.")
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="such as checkpoints/demo")
    parser.add_argument("second", type=Path, nargs="?", metavar="RUN2", help="another run, to be compared as well")
    parser.add_argument("--checkpoint", default="best", metavar="best|newest|N", help="of each run (best)")
    parser.add_argument("--rows", type=int, default=50, metavar="N", help="held-out rows that are compared (50)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (twice the longest reference)")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="such as review.least_votes=20")
    parser.add_argument("--host", help="serve there instead of on this machine alone: an address, or 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help=f"({PORT}); 0 takes a free one")
    parser.add_argument("--no-browser", action="store_true", help="only print the link")
    parser.add_argument("--reviewer", metavar="NAME", help="your name in the verdict (the user's)")
    parser.add_argument("--verify", action="store_true", help="say whether the verdict still holds, and end")
    args = parser.parse_intermixed_args()  # RUN2 may also stand behind options
    for name in ("rows", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port is {args.port}, expected 0 to 65535")
    if args.second and args.second.resolve() == args.run_dir.resolve():
        raise ValueError(f"RUN and RUN2 are both {args.run_dir}, expected two runs, or one alone")
    return args


def main() -> None:
    args = parse_arguments()
    try:
        import chess  # noqa: F401
        import scipy  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed, which the review needs: {INSTALL}") from None
    if args.verify:
        return verify(args.run_dir, args.second)
    from loop.review.pairs import begin, directory_of
    from loop.run import run_config

    directory = directory_of(args.run_dir, args.second)
    config = run_config(args.run_dir, args.set)
    begin(directory, config.review)
    shared = directory_of(args.run_dir)  # holds the answers, of which every review of the run uses some
    shared.mkdir(exist_ok=True)
    with open(shared / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{args.run_dir}: a review of this run is served already. Use its page, or end it first") from None
        serve(prepare(args, directory), args)


def prepare(args: argparse.Namespace, directory: Path) -> Review:
    """Has all answers written, and reads the review that they make."""
    from loop.review.answers import Source, write_review
    from loop.review.pairs import open_review

    run_dirs = [args.run_dir, *filter(None, [args.second])]
    sources = [Source(run_dir, args.checkpoint, args.set) for run_dir in run_dirs]
    write_review(directory, sources, args.rows, args.max_tokens)
    return open_review(args.run_dir, args.second)


def serve(review: Review, args: argparse.Namespace) -> None:
    """Serves the page until the process is stopped."""
    import uvicorn

    from loop.review.pairs import VERDICT, VOTES, keyed
    from loop.review.report import write_report
    from loop.review.server import application
    from loop.review.verdict import as_lines, conclude
    from loop.review.votes import Votes

    votes = Votes(review.directory / VOTES)

    def verdict() -> list[str]:
        reached = conclude(review, votes, args.reviewer)
        lines = as_lines(reached)
        written = f"Written: {review.directory / VERDICT} and {write_report(review, votes, reached)}"
        print(lines[0], written, flush=True)
        return [*lines, written]

    host = args.host or LOCAL[0]
    try:
        listening = socket.create_server((host, args.port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"--host {host} --port {args.port}: {error.strerror or error}. Choose another --port") from None
    port = listening.getsockname()[1]
    if host not in LOCAL:
        print("warning: --host: nothing is encrypted; who reads this network's packets can read and change the review")
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
    token = keyed(review.secret, "link")  # the same after a restart, so that an open page goes on
    link = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/?token={token}"
    cookie = "review-" + hashlib.sha256(f"{review.directory.resolve()} {port}".encode()).hexdigest()[:8]
    if len(review.pairs) < review.rules.least_votes:
        print(f"warning: {len(review.pairs)} held-out rows can be compared, and a go takes {review.rules.least_votes} votes: "
              "give more rows, or fewer votes before the first one with --set review.least_votes=N")
    num_voted = len(votes.standing.keys() & review.pairs.keys())
    print(f"{num_voted} of {len(review.pairs)} positions have a vote. The page, until Ctrl-C: {link}", flush=True)
    hosts = LOCAL if host in LOCAL else () if host in ("0.0.0.0", "::") else (host,)
    app = application(review, votes, verdict, token, hosts, cookie)
    if not args.no_browser:
        webbrowser.open(link)  # the socket listens already; the page comes once the server runs
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off",
                                  timeout_graceful_shutdown=2)).run(sockets=[listening])


def verify(run_dir: Path, second: Path | None = None) -> None:
    """Says whether a review's verdict still holds; exit status 1 if it does not."""
    from loop.checkpoint import read_json
    from loop.review.pairs import VERDICT, VOTES, open_review
    from loop.review.seal import broken
    from loop.review.verdict import as_lines, judgement
    from loop.review.votes import Votes

    review = open_review(run_dir, second)
    path = review.directory / VERDICT
    if not path.exists():
        raise ValueError(f"{path}: no verdict there. Vote first: python -m loop.review {run_dir} {second or ''}".rstrip())
    verdict, judged = read_json(path), judgement(review, Votes(review.directory / VOTES))
    if missing := sorted({*judged, "looks", "reviewer", "date", "seal"} - {*verdict}):
        raise ValueError(f"{path}: without {', '.join(missing)}: damaged, or of another version. V on the page writes it anew")
    problems = broken(review, verdict, judged)
    print(*as_lines(verdict), f"by {verdict['reviewer']} on {verdict['date']}", sep="\n")
    if problems:
        print("The verdict no longer holds:", *problems, sep="\n")
        sys.exit(1)
    print("The verdict holds: nothing that it was made from has changed.")


if __name__ == "__main__":
    run_command(main)
