"""Before the first step: the policy must still be the reference, and both the model of the config.

Five faults that leave the loss at its constant, or look like a good start, are seen here: values of
trained weights, both models without the start's adapter, an initialisation that moves the base
weights (PiSSA) while its adapter is off, values of other rows, and prompt tokens that are scored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftune.batching.batcher import RowBatcher
from preftune.batching.layout import token_weights
from preftune.batching.micro_batches import RowSizes
from preftune.errors import CacheError
from preftune.model.forward import pair_logps
from preftune.model.rope import forget_earlier_calls
from preftune.objective import Objective
from preftune.reference.agreement import tolerance
from preftune.schema import TokenizedExample

PLAIN_TOKENS = 512
"""Rows that are scored once more are no longer than this a side, where there are such."""
COMPARED_ROWS = 8
"""Rows that policy and reference are compared on, spread over the dataset."""


@dataclass(frozen=True)
class PlainScores:
    """Log-probs of the start model by its own forward: no layout, no engine, nothing stored."""

    per_token: dict[int, list[Tensor]]
    """Row -> for each answer the log-prob of each scored token, nats, fp64, on the CPU."""


@torch.no_grad()
def plain_scores(
    model: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    rows: Sequence[int],
    autocast: torch.dtype | None,
) -> PlainScores:
    """Score a few rows answer by answer, unpadded, with nothing of preftune's in between.

    To be called when the model has just been loaded, with the adapters it starts from active, and
    before anything is added to it or changed in it: what comes later is held against these values.

    Args:
        model: as transformers made it, in eval mode.
        examples: the rows of the dataset.
        rows: which of them.
        autocast: type of the products in training, where it is not the weights'.
    """
    device = model.device
    enabled = autocast is not None
    per_token: dict[int, list[Tensor]] = {}
    with torch.autocast(device.type, dtype=autocast, enabled=enabled):
        for row in rows:
            example = examples[row]
            per_token[row] = []
            for completion in example.completions:
                first = len(example.prompt_ids)
                ids = torch.tensor([[*example.prompt_ids, *completion.ids]], device=device)
                logits = model(input_ids=ids, use_cache=False).logits[0, first - 1 : -1]
                logps = logits.float().log_softmax(dim=-1)
                logps = logps.gather(1, ids[0, first:].unsqueeze(1)).squeeze(1)
                scored = completion.scored or [True] * len(completion.ids)
                per_token[row].append(logps[torch.tensor(scored, device=device)].double().cpu())
    forget_earlier_calls(model)
    return PlainScores(per_token)


def plain_rows(sizes: RowSizes) -> list[int]:
    """Two rows to score once more, cheap ones: the shortest, and one of ordinary length."""
    longest = sizes.lengths[:, 0] + sizes.lengths[:, 1:].max(axis=1)
    order = np.argsort(longest, kind="stable")
    cheap = order[longest[order] <= PLAIN_TOKENS]
    other = cheap[len(cheap) // 2] if len(cheap) else order[0]
    return sorted({int(order[0]), int(other)})


def compared_rows(num_rows: int) -> list[int]:
    """Rows to compare policy and reference on, spread over the dataset."""
    return sorted(set(np.linspace(0, num_rows - 1, COMPARED_ROWS).astype(int).tolist()))


@torch.no_grad()
def check_step_zero(
    model: nn.Module,
    objective: Objective[Any],
    batcher: RowBatcher,
    micro_batches: Sequence[Sequence[int]],
    *,
    is_exact: bool,
    plain: PlainScores | None = None,
    reference_is_start: bool = True,
) -> float:
    """Compare the policy with the reference, and both with the start model's own forward.

    The loss alone is blind: scoring the prompt on both sides, or both models on a wrong base,
    still gives ln 2. So each side's log-probs are compared as well, and a few rows are held against
    `plain`.

    Args:
        model: prepared, before any update and before a checkpoint is restored.
        objective: the loss.
        batcher: pairs with their stored reference values, if the reference is not a live one.
        micro_batches: which pairs to compare, a forward each.
        is_exact: whether weights and products are fp32; others round by batch composition, so
            their tolerance is wide.
        plain: what to hold policy and reference against; None: nothing.
        reference_is_start: whether the reference is the policy's own start. Of another model's
            values only that they are finite is checked.

    Returns:
        The mean loss over the pairs, each counted once.

    Raises:
        CacheError: policy, reference and start model disagree, or a value is not finite.
    """
    model.eval()
    _check_finite(batcher)
    if plain is not None:
        _check_plain(model, batcher, plain, is_exact, reference_is_start=reference_is_start)
    losses = []
    for rows in micro_batches:
        logps = objective.logps(model, batcher(rows))
        # Without weights, which scale the constant that the loss is compared with.
        output = objective.output(replace(logps, weight=None))
        losses.append(output.metrics["loss"].values)
        if reference_is_start:
            _check_sides(objective, logps, batcher, rows, is_exact)
            loss = float(losses[-1].mean())
            _check_constant(loss, objective.value_at_reference(logps), batcher, is_exact)
    return float(torch.cat(losses).mean())


def _check_finite(batcher: RowBatcher) -> None:
    if batcher.reference is None:
        return
    bad = (~torch.isfinite(batcher.reference)).any(dim=1).nonzero().flatten().tolist()
    if bad:
        named = ", ".join(batcher.examples[row].row_id for row in bad[:5])
        raise CacheError(
            f"the reference gives {len(bad)} of {len(batcher.examples)} rows a log-prob that is "
            f"not finite ({named}): the model's weights hold a number that is not finite or too "
            "large for its dtype. Take another model or --mixed_precision fp32, or leave those "
            "rows out"
        )


def _check_plain(
    model: nn.Module,
    batcher: RowBatcher,
    plain: PlainScores,
    is_exact: bool,
    *,
    reference_is_start: bool,
) -> None:
    """Policy and stored values against the start model's own forward, answer by answer."""
    for row, answers in plain.per_token.items():
        result = pair_logps(model, batcher([row]).layout)
        sums, lengths = result.sums.tolist(), result.lengths.tolist()
        stored = None
        if batcher.reference is not None and reference_is_start:
            stored = batcher.reference[row].tolist()
        weights = token_weights([len(tokens) for tokens in answers], batcher.layout.ld_alpha)
        for number, tokens in enumerate(answers):
            where = f"answer {number + 1} of {batcher.examples[row].row_id}"
            if lengths[number] != len(tokens):
                raise CacheError(
                    f"before the first step {lengths[number]} tokens of {where} are scored, and "
                    f"it has {len(tokens)}: tokens of the prompt count, or some of the answer do "
                    "not. The fault is preftune's: please report it"
                )
            allowed = _plain_tolerance(tokens, is_exact)
            pairs = [("policy", sums[number], float(tokens.sum()))]
            if stored is not None:
                own = float(tokens @ torch.tensor(weights[number], dtype=torch.float64))
                pairs.append(("reference", stored[number], own))
            for who, value, expected in pairs:
                # Not `>`: a value that is no number must not pass.
                if not abs(value - expected) <= allowed:
                    raise CacheError(
                        f"before the first step the {who} gives {where} a log-prob of "
                        f"{value:.6f}, and the model as it was loaded, with its adapters, "
                        f"{expected:.6f}; they must agree to {allowed:.2g}. {_remedy(batcher)}"
                    )


