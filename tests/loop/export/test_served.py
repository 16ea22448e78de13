"""Who wrote the answers: a real server that decodes with the trained model, the untuned one, or one that is neither; and
servers that cannot be asked."""

import json
import socket
import sys
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml

import train
from data.chat import ChatFormat
from loop import checkpoint
from loop.config import load_config
from loop.export import served
from loop.export.expected import Walk
from loop.export.served import Answer, Scores, judge, prove_server
from loop.run import load_tokenizer
from loop.state import load_adapters
from model.build import build
from model.decode.generate import generate
from model.lora import adapters_off
from model.weights.fetch import model_directory
from tests.conftest import tiny_settings


class Trained:
    """A run that has learned its rows, and a decoder of its model."""

    def __init__(self, run_dir):
        self.config = load_config(run_dir / "config.yaml")
        self.model_dir = model_directory(self.config.model.path)
        self.adapter = checkpoint.load(checkpoint.best(run_dir)).adapter
        self.chat = ChatFormat(load_tokenizer(self.model_dir), "strip")
        self.stage = build(self.model_dir, "float32", self.config.lora, seed=0, device=torch.device("cpu"), recompute=False)

    def walk(self, scale=1.0):
        return Walk(self.model_dir, self.config, scaled(self.adapter, scale), False, None)

    def reply(self, question, scale, ending):
        """What a server of the model answers."""
        load_adapters(self.stage.adapters(), scaled(self.adapter, scale))
        text = self.chat.prompt(question["messages"]) + ending
        prompt = self.chat.tokenizer(text, add_special_tokens=False).input_ids
        with nullcontext() if scale else adapters_off(self.stage):
            answer, = generate(self.stage, [prompt], stop_id=self.chat.stop_id, max_tokens=question["max_tokens"])
        assert question["temperature"] == 0
        return {"choices": [{"message": {"role": "assistant", "content": self.chat.tokenizer.decode(answer.text_ids)},
                             "finish_reason": "stop" if answer.stopped else "length",
                             "logprobs": {"content": [{"logprob": log_prob} for log_prob in answer.log_probs]}}],
                "usage": {"prompt_tokens": len(prompt)}}


def scaled(adapter, scale):
    return {name: tensor * scale if "lora_B" in name else tensor for name, tensor in adapter.items()}


@pytest.fixture(scope="module")
def trained(tiny_llama, tiny_rows, tmp_path_factory):
    """A run long enough for answers in letters: bytes that are no text would not come back as the same tokens."""
    directory = tmp_path_factory.mktemp("trained")
    config = tiny_settings(tiny_llama, tiny_rows, directory / "train.log", {"train__epochs": 8, "eval__every": 99})
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(sys, "argv", ["train.py", "--config", "config.yaml"])
        train.main()
    return Trained(directory / "checkpoints/tiny")


