"""Credit in verl: an engine that weights the advantages of each update by what the actor attended to.

    export VERL_ENGINE_VENDOR=attnprobe
    export VERL_USE_EXTERNAL_MODULES=attnprobe.rl.verl
    export ATTNPROBE_CREDIT='{"strategy": "CoupledRhythmCredit", "horizon": [10, 100]}'   # or leave it out
    python -m verl.trainer.main_ppo ...

verl imports this package in each of its processes, and so registers the engine (engine). The rooms beside it
read the options (options), take verl's rows apart (rows), and try out the run's loss (loss_trial). What is
left to others: measuring and weighing (`RolloutCredit`). docs/verl.md says what works, and what is refused.
"""

from __future__ import annotations

import os
import sys

from attnprobe.rl.verl.options import CREDIT_VARIABLE, check_environment

# Without verl, as when documentation is built, there is nothing to register with.
if "verl.protocol" in sys.modules:
    check_environment(os.environ)
    from attnprobe.rl.verl.engine import register

    register()

__all__ = ["CREDIT_VARIABLE"]
