"""How far two computations of one log-prob may be apart."""

import torch

from preftune.reference.agreement import tolerance


def allowed(length: int, logp: float, *, is_exact: bool) -> float:
    lengths = torch.tensor([float(length)], dtype=torch.float64)
    return float(tolerance(lengths, torch.tensor([logp], dtype=torch.float64), is_exact))


def test_what_bf16_was_seen_to_do_is_allowed_and_a_wrong_prompt_is_not():
    # SmolLM2's first answer of rasbt-polite, 3 tokens: in another composition of its forward.
    assert allowed(3, -30.53, is_exact=False) > abs(-30.53 + 30.03)
    # A long answer may be off by a few nats; one token more or less that counts moves it by more.
    assert 2 < allowed(500, -700.0, is_exact=False) < 5


def test_fp32_is_held_to_its_last_bits():
    assert allowed(500, -700.0, is_exact=True) < 1e-3
