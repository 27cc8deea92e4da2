"""`preftune train`: from a configuration to a trained model, top to bottom; every stage.

The stage decides what rows are read as, and the objective; a reference there is only with pairs.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from preftune.batching.batcher import RowBatcher
from preftune.batching.micro_batches import MicroBatching
from preftune.batching.sampler import PairSampler
from preftune.config.experiment import ExperimentConfig
from preftune.config.paths import cache_root
from preftune.distributed.engine import Engine
from preftune.distributed.folders import SeenFolder, look_at_folder
from preftune.distributed.runtime import AUTOCAST, Runtime, resolve_precision
from preftune.errors import ConfigError, Interrupted, ModelError, TrainingDiverged
from preftune.model.adapter_files import base_record
from preftune.model.adapters import StartAdapter
from preftune.model.forward import PolicyModel
from preftune.model.layout_choice import LayoutChoice
from preftune.model.layout_probe import rounded_to
from preftune.model.load import LoadedModel
from preftune.model.quantization import base_as_trained, num_bytes, num_quantized
from preftune.objective import Objective, objective_of
from preftune.recipes.evaluating import evaluator
from preftune.recipes.final import load_best, save_final, tell_early_end
from preftune.recipes.lint import risky_settings
from preftune.recipes.loss import describe_sync, loss_of
from preftune.recipes.pairs import Pairs, load_experiment_pairs, over_budget
from preftune.recipes.preflight import check_setup, slow_settings
from preftune.recipes.publish import is_pushed, open_repository, publish
from preftune.recipes.reference import open_reference
from preftune.recipes.run import Run
from preftune.recipes.same_start import (
    agree_on_data,
    agree_on_start,
    check_output_is_seen,
)
from preftune.recipes.sampling import choose_prompts
from preftune.recipes.start_model import StartModel
from preftune.recipes.step_zero import (
    PlainScores,
    check_step_zero,
    compared_rows,
    plain_rows,
    plain_scores,
)
from preftune.reference.live import LiveReference
from preftune.tracking.progress import ProgressDisplay
from preftune.training.loop import TrainingLoop
from preftune.training.optimizer import make_optimizer, make_schedule
from preftune.training.restore import taken_at_start
from preftune.training.run_folder import RunFolder, RunStart
from preftune.training.signals import SignalRequests
from preftune.training.step import TrainState


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves behind."""

    folder: RunFolder
    manifest: dict[str, Any]


def train(
    config: ExperimentConfig, *, on_step: Callable[[int, list[str]], None] | None = None
) -> TrainResult:
    """Train the policy that `config` describes; what `preftune train` does.

    A run that was stopped goes on from its last checkpoint, to the same bits. A finished one is
    left as it is.

    Args:
        config: the whole experiment.
        on_step: called after each step with its number, counted from 1, and the ids of the rows
            that this process trained on.

    Returns:
        The run's folder and its manifest.

    Raises:
        PreftuneError: see `preftune.errors`; the exit code of the command is the error's.
    """
    # From here on: SIGUSR1 would end the process while nothing is caught.
    with SignalRequests().saving() as requests:
        result = _train(config, requests, on_step)
        if not config.push_to_hub:
            return result
        publish(config, result.folder, requests)
    return replace(result, manifest=result.folder.read_manifest())


