"""Running means that stay on the device until somebody logs them."""

from collections.abc import Callable

import torch
from torch import Tensor

MetricState = dict[str, list[float]]
"""A snapshot for checkpoints: name -> [sum, count]; exact, because JSON keeps a float64's bits."""


class MetricSums:
    """Means over a window, kept as a sum and a count so that they add up over anything.

    Sums add over micro-batches, steps and ranks, so the mean is the same however the rows were
    dealt. Nothing here waits for the device before `means` or `snapshot`.
    """

    def __init__(self) -> None:
        """Start an empty window."""
        self._entries: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add a sum over `count` things to the metric `name`."""
        total = torch.as_tensor(total).detach().to(torch.float64)
        count = torch.as_tensor(count, dtype=torch.float64, device=total.device)
        if name in self._entries:
            old_total, old_count = self._entries[name]
            total, count = old_total + total, old_count + count
        self._entries[name] = (total, count)

    def means(self, all_reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The mean of each metric over all ranks; waits for the device once.

        Args:
            all_reduce: sums a tensor over ranks. All metrics travel as one tensor.
        """
        if not self._entries:
            return {}
        packed = all_reduce(self._packed())
        return {
            name: total / count if count else float("nan")
            for name, (total, count) in zip(self._entries, packed.tolist(), strict=True)
        }

    def clear(self) -> None:
        """Start the next window."""
        self._entries.clear()

    def snapshot(self) -> MetricState:
        """This rank's window for a checkpoint; waits for the device."""
        if not self._entries:
            return {}
        return dict(zip(self._entries, self._packed().tolist(), strict=True))

    def restore(self, state: MetricState, device: torch.device) -> None:
        """Go on with the window of `snapshot`."""
        self.clear()
        for name, (total, count) in state.items():
            self.add(name, torch.tensor(total, dtype=torch.float64, device=device), count)

    def _packed(self) -> Tensor:
        device = next(iter(self._entries.values()))[0].device
        return torch.stack(
            [torch.stack((total.to(device), n.to(device))) for total, n in self._entries.values()]
        )
