"""Make docs/losses.md and its pictures from the losses themselves.

    python scripts/loss_docs.py

Everything said of a loss comes from its docstring and its row in `preftune.losses.spec`; each curve
is computed by the loss. A test holds the text equal to what `page()` makes; the pictures need
matplotlib (`pip install -e '.[dev]'`).
"""

import inspect
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeAlias

import torch

from preftune.config.docs import field_docs
from preftune.config.dpo import DPOConfig, LossChoice
from preftune.losses import (
    KNOBS,
    LOSS_SPECS,
    CompletionLogps,
    DPOLossType,
    Loss,
    PairLogps,
    UnpairedLoss,
    make_loss,
)

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

Losses marked "single completions" train on rows `{prompt, completion, label}`: label true is a
desirable completion, false an undesirable one, and a prompt needs no pair. They give one value a
completion, and the step divides by the number of completions. A pair given to them is two rows.

## Which loss

| `loss_type` | what | rows | reference | beta | settings and their source |
|---|---|---|---|---|---|
"""
_EXPECTATIONS = """
## What to expect

| `loss_type` | formula | at the reference | curves |
|---|---|---|---|
"""

_PICTURE_OF_UNPAIRED = """\
The picture is of one global batch with a desirable and an undesirable completion at every log-ratio
drawn: both labels' mean rewards are 0, and so is what the rewards are compared with.
"""


_MODIFIERS = """\
## Around the losses on pairs

With `ld_alpha` α (LD-DPO, arXiv:2409.06411), π and ρ of a completion are
Σ_{t≤m} log p(y_t) + α·Σ_{t>m} log p(y_t), m = min(|y_w|, |y_l|), wherever a log-ratio is made of
them. |y|, the weights of wpo, fine-tuning and the metrics `logps/*` keep all tokens alike.

"""


def page() -> str:
    """The text of docs/losses.md."""
    rows = "".join(_row(loss_type) for loss_type in DPOLossType)
    expected = "".join(_expectation(loss_type) for loss_type in DPOLossType)
    knobs = field_docs(DPOConfig)
    listed = "".join(f"- `{name}` ({KNOBS[name].range}): {knobs[name]}\n" for name in KNOBS)
    around = [field.name for field in fields(LossChoice) if field.name != "loss_type"]
    added = "".join(f"- `{name}`: {knobs[name]}\n" for name in around)
    each = "\n".join(_section(loss_type) for loss_type in DPOLossType)
    return (
        f"{_INTRODUCTION}{rows}{_EXPECTATIONS}{expected}\n{_MODIFIERS}{added}"
        f"\n## Knobs\n\n{listed}\n{each}"
    )


def _row(loss_type: DPOLossType) -> str:
    spec = LOSS_SPECS[loss_type]
    return _cells(
        f"[`{loss_type}`](#{loss_type})",
        spec.summary,
        "single completions" if spec.unpaired else "pairs",
        "yes" if spec.needs_reference else "no",
        f"{spec.knobs['beta']:g}",
        _named(_parts(loss_type), "Settings"),
    )


def _expectation(loss_type: DPOLossType) -> str:
    formula = "<br>".join(f"`{line}`" for line in _formula(loss_type))
    curves = _named(_parts(loss_type), "Curves")
    return _cells(f"[`{loss_type}`](#{loss_type})", formula, _at_reference(loss_type), curves)


def _cells(*cells: str) -> str:
    # A bar ends a cell, in code too.
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"


def _at_reference(loss_type: DPOLossType) -> str:
    spec, loss = LOSS_SPECS[loss_type], make_loss(loss_type)
    if isinstance(loss, UnpairedLoss):
        return f"{loss.value_at_reference(_completions(torch.zeros(1))):.6g}"
    if not spec.needs_reference or spec.reads_alignment or spec.reads_margin:
        return "depends on the data"
    return f"{loss.value_at_reference(_pairs(torch.zeros(1))):.6g}"


def _parts(loss_type: DPOLossType) -> list[str]:
    return (inspect.getdoc(type(make_loss(loss_type))) or "").split("\n\n")


def _formula(loss_type: DPOLossType) -> list[str]:
    return [line.strip() for line in _parts(loss_type)[1].replace("; ", "\n").splitlines()]


def _section(loss_type: DPOLossType) -> str:
    title, _, *rest = _parts(loss_type)
    words = "\n\n".join(part for part in rest[: _index(rest, "Args:")])
    named = {name: _named(rest, name) for name in ("Source", "Deviates", "Settings", "Curves")}
    listed = "".join(f"- {name}: {text}\n" for name, text in named.items())
    knobs = ", ".join(f"`{name}` {value}" for name, value in LOSS_SPECS[loss_type].knobs.items())
    formula = "\n".join(_formula(loss_type))
    drawn = f"\n{_PICTURE_OF_UNPAIRED}" if LOSS_SPECS[loss_type].unpaired else ""
    return (
        f"## {loss_type}\n\n{title}\n\n```\n{formula}\n```\n\n{words}\n\n"
        f"Knobs and defaults: {knobs}.\n\n{listed}\n"
        f"![Value and slope of {loss_type}](losses/{loss_type}.svg)\n{drawn}"
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


def _completions(ratios: torch.Tensor) -> CompletionLogps:
    """A desirable and an undesirable completion at each log-ratio, in this order."""
    both = ratios.repeat(2)
    reference = torch.full_like(both, REFERENCE_MEAN * TOKENS)
    return CompletionLogps(
        policy=reference + both,
        lengths=torch.full(both.shape, TOKENS),
        is_desirable=torch.arange(len(both)) < len(ratios),
        reference=reference,
        mismatched=reference,
        mismatched_reference=reference,
    )


Curves: TypeAlias = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""By what a line is called: value, and its slope, at each point."""


