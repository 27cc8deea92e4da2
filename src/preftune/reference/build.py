"""Score every answer once under the reference, or take the value from the store.

The reference is the policy in its initial state. Shards and their micro-batches are a pure
function of the rows, so a pass that was killed ends in the same bytes when it is run again, and
processes that run the same pass at once share its shards.

The ranks of one run score together: rank 0 decides what to compute, alone reads and writes, and
gives the sums to all; each forward is done by one of them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from preftune.batching.layout import Layout, build_layout, token_weights
from preftune.batching.micro_batches import RowSizes, sorted_batches
from preftune.distributed.ranks import ALONE, Ranks
from preftune.model.forward import pair_logps
from preftune.reference.fingerprints import completion_key
from preftune.reference.store import ReferenceStore, StoredLogps, read_shard
from preftune.schema import TokenizedExample

SECONDS_BETWEEN_LOOKS = 0.2
"""At shards that other processes compute."""

MAX_TOKENS_PER_MICRO_BATCH = 4096
"""Token positions of a forward, padding included; a longer answer goes alone."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ShardSize:
    """How a pass is cut. Fixed: the composition of a micro-batch changes a log-prob's last bits."""

    tokens: int = MAX_TOKENS_PER_MICRO_BATCH
    """Of a micro-batch, at most."""
    micro_batches: int = 16
    """Of one shard."""


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
class Answer:
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
    say: Callable[[str], None] = lambda text: None,
    shard_size: ShardSize = ShardSize(),
    ranks: Ranks = ALONE,
    forwards: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> ReferenceLogps:
    """Log-prob sums of every answer under the model as it is now.

    Args:
        model: the policy before its first step, in eval mode, prepared like in training.
        examples: rows with the same number of answers each.
        store: where values are kept; it must belong to this model (see `namespace_fields`).
        layout: how rows are laid out. What is stored does not depend on its `ld_alpha`.
        device: where the result goes.
        progress: called with (answers done, answers to do).
        say: called with a sentence for people.
        shard_size: how the pass is cut.
        ranks: share the work; all call this with the same rows. Rank 0's store is read.
        forwards: entered where forwards run.

    Raises:
        CacheError: the store is damaged or cannot be written; on every rank.
    """
    keys, answers = answers_of(examples)
    scorer = Scorer(model, layout, device)
    shards = _Pass(examples, scorer, store, shard_size, progress, say, ranks, forwards)
    pass_id = xxhash.xxh3_64_hexdigest(b"".join(answers))
    planned = ranks.decide(lambda: _plan(store, pass_id, list(answers)))
    known = shards.run(pass_id, [answers[key] for key in planned])

    def find_lost() -> list[bytes]:
        known.update(store.read(skip_pass=pass_id) | known)
        return [key for key in answers if key not in known]

    lost = ranks.decide(find_lost)
    if lost:  # values of another pass that somebody has deleted since
        lost_id = xxhash.xxh3_64_hexdigest(b"".join(lost))
        known |= shards.run(lost_id, [answers[key] for key in lost])
    sums = ranks.decide(
        lambda: np.array([_sums([known[key] for key in row], layout.ld_alpha) for row in keys])
    )
    return ReferenceLogps(
        sums=torch.tensor(sums, dtype=torch.float64, device=device),
        num_computed=shards.num_computed,
        num_reused=len(answers) - shards.num_computed,
    )


def answers_of(
    examples: Sequence[TokenizedExample],
) -> tuple[list[list[bytes]], dict[bytes, Answer]]:
    """The keys of each row's answers, and each answer where it first stands."""
    keys: list[list[bytes]] = []
    answers: dict[bytes, Answer] = {}
    for row, example in enumerate(examples):
        keys.append([completion_key(example, c) for c in example.completions])
        for side, (key, completion) in enumerate(zip(keys[-1], example.completions, strict=True)):
            lengths = (len(example.prompt_ids), len(completion.ids))
            answers.setdefault(key, Answer(key, row, side, example.prompt_key, lengths))
    return keys, answers


class Scorer:
    """Scores answers one by one: what an answer's tokens weigh depends on its row."""

    def __init__(self, model: nn.Module, layout: Layout, device: torch.device) -> None:
        """Take a model in eval mode; nothing depends on the layout's `ld_alpha`."""
        self.model = model
        self.layout = replace(layout, ld_alpha=1.0, scores_prompt=False)
        self.device = device

    def batches(self, answers: Sequence[Answer], max_tokens: int) -> list[list[Answer]]:
        """Micro-batches of at most `max_tokens` positions; a longer answer goes alone."""
        sizes = RowSizes(
            np.array([answer.prompt_key for answer in answers], dtype=np.uint64),
            np.array([answer.lengths for answer in answers], dtype=np.int64).reshape(-1, 2),
        )
        rows = sorted_batches(sizes, self.layout.name, max_tokens=max_tokens)
        return [[answers[i] for i in batch] for batch in rows]

    @torch.no_grad()
    def __call__(
        self, examples: Sequence[TokenizedExample], answers: Sequence[Answer]
    ) -> dict[bytes, StoredLogps]:
        """Log-probs of the answers of one micro-batch, by key."""
        rows = [answer.example(examples) for answer in answers]
        result = pair_logps(self.model, build_layout(rows, self.layout).to(self.device))
        triples = zip(answers, result.sums.tolist(), result.per_token, strict=True)
        return {
            answer.key: StoredLogps(total, per_token.float().cpu().numpy())
            for answer, total, per_token in triples
        }


