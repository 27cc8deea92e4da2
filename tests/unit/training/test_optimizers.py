"""Each optimizer takes the steps of the library it stands for, and leaves one out to the bit."""

import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from preftune.config.optimizers import READS, ROUNDS
from preftune.config.training import TrainingConfig
from preftune.distributed.parts import whole_part
from preftune.training.optimizer import make_optimizer
from preftune.training.optimizers import blocks, masked
from preftune.training.optimizers.blocks import Codes, block_size
from preftune.training.optimizers.muon import hidden_matrices, orthogonal
from preftune.training.optimizers.rounding import StochasticRounding
from tests.tiny import tiny_model

ON_CPU = [name for name in READS if name != "paged_adamw_8bit"]
RATE = 1e-2


def make_weights(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Matrices whose rows blocks divide, and a vector."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(20, 256), nn.Linear(256, 512), nn.LayerNorm(512), nn.Linear(512, 256)
    ).to(dtype)


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        # Of many sizes, as gradients are.
        size = torch.rand(parameter.shape, generator=generator) * 8 - 10
        grad = torch.randn(parameter.shape, generator=generator) * 10**size
        parameter.grad = grad.to(parameter.dtype)


def weights_after(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5):
    for step in range(steps):
        give_gradients(model, step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def ours(name: str, dtype: torch.dtype = torch.float32, **options):
    options = {"weight_decay": 0.1, "learning_rate": RATE} | options
    model = make_weights(dtype)
    return model, make_optimizer(model, TrainingConfig(optimizer=name, **options))


def both(weights, expected):
    return zip(weights, expected, strict=True)


def groups_of(model: nn.Module):
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def held(optimizer: torch.optim.Optimizer):
    return [t.clone() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_left_out_leaves_no_trace(name, dtype):
    """Gradients that are no numbers, with the flag set, between two steps; and before the first."""
    options = {"stochastic_rounding": dtype == torch.bfloat16 and name in ROUNDS}
    runs = []
    for with_skip in (False, True):
        model, optimizer = ours(name, dtype, **options)
        for step in range(3):
            if with_skip:
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, torch.nan)
                optimizer.found_inf = torch.ones(())
                optimizer.grad_scale = None
                optimizer.step()
            give_gradients(model, step)
            optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), None
            optimizer.step()
        runs.append([*(p.detach() for p in model.parameters()), *held(optimizer)])
    assert len(runs[0]) == len(runs[1])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ON_CPU)
def test_gradients_are_divided_by_the_loss_scale(name):
    """A power of two costs no bits."""
    runs = []
    for scale in (None, 1024.0):
        model, optimizer = ours(name)
        give_gradients(model, 0)
        if scale is not None:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad *= scale
        optimizer.found_inf = torch.zeros(())
        optimizer.grad_scale = None if scale is None else torch.tensor(scale)
        optimizer.step()
        runs.append([p.detach() for p in model.parameters()])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ON_CPU)
def test_weight_decay_spares_vectors(name):
    model, optimizer = ours(name, learning_rate=1e-1, weight_decay=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, start in zip(model.parameters(), before, strict=True):
        kept = 1.0 if parameter.ndim == 1 else 0.95
        torch.testing.assert_close(parameter.detach(), start * kept, rtol=1e-6, atol=1e-7)


def test_fp32_moments_are_adamw():
    """What stochastic rounding of adamw runs on; of fp32 weights there is nothing to round."""
    model, optimizer = ours("adamw", stochastic_rounding=True)
    expected = make_weights()
    peer = torch.optim.AdamW(groups_of(expected), lr=RATE)
    for one, other in both(weights_after(model, optimizer), weights_after(expected, peer)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "bits"), [("adamw_torch_8bit", 8), ("adamw_torch_4bit", 4)])
def test_few_bits_are_torchaos(name, bits, monkeypatch):
    """Its own step, not compiled; the rows here are those that its blocks divide."""
    torchao = pytest.importorskip("torchao.optim", reason="needs the extra peers")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model, optimizer = ours(name)
    expected = make_weights()
    kind = torchao.AdamW8bit if bits == 8 else torchao.AdamW4bit
    peer = kind(groups_of(expected), lr=RATE)
    for one, other in both(weights_after(model, optimizer), weights_after(expected, peer)):
        same = torch.isclose(one, other, rtol=1e-5, atol=1e-7)
        # A number between two codes may become either, by its last bit.
        assert same.float().mean() > 0.999
        assert (one - other).abs().max() < RATE
    moments = optimizer.state[model[1].weight]
    theirs = peer.state[expected[1].weight]
    codes = Codes(bits, True).decoded(moments["exp_avg.codes"], moments["exp_avg.scales"])
    assert torch.isclose(codes, theirs["exp_avg"].dequantize()).float().mean() > 0.999


