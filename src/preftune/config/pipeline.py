"""The file of `preftune pipeline`: SFT, DPO, merge and evaluation, each made from the one before.

output_dir: chain
model_name_or_path: BASE      # shared: for every stage that reads it
stages:
  sft: {dataset_name: said.jsonl}
  dpo: {dataset_name: pairs.jsonl, beta: 0.1}
  merge:
  evaluate: {dataset_name: held_out.jsonl}
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from preftune.config.composed import ComposedConfig, section_fields
from preftune.config.dpo import ONLY_WITH_PAIRS
from preftune.config.experiment import ExperimentConfig
from preftune.config.lora import BROUGHT
from preftune.config.merge import MergeConfig
from preftune.config.parser import Given, config_of, unknown_option
from preftune.config.preset import PRESET_KEY
from preftune.config.score import ScoreConfig
from preftune.config.yamlfile import Entry, read_yaml
from preftune.errors import ConfigError, Findings

StageName: TypeAlias = Literal["sft", "dpo", "merge", "evaluate"]
STAGES: tuple[StageName, ...] = get_args(StageName)
_CLASSES: dict[StageName, type[ComposedConfig]] = {
    "sft": ExperimentConfig,
    "dpo": ExperimentConfig,
    "merge": MergeConfig,
    "evaluate": ScoreConfig,
}
_MODEL = ("model_name_or_path", "model_revision")
TOKENIZER = ("tokenizer_name_or_path", "tokenizer_revision", "chat_template")
_CHOSEN: dict[StageName, tuple[str, ...]] = {
    "sft": ("stage", "output_dir", "resume"),
    "dpo": ("stage", "output_dir", "resume"),
    "merge": ("adapter", "adapter_revision", "output", "model_name_or_path"),
    "evaluate": (*_MODEL, *TOKENIZER, "output", "summary", "lists"),
}
"""What the pipeline sets itself."""
_NEEDED: dict[StageName, tuple[str, ...]] = {
    "sft": ("model_name_or_path",),
    "dpo": ("model_name_or_path",),
    "merge": ("adapter", "output"),
    "evaluate": ("model_name_or_path",),
}
"""What a stage cannot be without, and has from those before it."""
_SHARED_BY_EVALUATION = (
    "dtype",
    "mixed_precision",
    "attn_implementation",
    "trust_remote_code",
    "max_length",
    "max_prompt_length",
    "truncation",
    "max_dropped_fraction",
    "num_proc",
    "cache_dir",
    "dataset_cache_mode",
    "per_device_eval_batch_size",
    "max_tokens_per_microbatch",
    "progress",
)
"""Shared settings that the evaluation takes: where others stand for training, it has its own."""
RESULTS = "results.json"
SCORES = "pairs.parquet"
LISTS = "lists.jsonl"
MERGED = "model"
_PIPELINE = "the pipeline"


@dataclass(frozen=True)
class Stage:
    """One stage, and where it works."""

    name: StageName
    config: ComposedConfig
    folder: Path

    @property
    def training(self) -> ExperimentConfig:
        """The configuration of a stage that trains."""
        assert isinstance(self.config, ExperimentConfig)
        return self.config

    @property
    def trains(self) -> bool:
        """Whether it is a run of `preftune train`."""
        return isinstance(self.config, ExperimentConfig)


@dataclass(frozen=True)
class Pipeline:
    """The stages of a file, in order."""

    root: Path
    stages: tuple[Stage, ...]


def read_pipeline(path: str) -> Pipeline:
    """Read a file, and check the settings of all its stages.

    Args:
        path: of the YAML file.

    Raises:
        ConfigError: with every mistake of every stage.
    """
    shared, written = _read(path)
    findings = Findings()
    root = shared.pop("output_dir", None)
    with findings:
        if root is None or not isinstance(root.value, str):
            raise ConfigError(f"{path}: output_dir must name the folder that gets one a stage")
    with findings:
        _check_names(path, shared, written)
    findings.raise_all()
    assert root is not None
    builder = _Builder(Path(str(root.value)).expanduser(), shared)
    for name in STAGES:
        if name in written:
            with findings:
                builder.add(name, written[name])
    with findings:
        builder.check_shared()
    with findings:
        builder.check_places()
    findings.raise_all()
    return Pipeline(builder.root, tuple(builder.stages))


def _read(path: str) -> tuple[dict[str, Given], dict[StageName, dict[str, Given]]]:
    """What is shared, and what each stage has of its own; names are not checked but the stages'."""
    entries = read_yaml(path)
    shared = _given([entry for entry in entries if entry.key != "stages"], path)
    listed = [entry for entry in entries if entry.key == "stages"]
    if len(listed) != 1 or not listed[0].entries(path):
        names = ", ".join(STAGES)
        raise ConfigError(f"{path}: stages must be given once, and name some of {names}")
    written: dict[StageName, dict[str, Given]] = {}
    problems = []
    for stage in listed[0].entries(path):
        at = f"{path} line {stage.line}"
        if stage.key not in STAGES:
            problems.append(f"{at}: {stage.key!r} is no stage; they are {', '.join(STAGES)}")
        elif stage.key in written:
            problems.append(f"{at}: stage {stage.key} is given twice; keep one")
        elif any(STAGES.index(name) > STAGES.index(stage.key) for name in written):
            order = " -> ".join(STAGES)
            problems.append(f"{at}: stage {stage.key} stands too late; the order is {order}")
        else:
            written[stage.key] = _given(stage.entries(path), path)
    if problems:
        raise ConfigError(problems)
    return shared, written


