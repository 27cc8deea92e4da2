"""Each warning comes where its numbers say so, once until it is over, and after a resume, too."""

import json

import pytest

from preftune.training.guards import CHECKS, LINES, QUIET, Guards

SOUND = {
    "loss": 0.6,
    "learning_rate": 1e-6,
    "grad_norm": 2.0,
    "rewards/chosen": 0.3,
    "rewards/rejected": -0.4,
    "rewards/accuracies": 0.7,
    "logratios/chosen": 3.0,
    "logratios/rejected": -4.0,
    "logps/chosen": -80.0,
}


def line(at, **changes):
    """A line of a run that learns."""
    values = SOUND | {"loss": 0.69 * 0.99**at, "grad_norm": 2.0 + at % 3}
    return values | {name.replace("__", "/"): value for name, value in changes.items()}


def kinds(lines):
    guards = Guards()
    return [(w.step, w.kind) for at, values in enumerate(lines, 1) for w in guards.look(at, values)]


def test_a_run_that_learns_is_not_warned_of():
    assert kinds(line(at) for at in range(200)) == []


def spiking(at):
    return line(at, grad_norm=31.0 if at == 15 else 3.0)


def falling(at):
    return line(at, rewards__chosen=-0.05 * at, rewards__rejected=-0.08 * at)


def displaced(at):
    return line(
        at,
        logratios__chosen=-1.5 * at,
        rewards__chosen=-0.15 * at,
        rewards__rejected=-0.6 * at,
    )


def saturated(at):
    return line(at, loss=0.69 if at == 0 else 0.002, rewards__accuracies=1.0)


def certain(at):
    return line(at, logps__chosen=min(-80.0 + 10 * at, -0.2))


def still(at):
    return line(at, loss=0.693147 + 1e-6 * (at % 2))


@pytest.mark.parametrize(
    ("run", "kind", "step", "says"),
    [
        (spiking, "grad_norm_spike", 16, "is 31, 10 times the median of the lines before (3;"),
        (falling, "rewards_falling", 10, "chosen one by 0.25, the rejected one by 0.4"),
        (displaced, "chosen_displaced", 17, "lost 21 nats against the reference (the limit is 20)"),
        (saturated, "saturated", 11, "at most 0.002 of 0.69"),
        (certain, "entropy_gone", 13, "nats for a whole answer, after -80 at the start"),
        (still, "not_learning", LINES, "of 0.693147 over the last 10 lines"),
    ],
)
def test_each_warning_names_its_number_and_a_setting(run, kind, step, says):
    guards = Guards()
    found = [w for at in range(21) for w in guards.look(at + 1, run(at))]
    assert [(w.step, w.kind) for w in found] == [(step, kind)]
    assert says in found[0].text
    settings = ("learning_rate", "max_grad_norm", "sft_weight", "num_epochs")
    assert sum(name in found[0].text for name in settings) == 1
    assert guards.warnings == found


def test_every_kind_has_its_test():
    tested = {"grad_norm_spike", "rewards_falling", "chosen_displaced"}
    assert tested | {"saturated", "entropy_gone", "not_learning"} == set(CHECKS)


@pytest.mark.parametrize(
    ("run", "at"),
    [
        (lambda at: line(at, grad_norm=29.0 if at == 15 else 3.0), "under ten times"),
        (lambda at: line(at, rewards__chosen=-0.03 * at, rewards__rejected=-0.08 * at), "less"),
        (lambda at: displaced(at) | {"logratios/chosen": max(-19.0, -1.5 * at)}, "19 nats"),
        (lambda at: line(at, loss=0.69 if at == 0 else 0.008, rewards__accuracies=1.0), "loss"),
        (lambda at: saturated(at) | {"rewards/accuracies": 0.99}, "accuracy"),
        (lambda at: line(at, logps__chosen=-0.5), "short answers from the start"),
        (lambda at: still(at) | {"learning_rate": 0.0}, "no rate"),
        (lambda at: line(at, loss=0.69 * (1 + 0.002 * (at % 2))), "moves"),
    ],
)
def test_below_its_threshold_there_is_none(run, at):
    assert kinds(run(at) for at in range(40)) == [], at


def test_a_warning_is_told_again_only_after_it_was_over():
    spikes = {15, 16, 15 + QUIET - 1, 40}
    told = kinds(line(at, grad_norm=500.0 if at in spikes else 3.0) for at in range(60))
    assert told == [(16, "grad_norm_spike"), (41, "grad_norm_spike")]


def test_a_resumed_run_warns_where_the_straight_one_does():
    for run in (spiking, falling, displaced, saturated, certain, still):
        straight = Guards()
        for at in range(40):
            straight.look(at, run(at))
        for stop in (5, 14, 20):
            before, after = Guards(), Guards()
            for at in range(stop):
                before.look(at, run(at))
            after.restore(json.loads(json.dumps(before.state())))
            for at in range(stop, 40):
                after.look(at, run(at))
            assert after.state() == straight.state()


def test_metrics_that_a_loss_lacks_are_not_missed():
    bare = {"loss", "learning_rate", "grad_norm"}
    assert kinds({k: v for k, v in line(at).items() if k in bare} for at in range(40)) == []
    assert kinds({"learning_rate": 1e-6} for _ in range(40)) == []
