"""What a computation keeps and makes, in bytes, counted at torch's own operators."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Memory(TorchDispatchMode):
    """The bytes that operators' results hold at once, and which results there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = 0
        self.results: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.live = {ref: size for ref, size in self.live.items() if not ref.expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.live[StorageWeakRef(storage)] = storage.nbytes()
                self.results[str(func), tuple(tensor.shape)] += 1
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def saved_sizes(run: Callable[[], Any], model: nn.Module | None = None) -> list[int]:
    """Bytes of each storage that autograd keeps for the backward of `run`, parameters aside."""
    storages: dict[int, int] = {}
    parameters = [] if model is None else list(model.parameters())

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    del kept
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    return [size for storage, size in storages.items() if storage not in own]
