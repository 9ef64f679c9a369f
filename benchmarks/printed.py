"""Refresh what commands print in the pages of docs/: each block of code below a line <!-- printed by: COMMAND -->.

python benchmarks/printed.py docs/performance.md        # --only TEXT: the commands that hold it
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"(<!-- printed by: (?P<command>.*?) -->\n```\n).*?(?=```\n)", re.DOTALL)
#: Columns of a terminal that no table has to be broken for.
COLUMNS = "180"


def refreshed(page: str, only: str) -> str:
    """Return a page with what its commands print now."""

    def run(block: re.Match[str]) -> str:
        if only not in block["command"]:
            return block[0]
        print(block["command"], file=sys.stderr)
        command = shlex.split(block["command"])
        if command[0] == "python":
            command[0] = sys.executable
        variables = os.environ | {"COLUMNS": COLUMNS}
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, check=True, text=True)
        return block[1] + "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())

    return BLOCK.sub(run, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("page", type=Path)
    parser.add_argument("--only", metavar="TEXT", default="", help="only the commands that hold this text")
    options = parser.parse_args()
    page = options.page.read_text(encoding="utf-8")
    options.page.write_text(refreshed(page, options.only), encoding="utf-8")


if __name__ == "__main__":
    main()
