"""What each device holds of a run, phase by phase, under each engine.

The arithmetic of docs/scaling.md: what an engine cuts is divided by the devices that share it, and
what it gathers or buckets on the way comes on top.
"""

from collections import Counter
from dataclasses import dataclass, field

from preftune.config.distributed import LARGEST_STAGE
from preftune.config.planning import PlanConfig
from preftune.planning.work import Held, Update, Work

_ZERO_BUCKET = 4 * 500_000_000
"""DeepSpeed's reduce_bucket_size, in fp32, which preftune leaves as it is."""
_PREFETCHED = 2
"""Layers of FSDP2 and ZeRO-3 that are whole at once: the one at work, and the next one."""


@dataclass(frozen=True)
class Sizes:
    """What a run holds where nothing is cut, in bytes."""

    weights: int
    """As they are stored, with buffers and scales."""
    trained: int
    """Of them those that train; their gradients take as much."""
    trained_numbers: int
    update: Update
    step: Work
    """The heaviest micro-batch."""
    scoring: Work | None
    """A forward of the reference pass; None where there is none."""
    largest_layer: int
    """Of the weights."""
    outside: int
    """Of the weights, those of no layer: embeddings, last norm, head."""
    gathered_share: float
    """Bytes of a gathered weight over those of a stored one."""
    own_reference: int = 0
    """Weights of a reference that is another model."""
    layer_inputs: int = 0
    """What `activation_offload` moves to the host."""


@dataclass(frozen=True)
class Division:
    """What one device holds, phase by phase, and what a host's memory has to take."""

    phases: list[Held]
    host: dict[str, int] = field(default_factory=dict)
    """In the memory of one host, for all of its devices."""

    @property
    def fullest(self) -> Held:
        """The phase with the most."""
        return max(self.phases, key=lambda held: held.total)

    def beside(self, part: str, size: int) -> "Division":
        """The same with a part that is there all the time."""
        if not size:
            return self
        phases = [Held(held.name, held.parts | {part: size}) for held in self.phases]
        return Division(phases, self.host)

    def with_slack(self, share: float) -> "Division":
        """The same with what an allocator holds beside the tensors of each phase.

        Args:
            share: of all but weights, which are taken at once and kept.
        """
        phases = []
        for held in self.phases:
            made = held.total - held.parts.get("weights", 0)
            phases.append(Held(held.name, held.parts | {"allocator": round(share * made)}))
        return Division(phases, self.host)


def divide(sizes: Sizes, config: PlanConfig) -> Division:
    """Lay a run out over its devices.

    Args:
        sizes: of the run.
        config: engine and devices.
    """
    static, host = _static(sizes, config)
    if config.shards:
        step = static["step"] + Counter(_shared_rows(_moving(sizes, config), config))
    else:
        # Gradients come while activations go: the two are not at their most at once.
        step = Counter(_shared_rows(sizes.step.peak, config))
        step["optimizer"] += static["step"]["optimizer"]
        step["buckets"] += static["step"]["buckets"]
        if config.activation_offload:
            step["activations"] = max(0, step["activations"] - sizes.layer_inputs)
    live = sizes.weights if config.sync_reference else 0
    phases = []
    if sizes.scoring is not None:
        pass_ = static["start"] + Counter(sizes.scoring.moving)
        pass_["reference"] += sizes.own_reference // _cut(config)
        phases.append(Held("reference pass", dict(pass_)))
    step["reference"] += live
    phases.append(Held("forward and backward", dict(step)))
    update = static["step"] + Counter({"activations": sizes.update.passing, "reference": live})
    phases.append(Held("update", dict(update)))
    return Division([Held(p.name, {k: v for k, v in p.parts.items() if v}) for p in phases], host)


def _cut(config: PlanConfig) -> int:
    """How many devices share each weight."""
    if not config.shards_weights:
        return 1
    if config.fsdp == "hybrid_shard":
        return config.fsdp_shard_size or config.host_size
    return config.num_processes


def _static(sizes: Sizes, config: PlanConfig) -> tuple[dict[str, Counter[str]], dict[str, int]]:
    """What a device holds besides activations: before the first step, and in steps."""
    parts, host = _engine_parts(sizes, config)
    start = Counter({"weights": parts["weights"], "gathered": parts.get("gathered", 0)})
    return {"start": start, "step": Counter(parts)}, host


def _engine_parts(sizes: Sizes, config: PlanConfig) -> tuple[dict[str, int], dict[str, int]]:
    number, per_host = config.num_processes, min(config.host_size, config.num_processes)
    weights, gradients, state = sizes.weights, sizes.trained, sizes.update.state
    twins = 4 * sizes.trained_numbers  # DeepSpeed's flat fp32 copy, from stage 1 on
    host: dict[str, int] = {}
    stage = config.zero_stage
    if config.fsdp != "no":
        cut = _cut(config)
        parts = {part: -(-size // cut) for part, size in _three(sizes)}
        if config.fsdp_offload_params:
            host = {part: size * per_host for part, size in parts.items()}
            parts = dict.fromkeys(parts, 0)
        return parts | {"gathered": _gathered(sizes)}, host
    if not stage:
        buckets = gradients if number > 1 else 0
        return dict(_three(sizes)) | {"buckets": buckets}, host
    parts = {
        "weights": -(-weights // number) if stage == LARGEST_STAGE else weights,
        "fp32 copy": -(-twins // number),
        "gradients": gradients if stage == 1 else -(-gradients // number),
        "optimizer": -(-state // number),
        "buckets": min(_ZERO_BUCKET, gradients),
    }
    if stage == LARGEST_STAGE:
        parts["gathered"] = _gathered(sizes)
        parts["buckets"] = min(_ZERO_BUCKET // 10, gradients)
    moved = ["fp32 copy", "optimizer"] if config.offload_optimizer else []
    moved += ["weights"] if config.offload_param else []
    for part in moved:
        host[part] = parts[part] * per_host
        parts[part] = 0
    return parts, host


def _three(sizes: Sizes) -> list[tuple[str, int]]:
    return [
        ("weights", sizes.weights),
        ("gradients", sizes.trained),
        ("optimizer", sizes.update.state),
    ]


def _gathered(sizes: Sizes) -> int:
    """Whole weights on their way: embeddings and head stay, layers come and go."""
    return round((sizes.outside + _PREFETCHED * sizes.largest_layer) * sizes.gathered_share)


def _moving(sizes: Sizes, config: PlanConfig) -> dict[str, int]:
    moving = dict(sizes.step.moving)
    if config.activation_offload:
        moving["activations"] = max(0, moving.get("activations", 0) - sizes.layer_inputs)
    if config.fsdp != "no":
        # A layer's gradients: whole as computed, and in fp32 on their way to their owners.
        moving["gathered gradients"] = round(sizes.largest_layer * (sizes.gathered_share + 1))
    return moving


def _shared_rows(moving: dict[str, int], config: PlanConfig) -> dict[str, int]:
    """Under sequence parallelism each device has its part of every row's tokens."""
    size = config.sequence_parallel_size
    own = ("activations", "head chunk")
    return {part: -(-v // size) if part in own else v for part, v in moving.items()}
