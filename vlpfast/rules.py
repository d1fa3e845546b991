"""Rules of a configuration as sentences, each of which is its own error message.

    "[fusion.class_token] needs {fusion.kind 'concat'} and {embed_dim > 0}"

Where all settings in brackets are so, all in braces must be. A setting is a path, then what it is:
literals with "or" between them, "> 0", ">= 1", "in (0, 1]", "between 0 and vision.depth", "a
multiple of text.heads"; nothing stands for anything but 0, False and "". In place of a literal
there may be another path. "must be", and what explains a path before it, may stand between the two.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterable
from typing import Any

_MARKED = re.compile(r"\[([^\]]+)\]|\{([^}]+)\}")
_PATH = re.compile(r"[a-z]\w*\.\w+")
_BELOW = {"(": operator.lt, "[": operator.le, ")": operator.lt, "]": operator.le}


def check_rules(config: object, rules: Iterable[str], prefix: str = "") -> None:
    """Raises ValueError with the first rule that `config` breaks, and the values that it has;
    errors have `prefix` before the paths of settings.
    """
    for rule in rules:
        marked = _MARKED.findall(rule)
        if not all(_Setting(config, when).holds() for when, _ in marked if when):
            continue
        needed = [_Setting(config, need) for _, need in marked if need]
        if not all(setting.holds() for setting in needed):
            told = lambda mark: prefix + _Setting(config, mark[1] or mark[2]).told(bool(mark[1]))
            *others, last = (repr(setting.value) for setting in needed)
            values = f"{', '.join(others)} and {last}" if others else last
            raise ValueError(f"{_MARKED.sub(told, rule)}, got {values}")


class _Setting:
    def __init__(self, config: object, text: str) -> None:
        self.config, self.text = config, text
        self.path, _, want = text.partition(" ")
        self.want = want.rpartition("must be ")[2]
        self.value = self._at(self.path)

    def holds(self) -> bool:
        value, want = self.value, self.want
        if not want:
            return bool(value)
        if match := re.fullmatch(r"(>=?) (\S+)", want):
            return _BELOW["[" if match[1] == ">=" else "("](self._operand(match[2]), value)
        if match := re.fullmatch(r"in ([\[(])(\S+), (\S+)([\])])", want):
            low, high = self._operand(match[2]), self._operand(match[3])
            return _BELOW[match[1]](low, value) and _BELOW[match[4]](value, high)
        if match := re.fullmatch(r"between (\S+) and (\S+)", want):
            return self._operand(match[1]) < value < self._operand(match[2])
        if match := re.fullmatch(r"a multiple of (\S+)", want):
            return value % self._operand(match[1]) == 0
        return value in [self._operand(text) for text in want.split(" or ")]

    def told(self, given: bool) -> str:
        """As errors have it: of choices the one that is given, and of other paths their values."""
        if given and " or " in self.want:
            return f"{self.path} {self.value!r}"
        value_of = lambda match: f"{match[0]} {self._at(match[0])!r}"
        return self.path + _PATH.sub(value_of, self.text.removeprefix(self.path))

    def _operand(self, text: str) -> Any:
        return self._at(text) if _PATH.fullmatch(text) else ast.literal_eval(text)

    def _at(self, path: str) -> Any:
        return operator.attrgetter(path)(self.config)
