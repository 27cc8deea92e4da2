"""A step on a GPU makes the host wait for nothing: CUDA itself raises where it would."""

from functools import partial

import pytest
import torch

from preftune.batching.batcher import RowBatcher
from preftune.config.distributed import DistributedConfig
from preftune.config.training import TrainingConfig
from preftune.distributed.runtime import Runtime
from preftune.losses import DPO
from preftune.model.forward import PolicyModel
from preftune.model.layout_choice import choose_layout
from preftune.objective import PairObjective
from preftune.training.optimizer import make_optimizer
from preftune.training.step import TrainState, train_step
from tests.examples import make_examples
from tests.tiny import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize(
    ("max_skipped", "precision", "optimizer"),
    [
        (0, "bf16", "adamw"),
        (3, "bf16", "adamw"),
        (0, "fp16", "adamw"),
        (0, "fp16", "adamw_torch_8bit"),
        (0, "bf16", "adamw_torch_4bit"),
        (0, "bf16", "adafactor"),
        (0, "bf16", "muon"),
    ],
    ids=["stop", "skip_batch", "fp16", "8bit", "4bit", "adafactor", "muon"],
)
def test_a_step_waits_for_nothing(max_skipped, precision, optimizer):
    runtime = Runtime(precision, seed=0)
    policy = PolicyModel(tiny_model(hidden_size=64).to(runtime.device))
    layout = choose_layout(policy, "shared_prefix", "auto", 200).name
    make = partial(make_optimizer, config=TrainingConfig(optimizer=optimizer))
    engine = runtime.spread(policy, make, DistributedConfig(), max_grad_norm=1.0)
    state = TrainState.at_start(engine, runtime.device, precision=precision)
    examples = make_examples(8)
    reference = torch.zeros(8, 2, dtype=torch.float64, device=runtime.device)
    batcher = RowBatcher(examples, reference, layout, runtime.device)
    objective = PairObjective(DPO(beta=0.1))

    def step() -> None:
        micro_batches = [batcher.place(batcher.lay_out(rows)) for rows in (range(4), range(4, 8))]
        options = {"learning_rate": 1e-4, "max_skipped": max_skipped}
        train_step(state, micro_batches, objective, runtime, num_rows=8, **options)

    step()  # kernels load and buffers are made
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(state.bad_step) == 0
