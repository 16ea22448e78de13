"""Writes the trained model for others to serve, and proves that it computes what was trained before it says that it is there.
Costs what merging (model/merge.py) and the proof (proof.py) cost.

python -m loop.export RUN_OR_CHECKPOINT OUT [--format merged] [--base-weights original|as-trained] [--dtype bf16|float32]
python -m loop.export RUN_OR_CHECKPOINT OUT --format adapter [--for peft|vllm]
python -m loop.export --verify OUT                     # whether it still does; the run first, where that was moved as well
python -m loop.export OUT --prove URL                  # whether a server gives the trained model's answers; takes a run as well
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loop.checkpoint import MANIFEST, read_json, write_json
from loop.errors import run_command

if TYPE_CHECKING:
    from loop.export.write import Form
    from loop.run import Trained

RECORD = "export.json"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as --max-lora-rank


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loop.export", description="Exports a trained model, proved.")
    parser.add_argument("source", type=Path, nargs="?", metavar="RUN_OR_CHECKPOINT", help="such as checkpoints/demo")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="a directory that does not exist yet")
    parser.add_argument("--format", choices=("merged", "adapter"), default="merged", help="base and adapter in one, or apart")
    parser.add_argument("--for", choices=("peft", "vllm"), dest="loader", help="who loads the adapter (peft)")
    parser.add_argument("--base-weights", choices=("original", "as-trained"),
                        help="merge into the weights as published, or as they were quantized for training (as-trained)")
    parser.add_argument("--dtype", choices=("bf16", "float32"), help="of merged weights (bf16)")
    parser.add_argument("--checkpoint", default="best", metavar="best|newest|N", help="of a run (best)")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="such as model.path=DIR")
    parser.add_argument("--verify", type=Path, metavar="OUT", help="prove once more what was exported to OUT")
    parser.add_argument("--prove", metavar="URL", help="compare the answers of an OpenAI-compatible server with the model's")
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="held-out rows that --prove asks (20)")
    parser.add_argument("--model", metavar="NAME", help="its name on the server, if that has several")
    args = parser.parse_args()
    if args.rows < 1:
        raise ValueError(f"--rows is {args.rows}, expected at least 1")
    if args.format == "merged" and args.loader:
        raise ValueError(f"--for {args.loader} chooses the names of an adapter: add --format adapter")
    if args.format == "adapter" and (args.base_weights or args.dtype):
        raise ValueError("--base-weights and --dtype are for --format merged: an adapter is stored as trained, in float32")
    num_given = sum(path is not None for path in (args.source, args.out))
    if not (num_given < 2 if args.verify else num_given == (1 if args.prove else 2)):
        raise ValueError("expected RUN_OR_CHECKPOINT OUT, or OUT --prove URL, or --verify OUT; see --help")
    return args


def main() -> None:
    args = parse_arguments()
    from loop.export.write import Form
    from loop.run import find_trained

    if args.verify:
        trained, form = exported(args.verify, args.source, args.set)
        proved(trained, form, args.verify)
        return print(f"{args.verify} computes what {trained.path} was trained to")
    if args.prove and (args.source / RECORD).is_file():
        trained, form = exported(args.source, None, args.set)
    else:
        # adapters trained on nf4 make up for its rounding: on the published weights the demo's held-out loss was 1.60, not 1.49
        form = (Form(args.loader or "peft") if args.format == "adapter" else
                Form("merged", args.base_weights or "as-trained", args.dtype or "bf16"))
        trained = find_trained(args.source, args.checkpoint, args.set)
    if args.prove:
        from loop.export.served import prove_server

        sys.exit(not prove_server(args.prove, walk(trained, form), trained.chat, args.rows, args.model))
    export(trained, form, args.out)


def export(trained: Trained, form: Form, out: Path) -> None:
    """Writes, proves, and makes it appear."""
    from loop.export.write import appearing, needed_bytes, write

    with appearing(out, needed_bytes(trained, form)) as directory:
        write(trained, form, directory)
        print(f"{trained.path}: written, and appears as {out} once it is proved", flush=True)
        figures = proved(trained, form, directory)
        write_json(directory / RECORD, {
            "checkpoint": str(trained.path.resolve()), "adapter": read_json(trained.path / MANIFEST)[trained.adapter.name],
            "form": asdict(form), "figures": figures, "date": time.strftime("%Y-%m-%d %H:%M:%S")})
    print(f"exported: {out}\n{advice(trained, form, out)}\n"
          f"And when it is served, see whether it is served right: python -m loop.export {out} --prove URL")


def exported(directory: Path, source: Path | None, overrides: list[str]) -> tuple[Trained, Form]:
    """What an exported directory was made from, and how.

    Args:
        source: where the run or the checkpoint is now, if it was moved.

    Raises:
        ValueError: this command did not write the directory, or the checkpoint is gone or another one.
    """
    from loop.export.write import Form
    from loop.run import find_trained

    file = directory / RECORD
    if not file.is_file():
        raise ValueError(f"{file}: no such file. Expected a directory that python -m loop.export has written")
    record = read_json(file)
    try:
        form, path, adapter = Form(**record["form"]), Path(record["checkpoint"]), record["adapter"]
    except (KeyError, TypeError):
        raise ValueError(f"{file}: expected what python -m loop.export writes, found {str(record)[:200]}") from None
    trained = find_trained(source or path, path.name.removeprefix("step-"), overrides)
    if read_json(trained.path / MANIFEST)[trained.adapter.name] != adapter:
        raise ValueError(f"{trained.path}: holds another adapter than the one that {directory} was made from")
    return trained, form


def walk(trained: Trained, form: Form) -> Any:
    """The model as it was trained, for proofs: tuned and untuned, as the export must compute it."""
    from safetensors.torch import load_file

    from loop.export.expected import Walk
    from loop.export.write import DTYPES

    return Walk(trained.model_dir, trained.config, load_file(trained.adapter), form.base_weights == "as-trained",
                DTYPES[form.dtype] if form.kind == "merged" else None)


def proved(trained: Trained, form: Form, directory: Path) -> dict[str, float]:
    """Proves a directory, and prints the figures."""
    from loop.export.expected import questions
    from loop.export.proof import prove

    figures = prove(walk(trained, form), questions(trained.config, trained.chat), directory, form.kind)
    print("proved on held-out rows; differences from the trainer are relative, losses those of an answer's first tokens:")
    for name, value in figures.items():
        print(f"  {name:<50}{value:>10.3g}")
    return figures


def advice(trained: Trained, form: Form, out: Path) -> str:
    """How to serve it, in a line."""
    if form.kind == "merged":
        return f"Serve it: vllm serve {out}   (llama.cpp, Ollama, LM Studio: docs/serving.md)"
    if form.kind == "peft":
        return f'Load it: AutoPeftModelForCausalLM.from_pretrained("{out}")'
    rank = min((rank for rank in RANKS if rank >= trained.config.lora.rank), default=trained.config.lora.rank)
    return (f"Serve it: vllm serve {trained.config.model.path} --enable-lora --max-lora-rank {rank} --lora-modules coach={out} "
            f"--chat-template {out}/chat_template.jinja   (vLLM takes the base's template otherwise)")


if __name__ == "__main__":
    run_command(main)
