"""Make docs/losses.md and its pictures from the losses themselves.

    python scripts/loss_docs.py

Everything said of a loss comes from its docstring and its row in `preftune.losses.spec`; each curve
is computed by the loss. A test holds the text equal to what `page()` makes; the pictures need
matplotlib (`pip install -e '.[dev]'`).
"""

import inspect
from pathlib import Path

import torch

from preftune.config.docs import field_docs
from preftune.config.dpo import DPOConfig
from preftune.losses import KNOBS, LOSS_SPECS, DPOLossType, Loss, PairLogps, make_loss

DOCS = Path(__file__).resolve().parent.parent / "docs"
TOKENS = 10
MARGIN = 1.0  # what the data say of every pair, in units of reward, in the pictures
REFERENCE_MEAN = -2.0  # nats a token, of both answers, in the pictures

_INTRODUCTION = """\
# Losses

Made by `python scripts/loss_docs.py` from the docstrings of `src/preftune/losses`; edit those.

π and ρ are the log-probs, in nats, that policy and reference give to a completion, summed over its
scored tokens; |y| is their number and a bar means divided by it. w is the chosen, l the rejected
completion; s = π − ρ. A loss gives one value a pair, and the step divides the sum over the global
batch by its number of pairs. "At the reference" is the value while the policy is still the
reference, which is checked before the first step.

| `loss_type` | what | reference | beta | value at the reference |
|---|---|---|---|---|
"""


def page() -> str:
    """The text of docs/losses.md."""
    rows = "".join(_row(loss_type) for loss_type in DPOLossType)
    knobs = field_docs(DPOConfig)
    listed = "".join(f"- `{name}` ({KNOBS[name].range}): {knobs[name]}\n" for name in KNOBS)
    each = "\n".join(_section(loss_type) for loss_type in DPOLossType)
    return f"{_INTRODUCTION}{rows}\n## Knobs\n\n{listed}\n{each}"


def _row(loss_type: DPOLossType) -> str:
    spec = LOSS_SPECS[loss_type]
    constant = "depends on the data"
    if spec.needs_reference and not spec.reads_alignment and not spec.reads_margin:
        value = make_loss(loss_type).value_at_reference(_pairs(torch.zeros(1)))
        constant = f"{value:.6g}"
    reads = "yes" if spec.needs_reference else "no"
    beta = f"{spec.knobs['beta']:g}"
    return f"| [`{loss_type}`](#{loss_type}) | {spec.summary} | {reads} | {beta} | {constant} |\n"


def _section(loss_type: DPOLossType) -> str:
    doc = inspect.getdoc(type(make_loss(loss_type))) or ""
    title, formula, *rest = doc.split("\n\n")
    words = "\n\n".join(part for part in rest[: _index(rest, "Args:")])
    named = {name: _named(rest, name) for name in ("Source", "Deviates", "Settings", "Curves")}
    listed = "".join(f"- {name}: {text}\n" for name, text in named.items())
    knobs = ", ".join(f"`{name}` {value}" for name, value in LOSS_SPECS[loss_type].knobs.items())
    formula = "\n".join(part.strip() for part in formula.replace("; ", "\n").splitlines())
    return (
        f"## {loss_type}\n\n{title}\n\n```\n{formula}\n```\n\n{words}\n\n"
        f"Knobs and defaults: {knobs}.\n\n{listed}\n"
        f"![Value and slope of {loss_type}](losses/{loss_type}.svg)\n"
    )


def _index(parts: list[str], start: str) -> int:
    return next(n for n, part in enumerate(parts) if part.startswith(start))


def _named(parts: list[str], name: str) -> str:
    text = parts[_index(parts, f"{name}: ")].removeprefix(f"{name}: ")
    return " ".join(text.split())


def _pairs(margins: torch.Tensor) -> PairLogps:
    """Pairs of equal lengths whose sides move apart, by half the margin each."""
    reference = torch.full_like(margins, REFERENCE_MEAN * TOKENS)
    lengths = torch.full(margins.shape, TOKENS)
    weight = torch.zeros_like(margins)  # alignments of text that the policy writes
    return PairLogps(
        chosen=reference + margins / 2,
        rejected=reference - margins / 2,
        chosen_lengths=lengths,
        rejected_lengths=lengths,
        ref_chosen=reference,
        ref_rejected=reference,
        chosen_alignment=weight,
        rejected_alignment=weight,
        margin=torch.full_like(margins, MARGIN),
    )


def curve(loss: Loss, margins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value, and its slope in the margin, at each margin."""
    at = margins.clone().requires_grad_()
    # One batch a point: some losses compare the pairs of a batch.
    values = torch.cat([loss(_pairs(margin[None])).values for margin in at])
    return values.detach(), torch.autograd.grad(values.sum(), at)[0]


def draw(folder: Path) -> None:
    """One picture a loss: value and slope over the margin, at its defaults."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "preftune", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    # Both answers keep a probability below 1.
    margins = torch.linspace(-30, 30, 241, dtype=torch.float64)
    folder.mkdir(exist_ok=True)
    for loss_type in DPOLossType:
        values, slopes = curve(make_loss(loss_type), margins)
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(6.4, 2.4), layout="constrained")
        for axes, line, name in ((left, values, "value"), (right, slopes, "slope")):
            axes.plot(margins, line, linewidth=1.5)
            axes.axvline(0, color="0.8", linewidth=0.8)
            axes.set(title=f"{loss_type}: {name}", xlabel="margin s_w − s_l, nats")
        figure.savefig(folder / f"{loss_type}.svg", metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    (DOCS / "losses.md").write_text(page(), encoding="utf-8")
    draw(DOCS / "losses")
