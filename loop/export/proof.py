"""Proves that an exported directory computes what was trained, and renders the prompts that were trained on.
Costs the model in transformers, in float32; of a merged one, what does not fit the memory is read from the disk when needed.

The trainer computes its side a few layers at a time (expected.py). transformers then runs the rows twice: as it is, and with
the trainer's hidden states in front of each layer. The second run says which layer differs, and is exact also where a
difference grows from layer to layer, as in a mixture of experts, where rounding may decide which expert a token takes.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, FineGrainedFP8Config

from loop.checkpoint import read_json
from loop.export.expected import Question, Walk, compared_logits, positions
from loop.run import load_tokenizer
from model.weights.checkpoint_files import first_few
from model.weights.fetch import model_directory

# T tokens of all rows in one stream, D hidden size, N positions whose logits are compared, V compared logits

TOLERANCE = 1e-4  # relative, between two implementations in float32
MOST = 0.95  # of tokens that must be within it in a mixture of experts: where two experts tie, rounding decides
APART = 10  # how many times as far as from the tuned model an export must be from the untuned one


def prove(walk: Walk, asked: list[Question], directory: Path, kind: str) -> dict[str, float]:
    """Compares an exported directory with the trainer: prompts, weights, each layer, and logits.

    Args:
        kind: "peft" or "vllm" for adapters, whose names have the prefix that this loader wants, or "merged".

    Returns:
        the figures, by what they are.

    Raises:
        ValueError: the directory is not what was trained; says what is different.
    """
    check_prompts(directory, asked)
    computed = walk.compute(asked, directory if kind == "merged" else None)
    if walk.wrong:
        raise ValueError(f"{directory}: {len(walk.wrong)} weights are not base plus adapter: {first_few(walk.wrong)}")
    trained, exported, untuned = (computed[name] for name in ("as trained", "exported", "untuned"))
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-offloaded-") as offloaded:
        model = load(directory, kind, Path(offloaded)).eval()
        alone_NV = run(model, asked)
        forced_NV, layers = run_forced(model, asked, exported.hidden)
    share = MOST if walk.has_experts else 1.0
    off = [worst(there - ours, ours - before, share)
           for there, before, ours in zip(layers, exported.hidden, exported.hidden[1:])]
    figures = {
        "logits": apart(alone_NV, exported.logits_NV, share),
        "logits of the untuned model": apart(untuned.logits_NV, exported.logits_NV, share),
        "worst layer": max(off),
        "logits behind the trainer's layers": apart(forced_NV, exported.logits_NV, share),
    }
    figures |= {f"{name} against as trained": apart(version.logits_NV, trained.logits_NV, 1.0)
                for name, version in computed.items() if version is not trained}
    figures |= {f"loss {name}": version.loss for name, version in computed.items()}
    refuse(directory, figures, off, apart(alone_NV, untuned.logits_NV, share), walk.has_experts)
    return figures


def refuse(directory: Path, figures: dict[str, float], off: list[float], from_untuned: float, has_experts: bool) -> None:
    """Raises unless the figures are those of the tuned model."""
    logits, control = figures["logits"], figures["logits of the untuned model"]
    if control <= APART * TOLERANCE:
        raise ValueError(f"{directory}: logits of the tuned and the untuned model are {control:.1e} apart, too near to tell "
                         "whether the adapter is there. Take a later checkpoint")
    if from_untuned < logits:
        raise ValueError(f"{directory}: the adapter was dropped: transformers computes what the untuned model computes")
    wrong = [layer for layer, difference in enumerate(off) if difference > TOLERANCE]
    if wrong:
        raise ValueError(f"{directory}: {len(wrong)} decoder layers are further than {TOLERANCE:.0e} from the trainer's: "
                         f"{', '.join(map(str, wrong[:8]))} (layer {wrong[0]}: {off[wrong[0]]:.1e})")
    behind = figures["logits behind the trainer's layers"]
    if max(behind, 0 if has_experts else logits) > TOLERANCE or logits > control / APART:
        raise ValueError(f"{directory}: logits are {logits:.1e} from the trainer's ({behind:.1e} behind its last layer), "
                         f"expected at most {TOLERANCE:.0e}; all decoder layers agree")


def worst(difference_TX: Tensor, scale_TX: Tensor, share: float) -> float:
    """The largest relative difference of the best `share` of tokens; infinite where it is not a number."""
    relative_T = difference_TX.norm(dim=-1) / scale_TX.norm(dim=-1)
    return relative_T.nan_to_num(torch.inf).quantile(share, interpolation="lower").item()


def apart(a_NV: Tensor, b_NV: Tensor, share: float) -> float:
    """How far two models' logits are apart, relative to their spread."""
    return worst(a_NV - b_NV, b_NV - b_NV.mean(dim=-1, keepdim=True), share)


