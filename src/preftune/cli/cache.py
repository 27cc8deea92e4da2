"""`preftune cache`: build, show, verify, prune, export."""

from collections.abc import Callable, Sequence

from preftune.cli.options import options_or_help, wants_help
from preftune.config.cache import (
    CacheExportConfig,
    CachePruneConfig,
    CacheShowConfig,
    CacheVerifyConfig,
)
from preftune.config.experiment import ExperimentConfig
from preftune.config.paths import cache_root
from preftune.errors import ConfigError

USAGES = {
    "build": "preftune cache build [CONFIG.yaml] [--key value ...]",
    "show": "preftune cache show [--cache_dir DIR]",
    "verify": "preftune cache verify [CONFIG.yaml] [--key value ...]",
    "prune": "preftune cache prune --older_than DAYS|--namespace NAME [--dry_run]",
    "export": "preftune cache export --output FILE.parquet [--key value ...]",
}
WHAT = {
    "build": "Compute the reference log-probs of a training run, which then finds them. Takes the "
    "options of `preftune train` and its config files; trains nothing.",
    "show": "List the stored reference log-probs: of which models and numerics, how many answers, "
    "how large, when last used.",
    "verify": "Read every shard of a run's reference log-probs, and score a sample of its answers "
    "again. Takes the options of `preftune train` and its config files.",
    "prune": "Remove stored reference log-probs that no run is using.",
    "export": "Write stored reference log-probs to one parquet file.",
}


def run(argv: Sequence[str]) -> int:
    """Look after stored reference log-probs.

    Args:
        argv: the words after `cache`.
    """
    command, rest = (argv[0], argv[1:]) if argv else ("", ())
    commands: dict[str, Callable[[Sequence[str]], str | None]] = {
        "build": build,
        "show": show,
        "verify": verify,
        "prune": prune,
        "export": export,
    }
    if command in commands:
        said = commands[command](rest)
        if said is not None:
            print(said)
    elif wants_help(argv):
        print(_help(), end="")
    else:
        said = f"cache {command} is not a command" if command else "cache needs a command"
        raise ConfigError(f"{said}; write: preftune cache {', '.join(commands)}, with --help")
    return 0


def build(argv: Sequence[str]) -> str | None:
    """The reference pass of a run, without the run."""
    usage, what = USAGES["build"], WHAT["build"]
    config = options_or_help(ExperimentConfig, argv, usage, what, for_ranks=True)
    if config is None:
        return None
    from preftune.distributed.runtime import is_main_process, leave_process_group
    from preftune.recipes import cache

    said = cache.build(config)
    speaks = is_main_process()
    leave_process_group()
    return said if speaks else None


def show(argv: Sequence[str]) -> str | None:
    """A line a namespace."""
    usage, what = USAGES["show"], WHAT["show"]
    config = options_or_help(CacheShowConfig, argv, usage, what, allow_file=False)
    if config is None:
        return None
    from preftune.reference.namespaces import find_namespaces, mib

    cache_dir = cache_root(config.cache_dir)
    found = find_namespaces(cache_dir)
    total = mib(sum(namespace.num_bytes for namespace in found))
    head = f"{cache_dir / 'reference'}: {len(found)} namespaces, {total}"
    return "\n".join([head, *(namespace.described() for namespace in found)])


def verify(argv: Sequence[str]) -> str | None:
    """Whether the stored values of a run are whole and right."""
    config = options_or_help(CacheVerifyConfig, argv, USAGES["verify"], WHAT["verify"])
    if config is None:
        return None
    from preftune.recipes import cache

    return cache.verify(config)


def prune(argv: Sequence[str]) -> str | None:
    """Remove what is old or named, and say what that frees."""
    usage, what = USAGES["prune"], WHAT["prune"]
    config = options_or_help(CachePruneConfig, argv, usage, what, allow_file=False)
    if config is None:
        return None
    from preftune.reference.namespaces import (
        find_namespaces,
        mib,
        one_namespace,
        remove_leftovers,
        remove_namespace,
    )

    cache_dir = cache_root(config.cache_dir)
    found = find_namespaces(cache_dir)
    if config.namespace is not None:
        found = [one_namespace(found, config.namespace)]
    lines, freed = [], 0 if config.dry_run else remove_leftovers(cache_dir)
    for namespace in found:
        if config.older_than is not None and namespace.days < config.older_than:
            continue
        kept = None if config.dry_run else remove_namespace(namespace)
        freed += 0 if kept else namespace.num_bytes
        verb = "would remove" if config.dry_run else f"kept, {kept}:" if kept else "removed"
        lines.append(f"{verb} {namespace.described()}")
    verb = "would free" if config.dry_run else "freed"
    return "\n".join([*lines, f"{verb} {freed} bytes ({mib(freed)})"])


def export(argv: Sequence[str]) -> str | None:
    """Write a parquet file."""
    usage, what = USAGES["export"], WHAT["export"]
    config = options_or_help(CacheExportConfig, argv, usage, what, allow_file=False)
    if config is None:
        return None
    from preftune.recipes import cache

    return cache.export(config)


def _help() -> str:
    lines = [f"  {usage}\n      {WHAT[name]}\n" for name, usage in USAGES.items()]
    return "usage: preftune cache COMMAND ...\n\n" + "".join(lines)
