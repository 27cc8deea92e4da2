"""A case trained by TRL's own trainers, which tokenise the text themselves."""

import copy
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from benchmarks.side_by_side.materials import word_tokenizer
from tests.peers.cases import BATCH, Case
from tests.peers.materials import LEARNING_RATE, MAX_GRAD_NORM, STEPS, VOCABULARY, Materials, Trace

TRAINERS: dict[str, Any] = {
    "DPO": (DPOConfig, DPOTrainer),
    "CPO": (CPOConfig, CPOTrainer),
    "ORPO": (ORPOConfig, ORPOTrainer),
    "KTO": (KTOConfig, KTOTrainer),
}


def loss_types() -> set[tuple[str, str]]:
    """Every loss that TRL has, with its trainer, read from TRL's own code."""
    found = {("ORPO", "orpo")}  # without a name of its own
    for name, trainer in (("DPO", DPOTrainer), ("KTO", KTOTrainer)):
        source = inspect.getsource(trainer._compute_loss)
        found |= {(name, word) for word in re.findall(r'\bloss_type == "(\w+)"', source)}
    (choices,) = (f.metadata["choices"] for f in fields(CPOConfig) if f.name == "loss_type")
    return found | {("CPO", word) for word in choices}


def divergences() -> set[str]:
    """Every divergence that TRL has."""
    source = inspect.getsource(DPOTrainer._compute_loss)
    return set(re.findall(r'f_divergence_type == "(\w+)"', source))


class Watch(TrainerCallback):
    """Keeps what is logged."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.trace = Trace([], [])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """A logging step."""
        if "loss" in logs:
            self.trace.losses.append(float(logs["loss"]))
            self.trace.grad_norms.append(float(logs["grad_norm"]))


def common_arguments(folder: Path, micro_batch: int) -> dict[str, Any]:
    """What every trainer of TRL is told, so that it takes the steps of `preftune_side`.

    Args:
        folder: for whatever TRL writes.
        micro_batch: rows a forward.
    """
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": BATCH // micro_batch,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_GRAD_NORM,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def train(case: Case, materials: Materials, folder: Path) -> Trace:
    """Train a case.

    Args:
        case: which loss.
        materials: what to start from.
        folder: for whatever TRL writes.
    """
    config, trainer_class = TRAINERS[case.trainer]
    arguments = config(**common_arguments(folder, case.their_micro_batch), **case.theirs)
    watch = Watch()
    reads_reference = case.trainer in ("DPO", "KTO")
    reference = {"ref_model": copy.deepcopy(materials.reference)} if reads_reference else {}
    trainer = trainer_class(
        model=copy.deepcopy(materials.policy),
        args=arguments,
        train_dataset=Dataset.from_list(materials.rows),
        processing_class=word_tokenizer(VOCABULARY),
        callbacks=[watch],
        **reference,
    )
    assert _ids(trainer.train_dataset) == [
        (e.prompt_ids, *(c.ids for c in e.completions)) for e in materials.examples
    ], "TRL trains on other tokens"
    trainer.train()
    return watch.trace


def _ids(dataset: Dataset) -> list[tuple[tuple[int, ...], ...]]:
    """Prompt, chosen and rejected tokens of each row, as a trainer has prepared them."""
    if "prompt_ids" in dataset.column_names:
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        if "label" in dataset.column_names:
            columns = ("prompt_ids", "completion_ids", "KL_completion_ids")
        return [tuple(tuple(row[column]) for column in columns) for row in dataset]
    labels = ("chosen_labels", "rejected_labels")
    return [
        (
            tuple(row["prompt_input_ids"]),
            *(tuple(i for i in row[column] if i != -100) for column in labels),
        )
        for row in dataset
    ]
