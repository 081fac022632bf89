"""Writes protos/REFERENCE.md, or with --check says whether it is current."""

from __future__ import annotations

import argparse
import sys

from gateway.rights import SCOPE_OF
from tests.contract import descriptors, sent
from tests.contract.markdown import Page
from tests.contract.reasons import REASONS, difference

TARGET = descriptors.PROTOS / "REFERENCE.md"


def page() -> str:
    """Return what the page has to be now. Raises ValueError where the table of reasons is not that of the code."""
    statuses = sent.reasons()
    if problems := difference(set(statuses)):
        raise ValueError(f"tests/contract/reasons.py: {', '.join(problems)}")
    return Page(descriptors.read(), SCOPE_OF).write(REASONS, statuses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, and fail if it is not current")
    args = parser.parse_args()
    try:
        wanted = page()
    except (ValueError, LookupError) as error:
        sys.exit(str(error))
    if not args.check:
        TARGET.write_text(wanted)
    elif not TARGET.exists() or TARGET.read_text() != wanted:
        sys.exit("protos/REFERENCE.md is out of date: run make reference-page")


if __name__ == "__main__":
    main()
