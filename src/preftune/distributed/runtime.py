"""One process among its peers: device, ranks, precision, collectives. Imports Accelerate."""

import os
import warnings
from datetime import timedelta
from typing import Literal, NoReturn, TypeAlias, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from torch import Tensor, nn

from preftune.config.distributed import DistributedConfig
from preftune.distributed.delivery import Delivery
from preftune.distributed.engine import Engine, MakeOptimizer, TorchEngine
from preftune.distributed.fsdp import FSDPEngine, cut_by_layers
from preftune.distributed.peers import meet_peers
from preftune.distributed.ranks import Ranks
from preftune.distributed.sequence import SequenceGroup, num_groups
from preftune.distributed.zero import ZeroEngine
from preftune.errors import ConfigError, PreftuneError

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
AUTOCAST: dict[Precision, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Type that products are computed in, where it is not the weights'."""
T = TypeVar("T")


def resolve_precision(choice: Literal["auto"] | Precision) -> Precision:
    """bf16 products where the device has them in hardware; else fp16 on GPUs and fp32 on CPUs.

    A choice stays as it is.
    """
    if choice != "auto":
        return choice
    if multiplies_bf16():
        return "bf16"
    return "fp16" if torch.cuda.is_available() else "fp32"


def multiplies_bf16() -> bool:
    """Whether the device computes bf16 products in hardware.

    On CPUs that means AVX-512 BF16 or AMX: four times the fp32 rate, where others emulate bf16 at
    a fraction of it.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False))


def multiplies_fp16() -> bool:
    """Whether the device computes fp16 products in hardware, as all GPUs do."""
    if torch.cuda.is_available():
        return True
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_fp16", False) or capabilities.get("amx_fp16", False))


def is_main_process() -> bool:
    """Whether this process, once its runtime was made, is the one that speaks."""
    return PartialState().is_main_process


def leave_process_group() -> None:
    """End the process group, if there is one; this process cannot train again.

    For a command that is done: a rank that still holds connections when its peers are gone may
    abort.
    """
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()


def tell_peers(error: PreftuneError) -> NoReturn:
    """End all ranks with what is wrong on this one alone, before it has made its runtime.

    The others meet it with the first thing that they do together (`Ranks.meet`).

    Raises:
        PreftuneError: on every rank.
    """

    def fail() -> NoReturn:
        raise error

    Runtime("fp32", seed=0).together(fail)
    raise error  # alone after all


class Runtime(Ranks):
    """One process among its peers."""

    sequence_group: SequenceGroup | None = None
    """Who shares each row with this rank; None: nobody."""

    def __init__(self, precision: Precision, seed: int, collective_seconds: float = 7200.0) -> None:
        """Start the process group, if the launcher made one, and seed every generator.

        Args:
            precision: that products are computed in.
            seed: of every generator.
            collective_seconds: how long to wait for the other processes.
        """
        self._timeout = timedelta(seconds=collective_seconds)
        self.precision: Precision = precision
        # Accelerate keeps the first settings of a process for good; a Python session may well have
        # used it before. The process group stays.
        AcceleratorState._reset_state(reset_partial_state=False)
        if not torch.cuda.is_available():
            # Where DeepSpeed is installed, Accelerate imports it, and it says on stdout that it
            # found no accelerator unless it is told so.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self._accelerator = Accelerator(
            # CUDA or CPU: Apple's MPS has no fp64, in which log-prob sums are kept.
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",  # `_give_precision`: Accelerate has no fp16 on CPUs
            kwargs_handlers=[InitProcessGroupKwargs(timeout=self._timeout)],
        )
        # Accelerate would divide by a number from the environment; the step divides by itself.
        self._accelerator.gradient_accumulation_steps = 1
        if self._accelerator.distributed_type not in SUPPORTED:
            raise ConfigError(
                f"Accelerate is set up for {self._accelerator.distributed_type.value} (by an "
                "accelerate config file or ACCELERATE_* variables); take that out of it, and "
                "choose the engine by preftune's own options fsdp or zero_stage"
            )
        set_seed(seed)
        meet_peers(self.gather)

    def share_rows(self, size: int) -> None:
        """Let as many consecutive ranks share each row.

        Args:
            size: `sequence_parallel_size`, the same on all ranks.

        Raises:
            ConfigError: the ranks do not make whole groups; on every rank.
        """
        self.together(lambda: num_groups(self.world_size, size))
        if size > 1:
            self.sequence_group = SequenceGroup(size, self._timeout)

    @property
    def data_size(self) -> int:
        """How many shares a global batch is dealt into."""
        group = self.sequence_group
        return self.world_size if group is None else self.world_size // group.size

    @property
    def data_rank(self) -> int:
        """Whose share this rank works on, alone or with the others of its sequence group."""
        return self.rank if self.sequence_group is None else self.rank // self.sequence_group.size

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self._accelerator.device

    @property
    def rank(self) -> int:
        """This process, from 0."""
        return self._accelerator.process_index

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self._accelerator.is_main_process

    def check_groups(self, config: DistributedConfig) -> None:
        """See that the ranks can be grouped as an engine shall group them.

        Raises:
            ConfigError: on every rank, with the option that does not divide their number.
        """
        for key in ("fsdp_shard_size", "zero_hpz_partition_size"):
            size = getattr(config, key)
            if size is not None and self.world_size % size:
                number = self.world_size
                text = f"{key} is {size}, and it must divide the number of processes, {number}"
                raise self.share(ConfigError(text))

    def spread(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        config: DistributedConfig,
        *,
        max_grad_norm: float | None,
    ) -> Engine:
        """Spread a model over the ranks, to be trained.

        Args:
            model: with the same weights on every rank, or at `starting_place`; changed in place.
            make_optimizer: makes the optimizer of what this rank holds.
            config: which engine, and how.
            max_grad_norm: longest gradient; None or 0 is off.
        """
        if config.zero_stage is not None:
            self._need_process_group()
            self.prepare_for_inference(model)  # gives the module itself its precision
            return ZeroEngine(
                model,
                make_optimizer,
                config,
                delivery=self._delivery(model) if config.shards_weights else None,
                max_grad_norm=max_grad_norm,
                device=self.device,
            )
        if config.fsdp != "no":
            self._cut_by_layers(model, config)
            return FSDPEngine(config.engine, model, make_optimizer(model), max_grad_norm)
        optimizer = make_optimizer(model)
        self._give_precision(model)
        wrapped = self._accelerator.prepare_model(model)
        return TorchEngine(config.engine, wrapped, optimizer, max_grad_norm)

    def spread_frozen(self, model: nn.Module, config: DistributedConfig) -> None:
        """Make a model that only scores ready, as much cut over the ranks as one that trains.

        Args:
            model: as in `spread`; changed in place.
            config: of the engine that trains.
        """
        if config.shards_weights:
            self._cut_by_layers(model.requires_grad_(False), config)
        else:
            self.prepare_for_inference(model)

    def _cut_by_layers(self, model: nn.Module, config: DistributedConfig) -> None:
        self._need_process_group()
        if self.precision == "fp16":
            self._give_precision(model)
        cut_by_layers(
            model,
            config,
            self._delivery(model),
            compute_dtype=AUTOCAST[self.precision],
            device=self.device,
            world_size=self.world_size,
            host_size=self._host_size(),
        )

    def _delivery(self, model: nn.Module) -> Delivery:
        self.forwards_together = True  # all ranks gather what one of them needs
        return Delivery(model, self.device, self)

    def _need_process_group(self) -> None:
        """A group of one, where no launcher made one: sharding engines want to have it."""
        # FSDP2's and DeepSpeed's own calls, by names that PyTorch is about to change.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        if not torch.distributed.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)

    def _host_size(self) -> int:
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    def prepare_for_inference(self, model: nn.Module) -> nn.Module:
        """Give a model the same precision as in training, without an optimizer or gradients."""
        self._give_precision(model)
        # Where it lies is not Accelerate's to say: an engine may be about to cut it.
        return self._accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)

    def _give_precision(self, model: nn.Module) -> None:
        """Let the model's forward compute its products in the precision of this run."""
        dtype = AUTOCAST[self.precision]
        if dtype is not None and "forward" not in vars(model):
            model.forward = torch.autocast(self.device.type, dtype)(model.forward)

    def release(self, model: nn.Module) -> None:
        """Let go of a model that was prepared, so that its memory is free once nobody holds it."""
        # Accelerate keeps a list of all it has prepared, and a wrapped forward is a cycle.
        models = self._accelerator._models
        models[:] = [kept for kept in models if kept is not model]
        for name in ("forward", "_is_accelerate_prepared"):
            vars(model).pop(name, None)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks; on one process, the tensor itself."""
        if self.world_size == 1:
            return tensor
        return self._accelerator.reduce(tensor, reduction="sum")  # type: ignore[return-value]

    def sum_shares(self, tensor: Tensor) -> Tensor:
        """Sum over the shares of a batch, where each rank brings what it knows of its own."""
        group = self.sequence_group
        # All ranks of a sequence group know the same.
        return self.all_reduce(
            tensor if group is None or not group.rank else torch.zeros_like(tensor)
        )

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is set on some rank: one decision for all. Waits, on several ranks."""
        if self.world_size == 1:
            return flags
        counts = torch.tensor([float(flag) for flag in flags], device=self.device)
        return tuple(count > 0 for count in self.all_reduce(counts).tolist())

    # ---------------------------------------------------------------- see `Ranks`

    def gather(self, value: T) -> list[T]:
        """The value of each rank, by rank, on every rank; for small things off the device."""
        return [value] if self.world_size == 1 else gather_object([value])

    def send(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        (value,) = broadcast_object_list([value])
        return value

    def send_into(self, tensor: Tensor) -> None:
        """Overwrite a tensor on the device with rank 0's, which has its shape and dtype."""
        if self.world_size > 1:
            torch.distributed.broadcast(tensor, src=0)
