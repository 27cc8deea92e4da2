"""`preftune quickstart`: a real model, this project's own pairs, and what training changed."""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from preftune.batching.layout import Layout
from preftune.config.experiment import ExperimentConfig
from preftune.config.model import ModelConfig
from preftune.config.paths import cache_root
from preftune.data.pairs import PairDataset, load_pairs
from preftune.data.quickstart_pairs import write_quickstart_pairs
from preftune.distributed.runtime import Runtime, resolve_precision
from preftune.errors import CheckpointError
from preftune.evaluation.samples import greedy_answers
from preftune.evaluation.scores import PairScores
from preftune.files import write_atomically
from preftune.model.embedded import NAME, embedded_model
from preftune.model.load import load_model, load_tokenizer
from preftune.recipes.answer_logps import score_examples
from preftune.recipes.train import train
from preftune.report.page import write_report
from preftune.tracking.progress import ProgressDisplay, ProgressStyle
from preftune.training.run_folder import RunFolder, check_writable

# Found by trial on the quickstart's own pairs: enough to see, not enough to break so small a model
# (at 1e-5 its answers turn warm and empty). 38 steps of 8 read 304 of the 360 pairs.
SETTINGS = {
    "loss_type": "dpo",
    "beta": 0.1,
    "learning_rate": 3e-6,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.1,
    "max_train_steps": 38,
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "checkpointing_steps": None,
    "eval_strategy": "steps",
    "eval_steps": 0.5,
    "max_length": 512,
}
SCORE_BATCH_SIZE = 16
MAX_NEW_TOKENS = 56
REPETITION_PENALTY = 1.1
NUM_SAMPLES = 3


@dataclass(frozen=True)
class QuickstartSummary:
    """Held-out numbers and answers, before and after."""

    num_train: int
    num_steps: int
    num_held_out: int
    likelihood_accuracy_before: float
    likelihood_accuracy_after: float
    reward_accuracy: float
    reward_margin: float
    training_seconds: float
    samples: list[dict[str, str]]
    model: str
    """Where the trained model lies."""
    pairs: str
    """Where the pairs lie."""


@dataclass(frozen=True)
class _View:
    """A model seen from outside: scores of the held-out pairs, and answers."""

    scores: PairScores
    answers: list[str]


def quickstart(output_dir: Path, progress: ProgressStyle = "auto") -> QuickstartSummary:
    """Train SmolLM2-135M-Instruct on the quickstart's pairs and show what changed.

    Everything lands in `output_dir`. Stopped at any time, the same call goes on.

    Args:
        output_dir: `pairs/`, `run/` and `summary.json` are made there.
        progress: how to show progress.

    Returns:
        What was printed.
    """
    display = ProgressDisplay(progress)
    check_writable("output_dir", output_dir)
    _check_folder(output_dir)
    base = embedded_model(cache_root(None), display.say)
    train_file, held_out_file = write_quickstart_pairs(output_dir / "pairs")
    config = ExperimentConfig(
        model_name_or_path=str(base),
        dataset_name=str(train_file),
        eval_dataset=str(held_out_file),
        output_dir=str(output_dir / "run"),
        run_name="quickstart",
        progress=progress,
        **SETTINGS,
    )
    held_out = _load_held_out(base, held_out_file)
    prompts = _sample_prompts(held_out_file)
    display.say(f"{NAME} before training")
    before = _look_at(base, held_out, prompts, display)
    result = train(config)
    display.say(f"{NAME} after training")
    after = _look_at(result.folder.final, held_out, prompts, display)
    summary = _summarise(before, after, config, result.manifest, prompts, train_file)
    text = json.dumps(asdict(summary), indent=1, ensure_ascii=False) + "\n"
    write_atomically(output_dir / "summary.json", text)
    _add_to_report(summary, output_dir / "summary.json", result.folder)
    print(_report(summary, output_dir))
    return summary


def _check_folder(output_dir: Path) -> None:
    """Refuse a folder whose files the quickstart would overwrite."""
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    with tempfile.TemporaryDirectory() as scratch:
        made = write_quickstart_pairs(Path(scratch))
        there = [output_dir / "pairs" / path.name for path in made]
        if any(
            not old.is_file() or old.read_bytes() != new.read_bytes()
            for old, new in zip(there, made, strict=True)
        ):
            raise CheckpointError(
                f"output_dir is {str(output_dir)!r}, which holds other files than a quickstart's; "
                "nothing there was changed; give a new or empty --output_dir"
            )


def _load_held_out(base: Path, file: Path) -> PairDataset:
    return load_pairs(
        str(file),
        tokenizer=load_tokenizer(ModelConfig(model_name_or_path=str(base))),
        max_length=int(SETTINGS["max_length"]),
        max_dropped_fraction=0.0,
    )


def _sample_prompts(file: Path) -> list[str]:
    """The first held-out prompts of one wording, the same ones every time.

    This wording the model answers before training too; to some others it only says that it cannot
    help, which shows little.
    """
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    prompts = [row["prompt"][-1]["content"] for row in rows]
    return [prompt for prompt in prompts if prompt.startswith("How does someone")][:NUM_SAMPLES]


