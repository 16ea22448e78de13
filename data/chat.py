"""Turns chat rows into token ids and says which of them are supervised: the assistant's text and its stop token.
Training sees the same prompts as a server, id by id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence

from data.records import BadRow, Dropped, Row, thought_and_answer

STOP_TOKEN = "<|im_end|>"
OPEN_BLOCK = "<think>\n"
CLOSED_BLOCK = "<think>\n\n</think>\n\n"


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
        ValueError: the tokenizer has no chat template or no `<|im_end|>`.
    """

    def __init__(self, tokenizer: Any, think: str) -> None:
        name = tokenizer.name_or_path
        if not isinstance(tokenizer.chat_template, str):
            found = f"several named ones: {', '.join(tokenizer.chat_template)}" if tokenizer.chat_template else "none"
            raise ValueError(f"{name}: expected one chat template, found {found}. Use an instruction-tuned (chat) model")
        if STOP_TOKEN not in tokenizer.get_vocab():
            raise ValueError(f"{name}: the tokenizer has no {STOP_TOKEN}. Only ChatML models (Qwen, SmolLM2) are supported")
        # a tokenizer.json may switch these on, which would silently change ids and masks
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.think = think
        self.stop_id: int = tokenizer.convert_tokens_to_ids(STOP_TOKEN)
        # without tags such as <think>, which are added but not special tokens and may occur in a text
        self.control_tokens = tuple(token for token in tokenizer.all_special_tokens if token)

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
        """Tokenizes rows as one batch, which the tokenizer works on in parallel; one entry for each row, in order.

        Every assistant turn is supervised. Turns share one example as long as the prompt of the next turn begins with
        all ids of the example so far. Where the template renders an earlier turn differently from the last one (Qwen
        drops the think block), the next turn starts a new example.
        """
        texts: list[str] = []
        outcomes: list[Dropped | None] = []
        for row in rows:
            try:
                texts += self.turn_texts(row)
                outcomes.append(None)
            except BadRow as bad:
                outcomes.append(Dropped(row.line, row.source, bad.reason, bad.detail, bad=True))
        encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        encoded = iter([encoding.ids for encoding in encodings])
        return [
            outcome or self.join_turns(row, [(next(encoded), next(encoded)) for _ in row.turns])
            for row, outcome in zip(rows, outcomes)
        ]

    def turn_texts(self, row: Row) -> list[str]:
        """Prompt and written text of every turn: prompt 1, text 1, prompt 2, text 2, ..."""
        self.check_no_control_tokens(row)
        texts = []
        answers_at = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
        for turn, index in zip(row.turns, answers_at):
            thinking = turn.thought is not None
            try:
                prompt = self.prompt(row.messages[:index], thinking)
            except Exception as error:  # templates raise jinja's errors or TypeError, which share no narrower base
                raise BadRow("refused by the chat template", str(error)) from None
            written = turn.answer if turn.thought is None else thought_and_answer(turn.thought, turn.answer)
            # the prompt may have opened the thought already
            texts += [prompt, written.removeprefix(OPEN_BLOCK) if prompt.endswith(OPEN_BLOCK) else written]
        return texts

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
