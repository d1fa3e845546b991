"""Rules as sentences: what each says, holds and is told."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest

from vlpfast.models import checks as of_models
from vlpfast.models import list_presets, preset_config
from vlpfast.objectives import ObjectivesConfig
from vlpfast.objectives import config as of_objectives
from vlpfast.rules import _MARKED, _Setting, check_rules


@dataclass(frozen=True)
class _Inner:
    kind: str = "a"
    depth: int = 4
    rate: float = 0.5


@dataclass(frozen=True)
class _Outer:
    on: bool = True
    width: int = 12
    inner: _Inner = field(default_factory=_Inner)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("{width 12}", None),
        ("{width 11 or 12}", None),
        ("{inner.kind must be 'b' or 'c'}", "inner.kind must be 'b' or 'c', got 'a'"),
        ("{width of all must be 11}", "width of all must be 11, got 12"),
        ("{width >= 12} {inner.depth > 3}", None),
        ("{width > 12}", "width > 12, got 12"),
        ("{inner.depth >= 5}", "inner.depth >= 5, got 4"),
        ("{inner.rate in [0.5, 1)} {inner.rate in (0, 0.5]}", None),
        ("{inner.rate must be in (0.5, 1]}", "inner.rate must be in (0.5, 1], got 0.5"),
        ("{inner.rate must be in [0, 0.5)}", "inner.rate must be in [0, 0.5), got 0.5"),
        ("{inner.depth between 3 and 5}", None),
        ("{inner.depth between 0 and inner.depth}", "between 0 and inner.depth 4, got 4"),
        ("{width a multiple of inner.depth}", None),
        ("{inner.depth a multiple of inner.rate}", None),
        ("{width must be inner.depth}", "width must be inner.depth 4, got 12"),
        (
            "[on] needs {inner.kind 'b'} and {width 1}",
            "on needs inner.kind 'b' and width 1, got 'a' and 12",
        ),
        ("[width > 12] needs {inner.kind 'b'}", None),
        ("[inner.kind 'a' or 'b'] needs {on False}", "inner.kind 'a' needs on False, got True"),
        ("[inner.kind 'b' or 'c'] with [on] needs {on False}", None),
    ],
    ids=str,
)
def test_a_rule_is_its_own_error(rule, told):
    if told is None:
        check_rules(_Outer(), (rule,))
        return
    with pytest.raises(ValueError, match=f"{re.escape(told)}$"):
        check_rules(_Outer(), (rule,))


def test_paths_have_the_prefix():
    with pytest.raises(ValueError, match=r"^run\.on needs run\.width 1, got 12$"):
        check_rules(_Outer(), ("[on] needs {width 1}",), "run.")


@pytest.mark.parametrize("rule", ["{nothing 1}", "{width some}", "{width > wide}"])
def test_what_is_no_rule_raises(rule):
    with pytest.raises((AttributeError, ValueError)):
        check_rules(_Outer(), (rule,))


def test_all_rules_can_be_read():
    """Also those that no configuration of a test comes to."""
    models = [preset_config(preset) for preset in list_presets()]
    for config, rules in (
        *((model, of_models._RULES) for model in models),
        (ObjectivesConfig(), of_objectives._RULES),
    ):
        for rule in rules:
            marked = _MARKED.findall(rule)
            assert any(need for _, need in marked), rule
            for when, need in marked:
                setting = _Setting(config, when or need)
                assert isinstance(setting.holds(), bool), rule
                assert setting.told(bool(when)).startswith(setting.path)
