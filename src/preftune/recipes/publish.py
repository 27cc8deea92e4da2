"""What of a run goes to the hub, and when: final/ at the end, checkpoints behind training's back.

    /                              final/, and preftune.yaml: the run's name and settings
    last-checkpoint/               hub_strategy checkpoint
    checkpoints/step-00000100/     hub_strategy all_checkpoints

Training never waits for the hub and never ends because of it. What is to be pushed is on disk: when
a push fails or is killed, the same command goes on with it.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from preftune.config.experiment import ExperimentConfig
from preftune.config.hub import HUB_OPTIONS, MAIN
from preftune.distributed.runtime import Runtime, resolve_precision
from preftune.errors import ConfigError, PushFailed
from preftune.files import hold_alone, remove_tree
from preftune.hub.repository import MARKER, Repository, first_line, marker
from preftune.recipes.base_card import fetch_base_card
from preftune.recipes.model_card import card_at
from preftune.redaction import redacted_values
from preftune.tracking.progress import ProgressDisplay
from preftune.training.run_folder import RunFolder, new_run_id
from preftune.training.signals import SignalRequests

CARD = "README.md"
LAST = "last-checkpoint"
_ONE_PUSH = threading.Lock()
"""Held while this process sends something."""


def look_at_hub(config: ExperimentConfig) -> None:
    """See that the model could be pushed, where it shall be; changes nothing on the hub.

    Args:
        config: of the run.

    Raises:
        ConfigError: it could not.
    """
    folder = RunFolder(Path(config.output_dir).expanduser())
    if not is_pushed(config, folder):
        _repository(config, folder).look()


def open_repository(config: ExperimentConfig, folder: RunFolder) -> None:
    """Make the repository ready, before the first step.

    Args:
        config: of the run, with the model's commit as its revision.
        folder: of the run.

    Raises:
        ConfigError: it cannot be made, or is another's.
    """
    if config.push_to_hub:
        _repository(config, folder).open()
        fetch_base_card(config)  # for the licence


def is_pushed(config: ExperimentConfig, folder: RunFolder) -> bool:
    """Whether the finished run is where the configuration wants it; true where it wants nothing."""
    if not config.push_to_hub:
        return True
    if not folder.manifest.is_file():
        return False
    manifest = folder.read_manifest()
    return manifest.get("status") == "finished" and manifest.get("hub") == (
        _told(config) | {"status": "pushed", "commit": (manifest.get("hub") or {}).get("commit")}
    )


def publish(config: ExperimentConfig, folder: RunFolder, requests: SignalRequests) -> None:
    """Push a finished run, unless it is pushed already; ranks other than 0 wait.

    Args:
        config: of the run.
        folder: of the run, with its final/.
        requests: a signal to stop ends the waiting; the same command goes on.

    Raises:
        PushFailed: it is not on the hub, or not all of it.
        Interrupted: a signal came first.
    """
    precision = resolve_precision(config.mixed_precision)
    runtime = Runtime(precision, config.seed, config.collective_seconds)
    if runtime.decide(lambda: is_pushed(config, folder)):
        return
    display = ProgressDisplay(config.progress, is_main=runtime.is_main)

    def stopped() -> str | None:
        return requests.stop and (
            f"{requests.stop} received: stopped while pushing to {config.hub_repo_id}; the run is "
            f"finished and {folder.final} is whole: run the same command again to go on pushing"
        )

    with requests.stopping(), _bars(config.progress != "none"):
        runtime.decide_slowly(lambda: _push(config, folder, display.say), stopped)


def _push(config: ExperimentConfig, folder: RunFolder, say: Callable[[str], None]) -> None:
    lock = hold_alone(folder.root)
    try:
        manifest = folder.read_manifest()
        manifest.setdefault("run_id", new_run_id())  # of a run that an older version trained
        manifest["hub"] = _told(config) | {"status": "trained, not yet pushed"}
        folder.write_manifest(manifest)
        repository = _repository(config, folder)
        with _ONE_PUSH:  # a checkpoint may be under way
            commit = _push_all(config, folder, repository, say)
        manifest["hub"] = _told(config) | {"status": "pushed", "commit": commit}
        folder.write_manifest(manifest)
    finally:
        os.close(lock)


def _push_all(
    config: ExperimentConfig,
    folder: RunFolder,
    repository: Repository,
    say: Callable[[str], None],
) -> str:
    """The model, then the checkpoints that training has left; gives the model's commit."""
    what = "the trained model"
    try:
        repository.open()  # somebody else may have written there since
        files: dict[str, Path | bytes] = {p.name: p for p in sorted(folder.final.iterdir())}
        size = sum(path.stat().st_size for path in folder.final.iterdir())
        card = (folder.final / CARD).read_text("utf-8")
        files[CARD] = card_at(card, repository.repo_id, repository.branch).encode()
        say(f"pushing {folder.final} ({size:,} bytes) to {repository.place}")
        commit = repository.commit(
            {MARKER: _marker(config, repository), **files}, f"{config.run_name}: the trained model"
        )
        for checkpoint in _staged(folder):
            what = checkpoint.name
            _push_checkpoint(config, repository, checkpoint)
    except Exception as error:
        reason = str(error) if isinstance(error, ConfigError) else first_line(error)
        raise PushFailed(
            f"{what} could not be pushed to {repository.place} ({reason}); the run is finished "
            f"and {folder.final} is whole: run the same command again to go on pushing, or with "
            "another hub_repo_id"
        ) from error
    say(f"pushed to {repository.place}, commit {commit}")
    return commit


