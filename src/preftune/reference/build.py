"""Score every answer once under the reference, or take the value from the store.

The reference is the policy in its initial state. Shards and their micro-batches are a pure
function of the rows, so a pass that was killed ends in the same bytes when it is run again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from preftune.batching.layout import Layout, build_layout, token_weights
from preftune.batching.micro_batches import RowSizes, sorted_batches
from preftune.model.forward import pair_logps
from preftune.reference.fingerprints import completion_key
from preftune.reference.store import ReferenceStore, StoredLogps
from preftune.schema import TokenizedExample

# Token positions, padding included. Fixed, because the composition of a micro-batch changes the
# last bits of a log-prob.
MAX_TOKENS_PER_MICRO_BATCH = 4096
MICRO_BATCHES_PER_SHARD = 16

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ReferenceLogps:
    """The reference's log-prob sums of a dataset, whole on the device."""

    sums: Tensor
    """fp64, (rows, answers a row), nats; with the layout's `ld_alpha`, weighted sums."""
    num_computed: int
    """Answers scored by this call; answers that occur twice count once."""
    num_reused: int
    """Answers whose values were in the store."""


@dataclass(frozen=True)
class _Answer:
    """Where an answer stands; its tokens are read when they are scored."""

    key: bytes
    row: int
    side: int
    prompt_key: int
    lengths: tuple[int, int]
    """Tokens of the prompt, and of the answer."""

    def example(self, examples: Sequence[TokenizedExample]) -> TokenizedExample:
        """Its row, with no other answer."""
        row, only = examples[self.row], slice(self.side, self.side + 1)
        return replace(row, completions=row.completions[only], roles=row.roles[only])


def reference_logps(
    model: nn.Module,
    examples: Sequence[TokenizedExample],
    store: ReferenceStore,
    *,
    layout: Layout,
    device: torch.device,
    progress: Progress | None = None,
) -> ReferenceLogps:
    """Log-prob sums of every answer under the model as it is now.

    Args:
        model: the policy before its first step, in eval mode, prepared like in training.
        examples: rows with the same number of answers each.
        store: where values are kept; it must belong to this model (see `namespace_fields`).
        layout: how rows are laid out. What is stored does not depend on its `ld_alpha`.
        device: where the result goes.
        progress: called with (answers done, answers to do).
    """
    keys: list[list[bytes]] = []
    answers: dict[bytes, _Answer] = {}
    for row, example in enumerate(examples):
        keys.append([completion_key(example, c) for c in example.completions])
        for side, (key, completion) in enumerate(zip(keys[-1], example.completions, strict=True)):
            lengths = (len(example.prompt_ids), len(completion.ids))
            answers.setdefault(key, _Answer(key, row, side, example.prompt_key, lengths))
    # Answers are scored one by one: what an answer's tokens weigh depends on its row.
    shared = (examples, model, store, replace(layout, ld_alpha=1.0, scores_prompt=False), device)
    rows_id = xxhash.xxh3_64_hexdigest(b"".join(answers))
    # What this pass has to compute is decided once and kept: a pass that was cut off, or that is
    # run again after others have added to the store, finds its own shards and its own values.
    planned = store.read_plan(rows_id)
    if planned is None:
        stored = store.read()
        planned = [key for key in answers if key not in stored]
        store.write_plan(rows_id, planned)
    own, num_computed = _compute_shards(
        [answers[key] for key in planned], rows_id, *shared, progress
    )
    known = store.read(skip_pass=rows_id) | own
    lost = [answer for key, answer in answers.items() if key not in known]
    if lost:  # values of another pass that somebody has deleted since
        lost_id = xxhash.xxh3_64_hexdigest(b"".join(answer.key for answer in lost))
        again, num_again = _compute_shards(lost, lost_id, *shared, progress)
        known |= again
        num_computed += num_again
    sums = [_sums([known[key] for key in row], layout.ld_alpha) for row in keys]
    return ReferenceLogps(
        sums=torch.tensor(sums, dtype=torch.float64, device=device),
        num_computed=num_computed,
        num_reused=len(answers) - num_computed,
    )


def _sums(row: list[StoredLogps], ld_alpha: float) -> list[float]:
    """The log-prob sums of one row's answers."""
    if ld_alpha == 1:
        return [answer.sum for answer in row]
    weights = token_weights([len(answer.per_token) for answer in row], ld_alpha)
    return [
        float(answer.per_token.astype(np.float64) @ np.array(own))
        for answer, own in zip(row, weights, strict=True)
    ]


def _compute_shards(
    missing: list[_Answer],
    pass_id: str,
    examples: Sequence[TokenizedExample],
    model: nn.Module,
    store: ReferenceStore,
    layout: Layout,
    device: torch.device,
    progress: Progress | None,
) -> tuple[dict[bytes, StoredLogps], int]:
    sizes = RowSizes(
        np.array([answer.prompt_key for answer in missing], dtype=np.uint64),
        np.array([answer.lengths for answer in missing], dtype=np.int64).reshape(-1, 2),
    )
    batches = sorted_batches(sizes, layout.name, max_tokens=MAX_TOKENS_PER_MICRO_BATCH)
    values: dict[bytes, StoredLogps] = {}
    num_computed = 0

    def report(num_more: int) -> None:
        if progress is not None:
            progress(len(values) + num_more, len(missing))

    for index, start in enumerate(range(0, len(batches), MICRO_BATCHES_PER_SHARD)):
        shard = [[missing[i] for i in b] for b in batches[start : start + MICRO_BATCHES_PER_SHARD]]
        keys = [answer.key for batch in shard for answer in batch]
        path = store.shard_path(pass_id, index)
        stored = store.read_shard(path) if path.exists() else {}
        if any(key not in stored for key in keys):
            stored = _compute_shard(model, shard, examples, layout, device, report)
            store.write_shard(path, stored)
            num_computed += len(keys)
        values.update(stored)
        report(0)
    return values, num_computed


@torch.no_grad()
def _compute_shard(
    model: nn.Module,
    batches: list[list[_Answer]],
    examples: Sequence[TokenizedExample],
    layout: Layout,
    device: torch.device,
    report: Callable[[int], None],
) -> dict[bytes, StoredLogps]:
    values: dict[bytes, StoredLogps] = {}
    for answers in batches:
        rows = [answer.example(examples) for answer in answers]
        result = pair_logps(model, build_layout(rows, layout).to(device))
        for answer, total, per_token in zip(
            answers, result.sums.tolist(), result.per_token, strict=True
        ):
            values[answer.key] = StoredLogps(total, per_token.float().cpu().numpy())
        report(len(values))
    return values
