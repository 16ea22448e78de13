"""Serves the review's page to one reviewer: what is compared, boards, votes; whose comment is whose only after the vote.
Needs Starlette and uvicorn. Everything waits for everything else: there is one reviewer, and an answer takes milliseconds."""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from pathlib import Path
from typing import Any, Callable
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loop.pages import SCRIPT, STYLE
from loop.review.pairs import SHOWN, Pair, Review
from loop.review.votes import TAGS, Refused, Vote, Votes

PAGE = Path(__file__).parent / "page"
MOST_BYTES = 64 * 1024  # of a vote
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Lets only the reviewer's own browser in: by host, origin and a token, which comes in the link and stays in a cookie.

    Args:
        hosts: names and addresses under which the page may be asked for; without them any address and this machine's name.
        cookie: the cookie's name. Cookies know no ports, so two reviews on one machine need two names.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: tuple[str, ...], cookie: str) -> None:
        self.app, self.token, self.hosts, self.cookie = app, token, hosts, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope)
        by_link = request.url.path == "/" and self.equals(request.query_params.get("token", ""))

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if by_link and message["status"] == 200:
                    headers.append("Set-Cookie", f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict")
            await send(message)

        problem = self.problem(request, by_link)
        await (PlainTextResponse(problem, 403) if problem else self.app)(scope, receive, send_with_headers)

    def problem(self, request: Request, by_link: bool) -> str | None:
        host = request.headers.get("host", "")
        origin = request.headers.get("origin")
        if not self.is_ours(host):
            return "This page is served under another name.\n"
        if origin is not None and origin != f"http://{host}" or request.method == "POST" and origin is None:
            return "This was asked for by another page.\n"
        if not by_link and not self.equals(request.cookies.get(self.cookie, "")):
            return "Open the link that the command printed; its end is the key to this page.\n"
        return None

    def equals(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self.token.encode())

    def is_ours(self, host: str) -> bool:
        """Whether a Host header is this server's. A page of another site that has its name point here is not let in."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if self.hosts:
            return name in self.hosts
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return name == socket.gethostname().lower()


def application(
    review: Review, votes: Votes, conclude: Callable[[], list[str]], token: str, hosts: tuple[str, ...], cookie: str
) -> Guard:
    """The page and what it asks for.

    Args:
        conclude: writes the verdict and the report, and returns the lines that the page shows of them.
    """
    pairs = review.pairs

    def file(path: Path, kind: str) -> Route:
        async def answer(request: Request) -> Response:
            return Response(path.read_bytes(), media_type=kind)
        return Route("/" if path.suffix == ".html" else f"/{path.name}", answer)

    async def listed(request: Request) -> Response:
        standing = votes.standing
        last = next((name for name in reversed(standing) if name in pairs), None)
        return JSONResponse({"pairs": [{"id": name, "voted": name in standing} for name in pairs], "last": last,
                             "tags": TAGS, "enough": min(review.rules.least_votes, len(pairs))})

    async def pair(request: Request) -> Response:
        found = pairs.get(request.path_params["id"])
        return JSONResponse(blind(found) | revealed(review, found, votes)) if found else refused("no such position", 404)

    async def board(request: Request) -> Response:
        found, shown = pairs.get(request.path_params["id"]), request.query_params.get("show", "")
        if not found or found.position[0] is None or shown and not SHOWN.fullmatch(shown):
            return refused("no such board", 404)
        return Response(found.board_svg(shown), media_type="image/svg+xml")

    async def vote(request: Request) -> Response:
        given = await body(request)
        found = pairs.get(str(given.get("pair")))
        if not found:
            raise Refused("no such position; load the page again")
        votes.add(found, given)
        return JSONResponse(revealed(review, found, votes))

    async def undo(request: Request) -> Response:
        vote = votes.undo(str((await body(request)).get("pair"))) or {}
        return JSONResponse({key: vote[key] for key in ("tags", "note") if key in vote})

    async def verdict(request: Request) -> Response:
        await body(request)
        return JSONResponse({"lines": conclude()})

    async def on_refused(request: Request, error: Exception) -> Response:
        return refused(str(error), 409)

    async def on_full_disk(request: Request, error: Exception) -> Response:
        return refused(f"not saved: {getattr(error, 'strerror', None) or error}", 507)

    routes = [file(PAGE / "page.html", "text/html"), *(file(style, "text/css") for style in (STYLE, PAGE / "page.css")),
              *(file(script, "text/javascript") for script in (SCRIPT, PAGE / "page.js")),
              Route("/pairs", listed), Route("/pair/{id}", pair), Route("/board/{id}", board),
              Route("/vote", vote, methods=["POST"]), Route("/undo", undo, methods=["POST"]),
              Route("/verdict", verdict, methods=["POST"])]
    handlers: Any = {Refused: on_refused, OSError: on_full_disk}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), token, hosts, cookie)


def blind(pair: Pair) -> dict[str, Any]:
    """What the page may know before the vote."""
    comments = [{"letter": letter, "parts": pair.parts(pair.comments[system]["text"])}
                for letter, system in pair.by_letter.items()]
    return {"id": pair.id, "prompt": pair.prompt, "board": pair.board_text(), "comments": comments}


def revealed(review: Review, pair: Pair, votes: Votes) -> dict[str, Any]:
    """The vote of a pair, and what was what; empty before the vote."""
    vote: Vote | None = votes.standing.get(pair.id)
    if vote is None:
        return {}
    told = {letter: {"name": review.names[system],
                     "flags": [f"{flag.check.replace('_', ' ')}: “{flag.quote[:200]}” ({flag.why})"
                               for flag in pair.flags[system]]}
            for letter, system in pair.by_letter.items()}
    return {"vote": {key: vote[key] for key in ("best", "second", "tags", "note")}, "told": told, "engine": pair.strength_text}


async def body(request: Request) -> dict[str, Any]:
    """The JSON object of a POST.

    Raises:
        Refused: it is none, or too long.
    """
    raw = b""
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MOST_BYTES:
            raise Refused(f"more than {MOST_BYTES:,} bytes were sent")
    try:
        given = json.loads(raw)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise Refused("expected a JSON object")
    return given


def refused(problem: str, status: int) -> Response:
    return JSONResponse({"error": problem}, status)
