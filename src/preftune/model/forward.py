"""`pair_logps`: the one forward that training, the reference pass, evaluation and score share."""

from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from preftune.batching.layout import Block, PairLayout
from preftune.batching.shards import Shard
from preftune.distributed.sequence import SequenceGroup
from preftune.model.activations import HostActivations
from preftune.model.adapter_files import ADAPTER
from preftune.model.load_balancing import Routing, experts_a_token, routing_of
from preftune.model.logprob_head import (
    HeadTransform,
    chunk_memory,
    head_chunk_size,
    token_logps,
)
from preftune.model.rope import forget_earlier_calls, length_limits

FORWARD_VERSION = 3
"""Part of the key of stored reference log-probs: raise it when the numbers may change."""


class SequenceLogps(NamedTuple):
    """Log-probs of the answers of one micro-batch, in the layout's numbering of answers.

    A tuple, because engines look for the tensors of a module's output to hook its backward to.
    """

    sums: Float[Tensor, " completions"]
    """Sum over the scored tokens of each answer, nats, fp64: an fp32 sum of a few thousand nats is
    off by 1e-4, which a difference of two such sums would keep."""
    lengths: Int[Tensor, " completions"]
    """Scored tokens of each answer."""
    weighted: Float[Tensor, " completions"] | None
    """The same with the layout's weights of tokens; None where it has none."""
    alignment: Float[Tensor, " completions"] | None
    """Mean over tokens of log p(y_t) - log sum_v p(v)^2; None unless asked for."""
    per_token: list[Float[Tensor, " _"]]
    """Log-prob of each scored token, answer by answer; without gradient."""
    routing: Routing | None = None
    """Of all tokens that were forwarded, prompts too; None unless asked for."""

    @property
    def counted(self) -> Float[Tensor, " completions"]:
        """What losses compare: the weighted sums where there are, else the plain ones."""
        return self.sums if self.weighted is None else self.weighted


