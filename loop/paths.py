"""Compares each fast path that a run would take with its plain reference, before the run takes it; switches off what differs.
Takes less than a second and some MiB at a start. `python -m loop.check` measures the same cases at a model's true sizes."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor

from data.files import write_text
from loop.compiling import PATHS_FILE, compiles, start_up
from loop.config import Config
from loop.distributed.groups import Ranks
from loop.optim import make_optimizer
from model import delta_rule
from model.build import text_config
from model.devices import OFF, ON, taking, without
from model.matmul import product_in_float32
from model.mixers import Segments, stream_attention
from model.moe import by_kernel
from model.moe.expert_weights import MATRICES
from model.moe.experts import FrozenExperts, has_grouped_kernel
from model.ops.fused import SwiGlu
from model.ops.heads import PlaceHeads
from model.ops.loss import cross_entropy, cross_entropy_and_gradient
from model.ops.norms import FusedNorm
from model.quant import LINEARS
from model.sizes import Sizes

BIAS_LIMIT = 0.003  # of the share by which results are too large or too small on the whole; rounding hardly moves the share
DTYPES = {torch.float32: 1e-4, torch.bfloat16: 0.008}  # limit of the relative error, where a path has no limit of its own
VERSIONS = ("torch", "transformers", "bitsandbytes", "triton", "fla-core")

Case = Callable[[Sizes, torch.dtype, torch.device], list[Tensor]]


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0, spread: float = 1.0) -> Tensor:
    """The same numbers for every device and dtype, up to rounding to bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * spread).bfloat16().to(device, dtype)


