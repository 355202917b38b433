"""``sae.upload`` and ``python -m sae upload``: an SAE, its card and its measured rows to the hub, as one commit.

The token is the hub library's own (``HF_TOKEN`` or ``hf auth login``); it is never an argument, never logged and never
written. With ``dry_run`` the folder that would be uploaded is left on disk and no network is used.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sae import console, model_card
from sae.errors import ArtefactError, ConfigError
from sae.plugins import names

if TYPE_CHECKING:
    from sae.portable import ImportOptions, Portable

README, METRICS = "README.md", "metrics.jsonl"
PRIVATE = ("manifest.json",)
"""Not uploaded: it names the machine that made the SAE; what a reader needs of it is in cfg.json and the card."""


def upload(
    path: str | Path, repo: str, *, licence: str, rows: Sequence[str | Path] = (), to: str | None = None,
    base_model: str | None = None, subfolder: str = "", private: bool = False, dry_run: str | Path | None = None,
    options: "ImportOptions | None" = None,
) -> str:  # fmt: skip
    """Upload the SAE at ``path`` (any format, or ``to`` another) to ``repo``; returns the URL of the commit.

    ``rows``: folders or files of result rows (``results/rows``); those of these weights make the card's table.
    ``dry_run``: a folder that is written instead, its path returned. Everything is checked before the network is used:
    ``ConfigError`` for a licence, repository or rows that cannot be, or without a token; ``Unsupported`` where the
    format cannot say what the SAE means; ``ArtefactError`` where the hub refuses.
    """
    _check(repo, subfolder, dry_run)
    token = "" if dry_run is not None else _token()
    with tempfile.TemporaryDirectory(prefix="saescope-upload-") as temporary:
        staged = Path(temporary) / "sae"
        stage(path, staged, repo, licence=licence, rows=rows, to=to, base_model=base_model, subfolder=subfolder,
              options=options)  # fmt: skip
        if dry_run is not None:
            shutil.copytree(staged, dry_run)
            return str(dry_run)
        return _send(staged, repo, subfolder, private, token)


def _check(repo: str, subfolder: str, dry_run: str | Path | None) -> None:
    if repo.count("/") != 1 or not model_card.HUB_ID.fullmatch(repo):
        raise ConfigError(f"{repo!r} is no repository of the hub; expected org/name")
    if subfolder.startswith("/") or ".." in subfolder.split("/"):
        raise ConfigError(f"--subfolder {subfolder!r} leaves the repository; expected a relative path")
    if dry_run is not None and Path(dry_run).exists():
        raise ArtefactError(f"{dry_run} exists; choose another folder for --dry-run")


def _token() -> str:
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise ConfigError("no token for the hub; run `hf auth login` or set HF_TOKEN (it is read, never written)")
    return str(token)


def stage(
    path: str | Path, folder: Path, repo: str, *, licence: str, rows: Sequence[str | Path], to: str | None,
    base_model: str | None, subfolder: str, options: "ImportOptions | None",
) -> None:  # fmt: skip
    """Write what will be uploaded into ``folder``: the files of the SAE, ``README.md`` and ``metrics.jsonl``."""
    from sae import loading
    from sae.convert import convert

    local, _ = loading.locate(path)
    p = loading.read(path, options)
    kept = loading.recognise(local)
    model_card.Card(name=repo, licence=licence, library="", base_model=base_model, facts=())  # its own checks, first
    weights, sae_id = _measured_as(p, local)
    found = model_card.find_rows(map(Path, rows))
    measured = model_card.of_weights(found, sae_id, weights) if rows else []
    if to is not None and to != kept:
        convert(path, folder, to, options=options)
        kept = to
    else:
        _copy(p, local, folder)
    for name in PRIVATE:
        (folder / name).unlink(missing_ok=True)
    floors = [row for row in found if str(row["sae_id"]).startswith(model_card.FLOOR)]
    text = model_card.render(_card(p, kept, repo, licence, base_model, subfolder, measured, floors))
    (folder / README).write_text(text, encoding="utf-8")
    if measured:
        lines = (json.dumps(row, sort_keys=True) for row in measured)
        (folder / METRICS).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _measured_as(p: "Portable", local: Path) -> tuple[str, str]:
    """sha256 of the native weights and sae_id: how result rows name this SAE. A foreign SAE is measured after its
    import, so it is written once more to learn them."""
    from sae import adapt, agreement, checkpoint, loading
    from sae.manifest import sha256_file

    if loading.recognise(local) == loading.NATIVE:
        return sha256_file(local / checkpoint.WEIGHTS), p.where
    with tempfile.TemporaryDirectory(prefix="saescope-upload-") as temporary:
        sae = adapt.to_sae(p)
        checkpoint.save(sae, Path(temporary), agreement.sample_inputs(p))
        return sha256_file(Path(temporary) / checkpoint.WEIGHTS), sae.sae_id


def _copy(p: "Portable", local: Path, folder: Path) -> None:
    from sae import loading

    folder.mkdir(parents=True)
    if loading.recognise(local) == loading.NATIVE:
        files = [local / name for name in loading.NATIVE_FILES if (local / name).is_file()]
    else:
        files = list(p.files)
    base = local if local.is_dir() else local.parent
    for file in files:
        inside = file.relative_to(base) if file.is_relative_to(base) else Path(file.name)
        (folder / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / inside)


def _card(
    p: "Portable", kept: str, repo: str, licence: str, base_model: str | None, subfolder: str,
    rows: Sequence[model_card.Row], floors: Sequence[model_card.Row],
) -> model_card.Card:  # fmt: skip
    from sae import inspect

    known = p.lm if p.lm is not None and model_card.HUB_ID.fullmatch(p.lm) else None
    where = f"{repo}/{subfolder}".rstrip("/")
    facts = [row for row in inspect.semantics(p) if row[0] != "format"]
    facts.append(("files of", "saescope" if kept == "native" else kept))
    usage = f'import sae\n\nautoencoder = sae.load("{where}")'
    if kept == "saelens":
        usage += f'\n# or, with SAELens: download the folder, then SAE.load_from_disk(folder)  # {where}'
    return model_card.Card(
        name=repo.split("/")[1], licence=licence, library="saelens" if kept == "saelens" else "saescope",
        base_model=base_model or known, facts=facts, rows=rows, floors=floors, usage=usage,
    )  # fmt: skip


def _send(staged: Path, repo: str, subfolder: str, private: bool, token: str) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=staged, path_in_repo=subfolder or None,
            commit_message=f"SAE from saescope{f' in {subfolder}' if subfolder else ''}",
        )  # fmt: skip
    except Exception as error:  # network, access and name errors alike; the hub library does not print the token
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no detail")
        raise ArtefactError(f"{repo}: the hub did not take the upload ({type(error).__name__}: {first})") from error
    return str(commit.commit_url)


def main(arguments: Sequence[str]) -> int:
    """Exit status 0, or 2 by the errors of :func:`upload`."""
    from sae import format_doors

    parser = argparse.ArgumentParser("python -m sae upload", description="an SAE, its card and its numbers to the hub")
    parser.add_argument("path", help="file or folder of an SAE, any format")
    parser.add_argument("repo", help="org/name on the hub; made if it is not there")
    parser.add_argument("--licence", required=True, help="identifier of the hub: mit, apache-2.0, gemma, other, ...")
    parser.add_argument("--rows", nargs="+", default=(), help="result rows, e.g. results/rows; they make the table")
    parser.add_argument("--to", metavar="FORMAT", help=f"write as {', '.join(names('sae.formats'))} or native first")
    parser.add_argument("--base-model", help="hub id of the language model, where the SAE does not say one")
    parser.add_argument("--subfolder", default="", help="place in the repository, for several SAEs in one")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--dry-run", metavar="FOLDER", help="write the folder instead; no network, no token")
    format_doors.add_options(parser, measuring=False)
    given = parser.parse_args(arguments)
    console.setup()
    done = upload(
        given.path, given.repo, licence=given.licence, rows=given.rows, to=given.to, base_model=given.base_model,
        subfolder=given.subfolder, private=given.private, dry_run=given.dry_run,
        options=format_doors.options_of(given),
    )  # fmt: skip
    console.say(f"{'written' if given.dry_run else 'uploaded'}: {done}")
    return 0
