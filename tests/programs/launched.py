#!/usr/bin/env python3
"""In the place of the interpreter that launch/slurm.sbatch starts: tells how it was called, then does as told.

A server runs until SIGTERM. A rank waits for SIGUSR1 and ends with 75, and with 0 once the job was requeued.
"""

import json
import os
import signal
import sys
from pathlib import Path

NAMES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "MASTER_ADDR", "MASTER_PORT", "MMR1_DS_SERVER_KEY")
NAMES += ("CUDA_VISIBLE_DEVICES", "SLURM_RESTART_COUNT", "SLURM_JOB_END_TIME", "OUR_CREDENTIAL")


def main() -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
    serves = "serve" in sys.argv
    variables = {name: os.environ.get(name, "") for name in NAMES}
    restart = variables["SLURM_RESTART_COUNT"] or "0"
    name = f"{'server' if serves else 'rank'}{variables['SLURM_PROCID']}.{restart}.json"
    path = Path(os.environ["MMR1_TEST_FOLDER"], name)
    path.with_suffix(".part").write_text(json.dumps({"arguments": sys.argv, "variables": variables}))
    path.with_suffix(".part").rename(path)
    if serves:
        signal.sigwait([signal.SIGTERM])
        return 0
    if restart != "0":
        return 0
    return 75 if signal.sigwait([signal.SIGTERM, signal.SIGUSR1]) == signal.SIGUSR1 else 1


if __name__ == "__main__":
    sys.exit(main())
