"""One small forward at start that proves our head equals the model's own."""

import torch
from transformers import PreTrainedModel

from preftune.model.logprob_head import HeadTransform

PROBE_TOKENS = 8


@torch.no_grad()
def head_is_plain(model: PreTrainedModel) -> bool:
    """Whether backbone, head and `HeadTransform` give the logits of the model's own forward.

    Architectures may do more between the last hidden state and the logits than their config says.
    Where they do, the whole model must run for every position, which is right but slower.

    Args:
        model: in eval mode.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    device = next(model.parameters()).device
    input_ids = torch.arange(1, 1 + PROBE_TOKENS, device=device).unsqueeze(0)
    input_ids %= model.config.get_text_config().vocab_size
    expected = model(input_ids=input_ids, use_cache=False).logits
    hidden = model.base_model(input_ids=input_ids, use_cache=False)[0]
    got = HeadTransform.from_config(model.config)(head(hidden))
    if got.shape != expected.shape:
        return False
    # Half-precision models may round the transform differently; a missing scale is far larger.
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    scale = expected.float().abs().max().clamp(min=1.0)
    return bool(((got - expected).float().abs().max() / scale) <= tolerance)
