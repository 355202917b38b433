"""``sae.load``: any SAE from a local path or the hub, native or foreign, recognised by its files; nothing is executed.

Every import is run once against the naive forward pass of its own tensors (:mod:`sae.agreement`), so that a fault in a
folding or in a mapping cannot pass silently.
"""

import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from sae import adapt, agreement, checkpoint, hub, import_calibration
from sae.base import SAE
from sae.config import to_dict
from sae.errors import ArtefactError
from sae.manifest import MANIFEST, is_complete, key_of, writing
from sae.plugins import find, names
from sae.portable import Format, ImportOptions, Portable, check

FORMATS = "sae.formats"
MAX_LOOKED_AT = 100
"""Entries of a folder that are looked at for a hint in an error message."""
NATIVE, UNKNOWN = adapt.NATIVE, adapt.UNKNOWN


def recognise(path: Path) -> str:
    """Name of the one format that the files at ``path`` have: ``native`` or a plug-in of ``sae/formats``.

    ``ArtefactError``: nothing there, no format known, or several of them.
    """
    if not path.exists():
        raise ArtefactError(f"{path} does not exist; expected a local file or folder, or org/repo/... of the hub")
    found = _formats_of(path)
    if len(found) == 1:
        return found[0]
    if found:
        raise ArtefactError(f"{path} holds files of {' and of '.join(found)}; give each a folder, or name one file")
    inside = sorted(p.name for p in path.iterdir())[:12] if path.is_dir() else [path.name]
    known = "; ".join(plugin(name).title for name in names(FORMATS))
    near = _near(path)
    hint = f"did you mean {' or '.join(map(str, near))}?" if near else f"known are saescope's own folder, {known}"
    raise ArtefactError(f"{path} is no SAE of a known format: found {inside}; {hint}")


def _formats_of(path: Path) -> list[str]:
    native = [NATIVE] if path.is_dir() and _is_native(path) else []
    return native + [name for name in names(FORMATS) if plugin(name).recognises(path)]


def _near(path: Path) -> list[Path]:
    """SAEs around a path that is none: the folder of a file, or up to three things inside a folder."""
    if path.is_file():
        return [path.parent] if _formats_of(path.parent) else []
    inside = sorted(path.glob("*"))[:MAX_LOOKED_AT] + sorted(path.glob("*/*"))[:MAX_LOOKED_AT]
    return [p for p in inside if _formats_of(p)][:3]


def plugin(name: str) -> Format:
    """The format of this name; ``UnknownPlugin`` with near names."""
    found: Format = find(FORMATS, name)
    return found


def _is_native(folder: Path) -> bool:
    if (folder / checkpoint.REFERENCE).is_file():
        return True
    path = folder / checkpoint.CFG
    text = path.read_text(errors="replace")[:65_536] if path.is_file() else ""
    return re.search(r'"format"\s*:\s*"saescope"', text) is not None


NATIVE_FILES = (checkpoint.WEIGHTS, checkpoint.CFG, checkpoint.REFERENCE, MANIFEST, "stats.safetensors")


def locate(path: str | Path) -> tuple[Path, str | None]:
    """Where the SAE lies here, and its origin on the hub: a path as it is, an id of the hub once it is fetched.

    ``ArtefactError`` before anything is fetched (:func:`sae.hub.fetch`).
    """
    if not hub.is_ref(str(path)):
        return Path(path), None
    found = _fetched(str(path))
    return found.path, found.origin


@lru_cache
def _fetched(ref: str) -> hub.Fetched:
    """One commit for the whole process: what is inspected is what is converted."""
    formats = {name: getattr(plugin(name), "files", ()) for name in names(FORMATS)}
    return hub.fetch(ref, {NATIVE: NATIVE_FILES} | formats)


def read(path: str | Path, options: ImportOptions | None = None) -> Portable:
    """The foreign SAE at ``path``, a local path or an id of the hub, checked but not yet in our class."""
    options = options or ImportOptions()
    path, origin = locate(path)
    name = recognise(path)
    if name == NATIVE:
        return adapt.from_sae(checkpoint.load(path))
    found = check(plugin(name).read(path, options), options)
    if found.lacks:
        assert options.calibrate_on is not None, "a reader lets a value lack only where it can be measured"
        found = import_calibration.fill(found, options.calibrate_on(_placed(found, options)))
    if found.activation == "topk_signed" and options.activation == "topk":
        recipe = (*found.recipe, "negative values of the K largest dropped, as asked for")
        found = replace(found, activation="topk", architecture="topk", recipe=recipe)
    found = _placed(found, options)
    return found if origin is None else replace(found, extra={**found.extra, "hub": origin})


def _placed(p: Portable, options: ImportOptions) -> Portable:
    return p if options.hookpoint is None else replace(p, hookpoint=options.hookpoint)


def load(path: str | Path, *, device: str = "cpu", options: ImportOptions | None = None) -> SAE:
    """The SAE at a local path or of the hub (``org/repo[/subfolder][@revision]``), whatever its format: weights in
    float32 without gradients, self-checked.

    ``ArtefactError`` for files that are absent, damaged, of no or of several formats; ``ConfigError`` for a
    configuration that contradicts the tensors; ``Unsupported`` for what saescope cannot run or refuses to read;
    ``CheckpointMismatch`` where codes or reconstructions are not those of the file's own recipe.
    """
    local, _ = locate(path)
    if recognise(local) == NATIVE:
        return checkpoint.load(local, device=device)
    found = read(path, options)
    sae = adapt.to_sae(found)
    agreement.self_check(sae, found)
    return sae.to(device)


def import_into(root: Path, path: str | Path, options: ImportOptions | None = None) -> Path:
    """The native folder of the SAE at ``path``: itself if native, else ``root/saes/<sae_id>/``, written once.

    The reference sample is :func:`sae.agreement.sample_inputs`, as no language model is at hand; the manifest says so.
    """
    local, _ = locate(path)
    if recognise(local) == NATIVE:
        return local
    found = read(path, options)
    sae = adapt.to_sae(found)
    folder = root / "saes" / sae.sae_id
    if is_complete(folder):
        return folder
    result = agreement.self_check(sae, found)
    inputs = {name: str(sha) for name, sha in (sae.cfg.source or {})["files"].items()}
    key = key_of("saes", adapt.IMPORT_VERSION, to_dict(sae.cfg), inputs)
    with writing(
        folder, kind="saes", key=key, stage_version=adapt.IMPORT_VERSION, config=to_dict(sae.cfg), inputs=inputs
    ) as out:
        checkpoint.save(sae, out.path, agreement.sample_inputs(found))
        out.counts.update({"sae_id": sae.sae_id, "reference": "synthetic inputs", "self_check": result.facts()})
    return folder
