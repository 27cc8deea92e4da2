"""`preftune plan` against the memory that the same run takes, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/planning.py [ROW ...]

Every row is planned in one process and trained, two steps, in another, whose highest resident
memory (VmHWM) the plan is held against. The model is a random Llama of 110 million parameters; rows
are printed as they are measured.
"""

import json
import random
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

KINDS: dict[str, dict[str, str]] = {
    "full": {},
    "LoRA": {"use_lora": "true"},
    "QLoRA": {"use_lora": "true", "load_in_4bit": "true"},
}
LENGTHS = (512, 1024, 256)
"""Tokens of a pair, about; the middle one first, for a run that is cut off."""
STEPS = 2


def main() -> None:
    """Measure every row, or those named."""
    wanted = sys.argv[1:]
    print("| run | checkpointing | tokens | planned, MiB | measured, MiB | planned / measured |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        subprocess.run([sys.executable, __file__, "--make", folder], check=True)
        for length, kind, checkpointing in product(LENGTHS, KINDS, ("false", "true")):
            name = f"{kind}-{checkpointing}-{length}"
            if not wanted or name in wanted:
                settings = {**KINDS[kind], "gradient_checkpointing": checkpointing}
                row = measure(root, name, length, settings)
                print(f"| {kind} | {checkpointing} | {row} |", flush=True)


def measure(root: Path, name: str, length: int, options: dict[str, str]) -> str:
    """Plan and train once: the columns after the first two."""
    settings: dict[str, Any] = {
        "model_name_or_path": root / "model",
        "dataset_name": write_pairs(root / f"{length}.jsonl", length),
        "per_device_train_batch_size": 1,
        "max_length": length,
        "learning_rate": 1e-6,
        "checkpointing_steps": "null",
        "progress": "none",
        "cache_dir": root / "cache" / name,
        "output_dir": root / name,
        **options,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "preftune", "plan", "--device", "cpu", "--json", *words]
    planned = json.loads(_output(command))
    measured = int(_output([sys.executable, __file__, "--one", *words]).splitlines()[-1])
    mib = 2**20
    tokens = planned["heaviest_micro_batch"]["tokens"]
    ratio = planned["peak_bytes"] / measured
    cells = f"{tokens} | {planned['peak_bytes'] / mib:.0f} | {measured / mib:.0f} | {ratio:.2f}"
    print(name, json.dumps(planned["bytes_by_phase_and_part"]), file=sys.stderr, flush=True)
    return cells


def _output(command: list[str]) -> str:
    done = subprocess.run(command, check=True, timeout=1200, stdout=subprocess.PIPE, text=True)
    return done.stdout


def write_pairs(path: Path, length: int) -> Path:
    """As many pairs as there are steps, a quarter of each prompt."""
    rng = random.Random(0)

    def text(tokens: int) -> str:
        return "".join(rng.choice("bcdfghjkmnpqrtvwxz") for _ in range(tokens))

    answer = 3 * length // 8
    rows = [
        {"prompt": text(length // 4), "chosen": text(answer), "rejected": text(answer)}
        for _ in range(STEPS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def make(folder: Path) -> None:
    """A random model, with a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: number for number, letter in enumerate(sorted(alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<end>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    wrapped.save_pretrained(folder / "model")


def one(words: list[str]) -> None:
    """Train, and print this process' highest resident memory in bytes."""
    from preftune.cli.main import main as preftune

    if code := preftune(["train", *words]):
        sys.exit(code)
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) * 1024)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2:])
    elif sys.argv[1:2] == ["--make"]:
        make(Path(sys.argv[2]))
    else:
        main()