class PolicyModel(nn.Module):
    """A causal LM whose forward returns log-probs of the scored tokens.

    Backbone and head sit inside one module, so that DDP's, FSDP's and ZeRO's hooks and autocast
    see every parameter that the step uses.
    """

    def __init__(
        self, model: PreTrainedModel, *, compact_head: bool = True, use_cache: bool = False
    ) -> None:
        """Wrap a causal LM.

        Args:
            model: the causal LM of transformers.
            compact_head: apply the head at scored positions only. False runs the whole model on
                every position: for architectures whose head does more than `HeadTransform` knows
                (`model.probe` decides).
            use_cache: let the model keep keys and values, which nothing here reads.
        """
        super().__init__()
        forget_earlier_calls(model)
        self.model = model
        self.limits = length_limits(model.config)
        self.compact_head = compact_head
        self.use_cache = use_cache
        self.activation_offload = False
        """Whether what a forward keeps for its backward lies in the host's memory."""
        self.sequence_group: SequenceGroup | None = None
        """Who shares the rows of layouts that give each process a part."""

    @property
    def transform(self) -> HeadTransform:
        """What comes after the head's product, where the head is compact."""
        if not self.compact_head:
            return HeadTransform()
        return HeadTransform.from_config(self.model.config)

    def head_chunk_size(self, device: torch.device) -> int:
        """Most positions whose logits exist at once on a device."""
        config = self.model.config.get_text_config()
        return head_chunk_size(chunk_memory(device), config.hidden_size, config.vocab_size)

    def forward(
        self, layout: PairLayout, with_alignment: bool = False, with_routing: bool = False
    ) -> SequenceLogps:
        """See `pair_logps`."""
        wanted = with_alignment, with_routing
        recompute = layout.one_at_a_time and torch.is_grad_enabled()
        results = [
            checkpoint(self._block_logps, block, *wanted, use_reentrant=False)
            # The backward begins with the last block, whose activations are there already.
            if recompute and block is not layout.blocks[-1]
            else self._block_logps(block, *wanted)
            for block in layout.blocks
        ]
        order = [i for block in layout.blocks for i in block.completion_ids]
        place = {completion: at for at, completion in enumerate(order)}
        at = [place[i] for i in range(layout.num_completions)]
        in_order = at == list(range(len(at)))

        def joined(parts: list[Tensor]) -> Tensor:
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            return whole if in_order else whole[torch.tensor(at, device=whole.device)]

        pieces = [piece for result in results for piece in result.per_token]
        routings = [result.routing for result in results if result.routing is not None]
        alignments = [result.alignment for result in results if result.alignment is not None]
        weighted = [result.weighted for result in results if result.weighted is not None]
        return SequenceLogps(
            sums=joined([result.sums for result in results]),
            lengths=joined([result.lengths for result in results]),
            weighted=joined(weighted) if weighted else None,
            alignment=joined(alignments) if alignments else None,
            per_token=[pieces[i] for i in at],
            routing=reduce(Routing.plus, routings) if routings else None,
        )

    def _block_logps(self, block: Block, with_alignment: bool, with_routing: bool) -> SequenceLogps:
        hidden, head, routing = self._scored_hidden(block, with_routing)
        logps, alignment = token_logps(
            hidden,
            head,
            block.labels if block.shard is None else block.labels[block.shard.scored],
            self.transform,
            with_alignment=with_alignment,
            chunk_size=self.head_chunk_size(hidden.device),
        )
        if block.shard is not None:
            logps, alignment = self._of_the_row(logps, alignment, block, block.shard)
        # segment_reduce sums in a fixed order on every device, where index_add_ does not on CUDA.
        sums = torch.segment_reduce(logps.double(), "sum", lengths=block.lengths, unsafe=True)
        weighted, means = None, None
        if block.weights is not None:
            weighted = torch.segment_reduce(
                logps.double() * block.weights, "sum", lengths=block.lengths, unsafe=True
            )
        if alignment is not None:
            means = torch.segment_reduce(
                alignment.double(), "mean", lengths=block.lengths, unsafe=True
            )
        per_token = list(logps.detach().split(block.num_scored))
        return SequenceLogps(sums, block.lengths, weighted, means, per_token, routing)

    def _scored_hidden(
        self, block: Block, with_routing: bool
    ) -> tuple[Tensor, nn.Module, Routing | None]:
        options = self._options(block)
        part = block if block.shard is None else block.shard
        if with_routing:
            options["output_router_logits"] = True
        if self.compact_head:
            # No attention mask and no position ids: right padding needs neither under causal
            # attention, and transformers would read restarting positions as packed documents.
            with self._keeping(part.input_ids.device):
                output = self.model.base_model(part.input_ids, **options)
            hidden = output[0]
            head = self.model.get_output_embeddings()
            assert head is not None  # the probe refuses a compact head without one
            head = _the_one_that_trains(head)
        else:
            with self._keeping(part.input_ids.device):
                output = self.model(part.input_ids, **options)
            hidden = output.logits
            head = nn.Identity()
        routing = None
        if with_routing:
            top_k = experts_a_token(self.model.config)
            assert top_k is not None  # the recipe refuses models without routers
            if block.shard is None:
                routing = routing_of(output.router_logits, top_k, block.real_tokens)
            else:
                own = routing_of(output.router_logits, top_k, block.shard.real)
                routing = own.summed(self._group.total)
        return hidden.flatten(0, 1)[part.score_positions], head, routing

    def _keeping(self, device: torch.device) -> AbstractContextManager[None]:
        """Where what the backward needs is kept."""
        moves = self.activation_offload and torch.is_grad_enabled()
        return HostActivations().kept(device) if moves else nullcontext()

    def _options(self, block: Block) -> dict[str, Any]:
        options: dict[str, Any] = {"use_cache": self.use_cache}
        if block.segments is not None:
            # A keyword reaches every layer, and activation checkpointing keeps it for the backward.
            options |= {"position_ids": block.position_ids, "segments": block.segments}
        if block.shard is not None:
            options["position_ids"] = block.shard.position_ids
            options["sequence_group"] = self._group
        return options

    @property
    def _group(self) -> SequenceGroup:
        assert self.sequence_group is not None  # the recipe gives one before it shares rows
        return self.sequence_group

    def _of_the_row(
        self, logps: Tensor, alignment: Tensor | None, block: Block, shard: Shard
    ) -> tuple[Tensor, Tensor | None]:
        """From the tokens predicted here to all of the row's, in their order."""
        # Each is given by one process and 0 on the others: the sum is exact.
        whole = logps.new_zeros(len(block.labels)).index_copy(0, shard.scored, logps)
        whole = self._group.total(whole)
        if alignment is not None:
            alignment = torch.zeros_like(whole).index_copy(0, shard.scored, alignment)
            alignment = self._group.total(alignment.detach())
        return whole, alignment


def pair_logps(
    model: nn.Module,
    layout: PairLayout,
    *,
    with_alignment: bool = False,
    with_routing: bool = False,
) -> SequenceLogps:
    """Log-probs of every answer of a micro-batch under `model`.

    Args:
        model: a `PolicyModel`, or an engine's wrapper of one.
        layout: what to compute, on the model's device.
        with_alignment: also compute what WPO's weight reads.
        with_routing: also say what the routers of a mixture of experts did.

    Returns:
        Sums, lengths and per-token values, in the layout's numbering of answers.
    """
    return model(layout, with_alignment, with_routing)


def _the_one_that_trains(head: Any) -> nn.Module:
    """The head itself, or, where PEFT keeps it beside one that trains, that one."""
    copies = getattr(head, "modules_to_save", None)
    return head if copies is None else copies[ADAPTER]