def check_prompts(directory: Path, asked: list[Question]) -> None:
    """Renders each question as a server does, whatever it says of thinking, and compares the ids with those of training."""
    tokenizer = load_tokenizer(directory)
    for number, question in enumerate(asked):
        for passed in question.passed:
            text = tokenizer.apply_chat_template(question.messages, tokenize=False, add_generation_prompt=True, **passed)
            ids, expected = tokenizer(text, add_special_tokens=False).input_ids, question.prompt
            if ids != expected:
                ends = [tokenizer.decode(other)[-60:] for other in (ids, expected)]
                raise ValueError(f"{directory}: its chat template, given {passed or 'nothing else'}, renders another prompt "
                                 f"than training: held-out row {number} ends in {ends[0]!r}, expected {ends[1]!r}")


def load(directory: Path, kind: str, offloaded: Path) -> Any:
    """The model in float32 as transformers and peft load it.

    Raises:
        ValueError: peft finds no place for an adapter, or no adapter for a place, or the base is too large for it.
    """
    placed: dict[str, Any] = {"device_map": "auto", "offload_folder": str(offloaded)}
    if kind == "merged":
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False, **placed)
    base = model_directory(read_json(directory / "adapter_config.json")["base_model_name_or_path"])
    config = read_json(base / "config.json")
    wrapped = kind == "vllm" and "vision_config" in config
    model_class = AutoModelForImageTextToText if wrapped else AutoModelForCausalLM
    if "quantization_config" in config:  # FP8; transformers dequantizes it to bf16 only
        placed["quantization_config"] = FineGrainedFP8Config(dequantize=True)
        model = model_class.from_pretrained(base, dtype=torch.bfloat16, trust_remote_code=False, **placed).float()
    else:
        model = model_class.from_pretrained(base, dtype=torch.float32, trust_remote_code=False, **placed)
    if any(parameter.is_meta for parameter in model.parameters()):  # peft would lose the adapters of modules on the disk
        raise ValueError(f"{base}: does not fit the memory in float32, as the proof of an adapter takes it. Take a larger "
                         "machine, or take --format merged, which is proved layer by layer")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(missing|unexpected).*adapter.*keys|.*adapter keys.*")
        try:
            return PeftModel.from_pretrained(model, directory)
        except UserWarning as warning:
            raise ValueError(f"{directory}: peft does not load every adapter: {' '.join(str(warning).split())[:300]}") from None


@torch.no_grad()
def run(model: Any, asked: list[Question]) -> Tensor:
    """Logits [N, V] of a model of transformers, one row at a time."""
    device = "cpu" if model.device.type == "meta" else model.device  # meta: on the disk; accelerate moves what goes in
    rows = [model(input_ids=torch.tensor([question.ids], device=device)).logits[0, positions([question])].float().cpu()
            for question in asked]
    logits_NV = torch.cat(rows)
    labels = torch.tensor([token for question in asked for token in question.ids[len(question.prompt):]])
    return logits_NV[:, compared_logits(logits_NV.shape[1], labels)]


def run_forced(model: Any, asked: list[Question], hidden: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Logits as of `run`, and the outputs [T, D] of the layers, each of which gets the trainer's hidden states as its input.

    Args:
        hidden: [T, D] in front of each layer.
    """
    layers = next(module for name, module in model.named_modules()
                  if name.endswith("layers") and len(getattr(module, "_modules")) == len(hidden) - 1)
    outputs: list[list[Tensor]] = [[] for _ in layers]
    parts = [part.split([len(question.ids) for question in asked]) for part in hidden]

    def give(layer: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (parts[layer][len(outputs[layer])][None].to(args[0]), *args[1:])

    def take(layer: int, output: Any) -> None:
        outputs[layer].append((output[0] if isinstance(output, tuple) else output)[0].float().cpu())

    handles = [handle for number, layer in enumerate(layers) for handle in (
        layer.register_forward_pre_hook(lambda _, args, number=number: give(number, args)),
        layer.register_forward_hook(lambda _, args, output, number=number: take(number, output)))]
    try:
        return run(model, asked), [torch.cat(rows) for rows in outputs]
    finally:
        for handle in handles:
            handle.remove()
