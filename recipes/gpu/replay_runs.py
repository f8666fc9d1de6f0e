"""Replay runs and print whether each rebuilt adapter equals that of the run, as JSON."""

import json
import sys
from pathlib import Path

from qzo.run.output.replay import replay


def main() -> None:
    """Replay the runs that the arguments name."""
    found = {}
    for run in map(Path, sys.argv[1:]):
        try:
            found[run.name] = replay(run).adapter
        except Exception as error:  # the other runs are replayed all the same
            found[run.name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
