"""SAEs on the Hugging Face hub: ``org/repo[/subfolder or file][@revision]``, fetched with ``huggingface_hub``.

The hub is asked once for the commit and the sizes of the files; only the files of the SAE that is named are fetched,
at that commit, into the hub's own local cache. Without a network the cache serves. Nothing that was fetched is
executed: it is read like any local file (:mod:`sae.safe_files`).
"""

import contextlib
import re
import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sae.errors import ArtefactError, ConfigError

LIMIT_BYTES = 32 * 2**30
"""Files of one SAE; more is left to ``hf download``, on purpose and by hand."""
TIMEOUT_S = 10.0
PREFIX = "hf:"
SIDECARS = ("cfg.json", "config.json", "config.yaml", "hyperparams.json")
"""Small configurations that are fetched with a file that is named itself."""
SINGLE = (".pt", ".pth", ".npz", ".safetensors")
_REF = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?P<at>(?:/[^/@\\]+)*)/?(?:@(?P<revision>[\w./-]+))?")
_ALIASES = ((r"gemma-scope-", "google/"),)
"""First words of a reference whose organisation may be left out, as SAELens and Gemma Scope's own pages do."""
SHOWN = 8


class HubRef(NamedTuple):
    """A parsed reference."""

    repo: str
    at: str
    """Folder or file inside the repository; "" for its root."""
    revision: str | None

    def __str__(self) -> str:
        return self.repo + (f"/{self.at}" if self.at else "") + (f"@{self.revision}" if self.revision else "")


class Fetched(NamedTuple):
    """What :func:`fetch` leaves."""

    path: Path
    """Local folder or file of the SAE, in the hub's cache."""
    origin: str
    """``org/repo/at@commit``."""


def parse(text: str) -> HubRef | None:
    """The reference in ``text``, or None where it cannot be one (a path with dots, a drive, a leading slash)."""
    forced, text = text.startswith(PREFIX), text.removeprefix(PREFIX).removeprefix("//")
    text = next((owner + text for pattern, owner in _ALIASES if re.match(pattern, text)), text)
    found = _REF.fullmatch(text)
    at = found.group("at").strip("/") if found else ""
    if found is None or ".." in at.split("/"):
        if forced:
            raise ConfigError(f"{PREFIX}{text}: expected {PREFIX}org/repo[/subfolder][@revision]")
        return None
    return HubRef(found.group("repo"), at, found.group("revision"))


def is_ref(text: str) -> bool:
    """Whether to ask the hub: nothing of that name lies here, and it reads like a reference."""
    if text.startswith(PREFIX):
        return True
    path = Path(text)
    # results/saes/typo is a path whose first folder is here, not a repository of the user "results"
    return not path.exists() and not Path(path.parts[0] if path.parts else "").is_dir() and parse(text) is not None


def fetch(text: str, formats: Mapping[str, Iterable[str]], *, limit_bytes: int = LIMIT_BYTES) -> Fetched:
    """The files of one SAE from the hub, or from its local cache where the hub cannot be reached.

    ``formats``: by name, the files an SAE of the format may consist of (patterns relative to its folder). All errors
    are :class:`ArtefactError` and come before anything is fetched: no such repository, no access, no network and
    nothing cached, no SAE at that place, more than ``limit_bytes`` or than the disk has room for.
    """
    ref = parse(text)
    if ref is None:
        raise ConfigError(f"{text!r} is no reference to the hub; expected org/repo[/subfolder][@revision]")
    from huggingface_hub import HfApi, hf_hub_download

    try:
        info = HfApi().model_info(ref.repo, revision=ref.revision, timeout=TIMEOUT_S, files_metadata=True)
    except Exception as error:  # every kind of network, proxy, access and name error ends in one message
        return _cached(ref, f"{type(error).__name__}: {_first_line(error)}", formats)
    sizes = {f.rfilename: int(f.size or 0) for f in info.siblings or ()}
    commit = str(info.sha)
    wanted = select(ref, sizes, formats)
    total = sum(sizes[name] for name in wanted.names)
    if total > limit_bytes:
        raise ArtefactError(
            f"{ref}: its files have {total:,} bytes, at most {limit_bytes:,} are fetched; download them by hand "
            f"(hf download {ref.repo}) and give the folder"
        )
    _check_disk(ref, total)
    for name in wanted.names:
        try:
            path = Path(hf_hub_download(ref.repo, name, revision=commit))
        except Exception as error:
            raise ArtefactError(f"{ref}: fetching {name} failed ({_first_line(error)}); try again") from error
    root = path.parents[name.count("/")]
    _remember(root, ref.revision, commit)
    return Fetched(root / wanted.at, _origin(ref, commit))


