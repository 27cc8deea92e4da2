"""Run by train_all.py: what engines hold on each rank, and whether mistakes would be seen."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, inject_adapter_in_model

from preftune.config.distributed import DistributedConfig
from preftune.distributed import zero
from preftune.distributed.engine import Engine
from preftune.distributed.runtime import Runtime
from preftune.objective import PairObjective
from tests.invariants.harness import Trace, short_training
from tests.tiny import tiny_model

ENGINES = {
    "ddp": DistributedConfig(),
    "fsdp": DistributedConfig(fsdp="full_shard"),
    "hybrid": DistributedConfig(fsdp="hybrid_shard", fsdp_shard_size=2),
    "zero1": DistributedConfig(zero_stage=1),
    "zero2": DistributedConfig(zero_stage=2),
    "zero3": DistributedConfig(zero_stage=3),
}
TYPES = {
    "ddp": "DistributedDataParallel",
    "fsdp": "FSDPPolicyModel",
    "hybrid": "FSDPPolicyModel",
    "zero1": "DeepSpeedEngine",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}
SHARE = {
    # Weights and moments of one rank, as parts of the whole.
    "ddp": (1.0, 1.0),
    "fsdp": (0.5, 0.5),
    "hybrid": (0.5, 0.5),
    "zero1": (1.0, 0.5),
    "zero2": (1.0, 0.5),
    "zero3": (0.5, 0.5),
}


class Seen(Runtime):
    """Keeps the engine."""

    engine: Engine

    def spread(self, *args: Any, **options: Any) -> Engine:
        """As it is."""
        engine = Seen.engine = super().spread(*args, **options)
        return engine


class Doubled(Runtime):
    """Mutant: gradients are multiplied by the number of ranks once more."""

    def spread(self, *args: Any, **options: Any) -> Engine:
        """With another backward."""
        engine = super().spread(*args, **options)
        backward = engine.backward
        engine.backward = lambda loss: backward(loss * self.world_size)
        return engine


class MeanOfMeans(PairObjective):
    """Mutant: a micro-batch counts the same, however few pairs it holds."""

    def __call__(self, model: Any, micro_batch: Any, **seen: Any) -> Any:
        """Scaled."""
        output = super().__call__(model, micro_batch, **seen)
        scale = 4 / max(micro_batch.num_rows, 1)
        return replace(output, loss_sum=output.loss_sum * scale)


def trace(name: str, make_runtime: Callable[..., Runtime] = Runtime, **options: Any) -> Trace:
    """Two epochs of batches of 8, 8 and 5 pairs."""
    return short_training(
        Path(tempfile.mkdtemp()),
        micro_batch=4,
        accumulation=1,
        optimizer="adamw",
        learning_rate=1e-3,
        make_runtime=make_runtime,
        engines=ENGINES[name],
        **options,
    )


def with_lora() -> Any:
    """A tiny model of which only adapters train."""
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False
    )
    return inject_adapter_in_model(config, tiny_model())


def numbers(held: Trace) -> list[float]:
    """What must be the same."""
    return held.losses + held.grad_norms


def close(expected: Trace) -> Any:
    """As closely as promised."""
    return pytest.approx(numbers(expected), rel=1e-4, abs=1e-5)


def check_held(name: str, engine: Engine) -> None:
    """The engine's own type, and how much of weights and moments is on this rank."""
    assert type(engine.model).__name__ == TYPES[name], type(engine.model)
    whole = sum(engine.whole(p).numel() for p in engine.model.parameters())
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    weights = list(engine.model.parameters())
    held = sum(local(p) for p in weights), sum(local(m) for m in moments)
    for number, share in zip(held, SHARE[name], strict=True):
        assert number == pytest.approx(share * whole, rel=0.02), (name, number, whole)


def local(tensor: Any) -> int:
    """Numbers on this rank."""
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor.numel()
    return getattr(tensor, "_local_tensor", tensor).numel()


def cut_everything() -> None:
    """Let ZeRO-3 cut small weights, too, which it would leave on every rank."""
    plain = zero.deepspeed_config

    def config(*args: Any) -> dict[str, Any]:
        document = plain(*args)
        document["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return document

    zero.deepspeed_config = config


def main() -> None:
    """Every check, on both ranks."""
    cut_everything()
    expected, lora = trace("ddp"), trace("ddp", make_model=with_lora)
    for name in ENGINES:
        assert numbers(trace(name, Seen)) == close(expected), name
        check_held(name, Seen.engine)
        assert numbers(trace(name, make_model=with_lora)) == close(lora), name
        assert numbers(trace(name, Doubled)) != close(expected), name
        assert numbers(trace(name, make_objective=MeanOfMeans)) != close(expected), name
    if Runtime("fp32", 0).is_main:
        print("all checks held")
