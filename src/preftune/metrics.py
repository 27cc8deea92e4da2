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
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | float] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add a sum over `count` things to the metric `name`."""
        total = torch.as_tensor(total, dtype=torch.float64).detach()
        if name in self._totals:
            total = self._totals[name] + total
        self._totals[name] = total
        self._counts[name] = self._counts.get(name, 0.0) + count

    def add_all(self, other: "MetricSums", keep: Tensor | None = None) -> None:
        """Add another window's sums and counts.

        Args:
            other: stays as it is.
            keep: on the device; where it is false, nothing is added. None: true.
        """
        for name, total in other._totals.items():
            count = other._counts[name]
            if keep is not None:
                total = torch.where(keep, total, torch.zeros_like(total))
                count = keep.double() * count
            self.add(name, total, count)

    def means(self, all_reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The mean of each metric over all ranks; waits for the device once.

        A metric of nothing in this window is left out.

        Args:
            all_reduce: sums a tensor over ranks. All metrics travel as one tensor.
        """
        return {
            name: total / count
            for name, (total, count) in self.snapshot(all_reduce).items()
            if count
        }

    def clear(self) -> None:
        """Start the next window."""
        self._totals.clear()
        self._counts.clear()

    def snapshot(self, all_reduce: Callable[[Tensor], Tensor]) -> MetricState:
        """The window of all ranks for a checkpoint; waits for the device."""
        if not self._totals:
            return {}
        totals = [total.flatten() for total in self._totals.values()]
        device = max((total.device for total in totals), key=lambda device: device.type != "cpu")
        totals = torch.cat([total.to(device) for total in totals])
        counts = [torch.as_tensor(count).to(totals) for count in self._counts.values()]
        packed = all_reduce(torch.stack((totals, torch.stack(counts)), dim=1))
        return dict(zip(self._totals, packed.tolist(), strict=True))

    def restore(self, state: MetricState, device: torch.device, *, is_main: bool = True) -> None:
        """Go on with the window of `snapshot`, which one rank holds for all."""
        self.clear()
        for name, (total, count) in state.items():
            mine = torch.tensor(total if is_main else 0.0, dtype=torch.float64, device=device)
            self.add(name, mine, count if is_main else 0.0)
