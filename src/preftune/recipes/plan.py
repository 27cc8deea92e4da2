"""`preftune plan`: what a run will take, from its config and the lengths of its rows."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from preftune.batching.batcher import RowBatcher
from preftune.batching.layout import Layout, build_layout
from preftune.batching.micro_batches import sorted_batches
from preftune.batching.sampler import PairSampler
from preftune.config.gpus import known_gpu
from preftune.config.lora import LoRAConfig
from preftune.config.planning import CPU, PlanConfig
from preftune.data.chat import set_chat_template
from preftune.distributed.delivery import repeated_layers
from preftune.distributed.runtime import AUTOCAST, Precision, resolve_precision
from preftune.errors import DataError, ModelError
from preftune.model.load import DTYPES, load_model_config, load_tokenizer
from preftune.model.logprob_head import chunk_memory
from preftune.model.quantization import loading_options
from preftune.model.rope import longest_sequence
from preftune.objective import objective_of
from preftune.planning.disk import disk_of
from preftune.planning.engines import Division, Sizes, divide
from preftune.planning.fits import Change, smallest_change
from preftune.planning.live import storages_of
from preftune.planning.process import (
    CUDA_CONTEXT,
    GPU_SLACK,
    HEAP_SLACK,
    mapped_bytes,
    working_bytes,
)
from preftune.planning.rate import arithmetic_of, duration
from preftune.planning.result import Place, Plan
from preftune.planning.rows import Heaviest, PlannedRows, heaviest_of, of_dataset, worst_case
from preftune.planning.weights import PlannedModel, plan_model, use_packing
from preftune.planning.work import (
    Held,
    Work,
    scoring_work,
    training_work,
    update_work,
    use_chunks_of,
)
from preftune.recipes.loss import loss_of
from preftune.recipes.pairs import load_experiment_pairs
from preftune.recipes.preflight import check_lora, check_routers, check_sequence
from preftune.recipes.train import count_steps
from preftune.reference.build import ShardSize
from preftune.tracking.progress import ProgressDisplay
from preftune.training.memory import GIB, device_memory_gib
from preftune.training.optimizer import make_optimizer


def plan(config: PlanConfig) -> tuple[Plan, Change | None]:
    """Plan a run; loads no weights.

    Args:
        config: of the run, and where it shall run.

    Returns:
        The plan and, where it does not fit, the smallest change that makes it fit, if any does.

    Raises:
        PreftuneError: the configuration, the model or the data is wrong.
    """
    rows, notes = _rows(config)
    base = _base(config)
    found = _planned(config, rows, base, notes)
    if found.fits:
        return found, None
    change = smallest_change(
        config, lambda other: _planned(other, rows, base, []).fits, found.heaviest.positions
    )
    return found, change


def _base(config: PlanConfig) -> int:
    """Bytes of a process before it loads a model, with the packages that the run will load."""
    if config.use_lora:
        import peft  # noqa: F401
    if config.is_quantized:
        loading_options(config, None)
    return working_bytes(AUTOCAST[place_of(config).precision])


def _rows(config: PlanConfig) -> tuple[PlannedRows, list[str]]:
    """The rows of the dataset or, where they cannot be read here, the longest there may be.

    Raises:
        PreftuneError: what would be wrong anywhere: a file that is not there, a bad row.
    """
    experiment = config.experiment()
    model_config = load_model_config(config)
    context = longest_sequence(model_config)
    check_routers(config, model_config)
    check_sequence(config, model_config)
    if config.use_lora:
        check_lora(experiment)
    try:
        tokenizer = load_tokenizer(config)
    except ModelError as error:
        return worst_case(config, context), [_assumed(config, context, error)]
    if config.chat_template is not None:
        set_chat_template(tokenizer, config.chat_template)
    try:
        pairs = load_experiment_pairs(experiment, tokenizer, ProgressDisplay("none"))
    except DataError as error:
        if not all(_is_remote(name) for name, _ in config.sources):
            raise
        return worst_case(config, context), [_assumed(config, context, error)]
    examples = pairs.train.examples
    return of_dataset(examples, examples.sizes, examples.num_scored), []


def _is_remote(name: str) -> bool:
    """Whether a dataset is one of the Hub, which another machine may well see."""
    plain = Path(name).expanduser()
    return not plain.exists() and not plain.suffix and not name.startswith(("/", "."))


def _assumed(config: PlanConfig, context: int | None, error: Exception) -> str:
    longest = min(b for b in (config.max_length, context) if b is not None)
    return (
        f"the rows cannot be read here ({str(error).splitlines()[0]}): every row is taken to be "
        f"{longest} tokens a side, the most there can be; steps and time depend on the rows"
    )


def _planned(config: PlanConfig, rows: PlannedRows, base: int, notes: Sequence[str]) -> Plan:
    place, notes = place_of(config), list(notes)
    products = AUTOCAST[place.precision]
    process = CUDA_CONTEXT if place.is_gpu else base
    model = plan_model(config, config, products=products)
    layout_name = _lay_out(config, model, rows, place, notes)
    shares = config.num_processes // config.sequence_parallel_size
    batch = config.global_batch_size(shares)
    sampler = PairSampler(len(rows.examples), batch, config.resolved_data_seed, config.shuffle)
    num_steps = None if rows.is_worst_case else count_steps(config, sampler)
    heaviest = heaviest_of(rows, config, layout_name, sampler, num_steps or 1)
    layout = Layout(layout_name, model.policy.limits, config.ld_alpha, config.scores_prompt)
    sizes, work = _sizes(config, model, rows, heaviest, layout, place)
    division = divide(sizes, config)
    if not place.is_gpu and config.checkpointing_steps is not None and config.checkpoint_async:
        division = _with_copy(division, sizes, config, num_steps)
    division = division.with_slack(GPU_SLACK if place.is_gpu else HEAP_SLACK)
    if not place.is_gpu:
        division = division.beside("model file", _left_mapped(config, model))
    arithmetic = arithmetic_of(work, rows, heaviest.rows, heaviest.positions)
    time = duration(config, arithmetic, rows, rows_a_step=batch, num_steps=num_steps)
    disk = disk_of(config, model, sizes, rows)
    return Plan(
        config=config,
        place=place,
        parameters=model.parameters,
        rows=rows,
        heaviest=heaviest,
        division=division,
        process=process,
        duration=time,
        disk=disk,
        num_steps=num_steps,
        notes=notes,
    )


def place_of(config: PlanConfig) -> Place:
    """The device that a plan is for."""
    gpu = known_gpu(config.device or "")
    has_gpu = config.device is None and torch.cuda.is_available()
    is_gpu = config.device != CPU and bool(gpu or has_gpu or config.device_memory_gib is not None)
    has_bf16 = gpu.has_bf16 if gpu else True
    precision: Precision
    if config.mixed_precision != "auto":
        precision = config.mixed_precision
    elif is_gpu and not has_gpu:
        precision = "bf16" if has_bf16 else "fp16"
    else:
        precision = resolve_precision("auto")
    gib = config.device_memory_gib or (gpu.memory_gib if gpu else None)
    if gib is None:
        gib = device_memory_gib(torch.device("cuda" if is_gpu else "cpu"))
    memory = round(gib * GIB)
    narrow = precision != "fp32" or config.dtype == "bfloat16"
    fused = is_gpu and has_bf16 and narrow and config.attn_implementation != "sdpa"
    chunks = memory if is_gpu else chunk_memory(torch.device("cpu"))
    name = config.device or ("this GPU" if has_gpu else "a GPU" if is_gpu else CPU)
    return Place(name, memory, is_gpu, precision, fused, chunks)


def _lay_out(
    config: PlanConfig, model: PlannedModel, rows: PlannedRows, place: Place, notes: list[str]
) -> Any:
    """Choose how rows go through the model, as a run would, as far as shapes tell it."""
    use_chunks_of(model, place.chunk_memory)
    wanted = config.wanted_layout
    if config.attn_implementation == "eager":
        model.policy.model.set_attn_implementation("eager")
        return "concatenated" if wanted == "auto" else wanted
    if wanted in ("concatenated", "separate"):
        return wanted
    row = build_layout([rows.examples[0]], "shared_prefix")
    if use_packing(model, row, fused=place.fused_attention):
        return "shared_prefix"
    notes.append("the model does not take packed rows: pairs are padded")
    return "concatenated"


def _sizes(
    config: PlanConfig,
    model: PlannedModel,
    rows: PlannedRows,
    heaviest: Heaviest,
    layout: Layout,
    place: Place,
) -> tuple[Sizes, Work]:
    """Run the heaviest micro-batch, an update and a forward of the reference pass, in shapes."""
    step = _step(config, model, rows, heaviest, layout)
    stored_step = step
    products = AUTOCAST[place.precision]
    if config.fsdp != "no" and products in (torch.bfloat16,):
        # FSDP2 gathers weights in the type of products, and there is no autocast.
        narrow = plan_model(config, config, products=products, stored=products)
        _lay_out(config, narrow, rows, place, [])
        step = _step(config, narrow, rows, heaviest, layout)
    make = partial(make_optimizer, config=config, seed=config.seed)
    layers = [storages_of(layer.parameters()) for layer in repeated_layers(model.policy)]
    weights = storages_of([*model.policy.parameters(), *model.policy.buffers()])
    trained = [p for p in model.policy.parameters() if p.requires_grad]
    width = model.policy.model.config.get_text_config().hidden_size
    inputs = len(layers) * heaviest.positions * width * (4 if config.dtype == "float32" else 2)
    sizes = Sizes(
        weights=weights,
        trained=storages_of(trained),
        trained_numbers=sum(p.numel() for p in trained),
        update=update_work(model, make, config.optimizer),
        step=step,
        scoring=_scoring(config, model, rows, layout) if config.stores_reference else None,
        largest_layer=max(layers, default=0),
        outside=weights - sum(layers),
        gathered_share=0.5 if step is not stored_step and config.dtype == "float32" else 1.0,
        own_reference=_own_reference(config, products),
        layer_inputs=inputs if config.activation_offload else 0,
    )
    return sizes, stored_step


def _step(
    config: PlanConfig, model: PlannedModel, rows: PlannedRows, heaviest: Heaviest, layout: Layout
) -> Work:
    number = len(rows.examples)
    answers = len(rows.examples[0].completions)
    reference = torch.zeros(number, answers, dtype=torch.float64)
    columns: dict[str, torch.Tensor] = {}
    if config.reads_margin:
        columns["margin"] = torch.zeros(number, dtype=torch.float64)
    if config.unpaired:
        columns["is_desirable"] = torch.ones(number, dtype=torch.bool)
    batcher = RowBatcher(
        rows.examples,
        reference if config.needs_reference else None,
        layout,
        torch.device("cpu"),
        columns,
    )
    objective = objective_of(loss_of(config), load_balancing_weight=config.load_balancing_weight)
    return training_work(
        model,
        objective,
        batcher(heaviest.rows),
        is_accumulating=heaviest.num_in_step > 1,
        max_grad_norm=config.max_grad_norm,
    )


def _scoring(config: PlanConfig, model: PlannedModel, rows: PlannedRows, layout: Layout) -> Work:
    """The forward of the reference pass with the most tokens."""
    batches = sorted_batches(rows.sizes, layout.name, max_tokens=ShardSize().tokens)
    return scoring_work(model, build_layout([rows.examples[i] for i in batches[0]], layout))


def _own_reference(config: PlanConfig, products: torch.dtype | None) -> int:
    """Bytes of a reference that is another model."""
    other = config.reference_model
    if other is None:
        return 0
    policy = plan_model(other, LoRAConfig(), products=products).policy
    return storages_of([*policy.parameters(), *policy.buffers()])


def _left_mapped(config: PlanConfig, model: PlannedModel) -> int:
    """Of a quantised model on a CPU, the pages of its file that other weights keep mapped.

    Weights that stay in their file's type are the file's pages, until they are written to; the file
    then is mapped whole, also where weights were quantised from it. Linux takes such pages back.
    """
    source = getattr(load_model_config(config), "dtype", None) or torch.float32
    if not config.is_quantized or source != DTYPES[config.dtype]:
        return 0
    file = mapped_bytes(Path(str(config.model_name_or_path)).expanduser())
    kept = (p for p in model.policy.parameters() if p.is_floating_point() and not p.requires_grad)
    return max(0, file - storages_of(kept))


def _with_copy(
    division: Division, sizes: Sizes, config: PlanConfig, num_steps: int | None
) -> Division:
    """With a checkpoint that is written while training goes on: on a CPU its copy counts, too."""
    every = config.checkpointing_steps
    goes_on = isinstance(every, int) and num_steps is not None and num_steps > every
    copy = sizes.trained + sizes.update.state
    if config.shards:
        return division  # written while training waits, from what there is
    last = {"weights": sizes.weights, "optimizer": sizes.update.state}
    base = division.fullest.parts if goes_on else last
    saving = Held("while a checkpoint is written", base | {"checkpoint copy": copy})
    return Division([*division.phases, saving], division.host)
