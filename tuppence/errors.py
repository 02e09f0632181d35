"""What can go wrong, in three kinds; the command line turns each into one line and an exit code."""

from __future__ import annotations


class UserError(ValueError):
    """The person's input is wrong: one line naming the value, the rule and the remedy."""

    exit_code = 2


class DoesNotFit(ValueError):
    """The plan does not fit the budget or the machine."""

    exit_code = 3


class Fault(RuntimeError):
    """Something broke that is not the person's input, such as a damaged shard: one clear line."""

    exit_code = 1


class Overtaken(Fault):
    """A newer attempt has the run: this one must not be tried again, or it would take it back."""

    exit_code = 4
