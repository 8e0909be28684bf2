"""What the places that have come to a meeting do there: every one of them decides the same, from
what all have said of themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


class PlacesError(ValueError):
    """This place cannot train with the others; the message names the setting or says why."""


NEW = -1  # the round of a place that has no shared weights yet


@dataclass(frozen=True)
class Standing:
    """What a place says of itself.

    round: the number of outer steps behind its shared weights, or NEW. history: names these
    weights: places with the same round and history have the same. taken: local steps since then.
    due: it has come for an outer step. settings: those that must be the same in every place.
    data: a digest of its data and seed.
    """

    round: int
    history: str
    taken: int
    due: bool
    settings: dict[str, Any]
    data: str

    def described(self) -> dict[Any, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Member:
    """A place at a meeting: its name, the address of its store, what it says."""

    name: str
    store: str
    standing: Standing


@dataclass(frozen=True)
class Agenda:
    """members: those that take part, by name. source: the one whose shared weights count. joining:
    the members that take them. contributing: the members whose local steps go into the outer
    step, none if there is none. refused: names and reasons of places with other settings. waits:
    a new run that waits for more places.
    """

    members: tuple[Member, ...]
    source: Member
    joining: tuple[Member, ...]
    contributing: tuple[Member, ...]
    refused: dict[str, str] = field(default_factory=dict)
    waits: bool = False

    @property
    def round(self) -> int:
        """The round after the meeting."""
        before = self.source.standing.round
        return before + 1 if before == NEW or self.contributing else before

    def same_data(self, name: str) -> list[str]:
        """The other members with the data and the seed of the member of this name."""
        own = next(m for m in self.members if m.name == name)
        return [
            m.name for m in self.members if m is not own and m.standing.data == own.standing.data
        ]


def agenda(present: Sequence[Member], start: int) -> Agenda:
    """The place with the most rounds (the first by name) has the weights that count; a place with
    others takes them and contributes nothing. If any place with these weights is due, all with
    local steps contribute.
    """
    ordered = sorted(present, key=lambda member: member.name)
    source = max(ordered, key=lambda member: member.standing.round)
    refused, members = {}, []
    for member in ordered:
        reason = _differs(member.standing.settings, source.standing.settings)
        if reason:
            refused[member.name] = reason
        else:
            members.append(member)
    new = source.standing.round == NEW
    # A new run's places all begin with the weights of the first.
    alike = [m for m in members if m is source or (not new and _key(m) == _key(source))]
    joining = tuple(m for m in members if m not in alike)
    due = not new and any(m.standing.due for m in alike)
    contributing = tuple(m for m in alike if due and m.standing.taken > 0)
    waits = new and len(members) < start
    return Agenda(tuple(members), source, joining, contributing, refused, waits)


def _key(member: Member) -> tuple[int, str]:
    return member.standing.round, member.standing.history


def _differs(mine: dict[str, Any], theirs: dict[str, Any]) -> str:
    for key in sorted({*mine, *theirs}):
        if mine.get(key) != theirs.get(key):
            return f"{key}: got {mine.get(key)}, takes that of the other places, {theirs.get(key)}"
    return ""
