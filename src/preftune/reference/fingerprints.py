"""What stored reference log-probs depend on, as hashes of content rather than of names."""

import json
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers
import xxhash
from torch import Tensor, nn

from preftune.model.adapters import settings_of
from preftune.model.attention import REGISTERED
from preftune.model.forward import FORWARD_VERSION, PolicyModel
from preftune.model.quantization import describe
from preftune.reference.store import STORE_VERSION
from preftune.schema import Completion, TokenizedExample

# Fields of a model config that name or describe, and do not reach the forward.
DESCRIPTIVE_FIELDS = frozenset(
    {"_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "use_cache"}
)


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of every parameter and buffer: names, shapes, dtypes and bytes, as they are now."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def namespace_fields(
    policy: PolicyModel, *, precision: str, layout: str, device: str
) -> dict[str, Any]:
    """Everything that decides a log-prob besides the row itself, readable by people.

    Two runs share stored values when, and only when, all of these are equal. The learning rate,
    beta, the loss and every path are not here, because they do not change the reference.

    Args:
        policy: the reference in eval mode: the policy before its first step.
        precision: of the products, `fp32`, `bf16` or `fp16`.
        layout: name of the forward layout; another one may differ in the last bits.
        device: type of the one that computes.
    """
    config = policy.model.config
    fields = {k: v for k, v in config.to_dict().items() if k not in DESCRIPTIVE_FIELDS}
    adapter = settings_of(policy.model)
    return {
        "weights": weights_fingerprint(policy.model),
        **({"adapter": adapter} if adapter else {}),
        **describe(policy.model),
        "model_config": fields,
        "dtype": str(next(policy.parameters()).dtype),
        "precision": precision,
        "layout": layout,
        "attention": _kernel(str(config._attn_implementation)),
        "compact_head": policy.compact_head,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "forward_version": FORWARD_VERSION,
        "store_version": STORE_VERSION,
    }


def _kernel(attention: str) -> str:
    """The attention's name, with the version of flash-attn where that computes it."""
    if attention in (REGISTERED["flash_attention_2"], "flash_attention_2"):
        with suppress(PackageNotFoundError):  # the kernel may come from the Hub, too
            return f"{attention} {version('flash-attn')}"
    return attention


def namespace_key(fields: Mapping[str, Any]) -> str:
    """Name of the folder that holds the values computed under `fields`."""
    text = json.dumps(fields, sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode())


def completion_key(example: TokenizedExample, completion: Completion) -> bytes:
    """16 bytes that name one answer after one prompt.

    The prompt's length is part of it: without it [1, 2] + [3] and [1] + [2, 3] would collide.
    """
    digest = xxhash.xxh3_128()
    digest.update(len(example.prompt_ids).to_bytes(8, "little"))
    for ids in (example.prompt_ids, completion.ids):
        digest.update(torch.tensor(ids, dtype=torch.int64).numpy().tobytes())
    if completion.scored is not None:
        digest.update(b"scored" + bytes(completion.scored))
    return digest.digest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data  # type: ignore[return-value]  # a view, no copy
