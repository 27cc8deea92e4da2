"""The JSON Schema accepts what the parser's types accept, and refuses wrong types and words.

Editors read YAML 1.2 and compare JSON values; the parser reads the words. Each case below is a word
as it stands in a file, with the value that YAML 1.2 gives it.
"""

from enum import Enum
from types import NoneType
from typing import Literal, get_args, get_origin

import jsonschema
import pytest

from preftune.config.composed import section_fields
from preftune.config.docs import field_docs
from preftune.config.experiment import ExperimentConfig
from preftune.config.json_schema import json_schema
from preftune.config.parser import parse_config
from preftune.config.preset import preset_names
from preftune.config.score import ScoreConfig
from preftune.config.typed import reader_of
from preftune.config.yamlfile import read_yaml
from preftune.errors import ConfigError
from preftune.losses.knobs import KNOBS

READER = reader_of(ExperimentConfig)
SCHEMA = json_schema(ExperimentConfig)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
FIELDS = [field.name for field in section_fields(ExperimentConfig)]

SCALARS = {
    "null": None,
    "~": None,
    "true": True,
    "False": False,
    "no": "no",
    "OFF": "OFF",
    "'yes'": "yes",
    "tRue": "tRue",
    "1": 1,
    "-3": -3,
    "'12'": "12",
    "1_000": "1_000",
    "0.25": 0.25,
    "5e-7": 5e-7,
    "'5e-7'": "5e-7",
    "5e-7x": "5e-7x",
    "'010'": "010",
    "'0x10'": "0x10",
    "'1:30'": "1:30",
    "'.nan'": ".nan",
    "'.'": ".",
    "''": "",
    "words": "words",
}
COMPOUND = {
    "[]": [],
    "[a, b]": ["a", "b"],
    "[a, 1, b, 1.5]": ["a", 1, "b", 1.5],
    "[a, null]": ["a", None],
    "[[a]]": [["a"]],
    "[tensorboard]": ["tensorboard"],
    "[wandb]": ["wandb"],
    "{}": {},
    "{a: b}": {"a": "b"},
    "{a: 2}": {"a": 2},
    "{a: '2.5'}": {"a": "2.5"},
    "{a: null}": {"a": None},
    "{a: {b: c}}": {"a": {"b": "c"}},
}


def words_of(kinds):
    """Words that the type of a field names."""
    for kind in kinds:
        if get_origin(kind) is Literal:
            yield from get_args(kind)
        elif get_origin(kind) is list:
            yield from words_of(get_args(kind)[:1])
        elif isinstance(kind, type) and issubclass(kind, Enum):
            yield from (member.value for member in kind)


def parser_accepts(name, text, tmp_path):
    """Whether the parser can tell what a value is: only its type, no rule."""
    file = tmp_path / "c.yaml"
    file.write_text(f"{name}: {text}\n", encoding="utf-8")
    try:
        READER.read(name, read_yaml(str(file))[0].value)
    except ValueError:
        return False
    return True


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator.check_schema(json_schema(ScoreConfig))
    assert "preset" not in json_schema(ScoreConfig)["properties"]


def test_every_field_is_described_and_no_other_key_is_allowed():
    properties = SCHEMA["properties"]
    assert properties.keys() == {*FIELDS, "preset", "preftune_version"}
    docs = field_docs(ExperimentConfig)
    assert all(properties[name]["description"] == docs[name] for name in FIELDS)
    assert not VALIDATOR.is_valid({"learning_rat": 1e-6})
    assert all(VALIDATOR.is_valid({"preset": name}) for name in preset_names())
    assert not VALIDATOR.is_valid({"preset": "tulu"})


@pytest.mark.parametrize("name", FIELDS)
def test_schema_and_parser_agree_on_every_field(name, tmp_path):
    spelled = [*words_of(READER.kinds[name]), *READER.spellings[name]]
    cases = SCALARS | COMPOUND | {f"'{word}'": word for word in spelled}
    accepted = {text for text in cases if parser_accepts(name, text, tmp_path)}
    in_schema = {text for text, value in cases.items() if VALIDATOR.is_valid({name: value})}
    if name in KNOBS and not KNOBS[name].choices:
        # The schema knows the ranges of knobs, which the type does not.
        assert {"-3"} <= accepted - in_schema <= {"-3", "1"}
    else:
        assert accepted == in_schema
    assert {f"'{word}'" for word in spelled} <= accepted
    assert accepted < set(cases)
    assert (NoneType in READER.kinds[name]) == ("null" in accepted)


@pytest.mark.parametrize("name", FIELDS)
def test_defaults_are_valid(name):
    if "default" in SCHEMA["properties"][name]:
        assert VALIDATOR.is_valid({name: SCHEMA["properties"][name]["default"]})


def test_resolved_configs_and_presets_are_valid():
    needed = ["--model_name_or_path", "m", "--dataset_name", "d"]
    for preset in preset_names():
        values = parse_config(ExperimentConfig, ["--preset", preset, *needed]).to_dict()
        VALIDATOR.validate(values | {"preftune_version": "0.1.0"})
    assert VALIDATOR.is_valid(None)  # an empty file


def test_ranges_of_knobs_are_those_of_the_losses():
    for value, valid in [(0, False), (0.1, True), (-1, False)]:
        assert VALIDATOR.is_valid({"beta": value}) is valid
        if not valid:
            with pytest.raises(ConfigError):
                ExperimentConfig(model_name_or_path="m", dataset_name="d", beta=value)
    assert not VALIDATOR.is_valid({"label_smoothing": 0.5})
    assert VALIDATOR.is_valid({"gamma_beta_ratio": 0})
