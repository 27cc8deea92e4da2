"""Every option explains itself, and the help shows it."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import textwrap

import pytest

import preftune.config
from preftune.config.cache import (
    CacheExportConfig,
    CachePruneConfig,
    CacheShowConfig,
    CacheVerifyConfig,
)
from preftune.config.composed import sections
from preftune.config.docs import field_docs
from preftune.config.experiment import ExperimentConfig
from preftune.config.help import config_help
from preftune.config.inspection import InspectConfig
from preftune.config.quickstart import QuickstartConfig
from preftune.config.report import ReportConfig
from preftune.config.score import ScoreConfig
from preftune.losses.knobs import KNOBS

CONFIGS = [
    ExperimentConfig,
    InspectConfig,
    ScoreConfig,
    QuickstartConfig,
    ReportConfig,
    CacheShowConfig,
    CachePruneConfig,
    CacheExportConfig,
    CacheVerifyConfig,
]


def documented_fields(section):
    """Fields of a class body and whether a docstring follows each."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body
    for index, node in enumerate(body):
        if isinstance(node, ast.AnnAssign):
            below = body[index + 1] if index + 1 < len(body) else None
            text = below.value.value if isinstance(below, ast.Expr) else None
            yield node.target.id, isinstance(text, str) and len(text) > 10


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_has_a_docstring(config):
    parents = {parent for section in sections(config) for parent in section.__mro__}
    found = dict(
        pair
        for parent in parents
        if dataclasses.is_dataclass(parent) and parent.__name__ != "Section"
        for pair in documented_fields(parent)
    )
    assert found.keys() == config.__dataclass_fields__.keys() == field_docs(config).keys()
    assert all(found.values()), [name for name, documented in found.items() if not documented]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_help_lists_every_option_once_with_its_docstring(config, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100000")
    text = config_help(config, "preftune x", "Does x.")
    for name, doc in field_docs(config).items():
        assert text.count(f"  --{name} ") == 1
        assert doc in text
    for section in sections(config):
        assert section.__doc__.splitlines()[0].rstrip(".") + ":" in text


def test_every_knob_of_a_loss_is_an_option_that_names_its_readers():
    docs = field_docs(ExperimentConfig)
    assert KNOBS.keys() <= docs.keys()
    assert docs["gamma_beta_ratio"].endswith("or more. Read by (default): simpo 0.5.")


def test_the_examples_in_docstrings_hold():
    for module in pkgutil.iter_modules(preftune.config.__path__, "preftune.config."):
        if not module.ispkg:
            assert doctest.testmod(importlib.import_module(module.name)).failed == 0
