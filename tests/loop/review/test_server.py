"""The page's server: who is let in, what it tells before the vote, and what it refuses."""

import json
import re
import socket

import pytest

from loop.review.server import Guard
from tests.loop.review.made import PAYLOADS, Served, write_made

pytestmark = pytest.mark.slow
TOKEN = "0123456789abcdef"
NAMES = re.compile(r"base|tuned|reference|rival|untuned|adapter|step-|marvin|eval\.jsonl|checkpoint", re.IGNORECASE)


@pytest.fixture
def served(tmp_path):
    run_dir = tmp_path / "checkpoints/marvin"
    write_made(run_dir, [("A knight move.", f"The bishop pins. Nf3 and e5, {number}.") for number in range(3)])
    with Served(run_dir) as made:
        yield made


def vote_of(name, **changes):
    return {"pair": name, "token": TOKEN, "best": "A", "second": None, "tags": {}, "note": "", **changes}


def test_only_the_link_lets_in_and_only_under_its_own_name(served):
    for path in ("", "page.js", "pairs", "?token=", "?token=" + "0" * 64, "pairs?token=" + served.token):
        assert served.ask(path)[0] == 403, path
    cookie = served.log_in()["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and served.token in cookie
    assert served.ask("pairs")[0] == 200
    for host in ("evil.example", f"evil.example:{served.port}", "127.0.0.1.evil.example", "[", ""):
        assert served.ask("pairs", Host=host or "x")[0] == 403, host
    assert served.ask("pairs", Host=f"localhost:{served.port}")[0] == 200
    assert served.ask("pairs", Origin="http://evil.example")[0] == 403
    pair = served.json("pairs")["pairs"][0]["id"]
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{served.port}", "http://127.0.0.1:1", ""):
        assert served.ask("vote", vote_of(pair), Origin=origin)[0] == 403, origin
    assert served.votes == []


def test_it_listens_on_loopback_alone(served):
    others = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None)} - {"127.0.0.1", "::1"}
    for address in others:
        if not address.startswith("127."):
            with pytest.raises(OSError):
                socket.create_connection((address, served.port), timeout=5).close()


@pytest.mark.parametrize("hosts, host, ours", [
    (("127.0.0.1", "::1"), "[::1]:80", True), (("127.0.0.1",), "127.0.0.2:80", False), ((), "10.1.2.3:80", True),
    ((), "[fe80::1]", True), ((), socket.gethostname(), True), ((), "evil.example", False),
    ((), "10.1.2.3.evil.example", False), ((), "", False), ((), "[", False), (("box",), "BOX:1", True),
])
def test_which_names_are_the_servers_own(hosts, host, ours):
    """With --host 0.0.0.0 any address and the machine's name are: another site's name that points here is still refused."""
    assert Guard(None, "token", hosts, "cookie").is_ours(host) == ours


def test_every_answer_carries_the_policy(served):
    served.log_in()
    pair = served.json("pairs")["pairs"][0]["id"]
    for path in ("", "style.css", "page.css", "make.js", "page.js", "pairs", f"pair/{pair}", f"board/{pair}", "pair/none",
                 "nothing", "../secret"):
        _, headers, _ = served.ask(path)
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ") and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_nothing_before_the_vote_names_a_system_or_the_run(served):
    head = served.log_in()
    listed = served.json("pairs")["pairs"]
    pair = listed[0]["id"]
    answers = [(200, head, served.ask("")[2])]
    answers += [served.ask(path) for path in ("style.css", "page.css", "make.js", "page.js", "pairs", f"pair/{pair}",
                                              f"board/{pair}", f"board/{pair}?show=e5", f"board/{pair}?show=g1f3")]
    answers.append(served.ask("undo", {"pair": pair}))
    answers.append(served.ask("vote", vote_of(pair, best="Z")))
    for _, headers, body in answers:
        named = {key: value for key, value in headers.items() if key != "content-security-policy"}  # has base-uri
        assert not NAMES.search(body.decode()), NAMES.search(body.decode())
        assert not NAMES.search(json.dumps(named)), named
    told = served.json("vote", vote_of(pair))["told"]
    assert sorted(one["name"].split(" (")[0] for one in told.values()) == [
        "the reference of the row", "the tuned model", "the untuned model"]
    assert not NAMES.search(served.ask(f"pair/{listed[1]['id']}")[2].decode()), "the other positions stay blind"


