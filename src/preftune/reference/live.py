"""A reference that runs beside the policy and follows it: TR-DPO."""

from copy import deepcopy

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from preftune.batching.layout import PairLayout
from preftune.config.dpo import DPOConfig
from preftune.distributed.runtime import Runtime
from preftune.model.forward import PolicyModel, pair_logps


class LiveReference:
    """A frozen copy of the policy in its initial state, drawn towards the policy now and then.

    Every `sync_steps` optimizer steps

        reference <- mixup_alpha * policy + (1 - mixup_alpha) * reference

    Each rank has a copy, and as the weights of the policy are the same on all ranks, so are those
    of the copies.

    Source: Gorbatovski et al. 2024, Learn Your Reference Model for Real Good Alignment,
    arXiv:2404.09656: mixup_alpha 1 is its hard update, sync_steps 1 its soft one.
    """

    def __init__(
        self, policy: PolicyModel, runtime: Runtime, *, mixup_alpha: float, sync_steps: int
    ) -> None:
        """Copy the policy, with its attention and in the precision that the runtime gives it.

        Args:
            policy: in its initial state, not yet wrapped by the engine.
            runtime: of the run.
            mixup_alpha: the policy's share in a sync, above 0, at most 1.
            sync_steps: optimizer steps from one sync to the next.
        """
        copy = deepcopy(policy).requires_grad_(False).eval()
        self.mixup_alpha = mixup_alpha
        self.sync_steps = sync_steps
        self._weights = list(zip(copy.parameters(), policy.parameters(), strict=True))
        self._copy = copy
        self._prepared = runtime.prepare_for_inference(copy)

    @classmethod
    def of(cls, config: DPOConfig, policy: PolicyModel, runtime: Runtime) -> "LiveReference | None":
        """The one that `config` asks for; None where it asks for none."""
        alpha, steps = config.reference_mixup_alpha, config.reference_sync_steps
        if not config.sync_reference or alpha is None or steps is None:
            return None
        return cls(policy, runtime, mixup_alpha=alpha, sync_steps=steps)

    @property
    def model(self) -> PreTrainedModel:
        """Whose weights a checkpoint holds."""
        return self._copy.model

    @torch.no_grad()
    def logps(self, layout: PairLayout) -> Float[Tensor, " completions"]:
        """Log-prob sums of every answer, fp64, nats; weighted where the layout says so."""
        return pair_logps(self._prepared, layout).counted

    @torch.no_grad()
    def follow(self, step: int, healthy: Bool[Tensor, ""]) -> None:
        """Sync with the policy, if it is time; nothing waits for the device.

        Args:
            step: optimizer steps done.
            healthy: on the device. If it is false the weights stay: the steps since the first bad
                one count for nothing, and the checkpoint of the step before it must not show them.
        """
        if step % self.sync_steps:
            return
        for own, policys in self._weights:
            own.lerp_(torch.where(healthy, policys, own), self.mixup_alpha)
