"""`accelerate launch --config_file`: the engine that the file chooses is the one that trains."""

from pathlib import Path

import pytest
import yaml

from preftune import train
from tests.launches import finish, start
from tests.runs import read_metrics, read_state, tiny_config, tiny_settings

pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MACHINE = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2}
MACHINE |= {"machine_rank": 0, "main_process_port": 0, "use_cpu": False, "mixed_precision": "no"}
FSDP = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_activation_checkpointing": True,
        "fsdp_cpu_ram_efficient_loading": True,
    },
}
ZERO = {
    "distributed_type": "DEEPSPEED",
    "deepspeed_config": {"zero_stage": 3, "gradient_clipping": 1.0, "zero3_init_flag": True},
}


def launched(root: Path, name: str, document: dict, **options) -> tuple[int, str]:
    file = root / f"{name}.yaml"
    file.write_text(yaml.safe_dump(MACHINE | document))
    settings = tiny_settings(root, output_dir=root / name, checkpointing_steps=2, **options)
    command = ["-m", "accelerate.commands.launch", "--config_file", str(file), "-m", "preftune"]
    return finish(start(command, settings))


def test_the_engine_of_the_file_trains(tmp_path):
    common = {"max_train_steps": 2, "num_epochs": None, "gradient_accumulation_steps": 1}
    one = {"per_device_train_batch_size": 8, "output_dir": tmp_path / "one"}
    train(tiny_config(tmp_path, **common, **one))
    expected = read_metrics(tmp_path / "one")
    for name, document, engine, said in (
        ("fsdp", FSDP, "FSDP2 full_shard", "fsdp full_shard, gradient_checkpointing true"),
        ("zero", ZERO, "ZeRO-3", "zero_stage 3, max_grad_norm 1.0"),
    ):
        code, text = launched(tmp_path, name, document, **common)
        assert code == 0, text
        assert text.count(f"preftune: from Accelerate's configuration: {said}\n") == 1
        checkpoint = tmp_path / name / "checkpoints" / "step-00000002"
        assert read_state(checkpoint)["spread"] == {"processes": 2, "engine": engine}
        parts = [f"model-0000{rank}-of-00002.safetensors" for rank in (1, 2)]
        assert sorted(path.name for path in checkpoint.glob("model-*")) == parts
        for line, other in zip(expected, read_metrics(tmp_path / name), strict=True):
            assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)
            assert other["loss"] == pytest.approx(line["loss"], rel=1e-4, abs=1e-5)


def test_what_cannot_be_honoured_ends_all_processes_alike(tmp_path):
    """Before Accelerate or transformers act on the file."""
    document = {"distributed_type": "FSDP"}
    document |= {"fsdp_config": {"fsdp_version": 1, "fsdp_sharding_strategy": "SHARD_GRAD_OP"}}
    code, text = launched(tmp_path, "refused", document)
    assert code != 0
    assert text.count("FSDP_SHARDING_STRATEGY is SHARD_GRAD_OP (from Accelerate's") == 1, text
    assert "exitcode  : 2" in text
