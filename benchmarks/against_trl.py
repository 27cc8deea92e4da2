"""preftune against TRL in one run: equal numbers first, then time and memory.

    make bench
    python benchmarks/against_trl.py --datasets qa-feedback-human pandalm-human --minutes 90
    python benchmarks/against_trl.py --growth
    python benchmarks/against_trl.py --model random-0.5b \
        --datasets random:200x300 random:150x60 random:4000x200 --batch 1 4 8

Needs the extra `peers` (TRL). Every arm runs in a process of its own, and arms take turns, so that
a noisy machine slows them alike. Both tools get the same model, token ids, pairs a step in the same
order, optimizer, learning rate and precision. On a machine with a GPU everything runs there in
bf16. Finished arms are written at once; `--resume` goes on after a kill.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from side_by_side.arms import GROWTH, Arm, arms_for
from side_by_side.gates import differences, largest, loss_differences
from side_by_side.jobs import JobFailed, run_job
from side_by_side.summary import predicted_seconds, runs_of
from side_by_side.tables import as_markdown, growth_markdown

EFFICIENCY = 0.5
"""Part of the rate of matrix products that training reaches: for the first guess of a duration."""
STARTUP_SECONDS = 20.0
"""Imports, loading and saving of one process: for the same."""
GATED = ("trl_default", "preftune")
"""The arms whose numbers are compared step by step before anything is timed."""
CHANGEABLE = ("repeats", "minutes", "resume", "arms", "output", "gates_only", "no_gates")
"""Options that may differ when a run goes on."""


def main() -> None:
    """Measure, write and print."""
    options = parse()
    bench = Bench(options)
    bench.prepare()
    bench.predict()
    if not options.no_gates:
        bench.check_equality()
    if not options.gates_only:
        bench.measure()
    bench.report()


def parse() -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="embedded", help="a folder, embedded, or random-tiny|small|0.5b[:VOCAB]")
    add("--datasets", nargs="+", help="folders of $PREFTUNE_DATA, .jsonl files or random:PxC")
    add("--batch", nargs="+", type=int, default=[8], help="pairs of an optimizer step")
    add("--steps", type=int, default=6, help="timed steps of an arm")
    add("--warmup", type=int, default=1, help="steps before them; the first is told apart")
    add("--repeats", type=int, default=3, help="processes of each arm")
    add("--minutes", type=float, help="start no further repeat that would end after this")
    add("--arms", nargs="+", help="only these")
    add("--attention", nargs="+", default=[], help="attn_implementation of further preftune arms")
    add("--epochs", type=float, default=3, help="over which a reference pass is spread")
    add("--learning-rate", type=float, default=1e-5)
    add("--beta", type=float, default=0.1)
    add("--max-length", type=int, default=1024, help="longer rows are left out; 0 for no limit")
    add("--gate-steps", type=int, default=20)
    add("--gates-only", action="store_true", help="only compare the numbers")
    add("--no-gates", action="store_true", help="do not compare the numbers")
    add("--growth", action="store_true", help="lengths, batch and vocabulary on a small model")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="folder of results; unset: bench/ and the time")
    add("--resume", action="store_true", help="keep what is finished in --output, and go on")
    options = parser.parse_args()
    if options.growth:
        options.model, options.no_gates = "random-small", True
        options.steps, options.repeats, options.arms = 2, 1, options.arms or list(GROWTH)
    if options.output is None:
        if options.resume:
            parser.error("--resume needs --output, the folder of the run that goes on")
        options.output = Path("bench") / time.strftime("%Y-%m-%d-%H%M%S")
    if options.datasets is None:
        options.datasets = default_datasets()
    return options


def default_datasets() -> list[str]:
    """Real pairs where there are some."""
    data = os.environ.get("PREFTUNE_DATA")
    return ["qa-feedback-human", "pandalm-human"] if data else ["random:240x60"]


def settings_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is measured: each a model, pairs and a batch size."""
    if not options.growth:
        return [
            {"label": f"{dataset}, batch {batch}", "dataset": dataset, "batch_size": batch}
            | {"model_spec": options.model}
            for dataset in options.datasets
            for batch in options.batch
        ]
    cases = [(prompt, 64, 2, "") for prompt in (64, 128, 256, 512, 1024, 2048, 4096)]
    cases += [(64, answer, 2, "") for answer in (128, 256, 512, 1024)]
    cases += [(256, 128, batch, "") for batch in (1, 4, 8)]
    cases += [(256, 64, 4, f":{vocabulary}") for vocabulary in (8192, 32768, 131072)]
    return [
        {
            "label": f"prompt {prompt}, answer {answer}, batch {batch}"
            + (f", vocabulary {vocabulary[1:]}" if vocabulary else ""),
            "dataset": f"random:{prompt}x{answer}=",
            "batch_size": batch,
            "model_spec": options.model + vocabulary,
        }
        for prompt, answer, batch, vocabulary in cases
    ]


