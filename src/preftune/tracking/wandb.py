"""Weights & Biases: a run of its server, or a folder for `wandb sync`."""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import wandb

from preftune.tracking.tracker import Status, TrackedRun

INIT_SECONDS = 60.0
"""How long to wait for the server to take up the run."""
FINISH_SECONDS = 20.0
"""How long to wait for uploads at the end; the rest stays on disk, for `wandb sync`."""
EXIT_CODES = {"finished": 0, "interrupted": 75, "diverged": 3, "failed": 1}


class WandbTracker:
    """Logs to W&B; its own variables (WANDB_MODE, WANDB_PROJECT, ...) are obeyed.

    A server knows the last step of a run. Offline, files of a process that was killed lack what it
    held back, and cannot be appended to: there the run is written anew from its first step.
    """

    def __init__(self, run: TrackedRun) -> None:
        """Take up the run by its id."""
        settings = wandb.Settings(
            console="off",
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            # The command line and the remote of a git checkout may hold tokens.
            x_disable_meta=True,
            disable_git=True,
            save_code=False,
        )
        offline = _is_offline()
        if offline:
            for earlier in (run.folder / "wandb").glob(f"offline-run-*-{run.id}"):
                shutil.rmtree(earlier)
        self._run = wandb.init(
            project=wandb.setup().settings.project or run.project,
            name=run.name,
            id=run.id,
            dir=str(run.folder),
            config=dict(run.facts),
            resume=None if offline else "allow",
            reinit="create_new",
            settings=settings,
        )
        self.last_step = -1 if offline else self._run.step - 1

    def append(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]
    ) -> None:
        """Log one row of history."""
        row: dict[str, Any] = dict(metrics)
        if samples:
            columns: list[Any] = list(samples[0])
            rows: list[Any] = [[sample[name] for name in columns] for sample in samples]
            row["samples"] = wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
        self._run.log(row, step=step, commit=True)

    def close(self, status: Status) -> None:
        """Finish the run; waits for uploads, for a while."""
        self._run.finish(exit_code=EXIT_CODES[status])


def lacks_account() -> bool:
    """Whether runs go to a server, and no key for it is found; asks nobody for one."""
    return not _is_offline() and not wandb.login(prompt=False, verify=False)


def _is_offline() -> bool:
    return wandb.setup().settings.mode in ("offline", "dryrun", "disabled")