def _train(
    config: ExperimentConfig,
    requests: SignalRequests,
    on_step: Callable[[int, list[str]], None] | None,
) -> TrainResult:
    limit = config.max_run_seconds
    deadline = None if limit is None else time.monotonic() + limit
    precision = resolve_precision(config.mixed_precision)
    runtime = Runtime(precision, config.seed, config.collective_seconds)
    agree_on_start(config, runtime)
    start, pinned, tokenizer = check_setup(config, runtime)
    runtime.share_rows(config.sequence_parallel_size)
    runtime.check_groups(config)
    display = ProgressDisplay(config.progress, is_main=runtime.is_main)
    if tokenizer is None:  # the run is finished
        left = "nothing to do" if is_pushed(config, start.folder) else "it is not pushed yet"
        display.say(f"the run in {start.folder.root} is finished; {left}")
        return TrainResult(start.folder, runtime.decide(start.folder.read_manifest))
    check_output_is_seen(config, start, runtime)
    cache = look_at_folder(runtime, "cache_dir", cache_root(config.cache_dir))

    # ---------------------------------------------------------------- data, before weights load
    pairs = _load_pairs(pinned, tokenizer, cache, runtime, display)
    prompts = runtime.together(lambda: choose_prompts(pinned, pairs))
    sampler = PairSampler(
        len(pairs.train.examples),
        config.global_batch_size(runtime.data_size),
        config.resolved_data_seed,
        config.shuffle,
    )
    num_steps = runtime.together(lambda: count_steps(config, sampler))
    for sentence in risky_settings(pinned, num_steps / sampler.steps_per_epoch):
        display.say(sentence)
    runtime.decide(lambda: open_repository(pinned, start.folder))

    # ---------------------------------------------------------------- model and reference
    policy = _StartPolicy.open(pinned, start, pairs, runtime, display)
    loaded, layout = policy.loaded, policy.layout
    live_reference = LiveReference.of(config, loaded.policy, runtime)
    for sentence in describe_sync(config, num_steps):
        display.say(sentence)
    engine = runtime.spread(
        loaded.policy,
        partial(make_optimizer, config=config, seed=config.seed),
        config,
        max_grad_norm=config.max_grad_norm,
    )
    run = Run(config, start, runtime, display, tokenizer, pairs, loaded, layout, sampler, num_steps)
    run.manifest["model"] = policy.about
    batcher, held_out = _with_reference(run, pinned, policy, cache)
    objective = objective_of(
        loss_of(config),
        live_reference=live_reference,
        load_balancing_weight=config.load_balancing_weight,
    )
    micro_batching = MicroBatching(
        pairs.train.examples.sizes,
        layout.name,
        config.per_device_train_batch_size,
        config.max_tokens_per_microbatch,
    )
    _check_start(run, policy, engine, objective, batcher, micro_batching)

    # ---------------------------------------------------------------- train
    state = TrainState.at_start(engine, runtime.device, live_reference, precision)
    run.try_heaviest(state, objective, batcher, micro_batching)
    run.ask(prompts)  # as long as it is in its initial state
    metrics_file = run.begin(state, batcher)
    loop = TrainingLoop(
        config=config,
        runtime=runtime,
        state=state,
        objective=objective,
        batcher=batcher,
        sampler=sampler,
        micro_batching=micro_batching,
        schedule=make_schedule(config, num_steps),
        num_steps=num_steps,
        metrics_file=metrics_file,
        display=display,
        evaluate=evaluator(run, state, objective, held_out),
        save=lambda: run.save_checkpoint(state, metrics_file),
        save_failed=run.checkpoints.failed,
        settle=run.checkpoints.settle,
        requests=requests,
        deadline=deadline,
        costs=run.costs,
        sample=None if config.sample_steps is None else run.sample,
        best=run.checkpoints.best,
        early_stopping=run.early_stopping,
        on_step=on_step,
        tell_trackers=run.follow(),
        note=lambda: run.note(state, batcher),
        report=run.report,
    )
    return _trained(run, loop, engine)


def _with_reference(
    run: Run, pinned: ExperimentConfig, policy: "_StartPolicy", cache: SeenFolder
) -> tuple[RowBatcher, dict[str, RowBatcher]]:
    """Score the pairs by the reference, if the loss reads one; gives batchers, of training too."""
    if not run.config.stores_reference:
        return run.batchers(None)
    reference = open_reference(
        pinned,
        policy.loaded.policy,
        policy.fields,
        policy.layout,
        run.pairs,
        cache,
        run.runtime,
        run.display,
    )
    run.manifest |= reference.describe(pinned)
    batchers = run.batchers(reference)
    reference.release()  # training needs the memory
    return batchers


def _check_start(
    run: Run,
    policy: "_StartPolicy",
    engine: Engine,
    objective: Objective[Any],
    batcher: RowBatcher,
    micro_batching: MicroBatching,
) -> None:
    """See that the policy scores rows as its own forward and the reference do."""
    reference_model = run.config.reference_model_name_or_path
    if reference_model is not None:
        run.display.say(
            f"the reference is {reference_model}: policy and reference are not "
            "compared before the first step, because they may well differ"
        )
    computed = rounded_to(policy.loaded.policy, AUTOCAST[run.runtime.precision])
    check_step_zero(
        engine.model,
        objective,
        batcher,
        micro_batching.split(compared_rows(len(batcher.examples))),
        is_exact=computed == torch.float32,
        plain=policy.plain,
        reference_is_start=reference_model is None,
    )


def _trained(run: Run, loop: TrainingLoop, engine: Engine) -> TrainResult:
    """Run the loop to its end, and write the model; the manifest says how it ended."""
    try:
        with run.checkpoints.awaited():
            loop.run()
        tell_early_end(run, loop.state)
        load_best(run, loop.state)
        run.manifest["final_step"] = loop.state.step
        save_final(run, engine)
        manifest = run.end("finished")
        run.report()
        return TrainResult(run.start.folder, manifest)
    except (Interrupted, TrainingDiverged) as error:
        run.end("interrupted" if isinstance(error, Interrupted) else "diverged")
        run.report()
        raise run.runtime.share(error)  # noqa: B904  # the same on every rank
    finally:
        run.release()


