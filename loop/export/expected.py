"""What the trainer computes on a few held-out rows, in float32: tuned and untuned, and what an export of it must compute.
A few decoder layers at a time: costs at most two such parts of the model in float32, and the hidden states of the rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from data.chat import ChatFormat
from data.records import Row, evenly, read_split
from data.template import PASSED
from loop.config import Config
from loop.state import load_adapters
from model.build import build, text_config
from model.lora import LoraLinear, adapters_off
from model.mixers import Segments
from model.moe.experts import Adapter, FrozenExperts, LoraExperts
from model.quant import FrozenLinear
from model.stages import Stage
from model.weights.checkpoint_files import Checkpoint

# T tokens of all rows in one stream, N positions that are compared, D hidden size, V compared logits, L layers

NUM_ROWS, NUM_POSITIONS = 8, 16  # of each row as many supervised positions
CANDIDATES = 64  # rows, evenly spread over the file, of which the shortest are taken
MAX_TOKENS = 2048  # of all rows
PART_BYTES = 2 * 2**30  # of the layers, in float32, that are in memory at a time
VOCABULARY = 512  # logits that are compared at each position


@dataclass(frozen=True)
class Question:
    """A held-out row up to a few tokens of its answer."""

    messages: list[dict[str, str]]  # before the answer
    passed: list[dict[str, bool]]  # what a server may pass to the template for this prompt
    prompt: list[int]
    ids: list[int]  # the prompt and the first tokens of the answer


@dataclass
class Computed:
    """What one version of the model computes."""

    hidden: list[Tensor] = field(default_factory=list)  # [T, D] in front of each layer and behind the last; only where kept
    logits_NV: Tensor = field(default_factory=lambda: torch.empty(0))
    loss: float = 0.0  # mean cross-entropy of the token that follows


def questions(config: Config, chat: ChatFormat) -> list[Question]:
    """The shortest of some held-out rows, so that a proof takes moments.

    Raises:
        ValueError: no held-out row can be used.
    """
    rows = [row for row in read_split(config.data, "eval") if isinstance(row, Row)]
    rows = evenly(rows, CANDIDATES)
    found: list[Question] = []
    for row, examples in zip(rows, chat.examples(rows)):
        if isinstance(examples, list):
            ids, first = examples[0].ids, examples[0].supervised.index(True)
            before = next(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
            off, *on = PASSED
            passed = list(PASSED) if chat.think == "strip" else on if row.turns[0].thought is not None else [off]
            found.append(Question(list(row.messages[:before]), passed, ids[:first], ids[: first + NUM_POSITIONS]))
    found.sort(key=lambda question: len(question.ids))
    taken: list[Question] = []
    for question in found[:NUM_ROWS]:
        if not taken or sum(len(other.ids) for other in [*taken, question]) <= MAX_TOKENS:
            taken.append(question)
    if not taken:
        raise ValueError(f"{config.data.file('eval')}: no held-out row to prove the export with. Name others with data.eval")
    return taken


def positions(asked: list[Question]) -> Tensor:
    """Where in the stream of all rows a token of an answer follows: [N]."""
    starts = torch.tensor([0] + [len(question.ids) for question in asked]).cumsum(0)
    return torch.cat([start + torch.arange(len(question.prompt) - 1, len(question.ids) - 1)
                      for start, question in zip(starts.tolist(), asked)])


def compared_logits(num_logits: int, labels: Tensor) -> Tensor:
    """The vocabulary ids whose logits are compared: the labels, and others that are the same for each proof. [V]"""
    others = torch.randperm(num_logits, generator=torch.Generator().manual_seed(0))[:VOCABULARY]
    return torch.cat([labels, others]).unique()[:VOCABULARY]


class Walk:
    """Versions of the model that go through the same layers side by side, on the same rows.

    Args:
        as_trained: the tuned model is that on the quantized base weights, as in training, not on the published ones.
        rounded: what its merged weights are rounded to; None: adapters stay beside the weights.
    """

    def __init__(self, model_dir: Path, config: Config, adapter: dict[str, Tensor], as_trained: bool,
                 rounded: torch.dtype | None) -> None:
        self.model_dir, self.config, self.adapter = model_dir, config, adapter
        self.as_trained, self.rounded = as_trained, rounded
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        parameters = sum(math.prod(info.shape) for info in Checkpoint(model_dir).tensors.values())
        self.num_layers = text_config(model_dir).num_hidden_layers
        self.step = max(PART_BYTES * self.num_layers // (4 * parameters), 1)  # layers
        self.has_experts = hasattr(text_config(model_dir), "num_experts")
        self.wrong: list[str] = []  # tensors of a merged directory that are not as they must be

    def stage(self, model_dir: Path, base: str, layer: int) -> Stage:
        stop = min(layer + self.step, self.num_layers)
        stage = build(model_dir, base, self.config.lora, seed=0, device=self.device, recompute=False, first=2 * layer,
                      stop=2 * stop).eval()
        load_adapters(stage.adapters(), self.adapter)
        return stage

    def versions(self, layer: int, merged: Path | None) -> Iterator[tuple[str, Stage]]:
        """Each version's decoder layers from `layer` on, one version after another in the same memory."""
        published = trained = self.stage(self.model_dir, "float32", layer)
        with adapters_off(published):
            yield "untuned", published
        if self.config.model.base not in ("bf16", "float32"):
            yield "on published weights", published
            trained = self.stage(self.model_dir, "float32", layer)
            take_dequantized(trained, self.stage(self.model_dir, self.config.model.base, layer))
        yield "as trained", trained
        exported = trained if self.as_trained else published
        if self.rounded is not None:
            fold(exported, self.rounded)
        yield "exported", exported
        if merged is not None:
            self.wrong += differing(exported, self.stage(merged, "float32", layer), self.rounded or torch.float32)

    @torch.no_grad()
    def compute(self, asked: list[Question], merged: Path | None = None) -> dict[str, Computed]:
        """What each version computes; `wrong` then names the tensors of a merged directory that differ.

        Args:
            merged: a directory to compare tensor by tensor with what is expected of it.
        """
        ids_T = torch.tensor([token for question in asked for token in question.ids], device=self.device)
        lengths = tuple(len(question.ids) for question in asked)
        positions_T = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(self.device, torch.int32)
        segments = Segments(cu_seqlens, lengths)
        at_N = positions(asked).to(self.device)
        states: dict[str, Tensor] = {}
        computed: dict[str, Computed] = {}
        for layer in range(0, self.num_layers, self.step):
            for name, stage in self.versions(layer, merged):
                done = computed.setdefault(name, Computed())
                x_1TD, rotary = stage.begin(states.get(name, ids_T[None]), positions_T)
                for number in range(stage.first // 2, stage.stop // 2):
                    if name == "exported":
                        done.hidden.append(x_1TD[0].cpu())
                    x_1TD = stage.run_layer(number, x_1TD, rotary, segments)
                states[name] = x_1TD
                if stage.is_last:
                    labels_N = ids_T[at_N + 1]
                    logits_NV = F.linear(stage.model.model.norm(x_1TD[0, at_N]), stage.model.lm_head.weight)
                    done.loss = F.cross_entropy(logits_NV, labels_N).item()
                    done.logits_NV = logits_NV[:, compared_logits(logits_NV.shape[1], labels_N.cpu()).to(self.device)].cpu()
        computed["exported"].hidden.append(states["exported"][0].cpu())
        return computed


def take_dequantized(stage: Stage, quantized: Stage) -> None:
    """Gives a stage in float32 the values that the weights of a quantized stage have in its matmuls."""
    modules = dict(quantized.named_modules())
    for name, module in stage.named_modules():
        other: Any = modules[name]
        if isinstance(module, FrozenLinear):
            module.put(0, other.dequantize())
        elif isinstance(module, FrozenExperts):
            for e in range(module.num_experts):
                module.put(e, other.gate_up_proj.dequantize(e, e + 1)[0], other.down_proj.dequantize(e, e + 1)[0])


def fold(stage: Stage, dtype: torch.dtype) -> None:
    """Adds each adapter to its weight, in the slices in which training uses both; rounds what was added to `dtype`."""
    for module in stage.modules():
        if isinstance(module, LoraLinear):
            weight = module.base.dequantize() + module.scaling * module.lora_B @ module.lora_A
            module.base.put(0, weight.to(dtype))
            module.enabled = False
        elif isinstance(module, LoraExperts):
            for matrices, pair in ((module.base.gate_up_proj, module.base_layer), (module.base.down_proj, module)):
                adapter = Adapter(pair.lora_A, pair.lora_B, module.scaling, module.base.num_experts, False)
                for e in range(module.base.num_experts):
                    one = slice(e, e + 1)
                    added_1OI = adapter.b_GOR(adapter.b, one) @ adapter.a_GRI(adapter.a, one)
                    matrices.put(e, (matrices.dequantize(e, e + 1) + module.scaling * added_1OI)[0].to(dtype))
            module.enabled = False


def differing(expected: Stage, found: Stage, dtype: torch.dtype) -> list[str]:
    """The names of the weights of a merged directory that are further from the expected ones than one rounding."""
    wrong = []
    modules = dict(found.named_modules())
    for name, module in expected.named_modules():
        other: Any = modules[name]
        pairs: list[tuple[str, Tensor, Tensor]] = []
        if isinstance(module, FrozenLinear):
            pairs.append((name.removesuffix(".base"), module.dequantize(), other.dequantize()))
        elif isinstance(module, FrozenExperts):
            for which in ("gate_up_proj", "down_proj"):
                ours, theirs = (getattr(experts, which) for experts in (module, other))
                pairs += [(f"{name.removesuffix('.base')}.{e}.{which}", ours.dequantize(e, e + 1), theirs.dequantize(e, e + 1))
                          for e in range(module.num_experts)]
        elif not isinstance(module, (LoraLinear, LoraExperts)):
            pairs += [(f"{name}.{last}", parameter, getattr(other, last))
                      for last, parameter in module.named_parameters(recurse=False) if not last.startswith("lora_")]
        for where, ours, theirs in pairs:
            # the two sums of base and adapter may be rounded to neighbours
            if not torch.allclose(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-6 * ours.abs().max().item()):
                wrong.append(where.removeprefix("model."))
    return wrong
