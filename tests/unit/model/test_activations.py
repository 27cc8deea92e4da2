"""What is computed again, and what moves to the host: the same gradients, for less memory."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from preftune.batching.layout import build_layout
from preftune.model import forward
from preftune.model.activations import HostActivations, recompute
from preftune.model.attention import SEGMENTS
from preftune.model.forward import PolicyModel, pair_logps
from tests.examples import make_examples
from tests.tiny import tiny_mixture, tiny_model

KINDS = [False, True, "selective"]
OPTIONS = {"num_hidden_layers": 8}


def policy_of(kind, make=tiny_model, **options) -> PolicyModel:
    policy = PolicyModel(make(**options)).train()
    policy.model.set_attn_implementation(SEGMENTS)
    if kind:
        recompute(policy.model, kind)
    return policy


def backward(policy: PolicyModel):
    layout = build_layout(make_examples(4, seed=1), "shared_prefix")
    result = pair_logps(policy, layout)
    result.sums.sum().backward()
    grads = [p.grad for p in policy.parameters() if p.grad is not None]
    assert grads
    return result.sums.detach(), grads


@pytest.mark.parametrize("make", [tiny_model, tiny_mixture])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_however_they_are_computed(make, precision):
    """And they are computed in training mode, where layers do recompute."""
    results = []
    for kind in KINDS:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            results.append(backward(policy_of(kind, make)))
    (sums, grads), *others = results
    for other_sums, other_grads in others:
        assert torch.equal(sums, other_sums)
        for one, other in zip(grads, other_grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_third_more_products_or_none():
    """Forward, and twice as much backward; all layers once more is a third; the head stays."""
    flops = {}
    for kind in KINDS:
        policy = policy_of(kind, **OPTIONS)
        with FlopCounterMode(display=False) as counter:
            backward(policy)
        flops[kind] = counter.get_total_flops()
    assert flops["selective"] == flops[False]
    assert 1.2 < flops[True] / flops[False] < 1.34


class Held:
    """Bytes of what a forward keeps outside of recomputed layers."""

    def __init__(self) -> None:
        self.bytes = 0

    def pack(self, tensor):
        if not isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter):
            self.bytes += tensor.nbytes
        return tensor


def test_full_checkpointing_keeps_the_inputs_of_layers_alone():
    kept = {}
    for layers in (2, 8):
        held = Held()
        with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda x: x):
            policy = policy_of(True, num_hidden_layers=layers)
            layout = build_layout(make_examples(4, seed=1), "shared_prefix")
            pair_logps(policy, layout)
        kept[layers] = held.bytes
    tokens = sum(block.input_ids.numel() for block in layout.blocks)
    inputs = tokens * policy.model.config.hidden_size * 4
    assert (kept[8] - kept[2]) / 6 == pytest.approx(inputs, rel=0.3)


def test_offload_brings_back_what_it_took(monkeypatch):
    """Every layer's input moves, and comes back as it was, also in a second backward."""
    made = []

    class Counted(HostActivations):
        def __init__(self) -> None:
            super().__init__(smallest=1)
            made.append(self)

    monkeypatch.setattr(forward, "HostActivations", Counted)
    expected = backward(policy_of(True))
    policy = policy_of(True)
    policy.activation_offload = True
    sums, grads = backward(policy)
    assert torch.equal(sums, expected[0])
    assert all(torch.equal(one, other) for one, other in zip(grads, expected[1], strict=True))
    (used,) = made
    shapes = [tuple(moved.host.shape) for moved in used._moved]
    tokens = build_layout(make_examples(4, seed=1), "shared_prefix").blocks[0].input_ids.shape[1]
    assert shapes.count((1, tokens, policy.model.config.hidden_size)) >= 2
    assert all(moved.back is None for moved in used._moved)  # nothing is fetched for nobody
    weights = {p.data_ptr() for p in policy.parameters()}
    assert not weights & {moved.host.data_ptr() for moved in used._moved}
    with torch.no_grad():
        pair_logps(policy, build_layout(make_examples(4, seed=1), "shared_prefix"))
    assert len(made) == 1


def test_small_tensors_and_weights_stay():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    x = torch.ones(4, 4, requires_grad=True)
    moves = HostActivations(smallest=64)
    with moves.kept(torch.device("cpu")):
        (x @ weight.T).sum().backward()
    assert [moved.host.shape for moved in moves._moved] == [(4, 4)]
    small = HostActivations()
    with small.kept(torch.device("cpu")):
        (x @ weight.T).sum()
    assert not small._moved
