"""Options of checkpoints: what follows from what, and what is refused."""

import pytest

from preftune import ExperimentConfig
from preftune.config.problem import InvalidConfig
from preftune.config.run_time import seconds_of

BASE = {"model_name_or_path": "m", "dataset_name": "pairs.jsonl"}
EVALUATED = BASE | {"test_size": 5}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (3600, 3600),
        ("90", 90),
        ("1.5h", 5400),
        ("1h30m", 5400),
        ("1d 2h", 93600),
        ("45s", 45),
        ("90:00", 5400),
        ("12:00:00", 43200),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-12:00:01", 129601),
    ],
)
def test_lengths_of_time(text, seconds):
    assert seconds_of(text) == seconds
    assert ExperimentConfig(**BASE, max_run_time=text).max_run_seconds == seconds


@pytest.mark.parametrize("text", ["", "soon", "2 weeks", "1:2:3:4", "-5", "1e3", "h", "0", "12:5"])
def test_what_is_no_length_of_time_is_refused(text):
    with pytest.raises(InvalidConfig, match="max_run_time is"):
        ExperimentConfig(**BASE, max_run_time=text)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval/loss", False),
        ("eval/rewards/accuracies", True),
        ("eval/rewards/margins", True),
        ("eval/logps/chosen", True),
        ("eval/rewards/accuracies_length_matched", True),
    ],
)
def test_which_way_is_better_follows_from_the_name(metric, greater):
    config = ExperimentConfig(**EVALUATED, metric_for_best_model=metric)
    assert config.greater_is_better is greater
    other = ExperimentConfig(
        **EVALUATED, metric_for_best_model=metric, greater_is_better=not greater
    )
    assert other.greater_is_better is not greater
    assert ExperimentConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (BASE | {"metric_for_best_model": "eval/loss"}, "nothing is evaluated: give eval_dataset"),
        (EVALUATED | {"metric_for_best_model": "loss"}, r"start with eval/$"),
        (
            BASE | {"eval_dataset": {"a": "x", "b": "y"}, "metric_for_best_model": "eval/loss"},
            r"start with eval/a/ or eval/b/$",
        ),
        (
            EVALUATED | {"metric_for_best_model": "eval/rewards/rejected"},
            "greater_is_better is not",
        ),
        (EVALUATED | {"greater_is_better": True}, "there is no metric_for_best_model"),
        (
            EVALUATED | {"metric_for_best_model": "eval/loss", "checkpointing_steps": None},
            "there are no checkpoints",
        ),
        (BASE | {"checkpoint_max_gb": 0.0}, "checkpoint_max_gb is 0.0; it must be above 0"),
    ],
)
def test_what_nothing_would_read_is_refused(options, text):
    with pytest.raises(InvalidConfig, match=text):
        ExperimentConfig(**options)
