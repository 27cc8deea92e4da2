"""Before the first step: the policy must still be the reference."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from preftune.batching.batcher import RowBatcher
from preftune.errors import CacheError
from preftune.objective import Objective


@torch.no_grad()
def check_step_zero(
    model: nn.Module,
    objective: Objective[Any],
    batcher: RowBatcher,
    rows: list[int],
    *,
    is_exact: bool,
) -> float:
    """Compare the policy with the reference, side by side, and the loss with its constant.

    The loss alone is blind: scoring the prompt on both sides, or both models on a wrong base,
    still gives ln 2. So each side's log-probs are compared as well.

    Args:
        model: prepared, before any update and before a checkpoint is restored.
        objective: the loss.
        batcher: pairs with their stored reference values, if the reference is not a live one.
        rows: which pairs to look at.
        is_exact: whether weights and products are fp32; bf16 rounds by batch composition, so its
            tolerance is wide.

    Returns:
        The mean loss over `rows`, each counted once.

    Raises:
        CacheError: policy and reference disagree.
    """
    model.eval()
    logps = objective.logps(model, batcher(rows))
    # Without weights, which scale the constant that the loss is compared with.
    output = objective.output(replace(logps, weight=None))
    loss = float(output.metrics["loss"].values.mean())
    for side, (policy, reference, lengths) in objective.sides(logps).items():
        tolerance = _tolerance(lengths.double(), reference, is_exact)
        excess = (policy - reference).abs() - tolerance
        worst = int(excess.argmax())
        if excess[worst] > 0:
            raise CacheError(
                f"before the first step the policy gives the {side} answer of "
                f"{batcher.examples[rows[worst]].row_id} a log-prob of {float(policy[worst]):.6f}, "
                f"the reference {float(reference[worst]):.6f}; they must agree to "
                f"{float(tolerance[worst]):.2g}. {_remedy(batcher)}"
            )
    expected = objective.value_at_reference(logps)
    allowed = 1e-4 if is_exact else 0.1
    if expected is not None and not math.isclose(loss, expected, abs_tol=allowed * (1 + expected)):
        raise CacheError(
            f"before the first step the loss is {loss:.6f}; it must be {expected:.6f}, because "
            f"policy and reference are still equal. {_remedy(batcher)}"
        )
    return loss


def _remedy(batcher: RowBatcher) -> str:
    if batcher.reference is None:
        return "The fault is preftune's: please report it"
    return (
        "The store does not belong to this model: delete its folder under cache_dir/reference, "
        "or give another --cache_dir"
    )


def _tolerance(lengths: torch.Tensor, logps: torch.Tensor, is_exact: bool) -> torch.Tensor:
    if is_exact:
        return 1e-5 * lengths.sqrt() + 1e-6 * logps.abs()
    return 0.1 * lengths.sqrt()
