"""Where a model is cut into stages, and what each stage then holds and computes: pure arithmetic, on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Sequence

from torch import nn

from data.tokenized import TokenizedRows
from loop.fit import TrainConfig
from model.build import FEED_FORWARD, GATES
from model.lora import LoraConfig

# bytes of a frozen weight: int8 with a scale a row; nf4 with double-quantized scales
WEIGHT_BYTES = {"int8": 1.01, "nf4": 0.516, "bf16": 2.0, "float32": 4.0}
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2}
DELTA_CHUNK = 64  # positions that the gated delta rule computes together
MIB = 2**20


@dataclass(frozen=True)
class PipelineConfig:
    """How pipeline_train.py splits the model. train.py takes no notice of it."""

    split: Any = "auto"  # sublayers at which the stages 1, 2, ... begin: 40, [30, 60]; auto: balanced, a stage a process
    schedule: Literal["gpipe", "1f1b"] = "gpipe"

    def __post_init__(self) -> None:
        cuts = self.split
        if isinstance(cuts, str) and cuts != "auto":
            cuts = [part.strip() for part in cuts.strip("[] ").split(",")]
        try:
            split = "auto" if cuts == "auto" else [int(cut) for cut in ([cuts] if isinstance(cuts, int) else cuts)]
        except (TypeError, ValueError):
            split = []
        if not split:
            raise ValueError(f"pipeline.split is {self.split!r}, expected sublayer numbers such as 40 or 30,60, or auto")
        object.__setattr__(self, "split", split)

    def num_stages(self, otherwise: int) -> int:
        """By the number of cuts; `otherwise` where the split is automatic."""
        return otherwise if self.split == "auto" else len(self.split) + 1


def choose_ranks(config: PipelineConfig, world_size: int, num_gpus: int) -> tuple[int, int]:
    """How many stages, and how many processes.

    Several processes that a launcher started stay as they are. One process is made into one a stage on the CPU, one a
    GPU where there are several, as far as they make whole replicas; on one GPU there is nothing to split.

    Raises:
        ValueError: more stages than GPUs.
    """
    if world_size > 1:
        return config.num_stages(otherwise=world_size), world_size
    if num_gpus == 1:
        return 1, 1
    num_stages = config.num_stages(otherwise=max(num_gpus, 2))
    if num_gpus and num_stages > num_gpus:
        raise ValueError(f"pipeline.split {config.split} makes {num_stages} stages, but {num_gpus} GPUs are visible")
    return num_stages, max(num_gpus // num_stages, 1) * num_stages


def check_split(split: Sequence[int], num_sublayers: int) -> None:
    """Raises:
        ValueError: a stage would be empty, or begin outside the model.
    """
    if any(start >= stop for start, stop in zip([0, *split], [*split, num_sublayers])):
        raise ValueError(
            f"pipeline.split {list(split)}: the model has {num_sublayers} sublayers, two a decoder layer; "
            f"expected ascending numbers from 1 to {num_sublayers - 1}, so that no stage is empty"
        )


@dataclass(frozen=True)
class Cost:
    """Of one sublayer, or several."""

    num_parameters: int = 0
    num_bytes: float = 0.0  # weights; adapters with gradients and optimizer; boundaries kept for the backward pass
    flops: float = 0.0  # a token of the stream, forward and backward

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.num_parameters + other.num_parameters, self.num_bytes + other.num_bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Load:
    """What decides the costs beside the model."""

    base: str
    lora: LoraConfig
    train: TrainConfig
    context: float  # tokens that a token attends to, on average
    supervised: float  # share of the tokens
    kept_tokens: float  # whose boundaries are kept at a time

    @classmethod
    def of(
        cls, base: str, lora: LoraConfig, train: TrainConfig, rows: TokenizedRows, schedule: str, num_stages: int,
        num_replicas: int,
    ) -> Load:
        lengths_E = rows.lengths_E.double()
        tokens = float(lengths_E.sum())
        step_tokens = tokens / len(lengths_E) * train.rows_per_step / num_replicas
        kept_tokens = step_tokens if schedule == "gpipe" else min(step_tokens, num_stages * train.microbatch_tokens)
        supervised = float(rows.supervised_N.double().sum()) / tokens
        return cls(base, lora, train, float(lengths_E.square().sum()) / tokens / 2, supervised, kept_tokens)


def sublayer_costs(model: Any, load: Load) -> list[Cost]:
    """Costs of all sublayers, the embedding with the first and the head with the last.

    Args:
        model: the skeleton of the whole model (`build.skeleton`).
    """
    config, itemsize = model.config, model.dtype.itemsize
    costs = []
    boundary = Cost(num_bytes=load.kept_tokens * config.hidden_size * itemsize / 2)  # one a decoder layer, of two sublayers
    for layer in model.model.layers:
        for half in (False, True):
            children = [module for name, module in layer.named_children() if (name in FEED_FORWARD) == half]
            costs.append(sum((module_cost(child, config, itemsize, load) for child in children), boundary))
    num_embedded = config.vocab_size * config.hidden_size
    costs[0] += Cost(num_embedded, num_embedded * itemsize)
    # the head's logits and the gradient they send back, at supervised positions; never computed again
    costs[-1] += Cost(num_embedded, num_embedded * itemsize, 2 * 2 * num_embedded * load.supervised)
    return costs


def module_cost(module: nn.Module, config: Any, itemsize: int, load: Load) -> Cost:
    """One norm, mixer or feed-forward. A matmul takes 2 flops a weight and token, again for the gradient of its input."""
    passes = 2 + load.train.recompute
    frozen = quantized = trained = 0
    flops = 0.0
    linears = {name: child for name, child in module.named_modules()
               if isinstance(child, nn.Linear) and not name.endswith(GATES)}
    for name, parameter in module.named_parameters():
        count = parameter.numel()
        frozen += count
        if ".experts." in f".{name}":
            quantized += count
            # each token meets a few of them, and their backward pass computes the forward once more
            flops += 2 * (passes + 1) * count * config.num_experts_per_tok / config.num_experts
            if load.lora.experts:
                trained += load.lora.rank * parameter.shape[0] * sum(parameter.shape[1:])
        elif name.rpartition(".")[0] in linears:
            quantized += count
            flops += 2 * passes * count
    adapted = [linear for name, linear in linears.items() if name.rpartition(".")[2] in load.lora.target]
    in_linears = sum(load.lora.rank * (linear.in_features + linear.out_features) for linear in adapted)
    trained += in_linears
    flops += 2 * (passes + 1) * in_linears + mixing_flops(module, config, load) * (passes + 1)
    num_bytes = quantized * WEIGHT_BYTES[load.base] + (frozen - quantized) * itemsize
    return Cost(frozen + trained, num_bytes + trained * (4 + 4 + OPTIMIZER_BYTES[load.train.optimizer]), flops)


def mixing_flops(module: Any, config: Any, load: Load) -> float:
    """What a mixer computes for a token in one forward pass beside its linears."""
    if hasattr(module, "q_proj"):
        return 4 * config.num_attention_heads * module.head_dim * load.context
    if hasattr(module, "in_proj_qkv"):
        k, v = config.linear_key_head_dim, config.linear_value_head_dim
        return config.linear_num_value_heads * (6 * k * v + 4 * DELTA_CHUNK * (k + v))
    return 0.0


def balance(costs: Sequence[Cost], num_stages: int) -> list[int]:
    """The cuts under which the fullest stage, by its share of time or of memory, whichever is larger, is least full.

    Raises:
        ValueError: more stages than sublayers.
    """
    num = len(costs)
    if num_stages > num:
        raise ValueError(f"{num_stages} stages for a model of {num} sublayers: start fewer processes")
    upto = [Cost()]
    for cost in costs:
        upto.append(upto[-1] + cost)

    def fullness(start: int, stop: int) -> float:
        return max((upto[stop].flops - upto[start].flops) / upto[-1].flops,
                   (upto[stop].num_bytes - upto[start].num_bytes) / upto[-1].num_bytes)

    # best[n]: fullest stage, sum of squares (among equals the most even), and cuts of the first n sublayers in s stages
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for stage in range(num_stages):
        longer: dict[int, tuple[float, float, list[int]]] = {}
        for stop in range(stage + 1, num - (num_stages - stage - 1) + 1):
            options = []
            for start, (fullest, squares, cuts) in best.items():
                if start < stop:
                    full = fullness(start, stop)
                    options.append((max(fullest, full), squares + full * full, [*cuts, start]))
            longer[stop] = min(options)
        best = longer
    return best[num][2][1:]


def table(costs: Sequence[Cost], split: Sequence[int], device: str, num_replicas: int) -> str:
    """The plan, a line a stage."""
    whole = sum(costs, Cost())
    bounds = [0, *split, len(costs)]
    num_stages = len(bounds) - 1
    lines = [f"{'stage':>5}  {'device':<16}  {'sublayers':>10}  {'parameters':>14}  {'MiB':>9}  compute"]
    for stage, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        cost = sum(costs[start:stop], Cost())
        ranks = ", ".join(str(replica * num_stages + stage) for replica in range(num_replicas))
        lines.append(
            f"{stage:>5}  {f'{device} (rank {ranks})':<16}  {f'{start} to {stop - 1}':>10}  {cost.num_parameters:>14,}  "
            f"{cost.num_bytes / MIB:>9,.1f}  {100 * cost.flops / whole.flops:>5.1f} %"
        )
    return "\n".join(lines)
