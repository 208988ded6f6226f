"""The installed command `attnprobe`: it prepares the process, and runs the command line (attnprobe.cli).

It lies beside the package, since importing the package takes seconds, most of which are torch's: an
interruption has to be understood by then, and tqdm reads its settings when it is imported, which torch does.
"""

import os
import sys


def main() -> None:
    """Run the command line, without other libraries' progress bars."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        from attnprobe.cli import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
