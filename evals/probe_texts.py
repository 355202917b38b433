"""Texts of the probe tasks of a run, which the text that SAEs are trained and judged on must not hold (DATA 7).

Torch-free.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from evals.language_tasks import catalogue_sha256
from evals.probe_activations import OwnTask, ProbeConfig
from evals.probe_datasets import raw_rows, read_table, task_table, tasks_sha256
from sae.errors import MissingAsset
from sae.kept_out import KeptOut
from sae.manifest import sha256_file

if TYPE_CHECKING:
    from evals.run_config import RunConfig

MADE = ("base64",)
"""Transforms whose prompts are made here and stand in no text."""


def kept_out(cfg: "RunConfig") -> KeptOut | None:
    """What the text of a run is cleaned of; None where there is nothing to clean it of.

    Texts of one's own: the preset's tasks and own ones, whatever --evals names, so that its parts share their
    artefacts. The default text is free of the built-in tasks: own ones, if it holds any of their prompts.
    """
    if not cfg.decontaminate:
        return None
    sizes = ProbeConfig.of_preset(cfg.preset, own=cfg.task_csv)
    tasks = sizes.tasks if cfg.texts != "default" else ()
    own = [OwnTask.parse(text) for text in cfg.task_csv]
    if not tasks and not own:
        return None
    found = KeptOut(_name(tasks, own), partial(_prompts, tasks, own))
    return None if cfg.texts == "default" and not found.touches_default() else found


def _name(tasks: Sequence[str], own: Sequence[OwnTask]) -> dict[str, str]:
    from sae.assets import find

    name = {f"own:{task.name}": f"{sha256_file(task.path)}:{task.prompt}" for task in own}
    if tasks:
        name |= {"tasks": ",".join(tasks), "table": tasks_sha256(), "sae_probes": find("sae_probes").wheel_sha256}
    if any(task_table()[task].get("transform") == "languages" for task in tasks):
        name["catalogues"] = catalogue_sha256()
    return name


def _prompts(tasks: Sequence[str], own: Sequence[OwnTask]) -> Iterator[str]:
    for task in tasks:
        if task_table()[task].get("transform") in MADE:
            continue
        try:
            rows, _ = raw_rows(task)
        except MissingAsset as error:
            raise MissingAsset(f"{error}\n  or leave the text as it is: --no-decontaminate") from error
        yield from {row.prompt for row in rows}
    for one in own:
        yield from {prompt for prompt, _ in read_table(one.path, one.prompt, one.label)}