def test_adafactor_is_that_of_transformers_trainer():
    from transformers.optimization import Adafactor

    model, optimizer = ours("adafactor")
    expected = make_weights()
    options = {"scale_parameter": False, "relative_step": False, "lr": RATE}
    peer = Adafactor(groups_of(expected), **options)
    for one, other in both(weights_after(model, optimizer), weights_after(expected, peer)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_muon_is_pytorchs_with_adamw_for_the_rest():
    model, optimizer = ours("muon")
    expected = make_weights()
    matrices = [expected[1].weight, expected[3].weight]
    rest = [p for p in expected.parameters() if all(p is not m for m in matrices)]
    peer = torch.optim.Muon(matrices, lr=RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=RATE,
    )
    adamw.register_step_post_hook(lambda *_: peer.step())
    for one, other in both(weights_after(model, optimizer), weights_after(expected, adamw)):
        # Both round to bfloat16 on the way, which small singular values feel.
        assert (one - other).norm() < 0.02 * RATE * one.numel() ** 0.5
        if one.ndim == 1:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_muons_update_is_as_large_as_adamws_and_about_orthogonal():
    matrix = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for given in (matrix, matrix.T, torch.stack([matrix, -matrix])):
        values = torch.linalg.svdvals(orthogonal(given).float())
        assert 0.5 < values.min() < values.max() < 1.3
    model, optimizer = ours("muon", weight_decay=0.0)
    before = model[1].weight.detach().clone()
    give_gradients(model, 0)
    optimizer.step()
    change = (model[1].weight.detach() - before) / RATE
    assert change.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)


def test_muon_takes_hidden_matrices_alone():
    model = tiny_model()
    names = {name for name, p in model.named_parameters() if p in hidden_matrices(model)}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in names} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_bitsandbytes_steps_are_its_own():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra quant")
    model, optimizer = ours("adamw_8bit")
    expected = make_weights()
    peer = bitsandbytes.optim.AdamW8bit(groups_of(expected), lr=RATE)
    for one, other in both(weights_after(model, optimizer), weights_after(expected, peer)):
        assert torch.equal(one, other)


BYTES = {
    "adamw": (8.0, 8.0),
    # Codes, and a scale of 4 bytes for each block of 256, or 128.
    "adamw_8bit": (2 + 8 / 256, 0.02),
    "adamw_torch_8bit": (2 + 8 / 256, 0.02),
    "adamw_torch_4bit": (1 + 8 / 128, 0.02),
    "adafactor": (4 * (1 / 512 + 1 / 256), 0.02),
    "muon": (4.0, 0.0),
    "sgd": (0.0, 0.0),
}


@pytest.mark.parametrize("name", ON_CPU)
def test_bytes_of_state_for_a_number_of_a_matrix(name):
    model, optimizer = ours(name)
    weights_after(model, optimizer, steps=1)
    matrix = model[1].weight
    state = [t for k, t in optimizer.state[matrix].items() if torch.is_tensor(t) and t.ndim]
    maps = 2048 if name == "adamw_8bit" else 0  # what codes stand for, shared by all weights
    size = (sum(t.nbytes for t in state) - maps) / matrix.numel()
    assert size == pytest.approx(BYTES[name][0], rel=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adamw_torch_8bit", "adamw_torch_4bit"])
def test_chunks_change_nothing(name, monkeypatch):
    """Nor what stochastic rounding draws."""
    runs = []
    for chunk in (masked.CHUNK, 700):
        monkeypatch.setattr(masked, "CHUNK", chunk)
        model, optimizer = ours(name, torch.bfloat16, stochastic_rounding=True)
        runs.append(weights_after(model, optimizer, steps=2))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("bits", "signed"), [(8, True), (8, False), (4, True), (4, False)])
def test_codes_stand_for_the_nearest_number(bits, signed):
    codes = Codes(bits, signed)
    numbers = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    numbers = numbers * torch.logspace(-8, 0, 6)[:, None]
    numbers = numbers if signed else numbers.abs()
    packed, scales = codes.encoded(numbers, 64)
    assert packed.numel() * 8 == numbers.numel() * bits
    assert scales.shape == (6, 4)
    again = codes.decoded(packed, scales)
    largest = numbers.view(6, 4, 64).abs().amax(-1, keepdim=True).expand(6, 4, 64).reshape(6, 256)
    assert ((again - numbers).abs() / largest).max() < (0.01 if bits == 8 else 0.15)
    every = torch.arange(256, dtype=torch.uint8).view(1, 256)
    values = codes.decoded(every, torch.ones(1, 1)).flatten()
    if bits == 8:
        assert len(set(values.tolist())) == 256
        assert all(a < b for a, b in pairwise(values.tolist()))
    assert torch.equal(codes.encoded(values[None], len(values))[0], every)


