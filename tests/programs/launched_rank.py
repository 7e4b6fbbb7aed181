"""In the place of mmr1_ds.train: write, into a file of its own, which GPU this rank would take."""

import json
import os
from pathlib import Path

NAMES = ("RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "MMR1_DS_VISIBLE_DEVICES")
found = {name: os.environ.get(name) for name in NAMES}
Path(os.environ["MMR1_TEST_FOLDER"], f"{os.environ['RANK']}.json").write_text(json.dumps(found))
