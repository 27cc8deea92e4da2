"""A case trained by preftune's own parts, from the options to the optimizer step."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preftune.batching.batcher import RowBatcher
from preftune.batching.layout import Layout
from preftune.config.distributed import DistributedConfig
from preftune.config.dpo import DPOConfig
from preftune.config.training import TrainingConfig
from preftune.distributed.runtime import Runtime
from preftune.losses import DPOLossType
from preftune.model.forward import PolicyModel
from preftune.model.layout_choice import choose_layout
from preftune.objective import objective_of
from preftune.recipes.loss import loss_of
from preftune.reference.build import reference_logps
from preftune.reference.live import LiveReference
from preftune.reference.store import ReferenceStore
from preftune.training.optimizer import make_optimizer
from preftune.training.step import TrainState, train_step
from tests.peers.cases import BATCH, Case
from tests.peers.materials import LEARNING_RATE, MAX_GRAD_NORM, STEPS, Materials, Trace

MICRO_BATCH = 2
LONGEST = 64
"""More tokens than any row has."""


def config_of(case: Case, **changes: Any) -> DPOConfig:
    """preftune's options of a case, in TRL's form, with changes."""
    options = {**case.ours, **case.form, **changes}
    names = options["loss_type"]
    losses = [DPOLossType(name) for name in ([names] if isinstance(names, str) else names)]
    return DPOConfig(**options | {"loss_type": losses})


def train(
    config: DPOConfig,
    materials: Materials,
    folder: Path,
    make_runtime: Callable[..., Runtime] = Runtime,
) -> Trace:
    """Train with the options of `config`.

    Args:
        config: the loss; the layout is the one that a run would choose.
        materials: what to start from.
        folder: for the reference's values, which several trainings may share.
        make_runtime: another one for mutants.
    """
    assert not config.problems(), config.problems()
    runtime = make_runtime("fp32", 0)
    examples = materials.examples
    policy = PolicyModel(copy.deepcopy(materials.policy)).to(runtime.device)
    choice = choose_layout(policy, config.wanted_layout, "auto", LONGEST)
    layout = Layout(choice.name, policy.limits, config.ld_alpha, config.scores_prompt)
    reference, following = None, LiveReference.of(config, policy, runtime)
    if following is not None:
        # It starts as a copy of the policy; here, where a resumed run's would be.
        following.model.load_state_dict(materials.reference.state_dict())
    if config.stores_reference:
        base = PolicyModel(copy.deepcopy(materials.reference)).to(runtime.device)
        choose_layout(base, config.wanted_layout, "auto", LONGEST)
        store = ReferenceStore(folder, config.unpaired * "labelled-" + "peers", {})
        reference = reference_logps(
            base, examples, store, layout=layout, device=runtime.device
        ).sums
    training = TrainingConfig(learning_rate=LEARNING_RATE)
    engine = runtime.spread(
        policy,
        partial(make_optimizer, config=training),
        DistributedConfig(),
        max_grad_norm=MAX_GRAD_NORM,
    )
    state = TrainState.at_start(engine, runtime.device, following)
    columns = {}
    if config.unpaired:
        columns["is_desirable"] = torch.tensor([e.roles[0] == "chosen" for e in examples])
    lengths = np.array([example.completions[0].num_scored for example in examples])
    trained = lengths if config.row_kind == "supervised" else None
    batcher = RowBatcher(examples, reference, layout, runtime.device, columns, lengths, trained)
    objective = objective_of(loss_of(config), live_reference=following)
    trace = Trace([], [])
    for step in range(STEPS):
        rows = range(step * BATCH, (step + 1) * BATCH)
        train_step(
            state,
            [
                batcher.place(batcher.lay_out(rows[at : at + MICRO_BATCH], rows))
                for at in range(0, BATCH, MICRO_BATCH)
            ],
            objective,
            runtime,
            num_rows=BATCH,
            learning_rate=LEARNING_RATE,
            num_terms=batcher.num_terms(rows),
        )
        means = state.window.means(runtime.all_reduce)
        state.window.clear()
        trace.losses.append(means["loss"])
        trace.baselines.append(means.get("rewards/baseline", 0.0))
        trace.grad_norms.append(means["grad_norm"])
    return trace
