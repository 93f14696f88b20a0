"""Several scored runs side by side: a table, plots, and samples of the same seeds; or a refusal.

Metrics are only put beside each other where protocol, reference, feature network, number of images
and their size agree.
"""

from __future__ import annotations

import argparse

from tokgen import output


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", nargs="+", metavar="DIR", help="two folders of tokgen evaluate, or more"
    )
    parser.add_argument("--out", required=True, help="folder of the page and of compare.json")
    output.arguments(parser)
    parser.add_argument(
        "--all", action="store_true", help="every result of each folder; default: its last"
    )


def run(args: argparse.Namespace) -> None:
    """Print the table; write it, plots and samples as a page, and all of it as JSON."""
    from tokgen.evaluation import comparison

    lines = comparison.compare(args.results, args.out, every=args.all, overwrite=args.overwrite)
    print(comparison.listed(lines))
