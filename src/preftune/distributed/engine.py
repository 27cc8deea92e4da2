"""What spreads a model over the ranks, and updates it: the same steps by whichever engine."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from preftune.distributed.parts import Part, part_beside, part_of

MakeOptimizer = Callable[[nn.Module], Optimizer]


class Engine(ABC):
    """A model and its optimizer.

    Engines average gradients over ranks. The step scales each rank's sum by the number of ranks, so
    that the average is the sum over all ranks divided by the global count.
    """

    name: str
    """What people call it."""
    is_sharded = False
    """Whether each rank saves its own part of a checkpoint."""
    model: nn.Module
    """To be called; gradients go through it."""
    optimizer: Any
    """Holds `param_groups` and, by parameter, `state`."""
    loss_scale: Tensor | None = None
    """On the device, of this step: `backward` multiplies by it, and norms and updates are those of
    the gradients without it. None: 1."""

    @abstractmethod
    def accumulate(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Where a micro-batch's forward and backward run.

        Args:
            is_last: whether it is the step's last one, after which gradients are those of all
                ranks.
        """

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients."""

    @abstractmethod
    def clip_gradients(self) -> Tensor:
        """Scale gradients that are longer than `max_grad_norm` to it.

        Returns:
            Their global L2 norm before that; not finite where one of them is not.
        """

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.loss_scale is None else loss * self.loss_scale

    def _unscaled(self, norm: Tensor) -> Tensor:
        return norm if self.loss_scale is None else norm / self.loss_scale

    @abstractmethod
    def update(self, *, skip: Tensor) -> None:
        """Update the weights and drop the gradients.

        Args:
            skip: device flag, 1.0 or 0.0; if it is set, only the gradients go.
        """

    @abstractmethod
    def make_state(self, *, with_gradients: bool) -> None:
        """Hold what a step holds, before the first one: optimizer state, at its zeros.

        Args:
            with_gradients: leave gradients of zero, too.
        """

    @abstractmethod
    def drop_gradients(self) -> None:
        """Forget what `backward` has added."""

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter or buffer of the model, put together from all ranks, on every rank."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()

    @abstractmethod
    def rest(self) -> None:
        """Let the model hold what the engine keeps, and nothing gathered for a forward.

        Before anybody looks at its parameters.
        """

    @abstractmethod
    def weight_parts(self, weights: Mapping[str, Tensor]) -> dict[str, Part]:
        """What this rank holds of weights.

        Args:
            weights: parameters and buffers of the model, by any names.
        """

    @abstractmethod
    def moment_parts(self, weights: Mapping[str, Tensor]) -> dict[str, Part]:
        """What this rank holds of the optimizer's state, as "<state>/<name>"; see `make_state`.

        Args:
            weights: as in `weight_parts`.
        """

    @abstractmethod
    def put_back(self, weights: Mapping[str, Tensor], parts: Mapping[str, Part]) -> None:
        """Take over parts that `weight_parts` and `moment_parts` gave and that were filled since.

        Args:
            weights: as in `weight_parts`.
            parts: of some of them.
        """

    def set_learning_rate(self, learning_rate: float) -> None:
        """Of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate


class TorchEngine(Engine):
    """Parameters, gradients and optimizer are PyTorch's own."""

    def __init__(
        self, name: str, model: nn.Module, optimizer: Optimizer, max_grad_norm: float | None
    ) -> None:
        """Take what is spread over the ranks already.

        Args:
            name: what people call it.
            model: to be called.
            optimizer: over its parameters; one that reads `found_inf` and `grad_scale`.
            max_grad_norm: longest gradient; None or 0 is off.
        """
        self.name = name
        self.model = model
        self.optimizer = optimizer
        self._max_norm = max_grad_norm or float("inf")

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Leaves gradients unsynchronised until the last micro-batch."""
        if is_last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients."""
        self._scaled(loss).backward()

    def clip_gradients(self) -> Tensor:
        """Scale long gradients; their norm before that."""
        parameters = self._parameters()
        norm = self._unscaled(self._norm(parameters))
        nn.utils.clip_grads_with_norm_(parameters, self._max_norm, norm)
        return norm

    def _norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        return gradient_norm(parameters)

    def update(self, *, skip: Tensor) -> None:
        """Update the weights, unless the flag is set; the host never waits for the flag.

        Optimizers read both on the device: they leave weights, moments and step count alone when
        `found_inf` is set, and divide gradients by `grad_scale`. bitsandbytes' alone wait.
        """
        self.optimizer.found_inf = skip
        self.optimizer.grad_scale = self.loss_scale
        self.optimizer.step()
        self.drop_gradients()

    def make_state(self, *, with_gradients: bool) -> None:
        """A skipped update makes the optimizer's state."""
        self._make_gradients()
        self.update(skip=torch.ones((), device=next(self.model.parameters()).device))
        if with_gradients:
            self._make_gradients()

    def rest(self) -> None:
        """Nothing: parameters stay what they are."""

    def weight_parts(self, weights: Mapping[str, Tensor]) -> dict[str, Part]:
        """Parameters and buffers themselves, or this rank's rows of them."""
        return {name: part_of(tensor.detach(), _rank()) for name, tensor in weights.items()}

    def moment_parts(self, weights: Mapping[str, Tensor]) -> dict[str, Part]:
        """The optimizer's state itself, or this rank's rows of it."""
        return {
            f"{key}/{name}": part_beside(value, tensor, _rank())
            for name, tensor in weights.items()
            for key, value in self.optimizer.state.get(tensor, {}).items()
            if isinstance(value, Tensor)
        }

    def put_back(self, weights: Mapping[str, Tensor], parts: Mapping[str, Part]) -> None:
        """Nothing: the parts are the state itself."""

    def drop_gradients(self) -> None:
        """Forget what `backward` has added."""
        self.optimizer.zero_grad(set_to_none=True)

    def _make_gradients(self) -> None:
        for parameter in self._parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def _parameters(self) -> Sequence[nn.Parameter]:
        return list(self.model.parameters())


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """L2 norm of their gradients."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0