def test_boards_show_only_moves_and_squares_of_pairs_that_are_there(served):
    served.log_in()
    pair = served.json("pairs")["pairs"][0]["id"]
    plain = served.ask(f"board/{pair}")
    assert plain[0] == 200 and plain[1]["content-type"] == "image/svg+xml" and plain[2].startswith(b"<svg")
    bodies = {served.ask(f"board/{pair}?show={shown}")[2] for shown in ("e5", "g1f3", "%2Bg8f6")}
    assert len(bodies | {plain[2]}) == 4
    for shown in ("e9", "e5e", "<script>", "a1b2c3", "e5%0A", "../../secret"):
        assert served.ask(f"board/{pair}?show={shown}")[0] == 404, shown
    assert served.ask("board/none")[0] == 404 and served.ask("board/..%2F..%2Fsecret")[0] == 404


NOT_VALID = [
    ({"best": "D"}, "choose"), ({"best": None}, "choose"), ({"best": ["A"]}, "choose"), ({"second": "A"}, "second"),
    ({"best": "tie", "second": "B"}, "second"), ({"tags": {"A": ["<b>"]}}, "tags"), ({"tags": {"Z": []}}, "tags"),
    ({"tags": []}, "tags"), ({"tags": {"A": [[]]}}, "tags"), ({"note": "x" * 4001}, "note"), ({"note": 1}, "note"),
    ({"token": "short"}, "token"), ({"token": None}, "token"), ({"pair": "none"}, "position"), ({"pair": []}, "position"),
]


def test_votes_that_are_not_valid_are_refused(served):
    served.log_in()
    pair = served.json("pairs")["pairs"][0]["id"]
    for changes, problem in NOT_VALID:
        status, _, body = served.ask("vote", vote_of(pair, **changes))
        assert status == 409 and problem in json.loads(body)["error"], changes
    assert served.votes == []


def test_bodies_that_are_no_objects_or_too_long_are_refused(served):
    served.log_in()
    for given in (b"", b"[]", b"{", b"[" * 5000, b"\xff", b"x" * 70_000):
        assert served.ask("vote", given)[0] == 409
    assert served.votes == []


def test_a_vote_that_is_sent_twice_counts_once_and_another_is_refused(served):
    """The answer to a vote may be lost on the way: the page then sends the vote again."""
    served.log_in()
    pair = served.json("pairs")["pairs"][0]["id"]
    assert served.ask("vote", vote_of(pair))[0] == served.ask("vote", vote_of(pair))[0] == 200
    assert served.ask("vote", vote_of(pair, token="f" * 16, best="B"))[0] == 409
    assert [line["best"] for line in served.votes] == ["A"]
    for _ in range(2):
        assert served.ask("undo", {"pair": pair})[0] == 200
    assert served.ask("vote", vote_of(pair))[0] == 409, "a copy of a vote that was taken back does not come back"
    assert served.ask("vote", vote_of(pair, token="f" * 16, best="B", note="\ud800 half"))[0] == 200
    assert [line.get("best", "undo") for line in served.votes] == ["A", "undo", "B"]
    assert served.votes[2]["again"] and not served.votes[0]["again"]
    assert served.json(f"pair/{pair}")["vote"]["best"] == "B"


def test_payloads_are_sent_as_data(tmp_path):
    write_made(tmp_path / "run", [(text, "plain") for text in PAYLOADS])
    with Served(tmp_path / "run") as made:
        made.log_in()
        for one, text in zip(made.json("pairs")["pairs"], PAYLOADS):
            status, headers, body = made.ask(f"pair/{one['id']}")
            assert headers["content-type"] == "application/json"
            texts = ["".join(words for words, _ in comment["parts"]) for comment in json.loads(body)["comments"]]
            assert text in texts
