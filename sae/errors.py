"""Every error a user may meet. A message names the offender, what was expected, and the next step."""

import difflib
from collections.abc import Iterable


class SaescopeError(Exception):
    """Base of all errors that saescope raises on purpose; doors print the message without a traceback."""

    exit_status: int = 1
    """What a command ends with (:mod:`sae.exits`): 1 the work failed, 2 it could not be done as asked."""


class ConfigError(SaescopeError):
    """An option or a configuration value that cannot be used."""

    exit_status = 2


class UnknownPlugin(ConfigError):
    """A plug-in name that no file carries."""


class MissingExtra(SaescopeError):
    """An optional package that is not installed."""

    exit_status = 2

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"the package {package!r} is not installed; run: pip install 'saescope[{extra}]'")


class ArtefactError(SaescopeError):
    """A file or folder of results that is absent, incomplete or damaged."""

    exit_status = 2


class StaleArtefact(ArtefactError):
    """An artefact made under another configuration than the one asked for."""


class CheckpointMismatch(ArtefactError):
    """A loaded SAE does not reproduce its own reference sample."""


class HashMismatch(ArtefactError):
    """A file whose sha256 is not the pinned one."""


class MissingAsset(ArtefactError):
    """An embedded asset that is neither cached nor reachable."""


class DataError(SaescopeError):
    """Input text or labels that cannot be used."""

    exit_status = 2


class LeakError(DataError):
    """Something would be scored that was shown before."""


class Unsupported(SaescopeError):
    """A back-end or a file lacks what was asked of it."""

    exit_status = 2


class NoAnswer(SaescopeError):
    """A language model answered none of the requests; nothing is stored, so that the next run asks again."""


class BudgetExceeded(SaescopeError):
    """The LLM budget is spent; what was paid for is kept."""

    exit_status = 3


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known names, followed by all of them when there are few."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    listing = f" (known: {', '.join(known)})" if 0 < len(known) <= 40 else ""
    return hint + listing


def os_error_text(error: OSError) -> str:
    """What the system said, and of which file: the line that a door prints for a disk that is full or not writable."""
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"
