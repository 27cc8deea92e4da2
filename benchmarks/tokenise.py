"""Tokenising a large file: time, memory against size, restart after a kill, second run.

    python benchmarks/tokenise.py [--pairs 100000] [--model FOLDER_OR_GGUF]

Every figure is of a process of its own. Peak memory is the process's largest resident size; what
counts is that it does not grow with the file.
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = ["model", "answer", "question", "reason", "example", "careful", "short", "long", "tell"]


def write_pairs(path: Path, num_pairs: int) -> Path:
    """Chat pairs of about 60 + 90 + 90 tokens, all different."""
    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(f"{rng.choice(WORDS)}{rng.randrange(1000)}" for _ in range(words))

    with path.open("w") as file:
        for _ in range(num_pairs):
            row = {
                "prompt": [{"role": "user", "content": text(rng.randint(10, 30))}],
                "chosen": [{"role": "assistant", "content": text(rng.randint(10, 50))}],
                "rejected": [{"role": "assistant", "content": text(rng.randint(10, 50))}],
            }
            file.write(json.dumps(row) + "\n")
    return path


def worker(pairs: Path, cache: Path, model: str, num_proc: int) -> None:
    """What each measured process does."""
    from preftune.config.model import ModelConfig
    from preftune.data.pairs import load_pairs
    from preftune.model.load import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=model))
    ready, cpu = time.perf_counter(), time.process_time()
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    data = load_pairs(
        str(pairs),
        tokenizer=tokenizer,
        cache=cache,
        num_proc=num_proc,
        max_dropped_fraction=1.0,
        progress=lambda done, total: print(f"\r{done} rows", end="", file=sys.stderr),
    )
    print(file=sys.stderr)
    figures = {
        "pairs": len(data.examples),
        "tokens": data.examples.num_tokens,
        "reused": data.reused,
        "seconds": round(time.perf_counter() - ready, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "mib_before": round(base),
        "mib_peak": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    print(json.dumps(figures))


def start(pairs: Path, cache: Path, model: str, num_proc: int = 1) -> subprocess.Popen[str]:
    """A measured process."""
    command = [sys.executable, __file__, "--worker", str(pairs), str(cache), model, str(num_proc)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def measure(label: str, process: subprocess.Popen[str]) -> None:
    """Wait, and print what the process measured."""
    output, _ = process.communicate()
    assert process.returncode == 0
    print(f"{label:32}{output.strip()}", flush=True)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--model", default=None)
    parser.add_argument("--worker", nargs=4)
    options = parser.parse_args()
    if options.worker:
        pairs, cache, model, num_proc = options.worker
        worker(Path(pairs), Path(cache), model, int(num_proc))
        return
    if options.model is None:
        from preftune.config.paths import cache_root
        from preftune.model.embedded import embedded_model

        options.model = str(embedded_model(cache_root(None), print))
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        small = write_pairs(root / "small.jsonl", options.pairs // 10)
        large = write_pairs(root / "large.jsonl", options.pairs)
        size = large.stat().st_size / 2**20
        print(f"{options.pairs} pairs, {size:.0f} MiB of jsonl; a tenth of them first")
        measure("a tenth", start(small, root / "a", options.model))
        measure("all", start(large, root / "b", options.model))
        measure("all, second run", start(large, root / "b", options.model))
        measure("all, two processes", start(large, root / "c", options.model, 2))
        stopped = start(large, root / "d", options.model)
        while len(shards := list((root / "d").glob("*/shard-*"))) < options.pairs // 2048 // 2:
            time.sleep(0.05)
        os.kill(stopped.pid, signal.SIGKILL)
        stopped.wait()
        print(f"killed with {len(shards)} shards of 2048 rows finished")
        measure("all, after the kill", start(large, root / "d", options.model))


if __name__ == "__main__":
    main()
