"""The exception that a reward raises when it cannot decide between right and wrong."""

from __future__ import annotations


class Unscored(Exception):
    """The response could not be judged, through no fault of its own: it counts neither as right nor as wrong."""


class NotApplicable(Unscored):
    """The reward says nothing of this response; of several rewards the others still count."""