class CheckpointPusher:
    """Sends checkpoints while training goes on, one at a time."""

    def __init__(
        self,
        config: ExperimentConfig,
        folder: RunFolder,
        run_id: str,
        say: Callable[[str], None],
    ) -> None:
        """Nothing is sent before `offer`.

        Args:
            config: of the run.
            folder: of the run; what waits stands in it, so that a kill loses none.
            run_id: of the run.
            say: tells people a sentence.
        """
        self._config, self._folder, self._say = config, folder, say
        self._repository = replace(_repository(config, folder), run_id=run_id)
        self._lock = threading.Lock()
        self._current: Path | None = None
        self._stopped = False
        disable_progress_bars()  # they would garble the live view

    def offer(self, checkpoint: Path) -> None:
        """Take a checkpoint that is on disk; that it is deleted later does not matter.

        Args:
            checkpoint: its folder.
        """
        with self._lock:
            try:
                _stage(checkpoint, self._folder)
            except OSError as error:
                self._say(f"warning: {checkpoint.name} is not pushed ({error}); training goes on")
                return
            if self._current is None and not self._stopped:
                self._current = checkpoint
                threading.Thread(target=self._work, daemon=True, name="preftune-push").start()

    def stop(self) -> None:
        """Begin no further push; what waits is pushed at the end, or by the next command."""
        with self._lock:
            self._stopped = True

    def _work(self) -> None:
        while (checkpoint := self._next()) is not None:
            try:
                with _ONE_PUSH:
                    _push_checkpoint(self._config, self._repository, checkpoint)
            except Exception as error:
                self._say(
                    f"warning: {checkpoint.name} could not be pushed to {self._repository.place} "
                    f"({first_line(error)}); training goes on, and it is tried again later"
                )
                with self._lock:
                    self._current = None
                return

    def _next(self) -> Path | None:
        with self._lock:
            waiting = [] if self._stopped else _staged(self._folder)
            if self._config.hub_strategy == "checkpoint":
                for older in waiting[:-1]:
                    remove_tree(older)
                waiting = waiting[-1:]
            self._current = waiting[0] if waiting else None
            return self._current


def _push_checkpoint(config: ExperimentConfig, repository: Repository, staged: Path) -> None:
    step = staged.name
    place = LAST if config.hub_strategy == "checkpoint" else f"checkpoints/{step}"
    files: dict[str, Path | bytes] = {f"{place}/{p.name}": p for p in sorted(staged.iterdir())}
    files[MARKER] = _marker(config, repository)
    repository.commit(files, f"{config.run_name}: {step}", instead_of=place)
    remove_tree(staged)


def _stage(checkpoint: Path, folder: RunFolder) -> None:
    """Keep a checkpoint until it is pushed: by links, which take no space while it is there."""
    staged = folder.to_push / checkpoint.name
    half = staged.with_name(f".{checkpoint.name}")
    remove_tree(half)
    remove_tree(staged)
    shutil.copytree(checkpoint, half, copy_function=_link)
    half.rename(staged)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _staged(folder: RunFolder) -> list[Path]:
    """Checkpoints that wait, oldest first."""
    return sorted(folder.to_push.glob("step-*"))


def _repository(config: ExperimentConfig, folder: RunFolder) -> Repository:
    assert config.hub_repo_id is not None  # the configuration refuses pushing without
    known = folder.read_manifest() if folder.manifest.is_file() else {}
    return Repository(
        config.hub_repo_id,
        config.hub_revision or MAIN,
        private=bool(config.hub_private),
        run_id=known.get("run_id"),
    )


def _told(config: ExperimentConfig) -> dict[str, Any]:
    """What run.json says of where the run goes."""
    return {"repository": config.hub_repo_id, "revision": config.hub_revision}


def _marker(config: ExperimentConfig, repository: Repository) -> bytes:
    assert repository.run_id is not None  # the run has begun
    return marker(repository.run_id, shared_settings(config))


def shared_settings(config: ExperimentConfig) -> str:
    """The run's options as YAML for others: no secret, no folder of this machine.

    Args:
        config: of the run.
    """
    plain: dict[str, Any] = {"resume": "auto", "output_dir": "output", "cache_dir": None}
    plain |= {"push_to_hub": False, **dict.fromkeys(HUB_OPTIONS)}
    return replace(config, **plain).to_yaml(lambda value: redacted_values(_by_last_name(value)))


def _by_last_name(value: Any) -> Any:
    match value:
        case str() if value.startswith(("/", "./", "../", "~")):
            return Path(value).name
        case dict():
            return {_by_last_name(key): _by_last_name(held) for key, held in value.items()}
        case list():
            return [_by_last_name(held) for held in value]
        case _:
            return value


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """huggingface_hub's own bars, for a while; it shows them on standard error."""
    (enable_progress_bars if shown else disable_progress_bars)()
    try:
        yield
    finally:
        enable_progress_bars()