def _plan(store: ReferenceStore, pass_id: str, keys: list[bytes]) -> list[bytes]:
    """What a pass has to compute, which is decided once and kept.

    A pass that was cut off, or that is run again after others have added to the store, so finds
    its own shards and its own values.
    """
    with store.deciding():
        planned = store.read_plan(pass_id)
        if planned is None:
            # Shards of this pass are there only if its plan was deleted: then it is that again.
            others, own = store.read(skip_pass=pass_id), store.read_pass(pass_id)
            planned = [key for key in keys if key in own or key not in others]
            store.write_plan(pass_id, planned)
    return planned


def _sums(row: list[StoredLogps], ld_alpha: float) -> list[float]:
    """The log-prob sums of one row's answers."""
    if ld_alpha == 1:
        return [answer.sum for answer in row]
    weights = token_weights([len(answer.per_token) for answer in row], ld_alpha)
    return [
        float(answer.per_token.astype(np.float64) @ np.array(own))
        for answer, own in zip(row, weights, strict=True)
    ]


Shard: TypeAlias = tuple[Path, list[list[Answer]]]
"""Where a shard lies, and its micro-batches."""


@dataclass
class _Pass:
    """Computes shards, or reads those that are there."""

    examples: Sequence[TokenizedExample]
    scorer: Scorer
    store: ReferenceStore
    size: ShardSize
    progress: Progress | None
    say: Callable[[str], None]
    ranks: Ranks
    forwards: Callable[[], AbstractContextManager[None]]
    num_computed: int = 0
    """Answers that the ranks computed, over all calls of `run`."""
    _has_told: bool = False

    def run(self, pass_id: str, missing: list[Answer]) -> dict[bytes, StoredLogps]:
        """The values of `missing`, on rank 0.

        In rounds: rank 0 takes as many shards as there are ranks, of those that no other process
        computes; the ranks share their micro-batches; rank 0 writes.
        """
        shards = self._shards(pass_id, missing)
        pending, values = list(range(len(shards))), {}
        report = partial(self._report, len(missing), values)
        while True:
            # What is claimed stays so until it is written.
            with ExitStack() as claims:
                take = partial(self._take, shards, pending, values, claims)
                taken = self.ranks.decide(take)
                report(0)
                if taken is None:
                    return values
                if taken:
                    batches = [batch for index in taken for batch in shards[index][1]]
                    computed = self._scored(batches, report)
                    self.num_computed += len(computed)
                    keep = partial(self._keep, shards, pending, values, taken, computed)
                    self.ranks.decide(keep)

    def _shards(self, pass_id: str, missing: list[Answer]) -> list[Shard]:
        batches, step = self.scorer.batches(missing, self.size.tokens), self.size.micro_batches
        return [
            (self.store.shard_path(pass_id, index), batches[start : start + step])
            for index, start in enumerate(range(0, len(batches), step))
        ]

    def _take(
        self,
        shards: list[Shard],
        pending: list[int],
        values: dict[bytes, StoredLogps],
        claims: ExitStack,
    ) -> list[int] | None:
        """Read what is there by now, and claim what to compute next.

        Returns:
            Which shards; None once all are read; none of them while other processes compute all
            that is left.
        """
        taken: list[int] = []
        for index in list(pending):
            if len(taken) == self.ranks.world_size:
                break
            path, batches = shards[index]
            keys = _keys(batches)
            stored = _stored(path, keys)
            if stored is None and claims.enter_context(self.store.claim(path)):
                stored = _stored(path, keys)
                if stored is None:
                    taken.append(index)
            if stored is not None:
                values |= stored
                pending.remove(index)
        if not pending:
            return None
        if not taken:
            self._wait(len(pending))
        return taken

    def _wait(self, num_shards: int) -> None:
        if not self._has_told:
            self.say(
                f"waiting for {num_shards} shards of reference log-probs, which another process "
                f"is computing in {self.store.folder}"
            )
            self._has_told = True
        time.sleep(SECONDS_BETWEEN_LOOKS)

    def _scored(
        self, batches: list[list[Answer]], report: Callable[[int], None]
    ) -> dict[bytes, StoredLogps]:
        """The values of micro-batches, on every rank; each is one rank's work."""
        ranks = self.ranks

        def compute() -> dict[bytes, StoredLogps]:
            values: dict[bytes, StoredLogps] = {}
            with self.forwards():
                for place in range(ranks.rank, len(batches) + ranks.rank, ranks.world_size):
                    if place < len(batches):
                        values |= self.scorer(self.examples, batches[place])
                        report(len(values) * ranks.world_size)
                    else:  # for nothing: some engines make every forward one of all ranks
                        self.scorer(self.examples, batches[-1][-1:])
            return values

        mine = compute() if ranks.forwards_together else ranks.together(compute)
        whole: dict[bytes, StoredLogps] = {}
        for part in ranks.gather(mine):
            whole |= part
        return whole

    def _keep(
        self,
        shards: list[Shard],
        pending: list[int],
        values: dict[bytes, StoredLogps],
        taken: list[int],
        computed: dict[bytes, StoredLogps],
    ) -> None:
        for index in taken:
            path, batches = shards[index]
            entries = {key: computed[key] for key in _keys(batches)}
            self.store.write_shard(path, entries)
            values |= entries
            pending.remove(index)

    def _report(self, number: int, values: Mapping[bytes, StoredLogps], num_more: int) -> None:
        if self.progress is not None:
            self.progress(min(len(values) + num_more, number), number)


def _keys(batches: list[list[Answer]]) -> list[bytes]:
    return [answer.key for batch in batches for answer in batch]


def _stored(path: Path, keys: list[bytes]) -> dict[bytes, StoredLogps] | None:
    """The shard, if it is there and holds these answers."""
    if not path.exists():
        return None
    stored = read_shard(path)
    return stored if all(key in stored for key in keys) else None
