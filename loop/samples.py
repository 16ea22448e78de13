"""What the model writes for the same few held-out rows at each evaluation. Greedy, on rank 0, while the other ranks wait.
Costs the decoder's cache for these rows, and on a CPU what it keeps of the weights (model/decode/)."""

from __future__ import annotations

from typing import Any

from data.chat import ChatFormat
from data.records import evenly
from data.tokenized import TokenizedRows
from model.decode.generate import generate
from model.stages import Stage

MAX_TOKENS = 200  # of an answer


def samples(stage: Stage, rows: TokenizedRows, number: int, step: int, chat: ChatFormat) -> list[dict[str, Any]]:
    """A record for each of `number` rows, evenly spread over the file: step, line, prompt, answer, reference.

    A row's prompt is what stands before its first supervised token, as in training.

    Args:
        stage: a stage that holds the whole model.
    """
    chosen = evenly(range(len(rows)), number)
    prompts, references = [], []
    for index in chosen:
        ids, supervised = (values.tolist() for values in rows.example(index))
        start = supervised.index(1)
        stop = next((i for i in range(start, len(ids)) if not supervised[i] or ids[i] == chat.stop_id), len(ids))
        prompts.append(ids[:start])
        references.append(ids[start:stop])
    answers, decode = generate(stage, prompts, stop_id=chat.stop_id, max_tokens=MAX_TOKENS), chat.tokenizer.decode
    return [{"step": step, "line": int(rows.lines_E[index]), "prompt": decode(prompt), "answer": decode(answer.text_ids),
             "stopped": answer.stopped, "reference": decode(reference)}
            for index, prompt, answer, reference in zip(chosen, prompts, answers, references)]
