"""`python -m bench.gpu check|bench [PART ...]`: run a command, or some of its parts, and write the report."""

from __future__ import annotations

import argparse
import sys

from bench.gpu.commands import COMMANDS
from bench.gpu.driver import run_command


def main() -> int:
    """Run the command of the command line; see `driver.run_command`."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run; all by default")
    parser.add_argument("--list", action="store_true", help="list the parts and exit")
    given = parser.parse_args()
    if given.list:
        for part in COMMANDS[given.command].parts:
            sys.stdout.write(f"{part.name:24} at most {part.limit_s:.0f} s\n")
        return 0
    return run_command(given.command, given.parts)


if __name__ == "__main__":
    sys.exit(main())
