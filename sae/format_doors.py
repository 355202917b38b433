"""``python -m sae convert`` and ``inspect``: flags first, heavy imports only once they are known to be needed."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sae import console
from sae.plugins import names

if TYPE_CHECKING:
    from torch import Tensor

    from sae.agreement import Agreement
    from sae.portable import ImportOptions, Portable


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags for what a file does not say; the same for ``convert`` and ``inspect``."""
    parser.add_argument("--activation", choices=("relu", "topk"), help="how to run a file that does not say")
    parser.add_argument("--k", type=int, help="active latents per token, where the file does not say")
    parser.add_argument("--input-norm", choices=("none", "layer_norm"), help="where the file does not say")
    parser.add_argument("--scale-in", type=float, help="unfolded SAELens norm: n = x * scale_in")
    parser.add_argument("--hookpoint", help="module that the SAE reads, e.g. layers.15")
    parser.add_argument("--allow-16bit-thresholds", action="store_true", help="take thresholds rounded to 16 bits")
    parser.add_argument(
        "--check-on", metavar="MODEL", help="measure on activations of this model: default, folder or hub id"
    )
    parser.add_argument("--texts", default="default", help="texts for --check-on")
    parser.add_argument("--tokens", type=int, default=4_096, help="tokens for --check-on")


def options_of(given: argparse.Namespace) -> "ImportOptions":
    """The import options among the parsed flags."""
    from sae.portable import ImportOptions

    return ImportOptions(
        activation=given.activation, k=given.k, input_norm=given.input_norm, scale_in=given.scale_in,
        hookpoint=given.hookpoint, allow_16bit_thresholds=given.allow_16bit_thresholds,
    )  # fmt: skip


def _real_inputs(given: argparse.Namespace, p: "Portable") -> "Tensor | None":
    if not given.check_on:
        return None
    from sae.real_inputs import model_inputs

    return model_inputs(given.check_on, p.hookpoint, p.d_in, given.texts, given.tokens)


def convert_main(arguments: Sequence[str]) -> int:
    """Exit status 0, or 2 by the errors of :func:`sae.convert.convert`."""
    parser = argparse.ArgumentParser(
        "python -m sae convert", description="write an SAE in another format; refused where meaning would be lost"
    )
    parser.add_argument("source", type=Path, help="file or folder of an SAE, any format")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=f"native, {', '.join(names('sae.formats'))}")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    add_options(parser)
    given = parser.parse_args(arguments)
    console.setup()
    from sae import loading
    from sae.convert import convert

    options = options_of(given)
    x_ND = _real_inputs(given, loading.read(given.source, options)) if given.check_on else None
    found = convert(given.source, given.out, given.to, options=options, x_ND=x_ND, force=given.force)
    _show(found, f"{given.source} -> {given.out} ({given.to})", real=x_ND is not None)
    return 0


def inspect_main(arguments: Sequence[str]) -> int:
    """Exit status 1 where ``--check-on`` finds a recipe that fits the activations better."""
    parser = argparse.ArgumentParser("python -m sae inspect", description="what an SAE is, how it is run, its health")
    parser.add_argument("path", type=Path, help="file or folder of an SAE, any format; or an artefact folder")
    add_options(parser)
    given = parser.parse_args(arguments)
    console.setup()
    from sae import inspect

    p = inspect.show(given.path, options_of(given))
    x_ND = _real_inputs(given, p)
    if x_ND is None:
        return 0
    rows = inspect.probe(p, x_ND)
    console.table(
        f"recipe probe on {len(x_ND):,} tokens of {given.check_on}", ("recipe", "FVU", "L0"),
        [(name, f"{fvu:.4f}", f"{l0:.1f}") for name, fvu, l0 in rows], right=(1, 2),
    )  # fmt: skip
    return inspect.verdict(rows)


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