def _load_pairs(
    config: ExperimentConfig,
    tokenizer: PreTrainedTokenizerBase,
    cache: SeenFolder,
    runtime: Runtime,
    display: ProgressDisplay,
) -> Pairs:
    """The rows of the run, seen to be the same on all ranks."""
    for sentence in slow_settings(config, config.mixed_precision):
        display.say(sentence)
    pairs = runtime.leaders_first(  # the others find their tokens in the cache
        lambda: load_experiment_pairs(config, tokenizer, display),
        is_leader=cache.leads(runtime.rank),
    )
    agree_on_data(pairs.by_use, runtime)
    for sentence in over_budget(config, pairs.train):
        display.say(sentence)
    return pairs


@dataclass(frozen=True)
class _StartPolicy:
    """The policy before its first step, and what was found out about it."""

    loaded: LoadedModel
    layout: LayoutChoice
    plain: PlainScores
    fields: dict[str, Any]
    """What its log-probs depend on."""
    about: dict[str, Any]
    """For the manifest; read before an engine takes the weights."""

    @classmethod
    def open(
        cls,
        config: ExperimentConfig,
        start: RunStart,
        pairs: Pairs,
        runtime: Runtime,
        display: ProgressDisplay,
    ) -> "_StartPolicy":
        """Load it, score a few rows by its own forward, and choose how rows go through it.

        Args:
            config: with commits as revisions.
            start: whose layout and adapter a run goes on with.
            pairs: the rows.
            runtime: the ranks.
            display: says what is done.
        """
        display.say(f"loading {config.model_name_or_path}")
        taken = runtime.together(partial(taken_at_start, start.checkpoint))
        adapter = StartAdapter.of(config, config.seed, taken)
        model = StartModel.load(config, runtime, is_cut=config.shards_weights, adapter=adapter)
        loaded, examples = model.loaded, pairs.train.examples
        autocast = AUTOCAST[runtime.precision]
        plain = runtime.decide(
            lambda: plain_scores(
                loaded.policy.model, examples, plain_rows(examples.sizes), autocast
            )
        )
        layout = model.lay_out(
            start.layout or config.wanted_layout,
            start.attention or config.attn_implementation,
            pairs.longest_side,
        )
        share_rows(loaded.policy, layout, runtime)
        for sentence in _told_of_quantization(config, loaded):
            display.say(sentence)
        if layout.why:
            display.say(f"pairs are padded: {layout.why}")
        fields = model.identify(layout)
        about = {
            "commit": config.model_revision,
            "weights": fields["weights"],
            "parameters": loaded.num_parameters,
            "quantized_parameters": num_quantized(loaded.policy),
            "bytes": num_bytes(loaded.policy),
            "trainable_parameters": loaded.num_trainable,
            "adapter_commit": config.adapter_revision,
        }
        return cls(loaded, layout, plain, fields, about)


def _told_of_quantization(config: ExperimentConfig, loaded: LoadedModel) -> list[str]:
    """What is quantised, and where that differs from what the run's adapter was trained over."""
    sentences, model = [], loaded.policy.model
    if config.is_quantized:
        sentences.append(
            f"{num_quantized(model):,} of {loaded.num_parameters:,} parameters are quantised; the "
            f"model takes {num_bytes(model):,} bytes"
        )
    if config.adapter_name_or_path is not None:
        name = config.adapter_name_or_path
        then = base_record(name, config.adapter_revision, "adapter_name_or_path")
        now = base_as_trained(model, config)
        if then and then != now:
            sentences.append(
                f"the adapter {name} was trained over a base with {_options(then)}, and here it "
                f"has {_options(now) or 'plain weights'}: the run starts from, and is measured "
                "against, another model than that one was"
            )
    return sentences


def _options(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def share_rows(policy: PolicyModel, layout: LayoutChoice, runtime: Runtime) -> None:
    """Let the ranks of each sequence group, where there are such, share the rows of layouts.

    Args:
        policy: with its attention function.
        layout: how rows go through it.
        runtime: the ranks.

    Raises:
        ModelError: rows are not packed.
    """
    group = runtime.sequence_group
    if group is not None and layout.name != "shared_prefix":
        error = ModelError(
            f"sequence_parallel_size is {group.size}, which shares out packed rows, and "
            f"{layout.why}; set it to 1"
        )
        raise runtime.share(error)
    policy.sequence_group = group


def count_steps(config: ExperimentConfig, sampler: PairSampler) -> int:
    """Optimizer steps of the whole run.

    Raises:
        ConfigError: the warm-up would take all of them, so the rate would never be reached.
    """
    if config.max_train_steps is not None:
        num_steps = config.max_train_steps
    else:
        assert config.num_epochs is not None  # filled by the config when neither is given
        # The small allowance: 0.1 epochs of 30 steps are 3.0000000000000004 in floating point.
        num_steps = max(1, math.ceil(config.num_epochs * sampler.steps_per_epoch - 1e-9))
    if config.warmup_steps and config.warmup_steps >= num_steps:
        raise ConfigError(
            f"warmup_steps is {config.warmup_steps}, and the run has {num_steps} steps; it must be "
            "fewer, or learning_rate is never reached"
        )
    return num_steps