def three_segments(num_tokens: int, device: torch.device) -> Segments:
    lengths = (num_tokens // 2 + 3, 2, num_tokens - num_tokens // 2 - 5)
    return Segments(torch.tensor([0, lengths[0], lengths[0] + 2, num_tokens], dtype=torch.int32, device=device), lengths)


# The cases: outputs and gradients of what a path computes. Each runs with the path, without it, and without it in float32.


def attention(s: Sizes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    q, k, v = (random(1, s.tokens, heads, s.head_size, dtype=dtype, device=device, seed=i).transpose(1, 2).requires_grad_()
               for i, heads in enumerate((s.heads, s.kv_heads, s.kv_heads)))
    o = stream_attention(q, k, v, s.head_size**-0.5, three_segments(s.tokens, device))
    return [o, *torch.autograd.grad(o, (q, k, v), random(*o.shape, dtype=dtype, device=device, seed=3))]


def cpu_attention(s: Sizes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    with taking("compiled"):  # without which the path is not taken
        return attention(s, dtype, device)


def delta(s: Sizes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    channels = (2 * s.key_heads + s.value_heads) * s.delta_size
    qkv = random(1, s.tokens, channels, dtype=dtype, device=device).requires_grad_()
    g = (-0.1 * random(1, s.tokens, s.value_heads, dtype=torch.float32, device=device, seed=1).abs()).requires_grad_()
    beta = random(1, s.tokens, s.value_heads, dtype=dtype, device=device, seed=2).sigmoid().requires_grad_()
    weight = random(channels, 1, 4, dtype=dtype, device=device, seed=3)
    o = delta_rule.mixed(qkv, g, beta, weight, s.key_heads, s.delta_size, three_segments(s.tokens, device))
    return [o, *torch.autograd.grad(o, (qkv, g, beta), random(*o.shape, dtype=dtype, device=device, seed=4))]


def routed(s: Sizes, dtype: torch.dtype, device: torch.device, top_k: int = 2) -> tuple[FrozenExperts, Tensor, Tensor, Tensor]:
    """Experts, hidden states, and each token's experts and routing weights; the last expert gets no token."""
    experts = FrozenExperts(s.experts, s.hidden, s.expert_size, s.base, dtype, device)
    for e in range(s.experts):
        experts.put(e, *(random(*shape, dtype=torch.bfloat16, device=device, seed=e, spread=shape[1] ** -0.5)
                         for shape in ((2 * s.expert_size, s.hidden), (s.hidden, s.expert_size))))
    scores = random(s.tokens, s.experts, dtype=torch.float32, device=device)
    weight, index = scores[:, :-1].softmax(-1).topk(top_k)
    return experts, random(s.tokens, s.hidden, dtype=dtype, device=device, seed=1), index, weight.bfloat16().to(dtype)


def routed_experts(s: Sizes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    experts, x, index, weight = routed(s, dtype, device)
    y = experts(x.requires_grad_(), index, weight.requires_grad_())
    return [y, *torch.autograd.grad(y, (x, weight), random(*y.shape, dtype=dtype, device=device, seed=2))]


def quantized(base: str) -> Case:
    def case(s: Sizes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        linear = LINEARS[base](s.hidden, s.num_out, dtype, device)
        linear.put(0, random(s.num_out, s.hidden, dtype=torch.bfloat16, device=device, spread=s.hidden**-0.5))
        x = random(s.tokens, s.hidden, dtype=dtype, device=device, seed=1).requires_grad_()
        y = linear(x)
        results = [y, *torch.autograd.grad(y, x, random(*y.shape, dtype=dtype, device=device, seed=2))]
        if s.experts:
            experts = MATRICES[base]((2, s.expert_size, s.hidden), dtype, device)
            for e in range(2):
                experts.put(e, random(s.expert_size, s.hidden, dtype=torch.bfloat16, device=device, seed=e))
            results.append(experts.dequantize(0, 2))
        return results
    return case


def lora_gradients(s: Sizes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    a, b = (random(s.tokens, size, dtype=dtype, device=device, seed=i) for i, size in enumerate((s.hidden, 64)))
    return [product_in_float32(a.T, b)]


def optimizer(s: Sizes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The first update: later ones differ from AdamW's by the rounding of its moments."""
    weight = torch.nn.Parameter(torch.zeros(64, s.hidden, device=device))
    weight.grad = random(64, s.hidden, dtype=torch.float32, device=device)
    adamw = make_optimizer("adamw8bit", [weight], weight_decay=0.0)
    adamw.param_groups[0]["lr"] = 1.0
    adamw.step()
    return [weight.detach()]


def compiled(s: Sizes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """What the model computes elementwise, for a few tokens."""
    def some(*shape: int, seed: int = 1) -> Tensor:
        return random(*shape, dtype=dtype, device=device, seed=seed).requires_grad_()

    def both(function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
        found = function(*inputs)
        outputs = [found] if isinstance(found, Tensor) else list(found)
        return [*outputs, *torch.autograd.grad(outputs, inputs, [some(*y.shape, seed=9).detach() for y in outputs])]

    is_new, size = s.kind.startswith("qwen3_5"), s.head_size
    x, norm = some(1, 64, s.hidden), FusedNorm(some(s.hidden, seed=2).detach(), 1e-6, is_new)
    found = both(norm.of_sum, x, some(1, 64, s.hidden, seed=3)) + both(norm, x) + both(lambda x: norm.of_sum(x, None), x)
    found += both(SwiGlu.apply, some(64, s.num_out), some(64, s.num_out, seed=3))
    norms = None if s.kind == "llama" else (FusedNorm(some(size, seed=4).detach(), 1e-6, is_new),) * 2
    q, k = some(64, s.heads, size * (1 + is_new)), some(64, s.kv_heads, size, seed=3)  # a new query has a gate beside it
    cos, sin = (some(64, s.rotated // 2, seed=i).detach().repeat(1, 2) for i in (5, 6))
    found += both(lambda q, k: PlaceHeads.apply(q[..., :size], k, norms, cos, sin), q, k)
    logits, labels = some(16, s.vocabulary, seed=7).detach(), torch.arange(16, device=device)[:, None]
    return [*found, cross_entropy(logits, labels), *cross_entropy_and_gradient(logits, labels)]


@dataclass(frozen=True)
class FastPath:
    """One fast path: the case that proves it, the relative error allowed in half precision, and what takes its place."""

    case: Case
    instead: str
    limit: float = DTYPES[torch.bfloat16]
    bias_limit: float = BIAS_LIMIT
    own_sizes: bool = False  # proved at the model's sizes, for which a run then has the code


PATHS = {
    "attention": FastPath(attention, "one call of torch's attention for each row"),
    "cpu_attention": FastPath(cpu_attention, "one call of torch's attention for each row"),
    "delta_rule": FastPath(delta, "the rule in plain torch, faster than transformers' and slower than the kernel", 0.03, 0.01),
    "grouped_matmul": FastPath(routed_experts, "one matmul an expert"),
    "expert_kernel": FastPath(routed_experts, "one matmul an expert"),
    "int8": FastPath(quantized("int8"), "dequantizing in float32"),
    "nf4": FastPath(quantized("nf4"), "dequantizing by a table in plain torch"),
    "lora_gradients": FastPath(lora_gradients, "sums in half precision"),
    "compiled": FastPath(compiled, "one kernel of torch an operation", own_sizes=True),
    "adamw8bit": FastPath(optimizer, "AdamW of torch, with 8 bytes a trained parameter instead of 2"),
}


def taken(config: Config, model: Any, device: torch.device) -> list[str]:
    """The fast paths that a run takes on this device."""
    on_gpu, half = device.type == "cuda", config.model.base != "float32"
    s = Sizes.of(model, 0)
    generation = torch.cuda.get_device_capability(device)[0] if on_gpu else None
    example = torch.empty(8, 8, dtype=torch.bfloat16, device=device)
    used = {
        "attention": on_gpu and half,
        "cpu_attention": not on_gpu and half and compiles(config, model, device),
        "delta_rule": on_gpu and s.value_heads > 0 and not delta_rule.why_no_kernel(generation),
        "grouped_matmul": on_gpu and half and s.experts > 0 and has_grouped_kernel(example, example[None]),
        "expert_kernel": (half and s.experts > 0 and not config.lora.experts
                          and by_kernel.fits(example, s.hidden, s.expert_size)),
        config.model.base: config.model.base in ("int8", "nf4"),
        "lora_gradients": on_gpu and half,
        "compiled": compiles(config, model, device),
        "adamw8bit": config.train.optimizer == "adamw8bit",
    }
    return [name for name in PATHS if used.get(name)]


def switch_off_unfit(model: Any, device: torch.device) -> str:
    """Switches off the delta rule's kernel where it is not fit for this card, so that plans do without it too; says why."""
    if device.type != "cuda" or not Sizes.of(model, 0).value_heads:
        return ""
    why = delta_rule.why_no_kernel(torch.cuda.get_device_capability(device)[0])
    if why:
        OFF.add("delta_rule")
    return why


def compare(name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Runs a fast path and its plain reference on the same numbers.

    Returns:
        error: relative, against the reference in float32; bias: the share by which the path's numbers are too large;
        plain_error: the reference's own error in this dtype; problem: what is wrong with the path, "" if nothing is.
    """
    path = PATHS[name]
    limit = path.limit if dtype != torch.float32 else DTYPES[torch.float32]
    found: dict[str, Any] = {"error": None, "bias": None, "plain_error": None, "limit": limit, "problem": ""}
    with without(name):
        truth, plain = path.case(sizes, torch.float32, device), path.case(sizes, dtype, device)
    found["plain_error"] = max(map(relative, plain, truth))
    try:
        with taking(name):
            fast = path.case(sizes, dtype, device)
        found["error"], found["bias"] = max(map(relative, fast, truth)), max(map(bias, fast, truth), key=abs)
    except torch.AcceleratorError as error:  # the GPU computes nothing any more in this process
        raise ValueError(f"fast path {name} ended with {str(error).splitlines()[0]}: start again with train.fast_paths=off, "
                         "and see what `python -m loop.check` says") from None
    except Exception as error:  # whatever else a kernel raises, its reference still works
        found["problem"] = f"it raised {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        return found
    if not found["error"] <= max(limit, 3 * found["plain_error"]):  # also where the error is not a number
        found["problem"] = f"its results differ by {found['error']:.2%}, at most {limit:.2%} is rounding"
    elif abs(found["bias"]) > path.bias_limit:
        found["problem"] = (f"its results are off by {found['bias']:+.2%} on the whole, "
                            f"at most {path.bias_limit:.1%} is rounding")
    return found


def relative(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def bias(found: Tensor, truth: Tensor) -> float:
    return ((found.double() * truth.double()).sum() / truth.double().square().sum()).item() - 1


def prove(config: Config, model_dir: Path, ranks: Ranks, say: Callable[[str], None], num_tokens: int = 0) -> None:
    """Switches off, on all ranks, every fast path that fails on any of them; writes paths.json into the run's directory.

    Args:
        num_tokens: that the run trains on.

    Raises:
        ValueError: a path fails, and `train.fast_paths` is `require`.
    """
    model, dtype = text_config(model_dir), torch.float32 if config.model.base == "float32" else torch.bfloat16
    decided = torch.tensor([compiles(config, model, ranks.device, num_tokens)], device=ranks.device)
    config = replace(config, train=replace(config.train, compile=bool(ranks.broadcast(decided).item())))  # as on rank 0
    names = taken(config, model, ranks.device)
    if config.train.fast_paths == "off":
        OFF.update(names)
        say(f"fast paths are off (train.fast_paths): {', '.join(names) or 'none would have been taken'}")
        return
    OFF.difference_update(PATHS)  # a process may train more than once
    ON.clear()
    if why := switch_off_unfit(model, ranks.device):
        say(f"the delta rule runs in plain torch: {why}")
    state = torch.random.get_rng_state()
    own = Sizes.of(model, 64, config.model.base)
    small = own.small(ranks.device.type == "cuda")
    found = {name: compare(name, own if PATHS[name].own_sizes else small, dtype, ranks.device) for name in names}
    torch.random.set_rng_state(state)
    failed = [float(name in found and bool(found[name]["problem"])) for name in PATHS]
    failed_anywhere = ranks.all_reduce(torch.tensor(failed, device=ranks.device)).tolist()
    problems = [(name, found.get(name, {}).get("problem") or "it failed on another rank")
                for name, number in zip(PATHS, failed_anywhere) if number]
    if ranks.is_main:
        report = {"device": device_name(ranks.device), "versions": versions(), "dtype": str(dtype),
                  "compiles": config.train.compile, "paths": found}
        write_text(config.run_dir / PATHS_FILE, json.dumps(report, indent=1) + "\n")
    for name, problem in problems:
        OFF.add(name)
        say(f"fast path {name} is off for this run: {problem}. In its place: {PATHS[name].instead}")
    (ON if "compiled" in names else OFF if ranks.device.type == "cuda" else set()).add("compiled")
    if "compiled" in names and "compiled" not in OFF:
        say(start_up())
    if problems and config.train.fast_paths == "require":
        raise ValueError("train.fast_paths is require, but " + "; ".join(f"{name}: {problem}" for name, problem in problems))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of the libraries that hold fast paths."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
