# SPDX-License-Identifier: Apache-2.0
"""Settings: origins of the values, and values that are refused."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from msgspec import structs

from kvxfer.config import MAX_S, OTHER_VARIABLES, Settings, names
from kvxfer.errors import ConfigError


def test_argument_before_environment_before_default():
    """An explicit value wins over a variable, a variable over the default, and each says where it came from."""
    environ = {
        "KVXFER_LEASE_S": "7.5",
        "KVXFER_RETRY_INTERVAL_S": "2",
        "KVXFER_MAX_LEASES": "12",
        "KVXFER_UNREAD_LEASE_S": "",
        "OTHER": "x",
    }
    settings = Settings.resolve(environ=environ, lease_s=9, unread_lease_s=None)
    assert (settings.lease_s, settings.retry_interval_s, settings.max_leases, settings.unread_lease_s) == (
        9,
        2.0,
        12,
        Settings().unread_lease_s,
    )
    assert (
        "lease_s=9.0 (argument)" in settings.describe()
        and "retry_interval_s=2.0 (KVXFER_RETRY_INTERVAL_S)" in settings.describe()
    )
    assert all(name in settings.describe() for name in names())


def test_the_process_environment_is_read(monkeypatch):
    """Without an explicit mapping the variables of this process count."""
    monkeypatch.setenv("KVXFER_QUARANTINE_S", "0.25")
    assert Settings.resolve().quarantine_s == 0.25
    assert Settings().quarantine_s == 1.0


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "5", None, True, MAX_S * 2, 10**400])
@pytest.mark.parametrize("name", ["lease_s", "max_leases"])
def test_values_that_make_no_sense(name, value):
    """A value that is no positive number within reason is refused with its name."""
    with pytest.raises(ConfigError, match=name):
        Settings(**{name: value})


def test_a_count_is_whole():
    """A count that is no whole number is refused."""
    with pytest.raises(ConfigError, match="whole"):
        Settings(max_leases=1.5)


def test_an_origin_that_is_no_mapping():
    """The origins of values are a mapping."""
    with pytest.raises(ConfigError, match="origin must be a mapping"):
        Settings(origin="argument")


def test_unknown_names_are_refused():
    """A misspelt setting is refused, with the known ones."""
    with pytest.raises(ConfigError, match=r"lease_seconds.*lease_s"):
        Settings.resolve(environ={}, lease_seconds=3)


@pytest.mark.parametrize("text", ["abc", "-1", "0", "nan", "1e", "1.5.2"])
def test_a_bad_variable_is_named(text):
    """The error of a variable names the setting, the value, the variable, and the values that are allowed."""
    with pytest.raises(ConfigError) as caught:
        Settings.resolve(environ={"KVXFER_LEASE_S": text})
    assert str(caught.value) == (
        f"lease_s must be a number of seconds above 0 and up to 31622400, not {text!r} (KVXFER_LEASE_S)"
    )


@pytest.mark.parametrize("value", [0, -5, (1 << 24) + 1, 1 << 70])
def test_arguments_and_variables_are_refused_alike(value):
    """The same value is refused in the same words, with its origin, whether it is an argument or text of the environment."""
    text = str(value)
    with pytest.raises(ConfigError) as of_argument:
        Settings.resolve(environ={}, max_leases=value)
    with pytest.raises(ConfigError) as of_variable:
        Settings.resolve(environ={"KVXFER_MAX_LEASES": text})
    allowed = "max_leases must be a whole number from 1 to 16777216"
    assert str(of_argument.value) == f"{allowed}, not {value} (argument)"
    assert str(of_variable.value) == f"{allowed}, not {text!r} (KVXFER_MAX_LEASES)"


def test_text_is_no_number_in_an_argument():
    """Only the environment may give numbers as text."""
    with pytest.raises(ConfigError, match=r"not '5' \(argument\)"):
        Settings.resolve(environ={}, lease_s="5")


def test_equality_looks_at_values_only():
    """Two settings with the same values are equal and hash alike, wherever the values come from."""
    by_variable = Settings.resolve(environ={"KVXFER_LEASE_S": "5"})
    assert by_variable == Settings(lease_s=5) != Settings(lease_s=6)
    assert hash(by_variable) == hash(Settings(lease_s=5.0)) and by_variable != 5
    assert structs.replace(by_variable, max_leases=3) == Settings(lease_s=5, max_leases=3)
    with pytest.raises(ConfigError, match="max_leases"):
        structs.replace(by_variable, max_leases=0)


def test_whole_numbers_of_the_environment_are_whole():
    """A count given as a fraction in the environment is refused too."""
    with pytest.raises(ConfigError, match="KVXFER_MAX_LEASES"):
        Settings.resolve(environ={"KVXFER_MAX_LEASES": "2.5"})


def test_unknown_variables_are_told_once(caplog):
    """An unknown KVXFER_* variable is a warning with the nearest known name, once; the variables of kvxfer are none."""
    known = {"KVXFER_LEASE_S": "5", **dict.fromkeys(OTHER_VARIABLES, "")}
    strange = {"KVXFER_LEASE_SECONDS": "5", "KVXFER_READ_TIMEOUT": "1", "KVXFER_XYZ": "1", "OTHER_LEASE_S": "1"}
    for _ in range(3):
        assert Settings.resolve(environ=known | strange).lease_s == 5
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3
    assert "'KVXFER_LEASE_SECONDS' means nothing to kvxfer and is ignored; did you mean KVXFER_LEASE_S?" in told[0]
    assert "KVXFER_READ_TIMEOUT' means nothing to kvxfer and is ignored; did you mean KVXFER_READ_TIMEOUT_S?" in told[1]
    assert "KVXFER_XYZ' means nothing" in told[2] and "KVXFER_SECRET_FILE" in told[2]


def test_the_variables_of_this_repository_are_known():
    """Each KVXFER_* variable that the product reads is a known one."""
    root = Path(__file__).parents[2]
    read = {
        name
        for folder in ("kvxfer", "adapters", "integrations")
        for path in (root / folder).rglob("*.py")
        for name in re.findall(r"KVXFER_[A-Z_]*[A-Z]", path.read_text())
    }
    settings = {f"KVXFER_{name.upper()}" for name in names()}
    assert read - settings - {"KVXFER_SIDE_CHANNEL"} <= set(OTHER_VARIABLES)
    assert len(read & set(OTHER_VARIABLES)) == len(OTHER_VARIABLES)
