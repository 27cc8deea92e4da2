"""Errors that hold several problems."""

import pytest

from preftune.errors import ConfigError, DataError, Findings, Interrupted, ModelError


def collect(*errors: Exception) -> Findings:
    findings = Findings()
    for error in errors:
        with findings:
            raise error
    return findings


def test_one_finding_is_raised_as_it_is():
    error = ModelError("m")
    with pytest.raises(ModelError) as caught:
        collect(error).raise_all()
    assert caught.value is error


def test_several_are_one_error_and_each_is_told_once():
    findings = collect(DataError("a\nb"), ConfigError(["c", "d"]), DataError("a\nb"))
    with pytest.raises(ConfigError) as caught:
        findings.raise_all()
    assert caught.value.problems == ["a\nb", "c", "d"]
    assert str(caught.value) == "3 problems:\n- a\n  b\n- c\n- d"


def test_several_of_one_class_keep_it():
    with pytest.raises(DataError, match="2 problems"):
        collect(DataError("a"), DataError("b")).raise_all()


def test_nothing_found_raises_nothing():
    Findings().raise_all()


def test_faults_of_the_program_pass_through():
    with pytest.raises(ZeroDivisionError):
        collect(ZeroDivisionError())


def test_what_is_no_mistake_of_the_user_passes_through():
    with pytest.raises(Interrupted):
        collect(Interrupted("saved"))
