"""The installed command `attnprobe`: it prepares the process, and runs the command line (attnprobe.cli).

It lies beside the package, since importing the package takes seconds, most of which are torch's: an
interruption has to be understood by then, and tqdm reads its settings when it is imported, which torch does.
"""

import os
import signal
import sys
from typing import Any


def main() -> None:
    """Run the command line, without other libraries' progress bars."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    interrupted = False

    def note(*_: Any) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        from attnprobe.cli import main as run

        signal.signal(signal.SIGINT, before)
        run()
    except (KeyboardInterrupt, ImportError) as error:
        # A library that is interrupted while it is imported may say that something cannot be imported.
        if not interrupted and not isinstance(error, KeyboardInterrupt):
            raise
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
