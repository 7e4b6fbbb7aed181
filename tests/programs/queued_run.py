"""Trains as `mmr1_ds.train` does and writes what each rank samples. Usage: OUT_FOLDER IDLE_RANK config=FILE ...

Writes OUT_FOLDER/RANK.json: a list a step, [slot, index, token ids of the responses] of each training group.
IDLE_RANK takes nothing from the queue; -1 = none.
"""

import json
import sys
from pathlib import Path

from mmr1_ds import train
from mmr1_ds.cluster.exits import leave
from mmr1_ds.cluster.ranks import Counter, Ranks
from mmr1_ds.loop.collector import Collector

out, idle_rank = Path(sys.argv[1]), int(sys.argv[2])
found, groups = [], []
make, count = Ranks.__init__, Counter.next
score, share, wait = Collector.score, Collector.share, Collector.wait


def remembered(self, *arguments, **settings):
    make(self, *arguments, **settings)
    groups.append(self)


def next_number(self):
    return 1 << 40 if groups[0].rank == idle_rank else count(self)


def note(in_flight):
    rows = []
    for at, slot in enumerate(in_flight.slots):
        responses = in_flight.groups[at].responses
        tokens = [response.token_ids.tolist() for response in responses]
        rows.append([slot, in_flight.requests[at].prompt.index, tokens])
    found.append(rows)


def shared(self, in_flight, *arguments):
    sampled = share(self, in_flight, *arguments)
    note(sampled)
    return sampled


def waited(self, in_flight, *arguments):
    wait(self, in_flight, *arguments)
    note(in_flight)


Ranks.__init__, Counter.next, Collector.share, Collector.wait = remembered, next_number, shared, waited
code = train.main(sys.argv[3:])
(out / f"{groups[0].rank}.json").write_text(json.dumps(found))
leave(code)
