"""The checkpoints of one run: written, kept or deleted, and the best of them noted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from preftune.config.checkpoint import CheckpointConfig
from preftune.distributed.engine import Engine
from preftune.distributed.runtime import Runtime
from preftune.errors import CheckpointError, PreftuneError
from preftune.tracking.jsonl import MetricsFile
from preftune.tracking.progress import ProgressDisplay
from preftune.training.checkpoint import Snapshot, write_checkpoint, write_together
from preftune.training.retention import BestCheckpoint, remove_old_checkpoints
from preftune.training.run_folder import RunFolder
from preftune.training.saver import CheckpointSaver


class Checkpoints:
    """Hands snapshots to the disk, and tells what becomes of them."""

    def __init__(
        self,
        config: CheckpointConfig,
        folder: RunFolder,
        runtime: Runtime,
        display: ProgressDisplay,
        note_best: Callable[[dict[str, Any]], None],
        written: Callable[[Path], None],
    ) -> None:
        """Nothing is written before `begin`.

        Args:
            config: what to keep, and how to write.
            folder: of the run.
            runtime: the ranks; only rank 0 writes.
            display: tells people a sentence.
            note_best: puts the best checkpoint into run.json, once it is on disk.
            written: told of each checkpoint on rank 0, before older ones are deleted.
        """
        self.best = BestCheckpoint.of(config)
        self._config = config
        self._folder = folder
        self._runtime = runtime
        self._display = display
        self._note = note_best
        self._written = written
        self._noted: int | None = None
        self._saver: CheckpointSaver | None = None

    def begin(self, engine: Engine) -> None:
        """Get ready to save the state of an engine."""
        if engine.is_sharded:
            if self._config.checkpoint_async:
                self._display.say(
                    f"training waits while a checkpoint is written: {engine.name} cuts the state "
                    "over the processes, and each writes its part (checkpoint_async is for DDP)"
                )
            return
        self._saver = CheckpointSaver(
            engine.optimizer,
            self._runtime.device,
            in_background=self._config.checkpoint_async,
            say=self._display.say,
        )

    def restore_best(self, saved: dict[str, Any] | None) -> dict[str, Any] | None:
        """Go on with the best of a checkpoint.

        Args:
            saved: as its document holds it.

        Returns:
            What run.json says of it; None without any.
        """
        if self.best is None:
            return None
        self.best.restore(saved, self._folder)
        self._noted = self.best.step
        if saved and saved["step"] is not None and self.best.step is None:
            self._display.say(
                f"the best checkpoint so far (step {saved['step']}, {saved['metric']} "
                f"{saved['value']:.6g}) is not in this run's folder or was by another measure: the "
                "best is sought anew from here on"
            )
        return self._described(self.best)

    def save(self, content: Snapshot, metrics_file: MetricsFile) -> None:
        """Write a checkpoint, in the background if the configuration says so.

        Args:
            content: of the state as it is; see `CheckpointSaver.save`.
            metrics_file: whose lines so far the checkpoint counts on.
        """
        assert self._saver is not None  # made in `begin`
        assert content.document is not None  # rank 0's
        step = content.document["step"]
        content, best = self._with_best(content)

        def publish(content: Snapshot) -> None:
            metrics_file.sync()
            write_checkpoint(self._folder.checkpoint(step), content)
            self._settle_on_disk(step, best)

        self._saver.save(content, publish)

    def save_together(self, content: Snapshot, metrics_file: MetricsFile, step: int) -> None:
        """Write a checkpoint of which each rank has a part; training waits.

        Args:
            content: this rank's part.
            metrics_file: whose lines so far the checkpoint counts on.
            step: of the checkpoint.
        """
        content, best = self._with_best(content)
        self._runtime.decide(metrics_file.sync)
        write_together(self._folder.checkpoint(step), content, self._runtime)
        self._runtime.decide(lambda: self._settle_on_disk(step, best))
        self._note_best()

    def _with_best(self, content: Snapshot) -> tuple[Snapshot, BestCheckpoint | None]:
        best = None if self.best is None else replace(self.best)
        document = content.document
        if document is not None:
            document = {**document, "best": None if best is None else best.as_dict()}
        return replace(content, document=document), best

    def _settle_on_disk(self, step: int, best: BestCheckpoint | None) -> None:
        self._written(self._folder.checkpoint(step))
        self._retain(best)

    def _retain(self, best: BestCheckpoint | None) -> None:
        keep, max_gb = self._config.keep_last_n_checkpoints, self._config.checkpoint_max_gb
        remove_old_checkpoints(self._folder, keep, max_gb, best and best.step)

    def failed(self) -> bool:
        """Whether a checkpoint could not be written; notes the best one once it is on disk."""
        if self._saver is None or self._saver.busy:
            return False
        if self._saver.failed:
            return True
        self._note_best()
        return False

    def settle(self) -> None:
        """Wait until the checkpoint under way is on disk.

        Raises:
            CheckpointError: it could not be written; on every rank.
        """

        def wait() -> None:
            if error := self._wait():
                raise error

        self._runtime.together(wait)
        self._note_best()

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Lose no checkpoint that is under way, nor its error, when the block ends with another."""
        try:
            yield
        except PreftuneError as error:
            if failed := self._wait():
                both = CheckpointError([*failed.problems, *error.problems])
                both.rank = error.rank
                raise both from error
            raise
        finally:
            if failed := self._wait():
                self._display.say(str(failed))

    def close(self) -> None:
        """End the background thread."""
        if self._saver is not None:
            self._saver.close()

    def _wait(self) -> CheckpointError | None:
        try:
            if self._saver is not None:
                self._saver.wait()
        except CheckpointError as error:
            return error
        return None

    def _note_best(self) -> None:
        best = self.best
        if best is not None and best.step != self._noted:
            self._noted = best.step
            described = self._described(best)
            assert described is not None  # it has a step
            self._note(described)

    def _described(self, best: BestCheckpoint) -> dict[str, Any] | None:
        if best.step is None:
            return None
        path = self._folder.checkpoint(best.step).relative_to(self._folder.root)
        return best.as_dict() | {"path": str(path)}
