"""The demo's assets on disk: the warmed-up model and the questions, built once and kept.

FOLDER/model/           the model folder
FOLDER/train_a.parquet  512 prompts, pool A (balanced)
FOLDER/train_b.parquet  512 prompts, pool B (mostly dead)
FOLDER/val.parquet      512 held-out learnable prompts
FOLDER/recipe.json      what the folder was built from; a folder of another recipe is built anew
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from mmr1_ds.commands.demo import digits, model, warmup
from mmr1_ds.commands.demo.warmup import WarmupSettings
from mmr1_ds.errors import UserError
from mmr1_ds.monitoring.progress import progress

RECIPE_FILE = "recipe.json"


def prepare_assets(folder: Path, seed: int = 0, settings: WarmupSettings | None = None) -> bool:
    """Build the assets in `folder` unless it holds them already. Returns: whether they were built.

    They are built in a temporary folder beside it, which then takes its name: `folder` is whole or not there, also
    after an interruption. An older recipe's assets are replaced.

    Raises: UserError when `folder` holds anything but assets: it is not ours to replace.
    """
    recipe = assets_recipe(seed, settings or WarmupSettings())
    if _read_recipe(folder) == recipe:
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as work:
        built = Path(work) / "built"
        built.mkdir()
        _build(built, seed, settings or WarmupSettings())
        (built / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(Path(work) / "replaced")
        built.rename(folder)
    return True


def assets_recipe(seed: int, settings: WarmupSettings) -> dict[str, Any]:
    """All that decides the assets: the seed, the settings, and the source that turns them into files."""
    source = hashlib.sha256()
    for module in (digits, model, warmup):
        source.update(Path(str(module.__file__)).read_bytes())
    settings_now = json.loads(json.dumps(dataclasses.asdict(settings)))  # tuples as lists, as the file gives them
    return {"seed": seed, "settings": settings_now, "source": source.hexdigest()}


def _read_recipe(folder: Path) -> object:
    """The recipe of the assets in `folder`; None when there is no such folder."""
    if not folder.exists():
        return None
    try:
        return json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{folder} exists but holds no demo assets ({RECIPE_FILE} is missing or damaged): "
            "remove it or give another --folder"
        ) from error


def _build(folder: Path, seed: int, settings: WarmupSettings) -> None:
    for pool in digits.POOLS:
        name = f"train_{pool.lower()}"
        digits.write_parquet(folder / f"{name}.parquet", digits.training_questions(pool, seed), name)
    digits.write_parquet(folder / "val.parquet", digits.validation_questions(seed), "val")
    network = model.build_model(seed)
    with progress(settings.num_steps, "warm-up") as advance:
        for _ in warmup.warm_up(network, seed, settings):
            advance(1)
    model.save_model(folder / "model", network)
