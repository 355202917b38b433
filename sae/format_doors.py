"""``python -m sae convert`` and ``inspect``: flags first, heavy imports only once they are known to be needed."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sae import console
from sae.errors import ConfigError
from sae.plugins import names

if TYPE_CHECKING:
    from sae.agreement import Agreement
    from sae.portable import ImportOptions, Portable
    from sae.real_inputs import RealInputs


def add_options(parser: argparse.ArgumentParser, *, measuring: bool = True) -> None:
    """Flags for what a file does not say; ``measuring``: those that run a language model as well."""
    parser.add_argument("--activation", choices=("relu", "topk"), help="how to run a file that does not say")
    parser.add_argument("--k", type=int, help="active latents per token, where the file does not say")
    parser.add_argument("--input-norm", choices=("none", "layer_norm"), help="where the file does not say")
    parser.add_argument("--scale-in", type=float, help="unfolded SAELens norm: n = x * scale_in")
    parser.add_argument("--hookpoint", help="module that the SAE reads, e.g. layers.15")
    parser.add_argument("--allow-16bit-thresholds", action="store_true", help="take thresholds rounded to 16 bits")
    if not measuring:
        return
    parser.add_argument(
        "--check-on", metavar="MODEL", help="measure on activations of this model: default, folder or hub id"
    )
    parser.add_argument("--texts", default="default", help="texts for --check-on")
    parser.add_argument("--tokens", type=int, default=4_096, help="tokens for --check-on")
    parser.add_argument(
        "--calibrate", action="store_true",
        help="with --check-on: measure there the scale or the threshold that the file lacks",
    )  # fmt: skip


def options_of(given: argparse.Namespace) -> "ImportOptions":
    """The import options among the parsed flags."""
    from sae.portable import ImportOptions

    if getattr(given, "calibrate", False) and not given.check_on:
        raise ConfigError("--calibrate measures on activations: give --check-on MODEL as well")
    calibrate_on = (lambda p: _inputs(given, p).x_ND) if getattr(given, "calibrate", False) else None
    return ImportOptions(
        activation=given.activation, k=given.k, input_norm=given.input_norm, scale_in=given.scale_in,
        hookpoint=given.hookpoint, allow_16bit_thresholds=given.allow_16bit_thresholds, calibrate_on=calibrate_on,
    )  # fmt: skip


def _inputs(given: argparse.Namespace, p: "Portable") -> "RealInputs":
    from sae.real_inputs import model_inputs

    target = p.hookpoint_out if p.transcoder else None
    if p.transcoder and target is None:
        raise ConfigError("the file does not say what the transcoder predicts, so that it cannot be checked on a model")
    return model_inputs(given.check_on, p.hookpoint, p.d_in, given.texts, given.tokens, target=target)


def _probe(given: argparse.Namespace, p: "Portable", found: "RealInputs") -> int:
    """Print the recipe probe; 1 where it is suspect."""
    from sae import inspect

    rows = inspect.probe(p, found.x_ND, found.target_NO)
    console.table(
        f"recipe probe on {len(found.x_ND):,} tokens of {given.check_on}", ("recipe", "FVU", "L0"),
        [(name, f"{fvu:.4f}", f"{l0:.1f}") for name, fvu, l0 in rows], right=(1, 2),
    )  # fmt: skip
    return inspect.verdict(rows, p.published_l0)


def convert_main(arguments: Sequence[str]) -> int:
    """Exit status 0, 1 where ``--check-on`` finds the recipe suspect, or 2 by :func:`sae.convert.convert`'s errors."""
    parser = argparse.ArgumentParser(
        "python -m sae convert", description="write an SAE in another format; refused where meaning would be lost"
    )
    parser.add_argument("source", help="file or folder of an SAE, any format, or org/repo[/subfolder][@revision]")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=f"native, {', '.join(names('sae.formats'))}")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    parser.add_argument("--accept-recipe", action="store_true", help="write OUT though --check-on finds it suspect")
    add_options(parser)
    given = parser.parse_args(arguments)
    console.setup()
    from sae import loading
    from sae.convert import convert

    options = options_of(given)
    x_ND = None
    if given.check_on:
        p = loading.read(given.source, options)
        real = _inputs(given, p)
        if _probe(given, p, real) and not given.accept_recipe:
            console.say(f"{given.out} is not written; --accept-recipe writes it all the same")
            return 1
        x_ND = real.x_ND
    found = convert(given.source, given.out, given.to, options=options, x_ND=x_ND, force=given.force)
    _show(found, f"{given.source} -> {given.out} ({given.to})", real=x_ND is not None)
    return 0


def inspect_main(arguments: Sequence[str]) -> int:
    """Exit status 1 where ``--check-on`` finds a recipe that fits the activations better."""
    parser = argparse.ArgumentParser("python -m sae inspect", description="what an SAE is, how it is run, its health")
    parser.add_argument("path", help="file or folder of an SAE, any format, or org/repo[/subfolder][@revision]")
    add_options(parser)
    given = parser.parse_args(arguments)
    console.setup()
    from sae import inspect

    p = inspect.show(given.path, options_of(given))
    return _probe(given, p, _inputs(given, p)) if given.check_on else 0


def _show(found: "Agreement", title: str, *, real: bool) -> None:

    def number(value: float) -> str:
        return "–" if value != value else f"{value:.6g}"

    rows = [
        (
            "FVU" if real else "FVU (synthetic inputs: no measure of quality)",
            number(found.fvu_before),
            number(found.fvu_after),
        ),
        ("L0", number(found.l0_before), number(found.l0_after)),
        ("tokens with the same active latents", "", f"{found.same_sets:.2%}"),
        ("relative error of codes", "", f"{found.codes:.1e}"),
        ("relative error of reconstructions", "", f"{found.reconstructions:.1e}"),
        ("tokens", "", f"{found.tokens:,}"),
    ]
    console.table(title, ("", "before", "after"), rows, right=(1, 2))
