"""Render a saved result again: ``python -m lbp_ray.report RUN/result.json --out DIR``.

Openings of the hold-out and scores of excluded groups are read from the result's folder, where their commands put them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lbp_ray.finished import EXCLUDED_FILE
from lbp_ray.report import render_console, write_report
from lbp_ray.result import ExcludedScores, StudyResult, Unsealed


def main(arguments: list[str] | None = None) -> int:
    """Load a result, print its table and write its report.

    Parameters
    ----------
    arguments
        Command line without the program's name; None reads the process's own.

    Returns
    -------
    int
        0, or 2 when the result cannot be read or reported.
    """
    parser = argparse.ArgumentParser(prog="python -m lbp_ray.report", description=__doc__)
    parser.add_argument("result", type=Path, help="result.json of a run")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.html, figures/ and tables/")
    parser.add_argument("--contact-sheet", type=Path, help="PNG of the crops, shown in the report")
    options = parser.parse_args(arguments)
    try:
        result = StudyResult.load(options.result)
        sheet = options.contact_sheet.read_bytes() if options.contact_sheet else None
        folder = options.result.parent
        excluded = folder / EXCLUDED_FILE
        page = write_report(
            result,
            options.out,
            contact_sheet=sheet,
            unsealed=[Unsealed.load(path) for path in sorted(folder.glob("unsealed-*.json"))],
            excluded=ExcludedScores.load(excluded) if excluded.is_file() else None,
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(render_console(result))
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
