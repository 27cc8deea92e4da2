"""The options of `preftune cache`."""

from dataclasses import dataclass

from preftune.config.composed import ComposedConfig
from preftune.config.experiment import ExperimentConfig
from preftune.config.problem import Problem, below, count
from preftune.config.section import Section


@dataclass(kw_only=True)
class CacheFolder(Section):
    """Where the cache is."""

    cache_dir: str | None = None
    """Folder of tokenised data and reference log-probs. Unset: $PREFTUNE_CACHE, or
    ~/.cache/preftune."""


@dataclass(kw_only=True)
class PruningConfig(Section):
    """What to remove."""

    older_than: float | None = None
    """Remove what no run has used for this many days, 0 or more. Unset: whatever its age, where
    `namespace` says which."""

    namespace: str | None = None
    """Remove this namespace, by its name or the first letters of it. Unset: any, where
    `older_than` says how old."""

    dry_run: bool = False
    """Say what would be removed, and remove nothing."""

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = below("older_than", self.older_than, 0, "it must be 0 days or more")
        if self.older_than is None and self.namespace is None:
            message = "give a number of days, or a namespace; 0 is all that no run is using"
            found.append(Problem("older_than", None, message, ("namespace",)))
        return found


@dataclass(kw_only=True)
class ExportingConfig(Section):
    """What to write, and where."""

    output: str | None = None
    """A new .parquet file, one row an answer. Required."""

    namespace: str | None = None
    """Of this namespace, by its name or the first letters of it. Unset: the one of the run of
    `rows_of`, else the only one there is."""

    rows_of: str | None = None
    """The config file of a run: its answers in the order of its rows, each with the row's id.
    Unset: every answer of the namespace, by its key alone."""

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        if self.output is not None and self.output.endswith(".parquet"):
            return []
        return [Problem("output", self.output, "it must be the path of a .parquet file")]


@dataclass(kw_only=True)
class VerifyingConfig(Section):
    """What to compute again."""

    verify_samples: int = 64
    """Answers to score again, drawn at random; 1 or more."""

    verify_seed: int = 0
    """Seed of the draw."""

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        return count("verify_samples", self.verify_samples)


@dataclass(kw_only=True)
class CacheShowConfig(ComposedConfig, CacheFolder):
    """What `cache show` can be told."""


@dataclass(kw_only=True)
class CachePruneConfig(ComposedConfig, PruningConfig, CacheFolder):
    """What `cache prune` can be told."""


@dataclass(kw_only=True)
class CacheExportConfig(ComposedConfig, ExportingConfig, CacheFolder):
    """What `cache export` can be told."""


@dataclass(kw_only=True)
class CacheVerifyConfig(ExperimentConfig, VerifyingConfig):
    """The run whose stored reference is looked at, flat, and how much of it is computed again."""
