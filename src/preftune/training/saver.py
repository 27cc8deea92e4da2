"""Checkpoints that are written while training goes on.

Only an update changes weights and optimizer state: a forward and a backward read them. So the
state is copied to the host while the next step computes its gradient, and the update of that step
begins when the copy is whole. Then it is written, checked and renamed beside the training.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from preftune.errors import CheckpointError
from preftune.training.checkpoint import Snapshot
from preftune.training.host_memory import available_bytes

_SLAB = 1 << 30
"""Most bytes taken from the host at once; torch rounds pinned memory up to a power of two."""
_ALIGNMENT = 64


class CheckpointSaver:
    """Publishes snapshots, one at a time.

    Example:
        >>> saver = CheckpointSaver(optimizer, device, in_background=True, say=print)
        >>> saver.save(snapshot(state, ...), lambda content: write_checkpoint(folder, content))
        >>> train_step(state, ...)  # its update waits for the copy, not for the disk
        >>> saver.wait()
    """

    def __init__(
        self,
        optimizer: Any,
        device: torch.device,
        *,
        in_background: bool,
        say: Callable[[str], None],
    ) -> None:
        """Nothing is saved yet.

        Args:
            optimizer: whose updates wait for a copy under way.
            device: of the state.
            in_background: whether to return before a checkpoint is on disk.
            say: tells people a sentence.
        """
        self._in_background = in_background
        self._say = say
        self._copies = HostCopies(device)
        self._copied = threading.Event()
        self._copied.set()
        self._pending: Future[None] | None = None
        self._hook: Any = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="preftune-checkpoint")
        if in_background:
            self._hook = optimizer.register_step_pre_hook(self._before_update)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._pending is not None and not self._pending.done()

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written; `wait` says why."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def save(self, content: Snapshot, publish: Callable[[Snapshot], None]) -> None:
        """Hand a snapshot over; waits for the one before it.

        Args:
            content: of the state as it is now, which may not change before the next update.
            publish: writes it; called once, maybe on another thread.

        Raises:
            CheckpointError: the one before it, or this one if it is not written in the background,
                could not be written.
        """
        self.wait()
        if not (self._in_background and self._is_room_for(content)):
            publish(content)
            return
        self._copied.clear()
        self._copies.mark()
        self._pending = self._thread.submit(self._copy_and_publish, content, publish)

    def wait(self) -> None:
        """Wait until the checkpoint under way is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread, after what it has begun."""
        self._thread.shutdown()
        if self._hook is not None:
            self._hook.remove()

    def _is_room_for(self, content: Snapshot) -> bool:
        if not self._copies.empty:
            return True
        needed = content.num_bytes
        available = available_bytes()
        # A tenth of what is free is left to what else a step takes.
        if available is None or needed < 0.9 * available:
            return True
        self._say(
            f"a copy of the state ({needed / 1e9:.1f} GB) does not fit into the memory that is "
            f"free ({available / 1e9:.1f} GB): training waits for this checkpoint"
        )
        return False

    def _copy_and_publish(self, content: Snapshot, publish: Callable[[Snapshot], None]) -> None:
        try:
            copy = self._copies.of(content)
        except (RuntimeError, MemoryError) as error:
            raise CheckpointError(
                f"the state could not be copied for a checkpoint ({error}); set "
                "--checkpoint_async false, and run the same command to go on"
            ) from error
        finally:
            self._copied.set()
        self._copies.wait()
        publish(copy)

    def _before_update(self, *_: object) -> None:
        if not self._copied.is_set():
            self._copied.wait()
        self._copies.hold_back_device()


@dataclass
class HostCopies:
    """Copies of tensors in memory of the host that is taken once and used again."""

    device: torch.device
    """Of what is copied. From a GPU, copies run beside its other work, into pinned memory."""
    _slab_size: int = 0
    _copies: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _slab: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    _stream: Any = None
    _marked: Any = None
    _done: Any = None

    @property
    def empty(self) -> bool:
        """Whether no memory has been taken yet."""
        return not self._copies

    def mark(self) -> None:
        """Copies are of the state after what the device has been given to do so far."""
        if self.device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(self.device)
            self._marked = torch.cuda.current_stream(self.device).record_event()

    def of(self, content: Snapshot) -> Snapshot:
        """A snapshot in the host's memory; on a GPU only begun, see `wait`."""
        if self._stream is None:
            return Snapshot(self._copied(content), content.document)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            self._stream.wait_event(self._marked)
            copied = self._copied(content)
            self._done = self._stream.record_event()
        return Snapshot(copied, content.document)

    def wait(self) -> None:
        """Wait until the copies are whole."""
        if self._done is not None:
            self._done.synchronize()

    def hold_back_device(self) -> None:
        """Let the device do nothing more before the copies are whole; the host does not wait."""
        if self._done is not None:
            torch.cuda.current_stream(self.device).wait_event(self._done)

    def _copied(self, content: Snapshot) -> dict[str, Mapping[str, Tensor]]:
        count = sum(map(len, content.tensors.values()))
        self._slab_size = content.num_bytes + count * _ALIGNMENT
        return {
            file: {name: self._copy((file, name), tensor) for name, tensor in tensors.items()}
            for file, tensors in content.tensors.items()
        }

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        held = self._copies.get(key)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = self._copies[key] = (
                self._room(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
            )
        return held.copy_(tensor.detach(), non_blocking=True)

    def _room(self, size: int) -> Tensor:
        aligned = -(-size // _ALIGNMENT) * _ALIGNMENT
        if aligned > len(self._slab):
            taken = max(aligned, min(_SLAB, self._slab_size))
            pinned = self.device.type == "cuda"
            self._slab = torch.empty(taken, dtype=torch.uint8, pin_memory=pinned)
        room, self._slab = self._slab[:size], self._slab[aligned:]
        return room
