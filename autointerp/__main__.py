"""Door of ``python -m autointerp``: explain and score latents, look at explanations, export them, take some in.

SAEs, latent caches and exemplars are made by ``python -m evals.run_all``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from autointerp.doors import add_explain, add_score, newest_artefact, run_explain, run_score
from sae import console, exits
from sae.errors import ArtefactError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m autointerp", description="Explanations of SAE latents.")
    doors = parser.add_subparsers(dest="door", metavar="COMMAND", title="commands", required=True)
    add_explain(doors)
    add_score(doors)
    export = doors.add_parser("export", help="write the explanation dataset: parquet tables and a card")
    export.add_argument("--root", type=Path, default=Path("results"), help="folder of artefacts (default: results)")
    export.add_argument("--out", type=Path, help="folder to write (default: ROOT/dataset)")
    export.add_argument(
        "--accept-licences", action="store_true",
        help="publish windows of texts whose licence is non-commercial or not stated",
    )  # fmt: skip
    pedia = doors.add_parser("export-neuronpedia", help="write Neuronpedia's batch files: features, activations, texts")
    pedia.add_argument("--root", type=Path, default=Path("results"), help="folder of artefacts (default: results)")
    pedia.add_argument("--out", type=Path, help="folder to write (default: ROOT/neuronpedia)")
    pedia.add_argument("--tokenizer", type=Path, required=True, help="folder of the subject model, or tokenizer.json")
    pedia.add_argument("--model-id", help="Neuronpedia's id of the subject model (default: its name)")
    take = doors.add_parser("import-neuronpedia", help="take in explanations of a Neuronpedia export, to be scored")
    take.add_argument("folder", type=Path, help="folder of one source, with explanations/batch-N.jsonl.gz inside")
    take.add_argument("--sae", required=True, help="the SAE below ROOT/saes whose latents they are about")
    take.add_argument("--root", type=Path, default=Path("results"), help="folder of artefacts (default: results)")
    batch = doors.add_parser("batch-read", help="put the replies of OpenAI batch output files into the reply cache")
    batch.add_argument("files", type=Path, nargs="+", help="output (and error) files of finished batches")
    batch.add_argument("--root", type=Path, default=Path("results"), help="folder of artefacts (default: results)")
    show = doors.add_parser("show", help="print the chosen explanation of every latent with its headline scores")
    show.add_argument("--root", type=Path, default=Path("results"), help="folder of artefacts (default: results)")
    return parser


def _show(root: Path) -> None:
    from autointerp.dataset import find_chains
    from autointerp.pipeline import open_explanations, open_scores

    chains = find_chains(root)
    if not chains:
        raise ArtefactError(f"{root} holds no finished explanations; run: python -m evals.run_all --root {root}")
    for sae_id, chain in sorted(chains.items()):
        found = [s for s in open_scores(chain["scores"]).scores if s.metric == "auc" and not (s.floor_kind or s.group)]
        value = {(s.explanation_id, s.scorer): s.value for s in found}
        scorers = sorted({s.scorer for s in found})
        rows = []
        for e in open_explanations(chain["explanations"]):
            if e.selected:
                aucs = [value.get((e.explanation_id, scorer)) for scorer in scorers]
                text = e.text if e.failure is None else f"({e.failure.code})"
                rows.append((e.latent, e.explainer, *("" if a is None else f"{a:.2f}" for a in aucs), text))
        columns = ("latent", "explainer", *(f"AUC {scorer}" for scorer in scorers), "explanation")
        console.table(sae_id, columns, rows, right=(0, *range(2, 2 + len(scorers))))


def _export_neuronpedia(options: argparse.Namespace) -> None:
    from autointerp.neuronpedia import export_neuronpedia
    from sae.errors import ConfigError

    file: Path = options.tokenizer
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise ConfigError(f"there is no tokenizer {file}; give the folder of the subject model")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))

    def decode(token_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=False))

    out = options.out or options.root / "neuronpedia"
    for folder in export_neuronpedia(options.root, out, decode, model_id=options.model_id):
        console.say(str(folder))


def _import_neuronpedia(options: argparse.Namespace) -> None:
    from autointerp.exemplars import ExemplarTable
    from autointerp.neuronpedia import import_explanations

    newest = newest_artefact(options.root, "exemplars", options.sae)
    if newest is None:
        raise ArtefactError(f"{options.root} holds no exemplars of {options.sae!r}; expected an SAE of a finished run")
    folder = import_explanations(options.root, options.folder, ExemplarTable.open(newest))
    console.say(f"score them with: python -m autointerp score --root {options.root} --explanations {folder.name}")
    console.say(str(folder))


def _read_batch(files: Sequence[Path], root: Path) -> None:
    from autointerp.batch_files import read_replies
    from autointerp.reply_cache import ReplyCache

    cache = ReplyCache(root / "replies.sqlite", must_exist=True)
    result = read_replies(files, cache)
    cache.close()
    failed = ", ".join(f"{n} {code}" for code, n in result.failed.items()) or "none"
    console.say(f"{result.stored} replies stored, {result.known} known before, failed: {failed}")
    console.say("run the same command again: it finds them, and goes on")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of one door: :mod:`sae.exits`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        _parser().print_help()
        return exits.USAGE
    options = _parser().parse_args(words)
    console.setup()
    return exits.run(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.door == "show":
        _show(options.root)
    elif options.door == "explain":
        run_explain(options)
    elif options.door == "score":
        run_score(options)
    elif options.door == "import-neuronpedia":
        _import_neuronpedia(options)
    elif options.door == "export-neuronpedia":
        _export_neuronpedia(options)
    elif options.door == "batch-read":
        _read_batch(options.files, options.root)
    else:
        from autointerp.dataset import export

        out = options.out or options.root / "dataset"
        console.say(str(export(options.root, out, check_licences=not options.accept_licences)))
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
