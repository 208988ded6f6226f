"""A rig that lets whole runs of verl take place on the CPU; verl loads it in each of its processes.

verl has no platform for CPUs and no rollout server that runs on one. `platform` adds the one, `rollout` the
other, and `recorder` writes what an engine saw to files. verl imports this package if
`VERL_USE_EXTERNAL_MODULES` names it, with this package's folder on the path. What is left to others: what is
run (runs), and what is tested.
"""

import os

from cpu_rig import platform

platform.register_engines()

# These import what the platform has to be there for.
from cpu_rig import rollout  # noqa: E402

rollout.register()

if os.environ.get("ATTNPROBE_RIG_RECORD"):
    from cpu_rig import recorder

    recorder.register()
