"""TRL's side of the comparison: its `DPOTrainer`, given token ids."""

from typing import Any

import torch
import trl.trainer.utils as trl_utils
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from .clock import Clock, Timer
from .materials import load
from .task import Task


class IdsTrainer(DPOTrainer):
    """`DPOTrainer` on rows that are token ids already, which it would tokenise again."""

    reference_pass: dict[str, float] | None = None

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        with Timer() as timer:
            result = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_pass = {"wall": timer.wall, "cpu": timer.cpu}
        return result


class Watch(TrainerCallback):
    """Marks every step, and keeps what is logged."""

    def __init__(self, clock: Clock) -> None:
        """Mark on `clock`."""
        self.clock = clock
        self.losses: list[float] = []
        self.grad_norms: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Before the first batch is made."""
        self.clock.mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After the update."""
        self.clock.mark()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """A logging step."""
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.grad_norms.append(float(logs["grad_norm"]))


def train(
    task: dict[str, Any], settings: dict[str, Any], bf16: bool, compact_head: bool
) -> dict[str, Any]:
    """Run a task, and say what each step took.

    Args:
        task: fields of `Task`.
        settings: further fields of `DPOConfig`.
        bf16: whether to compute in bf16.
        compact_head: score the positions of answers only, as on GPUs.
    """
    if compact_head:
        trl_utils._use_triton = lambda device: True  # which positions are scored; not the kernel
    work = Task(**task)
    watch = Watch(Clock(work.warmup, work.steps))
    trainer = _trainer(work, None, settings | {"bf16": bf16}, watch)
    trainer.train()
    return watch.clock.result() | {
        "losses": watch.losses,
        "reference_pass": trainer.reference_pass,
    }


def gate(task: dict[str, Any], base: str) -> dict[str, Any]:
    """Run a task with TRL's defaults and `base` as the reference; record what it computes."""
    work = Task(**task)
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    watch = Watch(Clock(work.warmup, work.steps))
    trainer = _trainer(work, reference, {"bf16": False, "logging_steps": 1}, watch)
    sums: dict[str, list[list[float]]] = {}

    def record(who: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            values = output.log_probs.detach().sum(dim=1)
            for side, part in zip(("chosen", "rejected"), values.chunk(2), strict=True):
                sums.setdefault(f"{who}_{side}", []).append(part.double().tolist())

        return hook

    trainer.model.register_forward_hook(record("policy"))
    trainer.ref_model.register_forward_hook(record("reference"))
    trainer.train()
    return sums | {"losses": watch.losses, "grad_norms": watch.grad_norms}


def _trainer(task: Task, reference: Any, settings: dict[str, Any], watch: Watch) -> IdsTrainer:
    on_gpu = torch.cuda.is_available()
    options = {
        "output_dir": task.scratch,
        "per_device_train_batch_size": task.batch_size,
        "max_steps": task.steps,
        "learning_rate": task.learning_rate,
        "beta": task.beta,
        "max_length": task.max_length,
        "train_sampling_strategy": "sequential",
        "logging_steps": 10 if on_gpu else 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not on_gpu,
    }
    rows = load(task.file, task.model, task.max_length)
    columns = {
        "prompt_ids": [list(row.prompt_ids) for row in rows],
        "chosen_ids": [list(row.completions[0].ids) for row in rows],
        "rejected_ids": [list(row.completions[1].ids) for row in rows],
    }
    return IdsTrainer(
        model=task.model,
        ref_model=reference,
        args=DPOConfig(**options | settings),
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(task.model),
        callbacks=[watch],
    )
