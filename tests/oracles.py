"""Scalar functions that the losses' oracles are written with; no torch."""

import mpmath


def log_sigmoid(x) -> mpmath.mpf:
    return -mpmath.log1p(mpmath.exp(-x))


def sigmoid(x) -> mpmath.mpf:
    return 1 / (1 + mpmath.exp(-x))


def logratios(pair, chosen, rejected) -> tuple[mpmath.mpf, mpmath.mpf]:
    """s_w and s_l of a pair whose policy has other sums."""
    return chosen - pair.ref_chosen, rejected - pair.ref_rejected


def divergence_score(x, divergence: str, alpha: float) -> mpmath.mpf:
    """f'(u) − f'(1) at u = e^x, from the derivative of each divergence's f.

    f is u·log u; −log u; u·log u − (1+u)·log((1+u)/2); (u^(1−α) − (1−α)u − α)/(α(α−1)).
    """
    u = mpmath.exp(x)
    if divergence == "reverse_kl":
        return mpmath.log(u)
    if divergence == "forward_kl":
        return 1 - 1 / u
    if divergence == "js":
        return mpmath.log(2 * u / (1 + u))
    return (1 - u**-alpha) / alpha
