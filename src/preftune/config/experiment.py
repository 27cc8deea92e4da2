"""The configuration of `preftune train`."""

from collections.abc import Collection
from dataclasses import dataclass

from preftune.config.checkpoint import CheckpointConfig
from preftune.config.composed import ComposedConfig
from preftune.config.dataset import DatasetConfig
from preftune.config.distributed import DistributedConfig
from preftune.config.dpo import ONLY_WITH_PAIRS, DPOConfig, layout_problems
from preftune.config.evaluation import EvalConfig
from preftune.config.guards import GuardConfig
from preftune.config.hub import HubConfig
from preftune.config.jobs import RUNS_TASKS, YAML_OPTIONS, JobsConfig
from preftune.config.logging import LoggingConfig
from preftune.config.lora import LoRAConfig
from preftune.config.model import ModelConfig, another_model, gguf_problems
from preftune.config.optimizers import placement_problems
from preftune.config.peers import PeersConfig
from preftune.config.problem import Problem
from preftune.config.tracking import TrackingConfig
from preftune.config.training import TrainingConfig, precision_problems

UNREAD_COLUMNS = {"dpo": ("messages",), "sft": ("chosen", "rejected", "label", "margin")}
"""Keys of `column_map` that a stage has no use for."""


@dataclass(kw_only=True)
class ExperimentConfig(
    ComposedConfig,
    TrackingConfig,
    ModelConfig,
    DPOConfig,
    LoRAConfig,
    TrainingConfig,
    DistributedConfig,
    GuardConfig,
    DatasetConfig,
    LoggingConfig,
    HubConfig,
    CheckpointConfig,
    EvalConfig,
    JobsConfig,
    PeersConfig,
):
    """Everything a training run needs, flat. Each section says what its options mean.

    Example:
        >>> config = ExperimentConfig(model_name_or_path="m", dataset_name="pairs.jsonl")
        >>> config.beta, config.num_epochs, config.eval_strategy
        (0.1, 1.0, 'never')
    """

    takes_presets = True
    yaml_options = YAML_OPTIONS

    @property
    def reference_model(self) -> ModelConfig | None:
        """The reference, where it is another model than the policy before its first step."""
        name = self.reference_model_name_or_path
        return another_model(self, name, self.reference_model_revision) if name else None

    @property
    def models(self) -> list[ModelConfig]:
        """All models that the rows go through: the policy, and a reference of its own."""
        return [model for model in (self, self.reference_model) if model is not None]

    def resolve(self) -> None:
        """Choose when to evaluate, from what there is."""
        if self.eval_strategy is None:
            if self.eval_steps is not None:
                self.eval_strategy = "steps"
            else:
                self.eval_strategy = "epoch" if self.has_eval_data else "never"

    def unread(self) -> Collection[str]:
        """What belongs to another stage."""
        return () if self.stage == "dpo" else ONLY_WITH_PAIRS

    def cross_problems(self) -> list[Problem]:
        """Settings that contradict each other, or that nothing reads."""
        found = self._column_problems()
        found += layout_problems(self.wanted_layout, self.attn_implementation)
        found += precision_problems(self.dtype, self.mixed_precision)
        if self.data_seed is not None and not self.shuffle:
            message = "shuffle is false, so there is no order to choose: leave it out"
            found.append(Problem("data_seed", self.data_seed, message, ("shuffle",)))
        found += self._sequence_problems()
        found += self._best_metric_problems()
        found += self._adapter_problems()
        found += self._engine_problems()
        found += self._quantization_problems()
        found += self._hub_problems()
        found += self._generating_problems()
        found += self._job_problems()
        if self.has_eval_data:
            return found
        settings = {
            "eval_steps": self.eval_steps,
            "eval_strategy": None if self.eval_strategy == "never" else self.eval_strategy,
            "per_device_eval_batch_size": self.per_device_eval_batch_size,
            "eval_on_start": self.eval_on_start or None,
            "eval_kl_samples": self.eval_kl_samples,
        }
        if self.eval_steps is not None:
            del settings["eval_strategy"]  # it may only follow from eval_steps
        message = "there are no pairs for evaluation: give eval_dataset or test_size"
        others = ("eval_dataset", "test_size")
        return found + [
            Problem(key, value, message, others)
            for key, value in settings.items()
            if value is not None
        ]

    def _column_problems(self) -> list[Problem]:
        """Of columns that another stage reads."""
        unread = UNREAD_COLUMNS[self.stage]
        return [
            Problem("column_map", self.column_map, f"stage {self.stage} does not read {name!r}")
            for name in self.column_map or {}
            if name in unread
        ]

    def _engine_problems(self) -> list[Problem]:
        """Of what engines cannot do with a state that they cut."""
        found = []
        if self.sync_reference and self.shards:
            message = (
                f"the live reference is a whole copy on each device, and {self.engine} cuts the "
                "model over them: leave out zero_stage and fsdp"
            )
            found.append(Problem("sync_reference", True, message, ("zero_stage", "fsdp")))
        return found + placement_problems(self)

    def _sequence_problems(self) -> list[Problem]:
        """Of what sharing rows out cannot do."""
        size = self.sequence_parallel_size
        if size <= 1:
            return []
        found, key = [], "sequence_parallel_size"
        if self.wanted_layout in ("concatenated", "separate"):
            message = f"it shares out packed rows, and the layout is {self.wanted_layout}: leave "
            message += "forward_layout and concatenated_forward out, or set it to 1"
            found.append(Problem(key, size, message, ("forward_layout", "concatenated_forward")))
        if self.attn_implementation == "eager":
            message = "it shares out packed rows, and attn_implementation eager has none: take "
            message += "auto or sdpa, or set it to 1"
            found.append(Problem(key, size, message, ("attn_implementation",)))
        if not self.disable_dropout:
            message = "disable_dropout is false, and processes draw the same random numbers, each "
            message += "for its part of a row: leave that out, or set this to 1"
            found.append(Problem(key, size, message, ("disable_dropout",)))
        return found

    def _adapter_problems(self) -> list[Problem]:
        """Of what does not go with adapters."""
        if not self.use_lora:
            return []
        found = []
        if self.sync_reference:
            message = (
                "use_lora is true, and a mixture of two adapters' factors is not the mixture of "
                "the two models: leave one of them out"
            )
            found.append(Problem("sync_reference", True, message, ("use_lora",)))
        if self.sequence_parallel_size > 1 and self.lora_dropout:
            message = (
                "sequence_parallel_size is above 1, and processes draw the same random numbers, "
                "each for its part of a row: set it to 0"
            )
            others = ("sequence_parallel_size",)
            found.append(Problem("lora_dropout", self.lora_dropout, message, others))
        return found

    def _job_problems(self) -> list[Problem]:
        """Of evaluation jobs that cannot read what the run leaves."""
        jobs, found = self.eval_jobs or [], []
        if "beaker" in jobs and not self.push_to_hub:
            message = "a job on Beaker reads the model from the Hub: set push_to_hub true and "
            message += "hub_repo_id, or leave beaker out"
            found.append(Problem("eval_jobs", jobs, message, ("push_to_hub",)))
        if self.is_quantized and set(jobs) & set(RUNS_TASKS):
            bits = self.quantization_key
            message = f"{bits} is true, and lm-evaluation-harness would put the adapter over the "
            message += "plain base: leave it out, and evaluate what preftune merge writes"
            found.append(Problem("eval_jobs", jobs, message, (bits,)))
        return found

    def _quantization_problems(self) -> list[Problem]:
        """Of what does not go with weights in 4 or 8 bits."""
        key, name = "reference_model_name_or_path", self.reference_model_name_or_path
        found = gguf_problems(self, key, name)
        if not self.is_quantized:
            return found
        bits = self.quantization_key
        if not self.use_lora:
            message = "quantised weights cannot train: add use_lora true, or leave it out"
            found.append(Problem(bits, True, message, ("use_lora",)))
        if self.shards_weights:
            message = (
                f"{self.engine} cuts the weights over the devices, and packed ones cannot be cut "
                "row by row: leave out fsdp, or take zero_stage 2 or less; each device then holds "
                "all of the quantised model"
            )
            found.append(Problem(bits, True, message, ("fsdp", "zero_stage")))
        if (self.init_lora_weights or "").startswith("pissa"):
            message = (
                f"{bits} is true, and what pissa takes out of a weight, a quantised one cannot "
                "give up: leave it out"
            )
            found.append(Problem("init_lora_weights", self.init_lora_weights, message, (bits,)))
        if self.bnb_4bit_compute_dtype == "float16" and self.mixed_precision != "fp16":
            message = (
                f"mixed_precision is {self.mixed_precision}, under which no loss scale keeps "
                "small fp16 gradients from vanishing: leave it out, or set mixed_precision fp16"
            )
            others = ("mixed_precision",)
            found.append(Problem("bnb_4bit_compute_dtype", "float16", message, others))
        return found

    def _hub_problems(self) -> list[Problem]:
        """Of checkpoints to push, where there are none."""
        strategy, key = self.hub_strategy, "hub_strategy"
        if strategy in (None, "end") or self.checkpointing_steps is not None:
            return []
        message = "checkpointing_steps is null, so there are no checkpoints: leave one of them out"
        return [Problem(key, strategy, message, ("checkpointing_steps",))]

    def _generating_problems(self) -> list[Problem]:
        """Of answers that cannot be generated, or that nothing would read."""
        found = []
        if self.eval_strategy == "never" and self.has_eval_data:
            read = {"eval_on_start": self.eval_on_start, "eval_kl_samples": self.eval_kl_samples}
            message = "eval_strategy is never: take steps or epoch, or leave it out"
            others = ("eval_strategy",)
            found = [Problem(key, value, message, others) for key, value in read.items() if value]
        if self.shards_weights:
            message = (
                f"{self.engine} cuts the weights over the processes, which would gather them again "
                "for each token of an answer: leave it out and sample from a checkpoint, or take "
                "zero_stage 2 or less"
            )
            settings = {"sample_steps": self.sample_steps, "eval_kl_samples": self.eval_kl_samples}
            found += [
                Problem(key, value, message, ("fsdp", "zero_stage"))
                for key, value in settings.items()
                if value is not None
            ]
        return found

    def _best_metric_problems(self) -> list[Problem]:
        metric = self.metric_for_best_model
        if metric is None:
            return []
        key, labels = "metric_for_best_model", list(self.eval_sources)
        if not self.has_eval_data or self.eval_strategy == "never":
            message = "nothing is evaluated: give eval_dataset or test_size, or leave it out"
            return [Problem(key, metric, message, ("eval_dataset", "test_size", "eval_strategy"))]
        prefixes = [f"eval/{label}/" if label else "eval/" for label in labels or [""]]
        if not metric.startswith(tuple(prefixes)):
            message = f"the metrics of evaluation start with {' or '.join(prefixes)}"
            return [Problem(key, metric, message, ("eval_dataset",))]
        return []
