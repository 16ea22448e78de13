"""Asks a running server for its answers to held-out rows, and says whether it is the trained model that wrote them.
Costs what expected.py does: a few decoder layers at a time in float32, and the hidden states of all rows.

Each token of a served answer is compared with what the trained model holds likeliest after the same tokens. So one token that
rounding decided otherwise spoils nothing behind it, and no answer has to be written a second time.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data.chat import OPEN_BLOCK, ChatFormat
from data.records import Row, evenly, one_answer_rows, thought_and_answer
from loop.config import Config
from loop.export.expected import Walk
from loop.samples import MAX_TOKENS
from model.mixers import Segments
from model.stages import Stage

# N tokens of an answer, T tokens of all prompts and answers in one stream, D hidden size, V vocabulary

# By so much, in log-probability, a greedy token may be less likely than the trained model's choice: logits of 16 to 32 in bf16
# are multiples of 0.125, and hidden states are rounded too. Right servers in bf16 reached 0.26 (docs/serving.md).
ROUNDING = 0.5
ANSWER_S = 300.0  # for which a server may be silent
MOST_BYTES = 2**24  # of a reply
EXPECTED = "Expected an OpenAI-compatible server, such as http://127.0.0.1:8000/v1"


@dataclass(frozen=True)
class Answer:
    """What the server answered to a row."""

    line: int
    prompt: list[int]  # as in training
    num_prompt_tokens: int | None  # as the server counts them, if it does
    ids: list[int]
    log_probs: list[float]  # of each id, if the server gives them
    thinks: bool  # whether the server gave a thought to a prompt without one


@dataclass(frozen=True)
class Scores:
    """What a model holds of an answer's tokens."""

    log_probs_N: Tensor
    gaps_N: Tensor  # how much less likely than the likeliest token
    likeliest_N: Tensor


def prove_server(url: str, walk: Walk, chat: ChatFormat, num_rows: int, model: str | None) -> bool:
    """Prints a row's line, tokens and verdict for each of `num_rows`, and a sentence; returns whether it is the trained model.

    Args:
        url: of the server, with or without /v1.
        model: its name on the server, needed if the server has several.

    Raises:
        ValueError: the server cannot be asked, or the answers cannot tell the trained model from the untuned one.
    """
    url = url.rstrip("/").removesuffix("/v1") + "/v1"
    name = find_model(url, model)
    answers = [ask(url, name, row, chat) for row in tqdm(held_out_rows(walk.config, num_rows), unit="answer", leave=False)]
    scores = score(walk, answers)
    verdicts, distances = [], []
    print(f"{url}, model {name}: greedy answers to held-out rows\n line  tokens  log-probabilities differ by")
    for answer, trained, untuned in zip(answers, scores["exported"], scores["untuned"]):
        verdict, said = judge(answer, trained, untuned, chat.tokenizer.decode)
        verdicts.append(verdict)
        shown = "not given"
        if len(answer.log_probs) == len(answer.ids):
            distances.append((torch.tensor(answer.log_probs) - trained.log_probs_N).abs().mean().item())
            shown = f"{distances[-1]:.1g}"
        print(f"{answer.line:5}  {len(answer.ids):6}  {shown:>9}  {said}")
    if set(verdicts) == {"same"} and not any((untuned.gaps_N > ROUNDING).any() for untuned in scores["untuned"]):
        raise ValueError(f"{url}: the untuned model gives the same answers, so they prove nothing. Take more --rows, or a "
                         "later checkpoint")
    mean = f" Log-probabilities differ by {sum(distances) / len(distances):.1g} on average." if distances else ""
    print(conclusion(url, verdicts) + mean)
    return set(verdicts) == {"same"}


def judge(answer: Answer, trained: Scores, untuned: Scores, decode: Callable[[list[int]], str]) -> tuple[str, str]:
    """Whose answer it is (same, prompt, base, differs), and what to say of it."""
    if answer.thinks:
        return "prompt", "holds a thought, which training left out: the template opens its block, or a parser looks for one"
    if answer.num_prompt_tokens not in (None, len(answer.prompt)):
        return "prompt", f"{answer.num_prompt_tokens} prompt tokens, {len(answer.prompt)} in training: another chat template"
    rounded, wrong = (torch.nonzero(trained.gaps_N > least)[:, 0].tolist() for least in (0, ROUNDING))
    if not wrong:
        return "same", f"same, but for rounding at token {rounded[0] + 1} ({trained.gaps_N.max():.2g})" if rounded else "same"
    at = wrong[0]
    ours, theirs = (decode([int(ids[at])]) for ids in (trained.likeliest_N, answer.ids))
    said = f"differs at token {at + 1}: {theirs!r}, expected {ours!r}, {trained.gaps_N[at]:.2g} likelier"
    if untuned.log_probs_N.sum() > trained.log_probs_N.sum():
        return "base", f"looks like the base, {said}"
    return "differs", said


def conclusion(url: str, verdicts: list[str]) -> str:
    same, prompt, base, differs = (verdicts.count(verdict) for verdict in ("same", "prompt", "base", "differs"))
    share = f"{same} of {len(verdicts)} answers are the trained model's"
    if same == len(verdicts):
        return f"{url} serves the trained model: {share}."
    if prompt:
        return f"{url} gives the model other prompts than training: {share}. Serve it with the exported chat_template.jinja."
    if base > differs:
        return f"{url} serves the untuned model: {share}, {base} look like the base. Its adapter is not on."
    return f"{url} serves another model than the trained one: {share}, {differs} differ. Are its weights quantized?"