def _given(entries: list[Entry], path: str) -> dict[str, Given]:
    given: dict[str, Given] = {}
    problems = []
    for entry in entries:
        twice = entry.key if entry.key in given else entry.twice
        if twice is not None:
            problems.append(f"{path} line {entry.line}: {twice} is given twice; keep one")
        given[entry.key] = Given(entry.value, path, entry.line)
    if problems:
        raise ConfigError(problems)
    return given


def _known(name: StageName) -> list[str]:
    cls = _CLASSES[name]
    return [*(f.name for f in section_fields(cls)), *([PRESET_KEY] if cls.takes_presets else [])]


def _check_names(
    path: str, shared: Mapping[str, Given], written: Mapping[StageName, Mapping[str, Given]]
) -> None:
    problems = []
    every = list(dict.fromkeys(key for name in STAGES for key in _known(name)))
    for key, found in shared.items():
        if key == PRESET_KEY:
            problems.append(f"{found.place}: {key} belongs to one stage: give it there")
        elif key not in every:
            problems.append(f"{found.place}: {unknown_option(key, ['stages', *every])}")
    for name, own in written.items():
        for key, found in own.items():
            if key in _CHOSEN[name]:
                problems.append(
                    f"{found.place}: stage {name}: {key} follows from the stages before, and from "
                    "the output_dir of the file: leave it out"
                )
            elif key not in _known(name):
                problems.append(f"{found.place}: stage {name}: {unknown_option(key, _known(name))}")
    if problems:
        raise ConfigError(problems)