def _check_sides(
    objective: Objective[Any], logps: Any, batcher: RowBatcher, rows: Sequence[int], is_exact: bool
) -> None:
    for side, (policy, reference, lengths) in objective.sides(logps).items():
        allowed = tolerance(lengths.double(), reference, is_exact)
        # A value that is no number exceeds every tolerance.
        excess = ((policy - reference).abs() - allowed).nan_to_num(nan=math.inf)
        worst = int(excess.argmax())
        if excess[worst] > 0:
            raise CacheError(
                f"before the first step the policy gives the {side} answer of "
                f"{batcher.examples[rows[worst]].row_id} a log-prob of {float(policy[worst]):.6f}, "
                f"the reference {float(reference[worst]):.6f}; they must agree to "
                f"{float(allowed[worst]):.2g}. {_remedy(batcher)}"
            )


def _check_constant(
    loss: float, expected: float | None, batcher: RowBatcher, is_exact: bool
) -> None:
    allowed = 1e-4 if is_exact else 0.1
    if expected is not None and not math.isclose(loss, expected, abs_tol=allowed * (1 + expected)):
        raise CacheError(
            f"before the first step the loss is {loss:.6f}; it must be {expected:.6f}, because "
            f"policy and reference are still equal. {_remedy(batcher)}"
        )


def _remedy(batcher: RowBatcher) -> str:
    if batcher.reference is None:
        return "The fault is preftune's: please report it"
    return (
        "The store does not belong to this model: delete its folder under cache_dir/reference, "
        "or give another --cache_dir"
    )


def _plain_tolerance(tokens: Tensor, is_exact: bool) -> float:
    """Wider than between two forwards of ours: the attention kernel is another one.

    A prompt token that counts, or another base, moves a sum by whole nats.
    """
    root = math.sqrt(len(tokens))
    return 1e-3 * root + 1e-5 * float(tokens.sum().abs()) if is_exact else 0.3 * root + 1.0
