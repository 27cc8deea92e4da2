"""A training step without numbers: what it holds, part by part, and the arithmetic it does."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from preftune.batching.batcher import MicroBatch
from preftune.batching.layout import PairLayout
from preftune.distributed.engine import TorchEngine
from preftune.model.forward import pair_logps
from preftune.model.logprob_head import head_chunk_size
from preftune.objective import Objective
from preftune.planning.live import BACKWARD, LiveBytes, attended, storages_of
from preftune.planning.stand_ins import FUSED_ATTENTION, head_told
from preftune.planning.weights import PlannedModel

MakeOptimizer = Callable[[nn.Module], Optimizer]
_QMAPS = 2 * 256 * 4
"""Bytes of bitsandbytes' two tables, which all states share."""


@dataclass(frozen=True)
class Held:
    """What a phase of a run holds at its fullest, in bytes by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Work:
    """One micro-batch, forward and backward."""

    peak: dict[str, int]
    """Weights, their copies, gradients, activations and the head, when most together."""
    moving: dict[str, int]
    """Copies, activations and the head alone, when those are most: what no engine cuts."""
    flops: dict[str, int] = field(default_factory=dict)


def use_chunks_of(planned: PlannedModel, memory: int) -> None:
    """Let the head make as many logits at once as on a device of so much memory.

    Args:
        planned: the model.
        memory: as `chunk_memory` says it.
    """
    config = planned.policy.model.config.get_text_config()
    size = head_chunk_size(memory, config.hidden_size, config.vocab_size)
    planned.policy.head_chunk_size = lambda device: size


def training_work(
    planned: PlannedModel,
    objective: Objective[Any],
    micro_batch: MicroBatch,
    *,
    is_accumulating: bool,
    max_grad_norm: float | None,
) -> Work:
    """Forward, backward and clipping of one micro-batch, as the step does it.

    Args:
        planned: the model.
        objective: of the run.
        micro_batch: the heaviest one.
        is_accumulating: whether gradients of an earlier micro-batch are there already.
        max_grad_norm: longest gradient; None or 0 is off.
    """
    policy, live = planned.policy, LiveBytes()
    trained = [p for p in policy.parameters() if p.requires_grad]

    def run() -> None:
        live.hold("weights", [*policy.parameters(), *policy.buffers()])
        policy.train()
        with live:
            if is_accumulating:
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter)
            output = objective(policy, micro_batch)
            output.loss_sum.backward()
            engine = TorchEngine("planned", policy, None, max_grad_norm)  # type: ignore[arg-type]
            engine.clip_gradients()
        live.name("gradients", [p.grad for p in trained if p.grad is not None])

    with ExitStack() as stack:
        stack.enter_context(head_told(live))
        planned.compute(run)
    for parameter in trained:
        parameter.grad = None
    if policy.model.config._attn_implementation == FUSED_ATTENTION:
        live.flops["attention"] += _fused_flops(planned, micro_batch.layout)
    apart = ("weights", "gradients")
    return Work(live.peak(), live.peak(without=apart), dict(live.flops))


def _fused_flops(planned: PlannedModel, layout: PairLayout) -> int:
    """Arithmetic of attention whose kernel is stood in for, from the calls of its layers."""
    text = planned.policy.model.config.get_text_config()
    total = 0.0
    for block in layout.blocks:
        if block.segments is None:
            continue
        seen = sum(
            attended(s.stop - s.start, s.prefix_stop - s.prefix_start) for s in block.segments.spans
        )
        calls = block.segments.calls
        forwards = [2 * text.num_attention_heads * seen * (c.head_dim + c.value_dim) for c in calls]
        # The calls after the first of each layer are the recomputed ones.
        total += sum(forwards) + BACKWARD * sum(forwards[: text.num_hidden_layers])
    return round(total)


def scoring_work(planned: PlannedModel, layout: PairLayout) -> Work:
    """A forward without gradient.

    Args:
        planned: the model.
        layout: of its rows.
    """
    policy, live = planned.policy, LiveBytes()

    def run() -> None:
        live.hold("weights", [*policy.parameters(), *policy.buffers()])
        policy.eval()
        with live, torch.no_grad():
            pair_logps(policy, layout)

    with head_told(live):
        planned.compute(run)
    return Work(live.peak(), live.peak(without=("weights", "gradients")), dict(live.flops))


@dataclass(frozen=True)
class Update:
    """What an optimizer keeps, and what one of its updates makes in passing."""

    state: int
    passing: int


def update_work(planned: PlannedModel, make: MakeOptimizer, name: str) -> Update:
    """State and passing memory of an optimizer, in bytes.

    Each shape is updated once and counted as often as there are weights of it: the state of a
    weight depends on nothing else, and weights are updated one after the other.

    Args:
        planned: the model.
        make: makes the optimizer.
        name: of the optimizer.
    """
    trained = [(n, p) for n, p in planned.policy.named_parameters() if p.requires_grad]
    if name in ("adamw_8bit", "paged_adamw_8bit"):
        return Update(sum(_bnb_state(p) for _, p in trained) + _QMAPS, 0)
    times: Counter[Any] = Counter()
    chosen: dict[Any, nn.Parameter] = {}
    one_of_each = nn.Module()
    for parameter_name, parameter in trained:
        key = (tuple(parameter.shape), parameter.dtype, _role(planned.policy, parameter_name, name))
        times[key] += 1
        if key not in chosen:
            chosen[key] = parameter
    for number, parameter in enumerate(chosen.values()):
        one_of_each.register_parameter(f"weight{number}", parameter)
    live = LiveBytes()
    states: dict[Any, int] = {}

    def run() -> None:
        optimizer: Any = make(one_of_each if name != "muon" else planned.policy)
        for parameter in chosen.values():
            parameter.grad = torch.zeros_like(parameter)
        live.hold("gradients", [p.grad for p in chosen.values() if p.grad is not None])
        live.hold("weights", chosen.values())
        optimizer.found_inf = torch.zeros(())
        optimizer.grad_scale = None
        with live:
            optimizer.step()
        for key, parameter in chosen.items():
            kept = [t for t in optimizer.state[parameter].values() if isinstance(t, Tensor)]
            live.name("optimizer", kept)
            states[key] = storages_of(kept)

    planned.compute(run)
    for parameter in chosen.values():
        parameter.grad = None
    peak = live.peak(without=("weights", "gradients", "optimizer"))
    return Update(sum(states[key] * count for key, count in times.items()), sum(peak.values()))


def _role(policy: nn.Module, name: str, optimizer: str) -> str:
    """Muon updates hidden matrices alone: embeddings and head of one shape have another state."""
    if optimizer != "muon":
        return ""
    return "outer" if any(word in name for word in ("embed", "head", "wte", "wpe")) else "hidden"


def _bnb_state(parameter: Tensor) -> int:
    """Bytes of bitsandbytes' two moments of a weight: in 8 bits from 4,096 numbers on."""
    number = parameter.numel()
    if number < 4096:
        return 8 * number
    return 2 * (number + 4 * -(-number // 256))