@pytest.mark.parametrize(("bits", "signed"), [(8, True), (8, False), (4, True), (4, False)])
def test_codes_are_those_of_a_search(bits, signed):
    """Also next to every edge, and at both ends of what shares the upper 16 bits."""
    every = torch.arange(256, dtype=torch.uint8).view(1, 256)
    codes = every if bits == 8 else torch.stack([every >> 4, every & 15], -1).flatten(1)
    values = Codes(bits, signed).decoded(every, torch.ones(1, 1)).flatten().unique()
    edges = (values[1:] + values[:-1]) / 2
    near = [torch.nextafter(edges, edges.new_tensor(to)) for to in (-2.0, 2.0)]
    cells = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = [cells.view(torch.float32), (cells | 0xFFFF).view(torch.float32)]
    numbers = torch.cat([edges, *near, values, *ends])
    numbers = numbers[numbers.isfinite() & (numbers.abs() <= 1) & (signed | (numbers >= 0))]
    found = blocks._nearest(numbers, bits, signed)
    assert torch.equal(found.long(), torch.bucketize(numbers, edges, right=True))
    assert codes.max() == found.max()


def test_blocks_end_with_rows():
    """A row of 576 has nine of 64; one of 100 has none, and its state stays in fp32."""

    def size(*shape, bits=8):
        return block_size(whole_part(torch.zeros(shape), 0), bits)

    assert [size(64, 576), size(64, 1536), size(8, 32, 64), size(8, 64)] == [64, 256, 256, None]
    assert [size(64, 100), size(8192), size(64, 1536, bits=4)] == [None, None, 128]


def test_stochastic_rounding_is_right_on_average():
    """Half as often as halves would be: each number goes up as often as it lies above."""
    rounding = StochasticRounding(seed=1)
    share = torch.linspace(0, 1, 257)[:-1]
    numbers = (1 + share * 2**-7).repeat(64, 1)
    steps = [torch.tensor(float(step)) for step in range(1, 65)]
    for sign in (1.0, -1.0):
        drawn = [rounding(sign * numbers, first=0, number=0, step=step) for step in steps]
        assert {float(x) for x in drawn[0].unique()} == {sign, sign * (1 + 2**-7)}
        up = torch.stack([(x.float() * sign > 1).double() for x in drawn]).mean((0, 1))
        assert (up - share).abs().max() < 0.04  # 4096 draws: 5 deviations
        assert up[0] == 0


def test_stochastic_rounding_draws_by_seed_weight_place_and_step():
    numbers = torch.full((4096,), 1 + 2**-8)

    def draw(seed=0, first=0, number=0, step=1.0):
        return StochasticRounding(seed)(
            numbers, first=first, number=number, step=torch.tensor(step)
        )

    first = draw()
    assert torch.equal(first, draw())
    assert torch.equal(first[1000:], draw(first=1000)[:-1000])
    for other in (draw(seed=1), draw(number=1), draw(step=2.0), draw(first=4096)):
        assert (first == other).float().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", ROUNDS)
def test_small_updates_are_kept_on_average_and_lost_without(name):
    """At 5e-7 a step is far below what a bfloat16 weight of 0.02 can change by (6e-5)."""
    rate, steps, moved = 5e-7, 40, {}
    for rounds in (False, True):
        options = {"stochastic_rounding": rounds, "learning_rate": rate, "weight_decay": 0.0}
        model, optimizer = ours(name, torch.bfloat16, **options)
        matrix = model[1].weight
        with torch.no_grad():
            matrix.fill_(0.02)
        start = matrix.detach().double()
        # The same direction all along.
        direction = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(3)).sign()
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            matrix.grad = direction.bfloat16()
            optimizer.step()
        change = (start - matrix.detach().double()) * direction
        moved[rounds] = float(change.mean()) / (rate * steps)
    assert moved[False] == 0
    # Muon's update is a fifth as long, and turned towards the direction.
    expected = {"muon": 0.16}.get(name, 1.0)
    assert moved[True] == pytest.approx(expected, rel=0.1)


def test_bitsandbytes_is_imported_only_for_itself():
    """So that a machine without it trains by the others."""
    assert "bitsandbytes" not in vars(sys.modules["preftune.training.optimizers.paged"])
