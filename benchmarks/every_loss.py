"""Train with every loss on the same pairs, and see what held-out pairs say of each.

    PREFTUNE_DATA=… python benchmarks/every_loss.py
    PREFTUNE_DATA=… python benchmarks/every_loss.py --losses simpo cpo --grid

100 steps of 8 pairs of `rasbt-polite` from SmolLM2-135M, each loss with its documented defaults.
A loss that reads a margin column gets one: how unlike the two answers are, from 0 to 1.
`--grid` varies learning rate and beta instead. Runs that are finished in `--output` are not run
again, and one that was stopped goes on, so the command may be repeated. The last lines are a table.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from difflib import SequenceMatcher
from pathlib import Path

from preftune.config.paths import cache_root
from preftune.losses import LOSS_SPECS, DPOLossType
from preftune.model.embedded import embedded_model

LEARNING_RATES = (5e-6, 1e-5, 3e-5)
BETA_FACTORS = (0.3, 1.0, 3.0)


def main() -> None:
    """Run what is missing, and print what all runs say."""
    options = parse()
    model = options.model or embedded_model(cache_root(None), print)
    runs = [(loss, rate, beta) for loss in options.losses for rate, beta in settings(loss, options)]
    rows = []
    for number, (loss, rate, beta) in enumerate(runs, start=1):
        began = time.monotonic()
        run = train(loss, rate, beta, Path(model), options)
        rows.append(row(loss, rate, beta, run))
        took = time.monotonic() - began
        print(f"[{number}/{len(runs)}] {rows[-1]} ({took:.0f} s)", file=sys.stderr, flush=True)
    header = "| loss | learning rate | beta | accuracy | margin | chosen logratio | loss |"
    print("\n".join([header, "|---|---|---|---|---|---|---|", *rows]))


def parse() -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = [loss.value for loss in DPOLossType]
    add("--losses", nargs="+", choices=names, metavar="LOSS", help="unset: all")
    add("--grid", action="store_true", help="several learning rates and betas of each")
    add("--learning-rate", type=float, default=1e-5)
    add("--steps", type=int, default=100)
    add("--dataset", default="rasbt-polite", help="a folder of $PREFTUNE_DATA")
    add("--model", help="a folder; unset: SmolLM2-135M-Instruct")
    add("--output", type=Path, default=Path("bench/every-loss"))
    options = parser.parse_args()
    if "PREFTUNE_DATA" not in os.environ:
        parser.error("set PREFTUNE_DATA to the folder that holds rasbt-polite/")
    options.losses = options.losses or names
    return options


def settings(loss: str, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Learning rates and betas to run."""
    beta = LOSS_SPECS[DPOLossType(loss)].knobs["beta"]
    if not options.grid:
        return [(options.learning_rate, beta)]
    return [(rate, float(f"{beta * f:.3g}")) for rate in LEARNING_RATES for f in BETA_FACTORS]


def train(loss: str, rate: float, beta: float, model: Path, options: argparse.Namespace) -> Path:
    """One run through the command line; its folder."""
    data = Path(os.environ["PREFTUNE_DATA"]) / options.dataset
    if LOSS_SPECS[DPOLossType(loss)].reads_margin:
        data = with_margins(data, options.output / f"{options.dataset}-with-margins")
    run = options.output / f"{loss}-lr{rate:g}-beta{beta:g}"
    words = {
        "model_name_or_path": model,
        "dataset_name": data / "train.jsonl",
        "eval_dataset": data / "test.jsonl",
        "output_dir": run,
        "loss_type": loss,
        "beta": beta,
        "learning_rate": rate,
        "max_train_steps": options.steps,
        "per_device_train_batch_size": 8,
        "max_length": 512,
        "eval_steps": options.steps,
        "logging_steps": 10,
        "checkpointing_steps": "null",
        "progress": "none",
    }
    given = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    subprocess.run([sys.executable, "-m", "preftune", "train", *given], check=True)
    return run


def with_margins(data: Path, folder: Path) -> Path:
    """A copy of the data with a margin column."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(data.glob("*.jsonl")):
        pairs = [json.loads(line) for line in file.read_text().splitlines()]
        for pair in pairs:
            chosen, rejected = (str(pair[side]) for side in ("chosen", "rejected"))
            pair["margin"] = round(1 - SequenceMatcher(None, chosen, rejected).ratio(), 3)
        (folder / file.name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def row(loss: str, rate: float, beta: float, run: Path) -> str:
    """What the last evaluation of a run says, as a line of a table."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval/loss" in line][-1]
    drift = last.get("eval/logratios/chosen")
    return (
        f"| {loss} | {rate:g} | {beta:g} | {last['eval/rewards/accuracies']:.3f} "
        f"| {last['eval/rewards/margins']:.3g} | {'' if drift is None else f'{drift:+.1f}'} "
        f"| {last['eval/loss']:.4g} |"
    )


if __name__ == "__main__":
    main()
