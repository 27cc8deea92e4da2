"""bitsandbytes' AdamW with moments in 8 bits, also in memory that is paged out to the host."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def adamw_8bit(
    groups: Iterable[dict[str, Any]],
    learning_rate: float,
    *,
    betas: tuple[float, float],
    eps: float,
    paged: bool,
) -> Optimizer:
    """bitsandbytes' AdamW8bit, or PagedAdamW8bit.

    Its kernels count steps on the host, so whether to leave an update out is read there: the host
    waits for the device once a step, and once more where the state is paged.

    Args:
        groups: of parameters, with `weight_decay`.
        learning_rate: of the first step.
        betas: of AdamW.
        eps: of AdamW.
        paged: keep the state in memory that the driver may move to the host.
    """
    from bitsandbytes import optim

    base = optim.PagedAdamW8bit if paged else optim.AdamW8bit
    made: Any = type(base.__name__, (_Skipping, base), {})
    return made(groups, lr=learning_rate, betas=betas, eps=eps)


class _Skipping:
    """In front of a class of bitsandbytes: what the engine asks of an optimizer."""

    param_groups: list[dict[str, Any]]
    state: Any
    is_paged: bool
    init_state: Callable[..., None]
    prefetch_state: Callable[..., None]
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every weight that has a gradient, unless `found_inf` is set.

        Args:
            closure: not read.
        """
        own = [
            (group, p, number, index)
            for number, group in enumerate(self.param_groups)
            for index, p in enumerate(group["params"])
            if p.grad is not None
        ]
        for place in own:
            state = self.state[place[1]]
            if not state:
                self.init_state(*place)
                # A tensor, so that checkpoints have it.
                state["step"] = torch.tensor(state["step"])
        if self.found_inf is not None and bool(self.found_inf > 0):  # host sync
            return
        if self.grad_scale is not None:
            torch._foreach_div_([p.grad for _, p, _, _ in own], self.grad_scale)
        for place in own:
            self.prefetch_state(place[1])
            self.update_step(*place)
        if self.is_paged and own and own[0][1].is_cuda:
            torch.cuda.synchronize()  # host sync: what is paged is read by the host, too

    @torch.no_grad()
    def update_step(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
        """bitsandbytes' own, whose step count is a number."""
        state = self.state[p]
        count = state["step"]
        state["step"] = count.numpy().item()  # the host's own
        super().update_step(group, p, gindex, pindex)  # type: ignore[misc]
        state["step"] = count.fill_(state["step"])