def curve(loss: Loss, margins: torch.Tensor) -> Curves:
    """Value, and its slope in the margin, at each margin: one line without a name."""
    at = margins.clone().requires_grad_()
    # One batch a point: some losses compare the pairs of a batch.
    values = torch.cat([loss(_pairs(margin[None])).values for margin in at])
    return {"": (values.detach(), torch.autograd.grad(values.sum(), at)[0])}


def unpaired_curves(loss: UnpairedLoss, ratios: torch.Tensor) -> Curves:
    """Value, and its slope in the log-ratio, of completions of each label.

    Args:
        loss: one that compares rewards with those of the batch.
        ratios: symmetric around 0, so that the batch they make has mean rewards of 0.
    """
    logps = _completions(ratios)
    logps = replace(logps, policy=logps.policy.requires_grad_())
    values = loss(logps).values
    (slopes,) = torch.autograd.grad(values.sum(), logps.policy)
    lines = zip(values.detach().chunk(2), slopes.chunk(2), strict=True)
    return dict(zip(("desirable", "undesirable"), lines, strict=True))


def draw(folder: Path) -> None:
    """One picture a loss: value and slope over the margin or the log-ratio, at its defaults."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "preftune", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    # Both answers keep a probability below 1.
    margins = torch.linspace(-30, 30, 241, dtype=torch.float64)
    folder.mkdir(exist_ok=True)
    for loss_type in DPOLossType:
        loss = make_loss(loss_type)
        if isinstance(loss, UnpairedLoss):
            at, label = margins / 2, "log-ratio s = π − ρ, nats"
            curves = unpaired_curves(loss, at)
        else:
            at, label = margins, "margin s_w − s_l, nats"
            curves = curve(loss, at)
        figure, panels = pyplot.subplots(1, 2, figsize=(6.4, 2.4), layout="constrained")
        for n, (axes, name) in enumerate(zip(panels, ("value", "slope"), strict=True)):
            for of, lines in curves.items():
                axes.plot(at, lines[n], linewidth=1.5, label=of)
            axes.axvline(0, color="0.8", linewidth=0.8)
            axes.set(title=f"{loss_type}: {name}", xlabel=label)
        if len(curves) > 1:
            panels[0].legend(frameon=False)
        figure.savefig(folder / f"{loss_type}.svg", metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    (DOCS / "losses.md").write_text(page(), encoding="utf-8")
    draw(DOCS / "losses")