@dataclass
class _Builder:
    """Makes the stages in order: what one starts from is what the ones before leave."""

    root: Path
    shared: dict[str, Given]
    stages: list[Stage] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    """Shared settings that some stage has taken."""
    broken: bool = False
    """Whether a stage is wrong; then nothing is said of what only follows from it."""

    def add(self, name: StageName, own: Mapping[str, Given]) -> None:
        """The next stage; where it is wrong, those behind it are made as far as they can be.

        Raises:
            ConfigError: with every mistake of the stage.
        """
        folder = self.root / name
        stands_alone = self.broken
        self.broken = True  # until it is made
        if stands_alone:
            chosen, without = {key: str(folder) for key in _NEEDED[name]}, ()
        else:
            chosen, without = self._chosen(name, folder, own)
        blocked = {*chosen, *without, *_CHOSEN[name]}
        taken = {key: v for key, v in self.shared.items() if self._shares(name, key)}
        self.read |= taken.keys()
        given = {key: found for key, found in taken.items() if key not in blocked | own.keys()}
        given |= own
        problems = [
            f"{found.place}: {key} follows from the stage before: leave it out"
            for key, found in own.items()
            if key in chosen or key in without
        ]
        given |= {key: Given(value, launcher=_PIPELINE) for key, value in chosen.items()}
        try:
            config = config_of(_CLASSES[name], given)
        except ConfigError as error:
            raise _of(name, problems + error.problems) from None
        if isinstance(config, ExperimentConfig) and config.eval_jobs:
            problems.append(
                "eval_jobs: a pipeline runs none; leave it out, and run preftune evaluate "
                f"{folder} afterwards"
            )
        if problems:
            raise _of(name, problems)
        self.broken = stands_alone
        self.stages.append(Stage(name, config, folder))

    def check_shared(self) -> None:
        """Refuse shared settings that no stage reads."""
        problems = [
            f"{found.place}: {key} is read by no stage of this file: leave it out"
            for key, found in self.shared.items()
            if key not in self.read
        ]
        if problems:
            raise ConfigError(problems)

    def check_places(self) -> None:
        """Refuse two stages that push to one place."""
        pushing = [s for s in self.stages if s.trains and s.training.push_to_hub]
        places = [(s.training.hub_repo_id, s.training.hub_revision) for s in pushing]
        for index, stage in enumerate(pushing):
            if places[index] in places[:index]:
                before = pushing[places.index(places[index])].name
                raise ConfigError(
                    f"stage {stage.name}: hub_repo_id is {places[index][0]!r}, to which stage "
                    f"{before} pushes, too: give each its own hub_repo_id or hub_revision"
                )

    def _shares(self, name: StageName, key: str) -> bool:
        """Whether a stage takes a shared setting."""
        if name == "evaluate":
            return key in _SHARED_BY_EVALUATION
        if name == "sft" and key in ONLY_WITH_PAIRS:
            return False
        return key in _known(name)

    def _chosen(
        self, name: StageName, folder: Path, own: Mapping[str, Given]
    ) -> tuple[dict[str, object], Collection[str]]:
        """What the pipeline sets, and what must then not be given."""
        match name:
            case "sft" | "dpo":
                chosen: dict[str, object] = {"stage": name, "output_dir": str(folder)}
                start, without = self._start()
                return chosen | start, without
            case "merge":
                adapter = self._last_trained("merge")
                if not adapter.training.use_lora:
                    raise ConfigError(
                        f"stage merge: stage {adapter.name} trains all weights, so there is no "
                        "adapter to merge: leave merge out, or set use_lora"
                    )
                return {
                    "adapter": str(adapter.folder / "final"),
                    "output": str(folder / MERGED),
                }, ()
            case "evaluate":
                chosen = {"model_name_or_path": self._final_model()}
                chosen |= {"output": str(folder / SCORES), "lists": str(folder / LISTS)}
                reference = self._plain_start()
                if reference is not None and "reference_model_name_or_path" not in own:
                    chosen["reference_model_name_or_path"] = reference
                return chosen, ()

    def _start(self) -> tuple[dict[str, object], Collection[str]]:
        """What a training starts from, where there was one before it."""
        if not self.stages:
            return {}, ()
        before = self.stages[-1]
        final = str(before.folder / "final")
        if not before.training.use_lora:
            return {"model_name_or_path": final}, (*_MODEL, *TOKENIZER)
        # The tokenizer of the adapter has the chat template that it was trained with.
        base = {key: getattr(before.training, key) for key in _MODEL}
        start = {"use_lora": True, "adapter_name_or_path": final, "tokenizer_name_or_path": final}
        known = {key: value for key, value in base.items() if value is not None}
        return known | start, (*_MODEL, *TOKENIZER, *BROUGHT, "adapter_revision")

    def _last_trained(self, name: StageName) -> Stage:
        trained = [stage for stage in self.stages if stage.trains]
        if not trained:
            raise ConfigError(f"stage {name}: no stage before it trains: give sft or dpo")
        return trained[-1]

    def _final_model(self) -> str:
        last = self._last_trained("evaluate")
        if self.stages[-1].name == "merge":
            return str(self.stages[-1].folder / MERGED)
        if last.training.use_lora:
            raise ConfigError(
                f"stage evaluate: stage {last.name} trains an adapter, and what is evaluated is a "
                "whole model: give stage merge before it"
            )
        return str(last.folder / "final")

    def _plain_start(self) -> str | None:
        """What the DPO started from, if that is a model by itself."""
        for stage in self.stages:
            if stage.name == "dpo":
                started = stage.training
                is_plain = started.adapter_name_or_path is None and started.model_revision is None
                return started.model_name_or_path if is_plain else None
        return None


def _of(name: StageName, problems: list[str]) -> ConfigError:
    return ConfigError([f"stage {name}: {problem}" for problem in problems])
