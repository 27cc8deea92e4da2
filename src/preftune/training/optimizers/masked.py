"""What the optimizers here have in common: an update in fp32 that a device flag leaves out."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from preftune.distributed.parts import Part, part_of
from preftune.training.optimizers.rounding import StochasticRounding

State = Mapping[str, Tensor]
Group = Mapping[str, Any]
CHUNK = 1 << 22
"""Numbers of a weight that are updated at once where rows do not depend on each other: what is
computed in between then takes megabytes, not copies of the largest weight."""


class MaskedOptimizer(Optimizer):
    """Updates one weight after the other; `found_inf` and `grad_scale` are read on the device.

    That is what PyTorch's fused kernels do: where the flag is set, weights, state and step count
    stay, and nothing waits. Here it costs a copy of one chunk at a time.
    """

    found_inf: Tensor | None = None
    """Device flag, 1.0 or 0.0: leave everything as it is."""
    grad_scale: Tensor | None = None
    """What gradients are divided by; None: 1."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        learning_rate: float,
        rounding: StochasticRounding | None = None,
    ) -> None:
        """No state yet: it is made with the first gradient.

        Args:
            groups: parameters with what `updated` reads of their group.
            learning_rate: of the first step.
            rounding: how bfloat16 weights are rounded; None: to the nearest number.
        """
        super().__init__(groups, {"lr": learning_rate})
        self._rounding = rounding

    @abstractmethod
    def new_state(self, part: Part, group: Group) -> dict[str, Tensor]:
        """The state of a weight before its first update, without the step count.

        Args:
            part: what this rank holds of the weight.
            group: of the weight.
        """

    @abstractmethod
    def updated(
        self, weight: Tensor, grad: Tensor, state: State, step: Tensor, group: Group
    ) -> tuple[Tensor, State]:
        """A weight and its state after an update; what is given stays as it is.

        Args:
            weight: in fp32; rows of it where `by_rows` says so, and the same rows of what follows.
            grad: in fp32.
            state: by the names of `new_state`.
            step: device scalar, counted from 1.
            group: of the weight.
        """

    def by_rows(self, group: Group) -> bool:
        """Whether a row's update needs nothing of other rows."""
        return True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient.

        Args:
            closure: not read.
        """
        parameters = ((p, group) for group in self.param_groups for p in group["params"])
        for number, (parameter, group) in enumerate(parameters):
            if parameter.grad is not None:
                self._step(parameter, group, number)

    def _step(self, parameter: nn.Parameter, group: Group, number: int) -> None:
        part = part_of(parameter.detach(), 0)
        grad = part_of(parameter.grad.detach(), 0).tensor  # type: ignore[union-attr]
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=part.tensor.device)
            state.update(self.new_state(part, group))
        step = state["step"] + 1
        own = {name: tensor for name, tensor in state.items() if name != "step"}
        for start, rows in self._chunks(part.tensor, group):
            weight, held = part.tensor[rows], {name: t[rows] for name, t in own.items()}
            numbers = grad[rows].float()
            if self.grad_scale is not None:
                numbers = numbers / self.grad_scale
            new, new_state = self.updated(weight.float(), numbers, held, step, group)
            if self._rounding is not None and weight.dtype == torch.bfloat16:
                first = (part.first + start) * (weight[:1].numel() if weight.ndim else 1)
                new = self._rounding(new, first=first, number=number, step=step)
            self._take(weight, new)
            for name, tensor in held.items():
                self._take(tensor, new_state[name])
        self._take(state["step"], step)

    def _chunks(self, tensor: Tensor, group: Group) -> Iterator[tuple[int, Any]]:
        if tensor.ndim == 0 or not self.by_rows(group):
            yield 0, ...
            return
        size = max(1, CHUNK // max(tensor[:1].numel(), 1))
        for start in range(0, len(tensor), size):
            yield start, slice(start, start + size)

    def _take(self, target: Tensor, new: Tensor) -> None:
        new = new.to(target.dtype)
        if self.found_inf is not None:
            new = torch.where(self.found_inf > 0, target, new)
        target.copy_(new)
