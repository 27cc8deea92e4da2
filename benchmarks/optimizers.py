"""Each optimizer: bytes it keeps, memory and processor time of a run, and what the run learns.

    PREFTUNE_DATA=DATA OMP_NUM_THREADS=1 python benchmarks/optimizers.py MODEL

MODEL is a folder of a causal LM; the pairs are `rasbt-polite` of DATA. Every run is a process of
its own. Rows are printed as they are measured.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROUNDED = {"dtype": "bfloat16", "stochastic_rounding": "true"}
ROWS: dict[str, dict[str, str]] = {
    "adamw": {},
    "adamw_8bit": {},
    "adamw_torch_8bit": {},
    "adamw_torch_4bit": {},
    "adafactor": {},
    "muon": {},
    "adamw, bf16 rounded": {"optimizer": "adamw", **ROUNDED},
    "adamw_torch_8bit, bf16 rounded": {"optimizer": "adamw_torch_8bit", **ROUNDED},
    "adafactor, bf16 rounded": {"optimizer": "adafactor", **ROUNDED},
    "adamw, checkpointing": {"optimizer": "adamw", "gradient_checkpointing": "true"},
    "adamw, selective": {"optimizer": "adamw", "gradient_checkpointing": "selective"},
}
STEPS = 20


def main() -> None:
    """Measure every row."""
    model, wanted = sys.argv[1], sys.argv[2:]
    print("| run | bytes a parameter | peak, GiB | CPU s a step | update | loss | accuracy |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, options in ROWS.items():
            if not wanted or name in wanted:
                found = measure(Path(folder), model, name, {"optimizer": name, **options})
                cells = (f"{value:.3g}" for value in found)
                print(f"| {name} | {' | '.join(cells)} |", flush=True)


def measure(root: Path, model: str, name: str, options: dict[str, str]) -> list[float]:
    """One run: the columns after the name."""
    output = root / name.replace(" ", "-")
    settings: dict[str, Any] = {
        "model_name_or_path": model,
        "dataset_name": Path(os.environ["PREFTUNE_DATA"]) / "rasbt-polite" / "train.jsonl",
        "max_train_samples": STEPS * 4,
        "max_train_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-6,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "checkpointing_steps": STEPS,
        "progress": "none",
        "output_dir": output,
        "cache_dir": root / "cache",
        **options,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, __file__, "--one", *words]
    subprocess.run(command, check=True, timeout=1200, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    updates = json.loads((output / "updates.json").read_text())
    parameters = json.loads((output / "run.json").read_text())["model"]["parameters"]
    state = next((output / "checkpoints").rglob("optimizer.safetensors")).stat().st_size
    last = lines[-5:]
    return [
        state / parameters,
        max(line["perf/peak_memory_gib"] for line in lines),
        sorted(updates["steps"])[STEPS // 2],
        sorted(updates["updates"])[STEPS // 2],
        sum(line["loss"] for line in last) / len(last),
        sum(line["rewards/accuracies"] for line in last) / len(last),
    ]


def one(words: list[str]) -> None:
    """A training whose steps and updates are timed, in processor seconds."""
    from preftune.cli.main import main as preftune
    from preftune.distributed.engine import TorchEngine
    from preftune.training import loop

    times: dict[str, list[float]] = {"steps": [], "updates": []}

    def timed(kind: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            result = function(*args, **kwargs)
            times[kind].append(time.process_time() - began)
            return result

        return run

    loop.train_step = timed("steps", loop.train_step)
    TorchEngine.update = timed("updates", TorchEngine.update)  # type: ignore[method-assign]
    code = preftune(["train", *words])
    output = Path(words[words.index("--output_dir") + 1])
    (output / "updates.json").write_text(json.dumps(times))
    sys.exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        one(sys.argv[2:])
    main()
