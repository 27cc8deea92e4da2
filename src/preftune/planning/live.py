"""The bytes that a computation holds, by part, at every moment of it.

Counted at torch's own operators: each result's storage from the moment it is made until nothing
holds it any more. That is the same for tensors with numbers and for tensors without (FakeTensor),
so a step can be counted on a machine that could not run it.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Part: TypeAlias = Literal[
    "weights", "weight copies", "gradients", "optimizer", "activations", "head chunk", "reference"
]
Bytes: TypeAlias = Mapping[str, int]
_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
)
_IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm}
"""Operators that PyTorch's table of arithmetic has under another name."""
BACKWARD = 2.5
"""Products of attention's backward over those of its forward: five for two."""


@dataclass(frozen=True)
class _Event:
    """A storage that came, or went."""

    number: int
    size: int
    """Negative for one that went."""


class LiveBytes(TorchDispatchMode):
    """Counts what is alive while it is entered, and the arithmetic of matrix products."""

    def __init__(self) -> None:
        """Nothing is known of yet: see `hold`."""
        super().__init__()
        self.flops: Counter[str] = Counter()
        """Of "attention", the "head" and all "other" matrix products; a multiplication and an
        addition count two."""
        self._events: list[_Event] = []
        self._numbers: dict[int, int] = {}
        """Address of a storage that is alive -> its number."""
        self._parts: list[Part] = []
        self._watched: dict[int, Any] = {}
        self._in_head = False

    def hold(self, part: Part, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before.

        Args:
            part: what they are.
            tensors: storages that several share count once.
        """
        for tensor in tensors:
            self._see(tensor, part)

    def name(self, part: Part, tensors: Iterable[Tensor]) -> None:
        """Say what tensors that are alive have been from their beginning.

        Args:
            part: what they are.
            tensors: results of operators.
        """
        for tensor in tensors:
            number = self._numbers.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self._parts[number] = part

    @contextmanager
    def head(self) -> Iterator[None]:
        """Where results belong to the head."""
        before, self._in_head = self._in_head, True
        try:
            yield
        finally:
            self._in_head = before

    def set_in_head(self, flag: bool) -> None:
        """As `head`, for hooks, which have a beginning and an end in different calls."""
        self._in_head = flag

    def peak(self, without: Iterable[Part] = ()) -> dict[str, int]:
        """The parts at the moment when they were most together, in bytes.

        Args:
            without: parts that are counted elsewhere.
        """
        left_out = set(without)
        now: Counter[str] = Counter()
        total = most = 0
        at_most: dict[str, int] = {}
        for event in self._events:
            part = self._parts[event.number]
            if part in left_out:
                continue
            now[part] += event.size
            total += event.size
            if total > most:
                most, at_most = total, dict(now)
        return {part: size for part, size in at_most.items() if size}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and look at what it gives."""
        result = func(*args, **(kwargs or {}))
        part: Part = "head chunk" if self._in_head else "activations"
        if func is torch.ops.aten._to_copy.default and self._is_weight(args[0]):
            part = "weight copies"
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor, part)
        self._count(func, args, kwargs, result)
        return result

    def _is_weight(self, tensor: Tensor) -> bool:
        number = self._numbers.get(tensor.untyped_storage()._cdata)
        return number is not None and self._parts[number] == "weights"

    def _see(self, tensor: Tensor, part: Part) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._numbers:
            return
        number, size = len(self._parts), storage.nbytes()
        self._parts.append(part)
        self._numbers[key] = number
        self._events.append(_Event(number, size))

        def gone(_: Any) -> None:
            del self._numbers[key], self._watched[number]
            self._events.append(_Event(number, -size))

        self._watched[number] = weakref.ref(storage, gone)

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func._overloadpacket in _ATTENTION:
            backward = func._overloadpacket is not _ATTENTION[0]
            query, key, value = (t.shape for t in (args[1:4] if backward else args[:3]))
            seen = attended(query[-2], key[-2] - query[-2])
            work = 2 * query[:-2].numel() * seen * (query[-1] + value[-1])
            self.flops["attention"] += round(work * (BACKWARD if backward else 1))
            return
        operator = func._overloadpacket
        formula = flop_registry.get(_IN_PLACE.get(operator, operator))
        if formula is None:
            return
        kind = "head" if self._in_head else "other"
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "out"}
        self.flops[kind] += int(formula(*args, **kwargs, out_val=result))


def attended(own: int, prefix: int) -> float:
    """How many pairs of a query and a key that it sees a span has.

    Args:
        own: tokens of the span, each of which sees those before it.
        prefix: tokens before the span that all of them see.
    """
    return own * prefix + own * own / 2


def storages_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; storages that several share count once."""
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(held.values())
