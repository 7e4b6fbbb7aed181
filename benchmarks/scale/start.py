"""What a rank reads of the data at a start: the first rank of a machine, and every other rank and later start.

    python benchmarks/scale/start.py [--rows 15000] [--side 448]

A parquet file of that many questions, each with a PNG image of side x side pixels of noise, for the demo's tiny
Qwen2.5-VL (its processor only). Seconds, and bytes that the process read (from the disk or its cache).
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmr1_ds.commands.demo.model import build_model, save_model
from mmr1_ds.config import DataConfig, ModelConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=15_000)
    parser.add_argument("--side", type=int, default=448)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        os.environ["HF_DATASETS_CACHE"] = f"{root}/cache"  # read when `datasets` is imported
        from mmr1_ds.data.dataset import load_dataset
        from mmr1_ds.data.encoding import PromptEncoder

        save_model(Path(root) / "model", build_model(0))
        write(Path(root) / "train.parquet", arguments.rows, arguments.side)
        data = DataConfig(max_prompt_length=512, answer_key="answer", prompt_key="prompt", image_key="images")
        encoder = PromptEncoder(ModelConfig(model_path=f"{root}/model"), data)
        process = psutil.Process()
        for name in ("the first start", "the first rank of a machine", "every other rank, and a later start"):
            before, start = process.io_counters().read_chars, time.perf_counter()
            dataset = load_dataset(f"{root}/train.parquet", data, encoder)
            seconds, read = time.perf_counter() - start, process.io_counters().read_chars - before
            sys.stdout.write(f"{name}: {len(dataset)} prompts, {seconds:.2f} s, {read / 1e6:.0f} MB read\n")
            if name == "the first start":  # which also converts the file for `datasets`; once more without that
                for kept in Path(root).glob("cache/mmr1_ds_scans_*/*.arrow"):
                    kept.unlink()


def write(path: Path, num_rows: int, side: int) -> None:
    """Write the questions, 500 rows at a time."""
    random = np.random.default_rng(0)
    schema = pa.schema(
        {"prompt": pa.string(), "answer": pa.string(), "images": pa.list_(pa.struct({"bytes": pa.binary()}))}
    )
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, 500):
            rows = []
            for index in range(start, min(start + 500, num_rows)):
                buffer = io.BytesIO()
                small = Image.fromarray(random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
                small.resize((side, side), Image.Resampling.NEAREST).save(buffer, "PNG", compress_level=1)
                prompt = f"<image>How many of {index} are there?"
                rows.append({"prompt": prompt, "answer": str(index), "images": [{"bytes": buffer.getvalue()}]})
            writer.write_table(pa.Table.from_pylist(rows, schema))


if __name__ == "__main__":
    main()
