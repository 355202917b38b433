"""Rows of ``train.jsonl`` sent to Weights & Biases as well, when asked. Free of torch; the package is optional."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from sae.errors import MissingExtra

logger = logging.getLogger(__name__)


class Mirror(Protocol):
    """Where rows go beside the file."""

    def write(self, row: Mapping[str, Any]) -> None:
        """One row; its ``step`` orders it."""

    def close(self) -> None:
        """No more rows."""


MakeMirror = Callable[[str, Mapping[str, Any]], Mirror]
"""(sae_id, configuration) -> a mirror of one SAE's log."""


class WandbMirror:
    """One wandb run per SAE, named and identified by its sae_id, so that a resumed training goes on in the same run.

    The file stays the record: what wandb refuses, or cannot send, is warned of once and does not stop training. Key and
    mode are wandb's own (``WANDB_API_KEY``, ``WANDB_MODE``). :class:`sae.errors.MissingExtra` without the package.
    """

    def __init__(self, project: str, sae_id: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingExtra("wandb", "wandb") from None
        self._broken = False
        self._run: Any = wandb.init(
            project=project, name=sae_id, id=sae_id, resume="allow", reinit="create_new", config=dict(config)
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """Send the numbers of a row."""
        self._attempt(lambda: self._run.log({k: v for k, v in row.items() if v is not None}, step=row["step"]))

    def close(self) -> None:
        """End the run."""
        self._attempt(self._run.finish)

    def _attempt(self, act: Callable[[], object]) -> None:
        if self._broken:
            return
        try:
            act()
        except Exception as error:  # whatever a service raises, the training matters more
            self._broken = True
            logger.warning("wandb: %s: %s; train.jsonl goes on alone", type(error).__name__, error)


def to_wandb(project: str) -> MakeMirror:
    """Mirrors in one wandb project."""
    return lambda sae_id, config: WandbMirror(project, sae_id, config)
