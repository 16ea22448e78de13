"""Shows a run in TensorBoard: the numbers of metrics.jsonl, under the names that torchtitan gives them.
Written in a thread of TensorBoard's own; costs some microseconds a step, and a second at the start."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Callable, Iterable

FOLDER = "tensorboard"  # in the run's directory
NAMES = {
    "loss": "loss_metrics/global_avg_loss", "grad_norm": "grad_norm", "lr": "lr", "tokens_per_s": "throughput(tps)",
    "step_s": "time_metrics/end_to_end(s)", "peak_gib": "memory/max_active(GiB)", "eval_loss": "validation_metrics/loss",
    "tensors_gib": "memory/max_active(GiB)",  # on a CPU, in the place of `peak_gib`, which comes before it
}


class TensorBoard:
    """Writes anew what the run has recorded so far, so that a resumed run has one curve, then each record as it comes. A writer
    that fails is said once, and the run goes on.

    Args:
        records: the lines of metrics.jsonl up to where the run continues.
    """

    def __init__(self, run_dir: Path, records: Iterable[dict[str, Any]], say: Callable[[str], None]) -> None:
        self.say, self.num_tokens = say, 0
        self.writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
            self.writer = SummaryWriter(str(run_dir / FOLDER))
        except Exception as error:  # TensorBoard, protobuf and the disk have no error in common
            self.fail(error)
        for record in records:
            self.record(record)

    def record(self, record: dict[str, Any]) -> None:
        """Writes the numbers of one line of metrics.jsonl."""
        if self.writer is None:
            return
        values = {NAMES[key]: value for key, value in record.items() if key in NAMES}
        if "tokens" in record:
            self.num_tokens += record["tokens"]
            values["n_tokens_seen"] = self.num_tokens
        by_source = record.get("eval_loss_by_source", {})
        values |= {f"{NAMES['eval_loss']}/{source}": value for source, value in by_source.items() if len(by_source) > 1}
        try:
            for name, value in values.items():
                if value is not None:  # not finite
                    self.writer.add_scalar(name, value, record["step"])
        except Exception as error:
            self.fail(error)

    def close(self) -> None:
        if self.writer is not None:
            try:
                self.writer.close()
            except Exception as error:
                self.fail(error)

    def fail(self, error: Exception) -> None:
        self.writer = None
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self.say(f"nothing more is written for TensorBoard: {reason}")
