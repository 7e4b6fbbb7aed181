"""One rank is lost, by the fault that is named; the others wait for it.

    lost_rank.py FOLDER LIMIT[/SILENCE] FAULT LOST

Writes FOLDER/N.torch once rank N has imported torch, and N.ready when all have met; after FOLDER/go the fault comes.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from fixtures.launching import wait_until

from mmr1_ds.cluster.exits import leave
from mmr1_ds.cluster.launch import launch_environment
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.cluster.watch import CollectiveError

folder, fault, lost = Path(sys.argv[1]), sys.argv[3], int(sys.argv[4])
limits = [float(seconds) for seconds in sys.argv[2].split("/")]  # of a wait, and of silence
launch = launch_environment()


def stall() -> None:
    threading.Event().wait()


def run(ranks: Ranks) -> None:
    ranks.write_stacks(folder / "stacks")
    counter = ranks.counter()
    ranks.barrier("meet")
    ranks.step = 17
    with ranks.stage("reward"):
        known = ranks.watch.known
        wait_until(lambda: all(heard.place.stage == "reward" for heard in known().others), 120, "all are heard")
        (folder / f"{ranks.rank}.ready").touch()
        wait_until((folder / "go").exists, 120, "the word to go on")
        if ranks.rank == lost:
            if fault in ("kill", "kill_in_update", "kill_in_count"):
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault in ("stop", "stop_in_update", "stop_in_count"):
                os.kill(os.getpid(), signal.SIGSTOP)
            elif fault == "stall":
                stall()
            elif fault == "hold_interpreter":
                ctypes.PyDLL(None).sleep(120)  # unlike CDLL, without letting go of the interpreter
            elif fault == "raise":
                raise MemoryError("no room")
            elif fault == "call_another":
                ranks.sum({"tokens": 1.0}, "count tokens")
            elif fault == "call_device":
                dist.all_reduce(torch.ones(1))
        while fault.endswith("in_count"):  # as ranks that take prompts from a queue
            counter.next()
            time.sleep(0.01)
    if fault.endswith("in_update"):
        with ranks.stage("update_actor"):
            dist.all_reduce(torch.ones(1))  # as DeepSpeed does, unannounced
    ranks.barrier("gather rewards")


(folder / f"{launch.rank}.torch").touch()
present = range(launch.world_size) if fault != "never_come" else [r for r in range(launch.world_size) if r != lost]
wait_until(lambda: all((folder / f"{rank}.torch").exists() for rank in present), 120, "torch on every rank")
try:
    with Ranks(launch, *limits) as everyone:
        run(everyone)
except CollectiveError:
    leave(1)
leave(0)
