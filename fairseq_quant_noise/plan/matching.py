"""Find the rules of a plan that match each name."""

import re
from collections.abc import Sequence
from typing import Protocol, TypeVar

from ..errors import UserError


class Rule(Protocol):
    """What `match_rules` requires of a rule."""

    @property
    def match(self) -> str:
        """A regular expression."""


R = TypeVar("R", bound=Rule)


def match_rules(what: str, rules: Sequence[R], names: Sequence[str]) -> list[list[R]]:
    """Find for each name the rules whose regular expression matches the whole of it, in order.

    Raises:
        UserError: a rule matches no name.
    """
    matches: list[list[R]] = [[] for _ in names]
    for rule in rules:
        hits = [i for i, name in enumerate(names) if re.fullmatch(rule.match, name)]
        if not hits:
            some = ", ".join([*names[:2], "…", *names[-2:]] if len(names) > 4 else names) or "none"
            raise UserError(
                f"{what} rule '{rule.match}' matches no weight of this model; its weights are {some} "
                "(`fairseq-quant-noise plan` lists them; match needs the whole name)"
            )
        for i in hits:
            matches[i].append(rule)
    return matches
