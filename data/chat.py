"""Turns chat rows into token ids and says which of them are supervised: the assistant's text and its stop token.
Training sees the same prompts as a server, id by id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence

from jinja2 import TemplateSyntaxError

from data.limits import RENDER_S, TooSlow, time_limit
from data.records import THINK_BLOCK, BadRow, Dropped, Row, thought_and_answer

STOP_TOKEN = "<|im_end|>"
OPEN_BLOCK = "<think>\n"
CLOSED_BLOCK = "<think>\n\n</think>\n\n"
QUESTION = "Is the knight on f3 or on g1?"  # tried on every template
MAX_SLOW_ROWS = 3  # after so many the template is to blame, not the rows
REMEDY = "Take chat_template.jinja and tokenizer_config.json from the model's publisher once more"


Rendered = list[str] | Dropped  # prompt and written text of every turn; or why the row is not trained on


@dataclass(frozen=True)
class Example:
    """One sequence to train on. `supervised[i]` says that `ids[i]` is a target of the loss."""

    row: Row
    ids: list[int]
    supervised: list[bool]


class ChatFormat:
    """Renders rows with the tokenizer's own chat template, as a server does.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        think: `strip` renders with thinking off, `keep` with thinking on where the row has a thought.

    Raises:
        ValueError: the tokenizer has no `<|im_end|>`, no chat template, or one that is broken or leaves out the messages.
    """

    def __init__(self, tokenizer: Any, think: str) -> None:
        name = tokenizer.name_or_path
        if not isinstance(tokenizer.chat_template, str):
            found = f"several named ones: {', '.join(tokenizer.chat_template)}" if tokenizer.chat_template else "none"
            raise ValueError(f"{name}: expected one chat template, found {found}. Use an instruction-tuned (chat) model")
        if tokenizer.backend_tokenizer.token_to_id(STOP_TOKEN) is None:
            raise ValueError(f"{name}: the tokenizer has no {STOP_TOKEN}. Only ChatML models (Qwen, SmolLM2) are supported")
        # a tokenizer.json may switch these on, which would silently change ids and masks
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self.tokenizer, self.name = tokenizer, name
        self.num_slow_rows = 0
        self.think = think
        self.stop_id: int = tokenizer.convert_tokens_to_ids(STOP_TOKEN)
        # without tags such as <think>, which are added but not special tokens and may occur in a text
        self.control_tokens = tuple(token for token in tokenizer.all_special_tokens if token)
        self.try_template()

    def try_template(self) -> None:
        """Renders one question. What a template refuses, such as a chat without a system message, the rows will show."""
        where = f"{self.name}: its chat template"
        try:
            with time_limit(RENDER_S):
                prompt = self.prompt([{"role": "user", "content": QUESTION}])
        except TemplateSyntaxError as error:
            raise ValueError(f"{where} has an error in line {error.lineno}: {error.message}. {REMEDY}") from None
        except TooSlow:
            raise ValueError(f"{where} takes over {RENDER_S:g} s for one short question. {REMEDY}") from None
        except Exception:  # jinja's errors, TypeError and others share no narrower base
            return
        if QUESTION not in prompt:
            raise ValueError(f"{where} leaves out the messages: of {QUESTION!r} it makes {prompt[:80]!r}. {REMEDY}")

    def prompt(self, messages: Sequence[dict[str, str]], thinking: bool = False) -> str:
        """The text that a server gives to the model for these messages, up to where the model starts to write.

        Some templates open a think block even with thinking off (Qwen3-4B-Thinking-2507 has no switch). The prompt then
        closes the empty block, as review and the exported template do.
        """
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        if not thinking and text.rstrip().endswith("<think>"):
            text = text[: text.rindex("<think>")] + CLOSED_BLOCK
        return text

    def examples(self, rows: Sequence[Row]) -> list[list[Example] | Dropped]:
        """One entry for each row, in order: its sequences, or why it is dropped.

        Every assistant turn is supervised. Turns share one example as long as the prompt of the next turn begins with
        all ids of the example so far. Where the template renders an earlier turn differently from the last one (Qwen
        drops the think block), the next turn starts a new example.
        """
        rendered = self.render(rows)
        return self.join(rows, rendered, self.encode(rendered))

    def render(self, rows: Sequence[Row]) -> list[Rendered]:
        """The texts of each row's turns; only the main thread can stop a template that takes too long."""
        rendered: list[Rendered] = []
        with time_limit(RENDER_S) as start_anew:
            for row in rows:
                start_anew()
                try:
                    rendered.append(self.turn_texts(row))
                except BadRow as bad:
                    rendered.append(Dropped(row.line, row.source, bad.reason, bad.detail, bad=True))
                except TooSlow:
                    rendered.append(self.slow_row(row))
        return rendered

    def encode(self, rendered: Sequence[Rendered]) -> list[list[int]]:
        """The ids of each text, by a batch on which the tokenizer works with all cores and without Python's lock."""
        texts = [text for outcome in rendered if isinstance(outcome, list) for text in outcome]
        encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def join(self, rows: Sequence[Row], rendered: Sequence[Rendered], ids: list[list[int]]) -> list[list[Example] | Dropped]:
        encoded = iter(ids)
        return [
            outcome if isinstance(outcome, Dropped) else
            self.join_turns(row, [(next(encoded), next(encoded)) for _ in row.turns])
            for row, outcome in zip(rows, rendered)
        ]

    def slow_row(self, row: Row) -> Dropped:
        self.num_slow_rows += 1
        if self.num_slow_rows == MAX_SLOW_ROWS:
            raise ValueError(f"{self.name}: its chat template takes over {RENDER_S:g} s for each of {MAX_SLOW_ROWS} rows, the "
                             f"last in line {row.line}. {REMEDY}")
        detail = f"the template of {self.name} takes over {RENDER_S:g} s for its {len(row.messages)} messages"
        return Dropped(row.line, row.source, "slow to render", detail, bad=True)

    def turn_texts(self, row: Row) -> list[str]:
        """Prompt and written text of every turn: prompt 1, text 1, prompt 2, text 2, ..."""
        self.check_no_control_tokens(row)
        texts = []
        answers_at = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
        for turn, index in zip(row.turns, answers_at):
            thinking = turn.thought is not None
            try:
                prompt = self.prompt(row.messages[:index], thinking)
            except TooSlow:
                raise
            except Exception as error:  # templates raise jinja's errors or TypeError, which share no narrower base
                raise BadRow("refused by the chat template", str(error)) from None
            self.check_all_is_said(row.messages[:index], prompt)
            written = turn.answer if turn.thought is None else thought_and_answer(turn.thought, turn.answer)
            # the prompt may have opened the thought already
            texts += [prompt, written.removeprefix(OPEN_BLOCK) if prompt.endswith(OPEN_BLOCK) else written]
        return texts

    def check_all_is_said(self, messages: Sequence[dict[str, str]], prompt: str) -> None:
        """Raises unless the prompt holds all messages, in order. Templates trim them, and leave out earlier thoughts."""
        position = 0
        for index, message in enumerate(messages):
            content = message["content"]
            text = (THINK_BLOCK.sub("", content) if message["role"] == "assistant" else content).strip()
            start = prompt.find(text, position)
            if start < 0:
                raise BadRow("left out by the chat template", f"messages[{index}].content, {text[:80]!r}, is missing or "
                             f"misplaced in the prompt that the template of {self.name} makes")
            position = start + len(text) if message["role"] != "system" else 0  # some templates say it with the last question

    def check_no_control_tokens(self, row: Row) -> None:
        for index, message in enumerate(row.messages):
            for token in self.control_tokens:
                if token in message["content"]:
                    raise BadRow("control token in text", f"messages[{index}].content holds {token}, which would end the turn")

    def join_turns(self, row: Row, turns: list[tuple[list[int], list[int]]]) -> list[Example]:
        examples: list[Example] = []
        for prompt, written in turns:
            so_far = examples[-1] if examples else None
            if so_far and prompt[: len(so_far.ids)] == so_far.ids:
                examples.pop()
                supervised = so_far.supervised + [False] * (len(prompt) - len(so_far.ids))
            else:
                supervised = [False] * len(prompt)
            written = written + [self.stop_id]
            examples.append(Example(row, prompt + written, supervised + [True] * len(written)))
        return examples
