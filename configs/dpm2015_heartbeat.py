"""Binary heartbeat of the 2015 paper, by the name that goes with its other experiments.

    python -m diffusion_jax.main --config=configs/dpm2015_heartbeat.py --workdir=runs/heartbeat

The config, with hardware, time and metric, is `configs/heartbeat.py`; its variants are here too.
"""

from __future__ import annotations

import runpy
from pathlib import Path

get_config = runpy.run_path(str(Path(__file__).with_name("heartbeat.py")))["get_config"]