def held_out_rows(config: Config, num_rows: int) -> list[Row]:
    """Evenly spread rows of one question and one answer; of those with a thought, if the model was trained to think."""
    rows = one_answer_rows(config.data)
    return evenly([row for row in rows if row.turns[0].thought is not None] or rows, num_rows)


@torch.no_grad()
def score(walk: Walk, answers: list[Answer]) -> dict[str, list[Scores]]:
    """What each version of the model holds of all answers, which go through the layers side by side."""
    streams = [answer.prompt + answer.ids for answer in answers]
    lengths = tuple(map(len, streams))
    ids_T = torch.tensor([token for stream in streams for token in stream], device=walk.device)
    positions_T = torch.cat([torch.arange(length) for length in lengths]).to(walk.device)
    segments = Segments(F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(walk.device, torch.int32), lengths)
    states: dict[str, Tensor] = {}
    scores: dict[str, list[Scores]] = {}
    for layer in range(0, walk.num_layers, walk.step):
        for name, stage in walk.versions(layer, None):
            states[name] = stage(states.get(name, ids_T[None]), positions_T, segments)
            if stage.is_last:
                hidden = states.pop(name)[0].split(lengths)
                scores[name] = [score_one(stage, h_TD, answer) for h_TD, answer in zip(hidden, answers)]
    return scores


def score_one(stage: Stage, h_TD: Tensor, answer: Answer) -> Scores:
    h_ND = stage.model.model.norm(h_TD[len(answer.prompt) - 1 : -1])
    log_p_NV = stage.model.lm_head(h_ND).log_softmax(-1)
    most_N, likeliest_N = log_p_NV.max(-1)
    log_probs_N = log_p_NV.gather(1, torch.tensor(answer.ids, dtype=torch.int64, device=h_TD.device)[:, None])[:, 0]
    return Scores(log_probs_N.cpu(), (most_N - log_probs_N).cpu(), likeliest_N.cpu())


def ask(url: str, model: str, row: Row, chat: ChatFormat) -> Answer:
    """The server's greedy answer to a row, whose messages the server's own chat template renders."""
    messages, thinking = row.messages[:-1], row.turns[0].thought is not None
    url += "/chat/completions"
    reply = call(url, {"model": model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, "logprobs": True})
    try:
        choice = reply["choices"][0]
        text = choice["message"].get("content") or ""
        thought = choice["message"].get("reasoning_content") or choice["message"].get("reasoning") or ""
        stopped, num_prompt_tokens = choice["finish_reason"] == "stop", (reply.get("usage") or {}).get("prompt_tokens") or None
        log_probs = [token["logprob"] for token in (choice.get("logprobs") or {}).get("content") or ()]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"{url}: no answer in {json.dumps(reply)[:200]}. {EXPECTED}") from None
    prompt = chat.prompt(messages, thinking)
    if thinking and thought:  # as the model wrote them
        text = thought_and_answer(thought.strip(), text)
        text = text.removeprefix(OPEN_BLOCK) if prompt.endswith(OPEN_BLOCK) else text
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # the longest answer may end within a character
    prompt_ids, ids = chat.tokenizer([prompt, text], add_special_tokens=False).input_ids
    ids += [chat.stop_id] * stopped
    if not ids and not thought:
        raise ValueError(f"{url}: the answer to held-out line {row.line} is empty: {json.dumps(reply)[:200]}")
    return Answer(row.line, prompt_ids, num_prompt_tokens, ids, log_probs[: len(ids)], bool(thought) and not thinking)


def find_model(url: str, wanted: str | None) -> str:
    """The model to ask for.

    Raises:
        ValueError: the server does not have it, or has several and none was named.
    """
    reply = call(f"{url}/models")
    try:
        names = [str(model["id"]) for model in reply["data"]]
    except (KeyError, TypeError):
        raise ValueError(f"{url}/models: no models in {json.dumps(reply)[:200]}. {EXPECTED}") from None
    chosen = names[0] if wanted is None and len(names) == 1 else wanted
    if chosen not in names:
        raise ValueError(f"--model is {wanted or 'not given'}, {url} has: {', '.join(names) or 'none'}")
    return str(chosen)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A reply from elsewhere would be taken for that of the server."""

    def redirect_request(self, *_: Any) -> None:
        return None


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    """What the server replies; asked directly, not by way of a proxy.

    Raises:
        ValueError: no server, an error of the server, or a reply that is no JSON.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--prove is {url.removesuffix('/v1/models')!r}. {EXPECTED}")
    opener = urllib.request.build_opener(NoRedirect, urllib.request.ProxyHandler({}))
    data = None if body is None else json.dumps(body).encode()
    text = ""
    try:
        with opener.open(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=ANSWER_S) as response:
            text = response.read(MOST_BYTES).decode(errors="replace")
        return json.loads(text)
    except urllib.error.HTTPError as error:
        said = error.headers.get("Location") or error.read(MOST_BYTES).decode(errors="replace").strip().partition("\n")[0]
        raise ValueError(f"{url}: the server answers {error.code} {error.reason}: {said[:300]}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        found = f"a reply that is no JSON, {text[:80]!r}" if text else f"no reply, {getattr(error, 'reason', error)}"
        raise ValueError(f"{url}: {found}. {EXPECTED}") from None
