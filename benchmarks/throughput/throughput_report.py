"""What is written of a throughput benchmark: the JSON, a table, a plot, and two of them side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from throughput_figures import STAGES

from mmr1_ds.errors import UserError

SCHEMA = 1
KEY = ("model", "ranks", "engine", "lengths", "sampling")  # what tells cells apart
_COLUMNS = (  # title, figure, format
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("a rank", "tokens_per_second_per_rank", "{:,.0f}"),
    ("samples/s", "samples_per_second", "{:.1f}"),
    ("s a step", "seconds/all", "{:.2f}"),
    *((name.replace("_", "-"), f"seconds/{name}", "{:.3f}") for name in (*STAGES, "refresh", "other")),
    ("GB", "memory_gb", "{:.2f}"),
    ("MFU", "mfu", "{:.1%}"),
)
_COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#F0E442", "#999999", "#D55E00", "#DDDDDD")


def read(path: Path) -> dict[str, Any]:
    """Raises: UserError for a file that this version did not write."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as JSON ({error}); give a file that throughput.py wrote") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        shown = found.get("schema") if isinstance(found, dict) else type(found).__name__
        raise UserError(f"{path} has schema {shown}, this version reads {SCHEMA}; measure anew")
    for number, cell in enumerate(found.get("cells", [])):
        missing = [name for name in (*KEY, "figures", "error") if name not in cell]
        if missing:
            raise UserError(f"{path}: cell {number} has no {missing[0]}; measure anew")
    return found


def write(found: Mapping[str, Any], path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(path)


def cell_name(cell: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    """What tells this cell from the others."""
    differing = [name for name in KEY if len({str(other[name]) for other in cells}) > 1] or ["sampling"]
    return ", ".join(_short(name, cell[name]) for name in differing)


def table(found: Mapping[str, Any]) -> str:
    """Markdown; medians of the repeats."""
    cells = found["cells"]
    columns = [column for column in _COLUMNS if any(column[1] in cell["figures"] for cell in cells)]
    lines = ["| | " + " | ".join(title for title, *_ in columns) + " |", "|---|" + "---|" * len(columns)]
    for cell in cells:
        if cell["error"]:
            lines.append(f"| {cell_name(cell, cells)} | failed: {cell['error'].splitlines()[-1]} |")
            continue
        values = [
            form.format(cell["figures"][name]["median"]) if name in cell["figures"] else "" for _, name, form in columns
        ]
        lines.append(f"| {cell_name(cell, cells)} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def compare(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Cells that both have: the other's figure over the one's, a star where their spreads do not touch."""
    by_key = {tuple(str(cell[name]) for name in KEY): cell for cell in one["cells"] if not cell["error"]}
    lines = []
    for cell in other["cells"]:
        before = by_key.get(tuple(str(cell[name]) for name in KEY))
        if before is None or cell["error"]:
            continue
        lines.append(f"{cell_name(cell, other['cells'])}:")
        for title, name, form in _COLUMNS:
            if name not in cell["figures"] or name not in before["figures"]:
                continue
            a, b = before["figures"][name], cell["figures"][name]
            apart = b["min"] > a["max"] or b["max"] < a["min"]
            ratio = f"{b['median'] / a['median']:.2f}x" if a["median"] else "-"
            row = f"  {title:<12} {form.format(a['median']):>10} {form.format(b['median']):>10} {ratio:>7}"
            lines.append(row + (" *" if apart else ""))
    if not lines:
        raise UserError(
            "the two files have no cell in common: " + " against ".join(_names(part) for part in (one, other))
        )
    return "\n".join([*lines, "* the repeats' spreads do not touch"])


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Seconds of a step by stage, stacked, and tokens a second beside them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = [cell for cell in found["cells"] if not cell["error"]]
    names = [cell_name(cell, cells) for cell in cells]
    height = 1.7 + 0.45 * len(cells)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, height), width_ratios=(3, 1.3), layout="constrained")
    start = [0.0] * len(cells)
    for stage, colour in zip((*STAGES, "refresh", "other"), _COLOURS, strict=True):
        widths = [cell["figures"][f"seconds/{stage}"]["median"] for cell in cells]
        left.barh(names, widths, left=start, color=colour, label=stage.replace("_", "-"), height=0.6)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    left.invert_yaxis()
    left.set_xlabel("seconds a step")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    speeds = [cell["figures"]["tokens_per_second"] for cell in cells]
    middles = [speed["median"] for speed in speeds]
    spread = [[m - s["min"] for m, s in zip(middles, speeds, strict=True)],
              [s["max"] - m for m, s in zip(middles, speeds, strict=True)]]  # fmt: skip
    right.barh(names, middles, xerr=spread, color="#0072B2", height=0.6, ecolor="#444444", capsize=3)
    right.invert_yaxis()
    right.set_yticks([])
    right.set_xlabel("tokens a second, all in")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    environment = found["environment"]
    figure.suptitle(
        f"{environment['device']}, {environment['num_cores']} cores, {environment['num_gpus']} GPUs", fontsize=9
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _short(name: str, value: Any) -> str:
    if name == "model":
        return Path(str(value)).name
    return f"{value} ranks" if name == "ranks" else str(value)


def _names(part: Mapping[str, Any]) -> str:
    return "; ".join(cell_name(cell, part["cells"]) for cell in part["cells"])