def _look_at(
    folder: Path, held_out: PairDataset, prompts: list[str], display: ProgressDisplay
) -> _View:
    config = ModelConfig(model_name_or_path=str(folder))
    runtime = Runtime(resolve_precision("auto"), seed=0)
    loaded = load_model(config, runtime.device)
    model = runtime.prepare_for_inference(loaded.policy)
    with display.stage("score", len(held_out.examples), "pair") as update:
        scores = score_examples(
            model,
            held_out.examples,
            Layout("concatenated"),
            runtime.device,
            update,
            rows=SCORE_BATCH_SIZE,
        )
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers = greedy_answers(
        loaded.policy.model,
        load_tokenizer(config),
        conversations,
        MAX_NEW_TOKENS,
        repetition_penalty=REPETITION_PENALTY,
    )
    return _View(scores, answers)


def _summarise(
    before: _View,
    after: _View,
    config: ExperimentConfig,
    manifest: dict,
    prompts: list[str],
    train_file: Path,
) -> QuickstartSummary:
    assert config.beta is not None  # filled by the config
    rewards = after.scores.rewards_against(before.scores, config.beta)
    return QuickstartSummary(
        num_train=manifest["data"]["train"]["num_pairs"],
        num_steps=manifest["steps"],
        num_held_out=len(rewards.chosen),
        likelihood_accuracy_before=before.scores.accuracy,
        likelihood_accuracy_after=after.scores.accuracy,
        reward_accuracy=rewards.accuracy,
        reward_margin=float(rewards.margins.mean()),
        training_seconds=manifest["seconds"],
        samples=[
            {"prompt": p, "before": b, "after": a}
            for p, b, a in zip(prompts, before.answers, after.answers, strict=True)
        ],
        model=str(Path(config.output_dir) / "final"),
        pairs=str(train_file.parent),
    )


def _add_to_report(summary: QuickstartSummary, file: Path, folder: RunFolder) -> None:
    """Put what was seen before and after into the run's folder, and write its report again."""
    lines = [
        {"step": summary.num_steps, "row_id": f"prompt {number}", "dataset": "held out"}
        | {"prompt": sample["prompt"], "start": sample["before"], "policy": sample["after"]}
        for number, sample in enumerate(summary.samples, 1)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(folder.samples, text)

    def row(metric: str, before: float | None, after: float) -> dict[str, Any]:
        about = {"job": "quickstart", "task": f"{summary.num_held_out} held-out pairs"}
        sides = {"base": before, "trained": after}
        return {**about, "metric": metric, "higher_is_better": True} | {
            side: None if value is None else {"value": value, "stderr": None, "file": str(file)}
            for side, value in sides.items()
        }

    likely = (summary.likelihood_accuracy_before, summary.likelihood_accuracy_after)
    rows = [
        row("chosen answer more likely than the rejected one", *likely),
        row("implicit-reward accuracy", None, summary.reward_accuracy),
        row("implicit-reward margin", None, summary.reward_margin),
    ]
    folder.results.parent.mkdir(exist_ok=True)
    write_atomically(folder.results, json.dumps(rows, indent=1) + "\n")
    write_report([folder.root])


def _report(summary: QuickstartSummary, output_dir: Path) -> str:
    likely = (summary.likelihood_accuracy_before, summary.likelihood_accuracy_after)
    lines = [
        "",
        f"{NAME}: {summary.num_steps} steps of {SETTINGS['per_device_train_batch_size']} of "
        f"{summary.num_train} pairs, in {summary.training_seconds:.0f} s",
        "",
        f"{f'on {summary.num_held_out} held-out pairs':48}{'before':>8}{'after':>8}",
        f"{'chosen answer more likely than the rejected one':48}{likely[0]:8.2f}{likely[1]:8.2f}",
        f"{'implicit-reward accuracy':48}{'-':>8}{summary.reward_accuracy:8.2f}",
        f"{'implicit-reward margin':48}{'-':>8}{summary.reward_margin:8.2f}",
        "(implicit rewards compare with the model before training: undefined before)",
    ]
    lines += ["", f"most likely answers, with a repetition penalty of {REPETITION_PENALTY}:"]
    for sample in summary.samples:
        lines += ["", f"prompt   {sample['prompt']}"]
        lines += [f"before   {sample['before']}", f"after    {sample['after']}"]
    lines += [
        "",
        f"model    {summary.model}",
        f"pairs    {summary.pairs}",
        f"run      {output_dir / 'run'} (config.yaml, metrics.jsonl, run.json)",
        f"report   {output_dir / 'run' / 'report.html'} (open it in a browser)",
        "",
        "Next, with your own pairs, one JSON object a line with prompt, chosen and rejected:",
        f"  preftune train --model_name_or_path {summary.model} \\",
        "    --dataset_name my-pairs.jsonl --output_dir my-run",
    ]
    return "\n".join(lines)
