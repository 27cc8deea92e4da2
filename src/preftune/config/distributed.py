"""How a model is spread over several devices."""

from dataclasses import dataclass
from typing import Annotated, Literal

from preftune.config.problem import Problem, count
from preftune.config.section import Section
from preftune.config.typed import AlsoSpelled

Fsdp = Annotated[Literal["no", "full_shard", "hybrid_shard"], AlsoSpelled(false="no", off="no")]
LARGEST_STAGE = 3


@dataclass(kw_only=True)
class DistributedConfig(Section):
    """What each device holds of the model: all of it (DDP), or a part (FSDP2, DeepSpeed ZeRO)."""

    fsdp: Fsdp = "no"
    """PyTorch's FSDP2. full_shard: weights, gradients and optimizer state are cut over all devices;
    hybrid_shard: over `fsdp_shard_size` devices, and each such group holds all of them; no: every
    device holds all."""

    fsdp_shard_size: int | None = None
    """hybrid_shard: devices that share one copy of the model, 1 or more; it divides their number.
    Unset: those of one host."""

    fsdp_reshard_after_forward: bool | None = None
    """Give a layer's gathered weights back after its forward and gather them again for its
    backward: less memory, half as much communication again. Unset: true."""

    fsdp_offload_params: bool = False
    """Keep this device's parts of weights, gradients and optimizer state in the host's memory."""

    zero_stage: int | None = None
    """DeepSpeed ZeRO, 0 to 3. What is cut over the devices: 0 nothing, 1 the optimizer state, 2 the
    gradients too, 3 the weights too. Unset: no DeepSpeed."""

    offload_optimizer: bool = False
    """ZeRO: keep optimizer state in the host's memory and update there. Needs stage 1 or above."""

    offload_param: bool = False
    """ZeRO: keep weights in the host's memory. Needs stage 3."""

    zero_hpz_partition_size: int | None = None
    """ZeRO stage 3: devices of one host that hold a second copy of the weights among them, so that
    the backward gathers inside the host; 1 is off. Unset: off."""

    sequence_parallel_size: int = 1
    """Processes that share each packed row, token by token, for rows too long for the memory of
    one; 1 (off) or more. It must divide the number of processes and the model's attention heads.
    A step takes the same pairs as on that many times fewer processes."""

    @property
    def shards(self) -> bool:
        """Whether a device holds a part of the training state only."""
        return self.fsdp != "no" or bool(self.zero_stage)

    @property
    def shards_weights(self) -> bool:
        """Whether every forward gathers weights, so that all ranks have to take part in it."""
        return self.fsdp != "no" or self.zero_stage == LARGEST_STAGE

    @property
    def engine(self) -> str:
        """What people call it."""
        if self.zero_stage is not None:
            return f"ZeRO-{self.zero_stage}"
        return "DDP" if self.fsdp == "no" else f"FSDP2 {self.fsdp}"

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = [*_zero_problems(self), *_fsdp_problems(self)]
        return found + count("sequence_parallel_size", self.sequence_parallel_size)


def _zero_problems(section: DistributedConfig) -> list[Problem]:
    stage, found = section.zero_stage, []
    if stage is not None and not 0 <= stage <= LARGEST_STAGE:
        found.append(Problem("zero_stage", stage, "it must be 0, 1, 2 or 3"))
    elif stage is not None and section.fsdp != "no":
        message = f"fsdp is {section.fsdp!r} too, and they exclude each other: leave one out"
        found.append(Problem("zero_stage", stage, message, ("fsdp",)))
    for key, least in (("offload_optimizer", 1), ("offload_param", LARGEST_STAGE)):
        if getattr(section, key) and (stage or 0) < least:
            above = " or above" if least < LARGEST_STAGE else ""
            message = f"it needs zero_stage {least}{above}"
            found.append(Problem(key, True, message, ("zero_stage",)))
    key, size = "zero_hpz_partition_size", section.zero_hpz_partition_size
    found += count(key, size)
    if size is not None and stage != LARGEST_STAGE:
        found.append(Problem(key, size, f"it needs zero_stage {LARGEST_STAGE}", ("zero_stage",)))
    return found


def _fsdp_problems(section: DistributedConfig) -> list[Problem]:
    found = count("fsdp_shard_size", section.fsdp_shard_size)
    if section.fsdp_shard_size is not None and section.fsdp != "hybrid_shard":
        message = "only fsdp hybrid_shard reads it: leave it out"
        found.append(Problem("fsdp_shard_size", section.fsdp_shard_size, message, ("fsdp",)))
    if section.fsdp != "no":
        return found
    message = "fsdp is 'no', so nothing reads it: leave it out, or choose full_shard"
    for key in ("fsdp_reshard_after_forward", "fsdp_offload_params"):
        if (value := getattr(section, key)) not in (None, False):
            found.append(Problem(key, value, message, ("fsdp",)))
    return found