def _remember(root: Path, revision: str | None, commit: str) -> None:
    """What a branch or tag meant, where the hub's library keeps it, so that the same words serve without a network."""
    from huggingface_hub import constants

    revision = revision or constants.DEFAULT_REVISION
    pointer = root.parent.parent / "refs" / revision
    if revision == commit or ".." in revision.split("/"):
        return
    with contextlib.suppress(OSError):  # only a convenience: a read-only cache goes without
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.write_text(commit, encoding="utf-8")


class Selection(NamedTuple):
    """Files of one SAE in a repository."""

    names: list[str]
    at: str
    """The folder, or the file where the SAE is one."""


def select(ref: HubRef, names: Iterable[str], formats: Mapping[str, Iterable[str]]) -> Selection:
    """The SAE at ``ref.at`` among the names of a repository; ``ArtefactError`` that says what is near."""
    names = sorted(names)
    if ref.at in names:
        beside = {_join(str(PurePosixPath(ref.at).parent), name) for name in SIDECARS}
        return Selection([ref.at, *(name for name in names if name in beside)], ref.at)
    found: set[str] = set()
    for weights, *others in filter(None, map(tuple, formats.values())):
        if hits := _matches(names, ref.at, weights):
            found.update(hits, *(_matches(names, ref.at, pattern) for pattern in others))
    if found:
        return Selection(sorted(found), ref.at)
    direct = [n for n in names if str(PurePosixPath(n).parent) == (ref.at or ".") and n.endswith(SINGLE)]
    if len(direct) == 1:
        return select(ref._replace(at=direct[0]), names, formats)
    raise ArtefactError(f"{ref} names no SAE: {_near(ref, names, direct)}")


def _origin(ref: HubRef, commit: str) -> str:
    return f"{ref.repo}{'/' + ref.at if ref.at else ''}@{commit}"


def _join(folder: str, name: str) -> str:
    """A path below ``folder`` of a repository; ``../`` goes up, never out."""
    parts = [p for p in PurePosixPath(folder).parts if p != "."]
    for part in PurePosixPath(name).parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


def _matches(names: list[str], at: str, pattern: str) -> list[str]:
    wanted = _join(at, pattern)
    return [n for n in names if n.count("/") == wanted.count("/") and fnmatch(n, wanted)]


def _near(ref: HubRef, names: list[str], direct: list[str]) -> str:
    if direct:
        return f"it holds {len(direct)} files that may be one, name the file: {', '.join(direct[:SHOWN])}"
    below = [n for n in names if n.endswith(SINGLE) and n.startswith(f"{ref.at}/" if ref.at else "")]
    folders = sorted({str(PurePosixPath(n).parent) for n in below or [n for n in names if n.endswith(SINGLE)]})
    if not folders:
        return "the repository holds no tensor files"
    more = f" and {len(folders) - SHOWN:,} more" if len(folders) > SHOWN else ""
    return f"{'below it' if below else 'elsewhere in the repository'} lie {', '.join(folders[:SHOWN])}{more}"


def _cached(ref: HubRef, reason: str, formats: Mapping[str, Iterable[str]]) -> Fetched:
    """The same from the local cache alone."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    home = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=ref.repo, repo_type="model")
    revision = ref.revision or constants.DEFAULT_REVISION
    pointer = home / "refs" / revision
    commit = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else revision
    root = home / "snapshots" / commit
    names = [p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if p.is_file()] if root.is_dir() else []
    if not names:
        raise ArtefactError(
            f"{ref} does not exist here, is not in the local hub cache, and the hub did not give it ({reason}); "
            "expected a local path, or an id org/repo[/subfolder][@revision] that can be reached"
        )
    try:
        wanted = select(ref, names, formats)
    except ArtefactError as error:
        raise ArtefactError(f"{error} (in the local cache; the hub did not answer: {reason})") from None
    return Fetched(root / wanted.at, _origin(ref, commit))


def _check_disk(ref: HubRef, total: int) -> None:
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if total > free:
        raise ArtefactError(f"{ref}: its files have {total:,} bytes, {place} has {free:,} free; set HF_HOME elsewhere")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no detail")
