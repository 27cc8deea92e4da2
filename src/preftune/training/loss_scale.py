"""What keeps the small gradients of an fp16 backward from vanishing."""

from collections.abc import Mapping

import torch
from torch import Tensor

START = 65536.0
"""2^16, as PyTorch's GradScaler and DeepSpeed begin. Powers of two cost no bits."""
PATIENCE = 2000
"""Good steps in a row after which the scale doubles."""
SMALLEST, LARGEST = 1.0, 2.0**64


class LossScale:
    """A factor of the loss that is halved when gradients overflow and doubled when all is well.

    float16 knows nothing between 0 and 6e-8, and nothing above 65,504. Gradients are taken of the
    loss times the scale, and divided by it in fp32. Everything is on the device, and nothing here
    waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        """At its start.

        Args:
            device: of training.
        """
        self.value = torch.full((), START, device=device)
        """Of the next step; replaced, never changed in place."""
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)
        """In a row, since the scale changed last."""
        self.num_skipped = torch.zeros_like(self.good_steps)
        """Steps so far that were left out because the scale was too large."""

    @property
    def can_fall(self) -> Tensor:
        """Device flag: a smaller scale may do where gradients overflow."""
        return self.value > SMALLEST

    def follow(self, *, good: Tensor, overflowed: Tensor) -> None:
        """Take note of a step.

        Args:
            good: device flag: it was finite.
            overflowed: device flag: its gradient was not, and this is the scale's fault. Where
                neither is set, nothing changes.
        """
        good_steps = self.good_steps + good
        grows = good_steps >= PATIENCE
        factor = torch.where(overflowed, 0.5, torch.where(grows, 2.0, 1.0))
        self.value = (self.value * factor).clamp(SMALLEST, LARGEST)
        self.good_steps = torch.where(grows | overflowed, 0, good_steps)
        self.num_skipped = self.num_skipped + overflowed

    def state(self) -> dict[str, float]:
        """All of it, as JSON keeps it; waits for the device."""
        parts = (self.value, self.good_steps, self.num_skipped)
        value, good_steps, num_skipped = torch.stack([part.double() for part in parts]).tolist()
        return {"value": value, "good_steps": int(good_steps), "num_skipped": int(num_skipped)}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from `state`."""
        self.value = torch.full_like(self.value, state["value"])
        self.good_steps = torch.full_like(self.good_steps, int(state["good_steps"]))
        self.num_skipped = torch.full_like(self.num_skipped, int(state["num_skipped"]))
