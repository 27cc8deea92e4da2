"""DeepSpeed ZeRO: optimizer state, gradients and weights cut over the ranks, by stages."""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from preftune.config.distributed import LARGEST_STAGE, DistributedConfig
from preftune.distributed.delivery import Delivery, repeated_layers
from preftune.distributed.engine import Engine, MakeOptimizer, gradient_norm
from preftune.distributed.parts import Part, cut


class ZeroEngine(Engine):
    """A DeepSpeed engine that is driven micro-batch by micro-batch.

    DeepSpeed counts accumulation, clips and skips by its own rules where it is let; here it is told
    when a step ends, gets `max_grad_norm`, and updates only when the step says so. The host
    waits for the norm in every step, as DeepSpeed itself does.
    """

    model: Any
    is_sharded = True

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        config: DistributedConfig,
        *,
        delivery: Delivery | None,
        max_grad_norm: float | None,
        device: torch.device,
    ) -> None:
        """Cut what the stage says.

        Args:
            model: what `delivery` was made for.
            make_optimizer: makes the optimizer of its parameters.
            config: what to cut, and where to keep it.
            delivery: brings the weights where the stage cuts them; None: the model is whole on
                every rank, with the same weights.
            max_grad_norm: longest gradient; None or 0 is off.
            device: of this rank.
        """
        deepspeed = _deepspeed(device)
        assert config.zero_stage is not None
        self.name = config.engine
        self._stage = config.zero_stage
        self._max_norm = max_grad_norm or float("inf")
        self._norm = torch.zeros((), device=device)
        self._rank, self._num_ranks = distributed.get_rank(), distributed.get_world_size()
        options = deepspeed_config(config, max_grad_norm, device)
        with _quiet():
            if delivery is not None:
                _cut_by_layers(model, delivery, options)
            self.model, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=make_optimizer(model),
                config=options,
                dist_init_required=False,
            )
        if self._stage:
            self._take_over_norms()

    def _take_over_norms(self) -> None:
        """Let DeepSpeed's update read the norm that is known by then."""
        optimizer = self.optimizer
        if self._stage == LARGEST_STAGE:
            self._norms = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: [self._norm]
        else:
            norm = optimizer.scaled_global_norm
            self._norms = lambda: [torch.as_tensor(norm())]
            optimizer.scaled_global_norm = lambda: self._norm

    @contextmanager
    def accumulate(self, *, is_last: bool) -> Iterator[None]:
        """Stages 0 and 1 reduce gradients with the last micro-batch, 2 and 3 with each."""
        self.model.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients."""
        self.model.backward(self._scaled(loss), scale_wrt_gas=False)

    def clip_gradients(self) -> Tensor:
        """The gradients' norm; from stage 1 on DeepSpeed clips them in its update."""
        if self._stage == 0:
            parameters = list(self.model.parameters())
            norm = self._unscaled(gradient_norm(parameters))
            nn.utils.clip_grads_with_norm_(parameters, self._max_norm, norm)
            return norm
        norms = torch.stack(self._norms()).to(self.model.device)
        # DeepSpeed's word for a norm that is not finite is -1.
        norm = torch.linalg.vector_norm(torch.where(norms < 0, float("inf"), norms))
        self._norm = self._unscaled(norm)
        return self._norm

    def update(self, *, skip: Tensor) -> None:
        """Update the weights and drop the gradients; one wait for the device."""
        # DeepSpeed clips by the norm that it is given, and PyTorch's optimizer divides; it would
        # not wait for a copy to the host.
        scale = self.loss_scale
        self._inner.grad_scale = None if scale is None else scale.to(self._flat[0].device)
        if self._stage == 0:
            self.optimizer.found_inf = skip
        else:
            # DeepSpeed would compute the norm again, and leaves out an update whose norm is not
            # finite, after which its state is as after any other.
            self._norm = torch.where(skip > 0, float("inf"), self._norm)
        self.model.set_gradient_accumulation_boundary(True)
        with _quiet():
            self.model.step()

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter or buffer of the model, put together from all ranks, on every rank."""
        if self._stage < LARGEST_STAGE or not hasattr(tensor, "ds_tensor"):
            return tensor.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters(tensor):
            return tensor.detach().clone()

    def make_state(self, *, with_gradients: bool) -> None:
        """A skipped update makes the optimizer's state; gradients have had buffers all along."""
        inner = self._inner
        inner.found_inf, inner.grad_scale = torch.ones((), device=self._flat[0].device), None
        buffers = [flat.grad for flat in self._flat]
        for flat in self._flat:
            flat.grad = torch.zeros_like(flat)
        if self._stage == LARGEST_STAGE:
            for number in range(len(self._flat)):
                self.optimizer._optimizer_step(number)
        else:
            inner.step()
        for flat, buffer in zip(self._flat, buffers, strict=True):
            flat.grad = buffer
        del inner.found_inf, inner.grad_scale
        if self._stage in (1, 2):
            # DeepSpeed links parameters to this state after the first of its groups has one.
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def rest(self) -> None:
        """Nothing: DeepSpeed has let go of what its forward gathered."""

    def weight_parts(self, weights: Mapping[str, Tensor]) -> dict[str, Part]:
        """Copies of this rank's rows, each put together from what all ranks hold."""
        return {name: self._cut(self.whole(tensor)) for name, tensor in weights.items()}

    def moment_parts(self, weights: Mapping[str, Tensor]) -> dict[str, Part]:
        """Copies of this rank's rows of the optimizer's state."""
        from deepspeed.utils import safe_get_full_optimizer_state

        parts = {}
        state = self._inner.state[self._flat[0]]
        for name, tensor in weights.items():
            if not tensor.requires_grad:
                continue
            for key, value in state.items():
                if self._stage == 0:
                    whole = self._inner.state[tensor][key]
                elif value.ndim == 0:  # the number of steps, the same for all
                    whole = value
                else:
                    whole: Any = safe_get_full_optimizer_state(tensor, key)
                parts[f"{key}/{name}"] = self._cut(whole)
        return parts

    def put_back(self, weights: Mapping[str, Tensor], parts: Mapping[str, Part]) -> None:
        """Give every rank's flat buffers what stands in the parts of all ranks."""
        for label, part in parts.items():
            value = self._joined(part)
            key, _, name = label.rpartition("/")
            tensor = weights[name]
            if key and value.ndim == 0:
                for flat in [tensor] if self._stage == 0 else self._flat:
                    self._inner.state[flat][key].copy_(value)
            elif key:
                self._set_moment(tensor, key, value)
            else:
                self._set_weight(tensor, value)
        if self._stage in (1, 2):
            self.optimizer.refresh_fp32_params()

    @torch.no_grad()
    def _set_weight(self, tensor: Any, value: Tensor) -> None:
        if self._stage < LARGEST_STAGE or not hasattr(tensor, "ds_tensor"):
            tensor.copy_(value)
            return
        from deepspeed.utils import safe_set_local_fp32_param

        own = self._own_slice(tensor, value)
        safe_set_local_fp32_param(tensor, own)
        tensor.ds_tensor.copy_(own)
        if tensor.numel():  # a small one, which every rank keeps gathered
            tensor.copy_(value)

    def _set_moment(self, tensor: Any, key: str, value: Tensor) -> None:
        if self._stage == 0:
            self._inner.state[tensor][key].copy_(value)
        elif self._stage == LARGEST_STAGE:
            from deepspeed.utils import safe_set_local_optimizer_state

            safe_set_local_optimizer_state(tensor, self._own_slice(tensor, value), key)
        elif tensor._hp_mapping is not None:  # this rank's flat buffer has some of it
            from deepspeed.utils import safe_set_full_optimizer_state

            safe_set_full_optimizer_state(tensor, value, key)

    def _own_slice(self, tensor: Any, value: Tensor) -> Tensor:
        """What stage 3 keeps here of a tensor: an equal part of its numbers, zeros at the end."""
        size = tensor.ds_tensor.numel()
        flat = nn.functional.pad(value.flatten(), (0, size * self._num_ranks - value.numel()))
        return flat[self._rank * size : (self._rank + 1) * size]

    def _cut(self, whole: Tensor) -> Part:
        part = cut(whole, self._rank, self._num_ranks)
        return replace(part, tensor=part.tensor.clone())

    def _joined(self, part: Part) -> Tensor:
        if not part.shape:
            return part.tensor
        whole = part.tensor.new_zeros(part.shape)
        whole[part.first : part.first + len(part.tensor)] = part.tensor
        distributed.all_reduce(whole)
        return whole

    @property
    def _inner(self) -> Any:
        """PyTorch's optimizer."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def _flat(self) -> list[Any]:
        """What it updates on this rank."""
        if self._stage == 0:
            return [p for p in self.model.parameters() if p.requires_grad]
        if self._stage == LARGEST_STAGE:
            return self.optimizer.fp32_partitioned_groups_flat
        return self.optimizer.single_partition_of_fp32_groups

    def drop_gradients(self) -> None:
        """Forget what `backward` has added."""
        if self._stage == 0:
            self.model.zero_grad()
            return
        self._norm = torch.full((), float("inf"), device=self.model.device)
        self.update(skip=torch.ones((), device=self.model.device))


def _cut_by_layers(model: nn.Module, delivery: Delivery, options: dict[str, Any]) -> None:
    """Cut each layer when it has come, before the next one does."""
    import deepspeed

    first: Any = None
    for layer in repeated_layers(model):
        delivery.bring(layer)
        parameters = [p for p in layer.parameters() if not hasattr(p, "ds_id")]
        if first is not None:
            first.convert_to_zero_parameters(param_list=parameters)
        elif parameters:
            deepspeed.zero.Init(module=layer, config_dict_or_path=options)
            first = parameters[0]
    delivery.bring(model)  # DeepSpeed cuts the rest itself


def deepspeed_config(
    config: DistributedConfig, max_grad_norm: float | None, device: torch.device
) -> dict[str, Any]:
    """What DeepSpeed is told. Nothing in it is "auto"; the rest is DeepSpeed's own default.

    Args:
        config: stage and offload.
        max_grad_norm: see `ZeroEngine`.
        device: of this rank.
    """
    host = {"device": "cpu", "pin_memory": device.type == "cuda"}
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = host
    if config.offload_param:
        zero["offload_param"] = host
    if config.zero_hpz_partition_size is not None:
        zero["zero_hpz_partition_size"] = config.zero_hpz_partition_size
    return {
        # Pairs are counted, and micro-batches accumulated, by the step.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": (max_grad_norm or 0.0) if config.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def _deepspeed(device: torch.device) -> Any:
    """The package, for the device in use."""
    os.environ.setdefault("LOCAL_RANK", "0")  # of a process that nothing launched
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it finds deprecated in PyTorch and Python
        import deepspeed
    # Collectives in shared memory, for which it would call a compiler first; gloo does them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DeepSpeed's own talk, which goes to the same terminal as the run's one live view."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