@contextmanager
def serving(reply, models=("coach",)):
    """A server whose chat completions are what `reply` makes of a question: an object, or a status and a text."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send(200, {"data": [{"id": name} for name in models]} if self.path == "/v1/models" else {})

        def do_POST(self):
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions" and question["model"] in models
            answer = reply(question)
            self.send(*answer if isinstance(answer, tuple) else (200, answer))

        def send(self, status, body):
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", "http://elsewhere.example/v1")
            self.end_headers()
            self.wfile.write((body if isinstance(body, str) else json.dumps(body)).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(served, "MAX_TOKENS", 40)


@pytest.mark.parametrize("scale, ending, verdict, said", [
    (1.0, "", "same", "serves the trained model: 6 of 6"),
    (0.0, "", "looks like the base, differs at token 1:", "serves the untuned model: 0 of 6"),
    (0.7, "", "differs at token", "serves another model than the trained one: 0 of 6"),
    (1.0, "<think>\n", "another chat template", "gives the model other prompts than training: 0 of 6"),
])
def test_whose_answers_a_server_gives(trained, capsys, scale, ending, verdict, said):
    with serving(lambda question: trained.reply(question, scale, ending)) as url:
        assert prove_server(url + "/v1/", trained.walk(), trained.chat, 6, None) == (verdict == "same")
    *_, conclusion = lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 6 + 1
    assert all(verdict in line for line in lines[2:-1])
    assert said in conclusion
    if scale == 1 and not ending:
        assert float(conclusion.split()[-3]) < 1e-5  # log-probabilities, in float32


def test_a_server_without_log_probabilities_is_judged_by_its_text(trained, capsys):
    def reply(question):
        answer = trained.reply(question, 1.0, "")
        return {"choices": [{"message": answer["choices"][0]["message"], "finish_reason": "length"}]}

    with serving(reply) as url:
        assert prove_server(url, trained.walk(), trained.chat, 2, "coach")
    assert capsys.readouterr().out.count("not given") == 2


def test_a_thought_beside_the_answer_means_another_prompt(trained, capsys):
    def reply(question):
        return {"choices": [{"message": {"content": None, "reasoning_content": "It eyes"}, "finish_reason": "length"}]}

    with serving(reply) as url:
        assert not prove_server(url, trained.walk(), trained.chat, 2, None)
    assert capsys.readouterr().out.count("holds a thought, which training left out") == 2


def test_a_model_trained_to_think_is_asked_with_rows_that_have_a_thought(trained, write_rows, make_row):
    rows = [make_row("Why?", "So."), make_row("Why?", "<think>\nHm.\n</think>\n\nSo.")]
    data = replace(trained.config.data, eval=write_rows(rows), sources=["textbook"], think="keep")
    row, = served.held_out_rows(replace(trained.config, data=data), 5)
    reply = {"choices": [{"message": {"content": "So.", "reasoning": "Hm."}, "finish_reason": "stop"}]}
    with serving(lambda question: reply) as url:
        answer = served.ask(url + "/v1", "coach", row, trained.chat)
    assert (answer.line, answer.thinks) == (2, False)
    assert trained.chat.tokenizer.decode(answer.ids) == "<think>\nHm.\n</think>\n\nSo.<|im_end|>"


def test_answers_that_the_untuned_model_gives_as_well_prove_nothing(trained, monkeypatch):
    monkeypatch.setattr(served, "ROUNDING", 99.0)  # then every answer is the trained model's, and the untuned one's too
    with serving(lambda question: trained.reply(question, 1.0, "")) as url:
        with pytest.raises(ValueError, match="the untuned model gives the same answers, so they prove nothing"):
            prove_server(url, trained.walk(), trained.chat, 1, None)


@pytest.mark.parametrize("gap, untuned, verdict, said", [
    (0.0, -9.0, "same", "same"),
    (0.4, -9.0, "same", "same, but for rounding at token 2 (0.4)"),
    (0.6, -9.0, "differs", "differs at token 2: 'b', expected 'x', 0.6 likelier"),
    (0.6, -0.1, "base", "looks like the base, differs at token 2: 'b', expected 'x', 0.6 likelier"),
])
def test_rounding_may_decide_between_tokens_that_are_about_as_likely(gap, untuned, verdict, said):
    answer = Answer(1, [7], 1, [ord("a"), ord("b")], [], False)
    trained = Scores(torch.tensor([-0.5, -1.0]), torch.tensor([0, gap]), torch.tensor([ord("a"), ord("x")]))
    base = Scores(torch.full((2,), untuned), torch.zeros(2), torch.zeros(2))
    assert judge(answer, trained, base, lambda ids: "".join(map(chr, ids))) == (verdict, said)


@pytest.mark.parametrize("reply, model, said", [
    ((503, "loading model\nplease wait"), None, r"completions: the server answers 503 Service Unavailable: loading model$"),
    ((302, ""), None, r"the server answers 302 Found: http://elsewhere.example/v1"),
    ("<html>", None, r"a reply that is no JSON, '<html>'\. Expected an OpenAI-compatible server"),
    ({"answer": "e4"}, None, r'no answer in {"answer": "e4"}\. Expected an OpenAI-compatible server'),
    ({"choices": [{"message": {}, "finish_reason": "length"}]}, None, r"the answer to held-out line 1 is empty"),
    ({}, "couch", r"--model is couch, http://127.0.0.1:\d+/v1 has: coach$"),
])
def test_a_server_that_does_not_answer_is_described(trained, reply, model, said):
    with serving(lambda question: reply if isinstance(reply, (tuple, dict)) else (200, reply)) as url:
        with pytest.raises(ValueError, match=said):
            prove_server(url, trained.walk(), trained.chat, 2, model)


def test_several_models_are_listed_and_one_has_to_be_named(trained):
    with serving(lambda question: trained.reply(question, 1.0, ""), models=("base", "coach")) as url:
        with pytest.raises(ValueError, match="--model is not given, .* has: base, coach$"):
            prove_server(url, trained.walk(), trained.chat, 2, None)
        assert prove_server(url, trained.walk(), trained.chat, 2, "coach")


@pytest.mark.parametrize("url, said", [
    ("localhost:8000", "--prove is 'localhost:8000'. Expected an OpenAI-compatible server"),
    ("file:///etc", "--prove is 'file:///etc'"),
    ("http://127.0.0.1:1", "http://127.0.0.1:1/v1/models: no reply, .*refused"),
    ("http://127.0.0.1:port", "no reply, nonnumeric port"),
    ("http://[::1", "no reply, Invalid IPv6 URL"),
])
def test_what_is_no_server_is_refused(trained, url, said):
    with pytest.raises(ValueError, match=said):
        prove_server(url, trained.walk(), trained.chat, 2, None)


def test_a_silent_server_is_given_up(trained, monkeypatch):
    monkeypatch.setattr(served, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        with pytest.raises(ValueError, match="no reply, timed out"):
            prove_server(f"http://127.0.0.1:{listening.getsockname()[1]}", trained.walk(), trained.chat, 2, None)
