"""Ratios and tables of the rows in results/kernels.csv: what ``bench.py`` prints at its end and docs/kernels.md shows.

``python kernels/bench_summary.py`` prints the tables; with ``--write`` they replace those between the marks of
docs/kernels.md. Of several runs of the same measurement on the same device the last one counts.
"""

import argparse
import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: made by kernels/bench_summary.py -->", "<!-- end of figures -->"
SHOWN = (
    "topk_step", "encode_topk", "encode_threshold", "sparse_decode", "decode_entries", "decode_error", "dual_gradient",
    "worklist", "project", "unit_rows", "torch_topk", "host", "cpu_decode", "cpu_step",
)  # fmt: skip
"""Kernels of the tables, in their order."""
TRIED = re.compile(r"-\d+x\d+$")
"""Providers that are launch settings."""
BASELINES = ("dense", "dense-compiled", "published")
WANTED = (
    # kernel, mode, numerator, denominator, least ratio, devices
    ("sparse_decode", "forward+backward", "dense", "torch", 8.0, "cpu"),
    ("topk_step", "forward+backward", "product+topk", "torch", 1 / 1.3, "cpu"),
    ("cpu_decode", "forward+backward", "dense", "embedding_bag", 8.0, "cpu"),
    ("cpu_step", "forward+backward", "product+topk", "torch", 1 / 1.3, "cpu"),
    ("topk_step", "step", "dense", "fused-A", 2.5, "gpu"),
    ("topk_step", "step", "published", "fused-A", 1.5, "gpu"),
)
"""Figures to reach: time of the numerator over that of the denominator."""
SHARE_WANTED = 0.6

Row = Mapping[str, object]


def _groups(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """Rows by provider of each (device, threads, kernel, mode, N, K, F, D, dtype), those of the last commit."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        names = ("device", "threads", "kernel", "mode", "n_tokens", "k", "d_sae", "d_in", "dtype")
        group = found.setdefault(tuple(str(row[name]) for name in names), {})
        if any(other["commit"] != row["commit"] for other in group.values()):
            group.clear()  # providers of an earlier commit are not comparable, and some exist no more
        group[str(row["provider"])] = row
    return found


def _p50(row: Row) -> float:
    return float(str(row["p50_ms"]))


def ratios(rows: Iterable[Row]) -> list[str]:
    """The figures to reach that these rows tell, one line each."""
    lines = []
    for (device, threads, kernel, mode, n, k, f, d, dtype), by_provider in _groups(rows).items():
        shape = f"N {n}, K {k}, F {f}, D {d}, {dtype}, {device}, {threads} threads"
        kind = "gpu" if any(str(row["peak_mib"]) for row in by_provider.values()) else "cpu"
        for wanted, wanted_mode, over, under, least, devices in WANTED:
            if (wanted, wanted_mode, devices) != (kernel, mode, kind) or not {over, under} <= set(by_provider):
                continue
            found = _p50(by_provider[over]) / _p50(by_provider[under])
            verdict = "reached" if found >= least else "NOT reached"
            lines.append(f"{kernel} {mode}: {over} / {under} = {found:.2f} (at least {least:.2f}: {verdict}); {shape}")
        if kernel == "topk_step" and mode == "step" and "fused-A" in by_provider:
            share = float(str(by_provider["fused-A"]["share"]) or 0)
            verdict = "reached" if share >= SHARE_WANTED else "NOT reached"
            lines.append(f"{kernel} {mode}: {share:.2f} of the floor (at least {SHARE_WANTED}: {verdict}); {shape}")
    return lines


def _ratio(by_provider: Mapping[str, Row], baseline: str, row: Row) -> str:
    base = by_provider.get(baseline)
    return "" if base is None or base is row else f"{_p50(base) / _p50(row):.2f}"


def tables(rows: Iterable[Row]) -> str:
    """Markdown, one table a device."""
    groups = _groups(rows)
    text = []
    for device, threads in dict.fromkeys(key[:2] for key in groups):
        here = {key[2:]: value for key, value in groups.items() if key[:2] == (device, threads)}
        made = []
        for kernel in SHOWN:
            for (name, mode, n, k, f, d, dtype), by_provider in here.items():
                if name != kernel:
                    continue
                for provider, row in by_provider.items():
                    if TRIED.search(provider):
                        continue
                    cells = [kernel, mode, n, k, f, d, dtype, provider, str(row["p50_ms"])]
                    cells += [_ratio(by_provider, baseline, row) for baseline in BASELINES]
                    cells += [str(row["share"]), str(row["peak_mib"])]
                    made.append(f"| {' | '.join(cells)} |")
        if made:
            version = next(iter(next(iter(here.values())).values()))
            text += [
                f"### {device}, {threads} threads (torch {version['torch']}, Triton {version['triton']})", "",
                "| operation | mode | N | K | F | D | type | implementation | p50 ms | dense / this | compiled / this "
                "| published / this | share of the floor | peak MiB |",
                "|" + "---|" * 14, *made, "",
            ]  # fmt: skip
    return "\n".join(text)


def read(path: Path) -> list[Row]:
    """Rows of a file of the bench."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(document: Path, made: str) -> None:
    """Put the tables between the marks. ``ValueError`` where a mark is missing."""
    text = document.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{document} has no place for the tables: it wants the lines {BEGIN!r} and {END!r}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    document.write_text(f"{before}{BEGIN}\n\n{made}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROOT / "results" / "kernels.csv", help="file of the bench")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/kernels.md")
    args = parser.parse_args()
    rows = read(args.rows)
    made = tables(rows)
    if args.write:
        write(ROOT / "docs" / "kernels.md", made)
    else:
        print(made)
    print("\n".join(ratios(rows)))


if __name__ == "__main__":
    main()