class Bench:
    """One run of the benchmark, and its record on disk."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Start a record, or take up one."""
        self.options = options
        self.began = time.monotonic()
        self.output: Path = options.output.resolve()
        self.work = self.output / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.log = self.output / "log.txt"
        self.file = self.output / ("growth.json" if options.growth else "results.json")
        self.record = self._take_up()
        machine = self.record["machine"]
        self.bf16 = machine["device"] == "cuda"
        self.arms = arms_for(machine["device"], options.arms, options.attention)

    def _take_up(self) -> dict[str, Any]:
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.options).items()}
        if self.file.exists():
            if not self.options.resume:
                raise SystemExit(f"{self.file} exists: give --resume or another --output")
            record = json.loads(self.file.read_text())
            for key, value in plain.items():
                if key not in CHANGEABLE and record["options"].get(key) != value:
                    before = record["options"].get(key)
                    raise SystemExit(f"--{key} was {before!r} in {self.file}, now {value!r}")
            for setting in record["settings"]:  # what failed is tried again
                setting["runs"] = [run for run in setting["runs"] if "error" not in run]
            return record
        return {
            "date": time.strftime("%Y-%m-%d"),
            "options": plain,
            "machine": self._run("rates:describe", {}),
            "settings": [],
        }

    def prepare(self) -> None:
        """Models and pairs of every setting."""
        have = {setting["label"] for setting in self.record["settings"]}
        for setting in settings_of(self.options):
            if setting["label"] in have:
                continue
            setting |= {"warmup": self.options.warmup, "bf16": self.bf16, "rates": [], "runs": []}
            setting["model"] = self._prepare_model(setting)
            steps = self.options.warmup + self.options.steps
            setting["pairs"] = self._prepare_pairs(setting, "timed", steps)
            self.record["settings"].append(setting)
            self._say(f"{setting['label']}: pairs ready")
        self._save()

    def _prepare_model(self, setting: dict[str, Any]) -> dict[str, Any]:
        folder = self.work / _name(setting["model_spec"])
        folder.mkdir(exist_ok=True)
        return self._run(
            "materials:prepare_model",
            {
                "spec": setting["model_spec"],
                "folder": str(folder),
                "with_policy": not self.options.no_gates,
            },
        )

    def _prepare_pairs(self, setting: dict[str, Any], kind: str, steps: int) -> dict[str, Any]:
        folder = self.work / _name(f"{setting['label']} {kind}")
        folder.mkdir(exist_ok=True)
        return self._run(
            "materials:prepare_pairs",
            {
                "dataset": find_dataset(setting["dataset"]),
                "model": setting["model"]["base"],
                "folder": str(folder),
                "batch_size": setting["batch_size"],
                "num_batches": steps,
                "max_length": self._max_length(setting),
                "seed": self.options.seed,
            },
        )

    def _max_length(self, setting: dict[str, Any]) -> int | None:
        is_random = setting["dataset"].startswith("random:")
        return None if is_random else self.options.max_length or None

    def predict(self) -> None:
        """Say how long the run will take, from its arithmetic and the machine's matrix products."""
        rates = self._measure_rates(self.record["settings"][0])["bf16" if self.bf16 else "fp32"]
        rate = max(r["wall"] for r in rates.values()) * EFFICIENCY
        gates = rounds = 0.0
        gated = {arm.name: arm for arm in arms_for(self.record["machine"]["device"], None, [])}
        for setting in self.record["settings"]:
            rounds += sum(
                predicted_seconds(setting, arm, rate) + STARTUP_SECONDS for arm in self.arms
            )
            a_step = sum(predicted_seconds(setting, gated[name], rate) for name in GATED)
            steps = self.options.warmup + self.options.steps
            if "gate" not in setting and setting["batch_size"] == self.options.batch[0]:
                gates += a_step * self.options.gate_steps / steps + 2 * STARTUP_SECONDS
        if not self.options.no_gates:
            self._say(f"comparing numbers will take about {gates / 60:.0f} min")
        if not self.options.gates_only:
            self._say(
                f"each of {self.options.repeats} rounds will take about {rounds / 60:.0f} min"
            )

    def _measure_rates(self, setting: dict[str, Any]) -> dict[str, Any]:
        sizes = {key: setting["model"][key] for key in ("hidden", "intermediate")}
        return self._run("rates:measure", sizes)

    def check_equality(self) -> None:
        """Stop unless both tools compute the same log-probs, gradients and losses."""
        seen = set()
        for setting in self.record["settings"]:
            if setting["dataset"] in seen or "gate" in setting:
                seen.add(setting["dataset"])
                continue
            seen.add(setting["dataset"])
            steps = self.options.gate_steps
            file = self._prepare_pairs(setting, "gate", steps)["random"]["file"]
            base, policy = setting["model"]["base"], setting["model"]["policy"]
            sides = {}
            for tool in ("preftune", "trl"):
                self._say(f"{setting['label']}: {steps} steps of {tool} for the gate")
                with self._task(setting, policy, file, steps) as task:
                    sides[tool] = self._run(f"{tool}_side:gate", {"task": task, "base": base})
            gate = {"steps": steps, "largest": largest(sides["preftune"], sides["trl"])}
            if found := differences(sides["preftune"], sides["trl"]):
                shown = "\n  ".join(str(difference) for difference in found[:10])
                raise SystemExit(
                    f"{setting['label']}: preftune and TRL do not compute the same numbers, so "
                    f"nothing is timed ({len(found)} differences):\n  {shown}"
                )
            setting["gate"] = gate | {"sides": sides}
            self._save()
            self._say(f"{setting['label']}: equal; largest differences {gate['largest']}")
        for policy in {setting["model"]["policy"] for setting in self.record["settings"]}:
            shutil.rmtree(policy, ignore_errors=True)  # as large as the model in fp32

    def measure(self) -> None:
        """All arms of all settings, in turns; a second round in the opposite order."""
        for round_number in range(self.options.repeats):
            began = time.monotonic()
            for setting in self.record["settings"]:
                self._one_round(setting, round_number)
            seconds = time.monotonic() - began
            left = self.options.repeats - round_number - 1
            self._say(f"round {round_number + 1} took {seconds / 60:.1f} min, {left} to go")
            limit = self.options.minutes
            if left and limit and (time.monotonic() - self.began + seconds) / 60 > limit:
                self._say(f"stopped: another round would end after {limit:g} min")
                break
        self._compare_losses()

    def _one_round(self, setting: dict[str, Any], number: int) -> None:
        if len(setting["rates"]) == number:
            setting["rates"].append(self._measure_rates(setting))
            self._save()
        done = {(run["arm"], run["round"]) for run in setting["runs"]}
        for arm in self.arms if number % 2 == 0 else self.arms[::-1]:
            if (arm.name, number) not in done:
                self._one_run(setting, arm, number)

    def _one_run(self, setting: dict[str, Any], arm: Arm, number: int) -> None:
        order = setting["pairs"]["sorted" if arm.is_sorted else "random"]
        steps = self.options.warmup + self.options.steps
        bf16 = self.bf16 or arm.precision == "bf16"
        arguments: dict[str, Any] = {"settings": arm.settings, "bf16": bf16}
        if arm.tool == "trl":
            arguments["compact_head"] = arm.compact_head
        run: dict[str, Any] = {"arm": arm.name, "round": number}
        began = time.monotonic()
        try:
            with self._task(setting, setting["model"]["base"], order["file"], steps) as task:
                run |= self._run(f"{arm.tool}_side:train", {"task": task} | arguments)
            timed = run["wall" if self.bf16 else "cpu"][self.options.warmup :]
            text = f"{sum(timed) / len(timed):.2f} s a step, {run['peak_mib'] / 1024:.2f} GiB"
        except JobFailed as error:
            run["error"] = text = str(error)
        setting["runs"].append(run)
        self._save()
        seconds = time.monotonic() - began
        self._say(f"{setting['label']}  round {number + 1}  {arm.name}: {text} ({seconds:.0f} s)")

    def _compare_losses(self) -> None:
        """The timed arms trained on the same pairs: so must their losses be, in fp32."""
        found = []
        for setting in self.record["settings"]:
            for is_sorted in (False, True):
                runs = {
                    arm.name: runs_of(setting, arm.name)[0]["losses"]
                    for arm in self.arms
                    if arm.is_sorted == is_sorted
                    and not (self.bf16 or arm.precision == "bf16")
                    and runs_of(setting, arm.name)
                }
                found += [f"{setting['label']}: {text}" for text in loss_differences(runs)]
        if found:
            raise SystemExit("timed arms disagree in their losses:\n  " + "\n  ".join(found[:10]))

    def report(self) -> None:
        """Write and print the tables."""
        if self.options.gates_only:
            return
        write = growth_markdown if self.options.growth else as_markdown
        text = write(self.record, self.arms)
        self.file.with_suffix(".md").write_text(text)
        print(text)
        self._say(f"written: {self.file} and {self.file.with_suffix('.md')}")

    def _task(self, setting: dict[str, Any], model: str, file: str, steps: int) -> "_Scratch":
        return _Scratch(
            {
                "model": model,
                "file": file,
                "max_length": self._max_length(setting),
                "batch_size": setting["batch_size"],
                "steps": steps,
                "warmup": self.options.warmup,
                "learning_rate": self.options.learning_rate,
                "beta": self.options.beta,
            },
            self.work,
        )

    def _run(self, function: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return run_job(function, arguments, threads=self.options.threads, log=self.log)

    def _save(self) -> None:
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.record, indent=1))
        partial.replace(self.file)

    def _say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        print(f"[{minutes:3d}:{seconds:02d}] {text}", file=sys.stderr, flush=True)


class _Scratch:
    """A task with a folder that lasts as long as its process."""

    def __init__(self, task: dict[str, Any], work: Path) -> None:
        self.task = task
        self.work = work

    def __enter__(self) -> dict[str, Any]:
        self.folder = tempfile.mkdtemp(dir=self.work)
        return self.task | {"scratch": self.folder}

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)


def find_dataset(name: str) -> str:
    """The file that a dataset's name stands for."""
    if name.startswith("random:") or Path(name).is_file():
        return name
    file = Path(os.environ.get("PREFTUNE_DATA", ".")) / name / "train.jsonl"
    if not file.is_file():
        raise SystemExit(
            f"--datasets {name}: no file {file}; set PREFTUNE_DATA, or give random:PxC"
        )
    return str(file)


def _name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in text)[-80:]


if __name__ == "__main__":
    main()
