"""Files of `preftune pipeline` on a tiny model, for tests."""

from pathlib import Path
from typing import Any

import yaml

from preftune.config.composed import section_fields
from preftune.config.experiment import ExperimentConfig
from tests.runs import tiny_settings
from tests.tiny import make_pairs, write_jsonl


def pipeline_file(root: Path, *, lora: bool, name: str = "chain", **stages: Any) -> Path:
    """SFT, DPO, a merge of adapters, evaluation; a step a checkpoint, three steps each.

    Args:
        root: gets model, data, and the file.
        lora: whether adapters train.
        name: of the output folder, and of the file.
        **stages: changes of a stage's own settings.
    """
    shared = tiny_settings(root)
    del shared["dataset_name"]
    shared |= {"output_dir": str(root / name), "checkpointing_steps": 1, "num_epochs": 1.0}
    if lora:
        shared |= {"use_lora": True, "lora_r": 2, "learning_rate": 1e-2}
    pairs = make_pairs(21, seed=0)
    rows = [{"messages": [*row["prompt"], *row["chosen"]]} for row in pairs]
    own: dict[str, Any] = {
        "sft": {"dataset_name": str(write_jsonl(root / "said.jsonl", rows))},
        "dpo": {"dataset_name": str(root / "pairs.jsonl"), "beta": 0.2},
        **({"merge": {}} if lora else {}),
        "evaluate": {
            "dataset_name": str(write_jsonl(root / "held_out.jsonl", make_pairs(5, seed=9)))
        },
    }
    own = {stage: settings | stages.get(stage, {}) for stage, settings in own.items()}
    known = {field.name for field in section_fields(ExperimentConfig)}
    assert shared.keys() <= known
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(shared | {"stages": own}, sort_keys=False), "utf-8")
    return path


def outputs(root: Path) -> dict[str, bytes]:
    """What a pipeline is run for: models and numbers, by path in its folder.

    Not what holds times, paths of the folder or commands.
    """
    kept = {}
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        is_model = {"final", "model"} & set(relative.parts[:-1])
        if path.is_file() and (is_model or relative.name in ("pairs.parquet", "results.json")):
            kept[str(relative)] = path.read_bytes().replace(str(root).encode(), b"<root>")
    return kept
