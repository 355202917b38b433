"""``python -m sae convert IN OUT --to FORMAT``: any SAE in, any SAE out, with what was measured before and after.

What is written is read back by its own importer and compared with the source on the same inputs; only then is the
folder renamed into place. An export that would lose meaning is refused with the reason (FORMATS 6).
"""

import os
import shutil
from pathlib import Path

from torch import Tensor

from sae import adapt, agreement, checkpoint, loading
from sae.agreement import Agreement
from sae.config import to_dict
from sae.errors import ArtefactError, CheckpointMismatch, ConfigError, Unsupported
from sae.manifest import key_of, writing
from sae.plugins import names
from sae.portable import ImportOptions, Portable, check

CHECK_TOKENS = 1_024


def convert(
    source: str | Path, out: Path, to: str, *, options: ImportOptions | None = None, x_ND: Tensor | None = None,
    force: bool = False,
) -> Agreement:  # fmt: skip
    """Write the SAE at ``source`` (a path or an id of the hub) as the folder ``out`` in format ``to``.

    Returns the comparison on ``x_ND``.

    ``x_ND``: raw activations, by default :func:`sae.agreement.sample_inputs`. ``Unsupported`` where the format cannot
    say what the SAE means, ``CheckpointMismatch`` where what was written does not do the same, ``ArtefactError`` for
    an ``out`` that exists (``force`` replaces it).
    """
    known = [loading.NATIVE, *names(loading.FORMATS)]
    if to not in known:
        raise ConfigError(f"--to {to}: no such format; known: {', '.join(known)}")
    if out.exists() and not force:
        raise ArtefactError(f"{out} exists; choose another folder or pass --force")
    if to == loading.NATIVE and loading.recognise(loading.locate(source)[0]) == loading.NATIVE:
        raise ConfigError(f"{source} is in saescope's own format already")
    p = loading.read(source, options)
    x_ND = agreement.sample_inputs(p, CHECK_TOKENS) if x_ND is None else x_ND
    if to == loading.NATIVE:
        return _to_native(p, out, x_ND)
    plugin = loading.plugin(to)
    if not hasattr(plugin, "write"):
        raise Unsupported(f"{plugin.title} can be read but not written; --to native or saelens can")
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        plugin.write(p, temporary)
        found = agreement.compare(p, _read_back(to, temporary), x_ND)
        _verdict(found, f"{source} as {to}")
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found


def _read_back(to: str, folder: Path) -> Portable:
    files = sorted(folder.iterdir())
    path = folder if loading.plugin(to).recognises(folder) else files[0]
    recognised = loading.recognise(path)
    if recognised != to:
        raise CheckpointMismatch(f"what was written as {to} is recognised as {recognised}; this is a fault of saescope")
    return check(loading.plugin(to).read(path, ImportOptions()), ImportOptions())


def _to_native(p: Portable, out: Path, x_ND: Tensor) -> Agreement:
    sae = adapt.to_sae(p)
    found = agreement.compare(p, sae, x_ND)
    _verdict(found, f"{p.where} as {loading.NATIVE}")
    inputs = {name: str(sha) for name, sha in (sae.cfg.source or {}).get("files", {}).items()}
    key = key_of("saes", adapt.IMPORT_VERSION, to_dict(sae.cfg), inputs)
    with writing(
        out, kind="saes", key=key, stage_version=adapt.IMPORT_VERSION, config=to_dict(sae.cfg), inputs=inputs
    ) as w:
        checkpoint.save(sae, w.path, x_ND)
        w.counts.update({"sae_id": sae.sae_id, "self_check": found.facts()})
    return found


def _verdict(found: Agreement, what: str) -> None:
    if not found.passed:
        raise CheckpointMismatch(
            f"{what} does not do the same: codes differ by {found.codes:.2g}, reconstructions by "
            f"{found.reconstructions:.2g}, equal sets on {found.same_sets:.1%} of {found.tokens} tokens; "
            "nothing is written"
        )
