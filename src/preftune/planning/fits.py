"""The smallest change of a configuration that makes a run fit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from preftune.config.planning import PlanConfig
from preftune.errors import ConfigError

_DEVICES = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Change:
    """Options to add, and why they are the least."""

    options: dict[str, Any]
    costs: str
    """What the change costs, for people."""

    @property
    def flags(self) -> str:
        """As they are written on the command line."""
        words = (f"--{key} {str(value).lower()}" for key, value in self.options.items())
        return " ".join(words)

    def applied(self, config: PlanConfig) -> PlanConfig:
        """The configuration with it.

        Raises:
            ConfigError: it contradicts another setting.
        """
        return replace(config, **self.options)


def smallest_change(
    config: PlanConfig, fits: Callable[[PlanConfig], bool], positions: int
) -> Change | None:
    """The first change, in the order of `changes`, with which a run fits; None if none does.

    Args:
        config: that does not fit.
        fits: plans another configuration.
        positions: tokens of the heaviest micro-batch.
    """
    for change in changes(config, positions):
        try:
            other = change.applied(config)
        except ConfigError:
            continue  # not beside the other settings
        if fits(other):
            return _relaxed(change, config, fits)
    return None


def _relaxed(change: Change, config: PlanConfig, fits: Callable[[PlanConfig], bool]) -> Change:
    """The same with forwards as large as still fit: among other changes they may be larger."""
    key = "max_tokens_per_microbatch"
    if key not in change.options or len(change.options) == 1:
        return change
    rest = {name: value for name, value in change.options.items() if name != key}
    larger: list[dict[str, Any]] = [rest]
    larger += [rest | {key: change.options[key] * factor} for factor in (8, 4, 2)]
    for options in larger:
        other = replace(change, options=options)
        if fits(other.applied(config)):
            return other
    return change


def changes(config: PlanConfig, positions: int) -> Iterator[Change]:
    """What can be changed, from what changes least to what changes most.

    First what leaves the numbers of the run as they are; then other optimizer states, more devices,
    and adapters in place of all weights. What stands before stays where it costs nothing but time.

    Args:
        config: of the run.
        positions: tokens of the heaviest micro-batch.
    """
    smaller = list(_smaller_batches(config, positions))
    yield from smaller
    exact: dict[str, Any] = smaller[-1].options if smaller else {}
    if config.gradient_checkpointing is not True:
        yield Change({"gradient_checkpointing": "selective"}, "about 5 % more time a step")
        yield Change({"gradient_checkpointing": True}, "about a third more time a step")
        exact = exact | {"gradient_checkpointing": True}
        yield Change(exact, "about a third more time a step; the same steps")
    if config.optimizer == "adamw":
        eight_bit = {"optimizer": "adamw_torch_8bit"}
        yield Change(eight_bit, "moments in 8 bits")
        yield Change(exact | eight_bit, "moments in 8 bits; time for checkpointing")
    yield from _more_devices(config, exact)
    if not config.use_lora:
        lora = {"use_lora": True, **_adapter_rate(config)}
        yield Change(lora, "adapters train, the weights do not")
        yield Change(exact | lora, "adapters train, the weights do not")
        half = exact | lora | {"dtype": "bfloat16"}
        yield Change(half, "adapters train over weights in bf16")
    if not config.is_quantized:
        lora = {} if config.use_lora else {"use_lora": True, **_adapter_rate(config)}
        quantized = exact | lora | {"load_in_4bit": True}
        yield Change(quantized, "adapters train over weights in 4 bits")
        yield Change(quantized | {"dtype": "bfloat16"}, "the same, the rest in bf16")
    if not config.use_lora:
        offload = {"zero_stage": 3, "offload_optimizer": True, "offload_param": True, "fsdp": "no"}
        yield Change(exact | offload, "weights and optimizer in the host's memory: far slower")


def _smaller_batches(config: PlanConfig, positions: int) -> Iterator[Change]:
    """The same steps in smaller parts, down to a row each."""
    tokens = positions // 2
    least = max(2, positions // 16)
    while tokens >= least:
        yield Change({"max_tokens_per_microbatch": tokens}, "more, smaller forwards a step")
        tokens //= 2


def _more_devices(config: PlanConfig, exact: dict[str, Any]) -> Iterator[Change]:
    if config.is_quantized or config.shards:
        return
    cut = {"fsdp": "full_shard"}
    if config.num_processes > 1:
        yield Change(cut, "weights, gradients and optimizer cut over the devices")
        yield Change(exact | cut, "the same, with checkpointing")
    for number in _DEVICES:
        if number > config.num_processes:
            more = {"num_processes": number, **cut}
            yield Change(exact | more, f"{number} devices")


def _adapter_rate(config: PlanConfig) -> dict[str, Any]:
    """A learning rate that adapters learn by, where the run's is one of whole weights."""
    return {"learning_rate": 5e-6} if config.peak_rate < 5e-6 else {}
