"""How often the host waits for the device, counted below PyTorch's own dispatch."""

from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from preftune.batching.batcher import RowBatcher
from preftune.config.distributed import DistributedConfig
from preftune.config.training import TrainingConfig
from preftune.distributed.runtime import Runtime
from preftune.losses import DPO
from preftune.model.forward import PolicyModel
from preftune.model.layout_choice import choose_layout
from preftune.objective import PairObjective
from preftune.recipes.train import train
from preftune.training.optimizer import make_optimizer
from preftune.training.step import TrainState, train_step
from tests.examples import make_examples
from tests.runs import tiny_config


class CountSyncs(TorchDispatchMode):
    """Counts operators that make the host wait: scalars read, and copies from device to host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if func is torch.ops.aten._local_scalar_dense.default or _leaves_device(args, result):
            self.seen[name] += 1
        return result


def _leaves_device(args, result) -> bool:
    if not isinstance(result, torch.Tensor) or result.device.type != "cpu":
        return False
    return any(isinstance(a, torch.Tensor) and a.device.type == "cuda" for a in args)


def syncs_of_a_run(root: Path, name: str, **settings) -> int:
    """Of a whole run under `root`."""
    with CountSyncs() as counter:
        train(tiny_config(root, output_dir=root / name, **settings))
    return sum(counter.seen.values())


def take_steps_without_waiting(
    policy: PolicyModel,
    runtime: Runtime,
    precision: str,
    optimizer: str = "adamw",
    allowed: int = 0,
) -> None:
    """Two steps on a GPU; in the second, CUDA itself raises where the host would wait.

    Args:
        policy: on the GPU.
        runtime: one process.
        precision: of products.
        optimizer: by its name.
        allowed: `max_skipped_batches`.
    """
    layout = choose_layout(policy, "shared_prefix", "auto", 200).name
    make = partial(make_optimizer, config=TrainingConfig(optimizer=optimizer))
    engine = runtime.spread(policy, make, DistributedConfig(), max_grad_norm=1.0)
    state = TrainState.at_start(engine, runtime.device, precision=precision)
    reference = torch.zeros(8, 2, dtype=torch.float64, device=runtime.device)
    batcher = RowBatcher(make_examples(8), reference, layout, runtime.device)
    objective = PairObjective(DPO(beta=0.1))

    def step() -> None:
        micro_batches = [batcher.place(batcher.lay_out(rows)) for rows in (range(4), range(4, 8))]
        options = {"learning_rate": 1e-4, "max_skipped": allowed}
        train_step(state, micro_batches, objective, runtime, num_rows=8, **options)

    step()  # kernels load and buffers are made
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(state.bad_step) == 0
