"""Checks of the files that a run names, without loading a model: data, model, reward file, format prompt."""

from __future__ import annotations

import ast
import csv
import itertools
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mmr1_ds.config import DataConfig, ModelConfig, RewardConfig, RunConfig, user_files
from mmr1_ds.config.ranges import value_at
from mmr1_ds.config.schema import names_a_file
from mmr1_ds.data.chat import load_format_prompt
from mmr1_ds.data.columns import ROWS_LOOKED_AT, check_images_are_read
from mmr1_ds.data.paths import column_of
from mmr1_ds.data.rows import check_columns
from mmr1_ds.data.sources import BUILDERS, list_names, split_name
from mmr1_ds.errors import UserError, first_line
from mmr1_ds.preflight.videos import check_first_videos
from mmr1_ds.rewards.interfaces import call_style
from mmr1_ds.rewards.loading import BUILT_IN, each_function, split_reference

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TEXT = "utf-8-sig"  # passes over the byte order mark that spreadsheets write, as `datasets` does
_MAX_COUNTED_BYTES = 256 * 2**20  # a larger JSON file is not counted: a dry run stays quick


@dataclass(frozen=True)
class FileSummary:
    """One data set as the user named it."""

    name: str
    is_local: bool  # False: taken for a hub name, not checked
    num_rows: int | None  # before over-long prompts are dropped; None = not counted
    has_images: bool | None  # None = unknown
    has_videos: bool | None = None


@dataclass(frozen=True)
class DataSummary:
    """All data sets of one key."""

    files: tuple[FileSummary, ...]

    @property
    def num_rows(self) -> int | None:
        """Return P before filtering, None when a part of it is unknown."""
        counts = [file.num_rows for file in self.files]
        return None if None in counts else sum(count for count in counts if count is not None)


# --- data ---------------------------------------------------------------------------------------------------------


def check_data(data: DataConfig, key: str, model: ModelConfig) -> DataSummary:
    """Check that the files of data.train_files or data.val_files (`key`) exist and their first rows have the columns.

    Images in a column of another name are an error for a local model that takes images, else a warning. Videos of the
    first rows are opened where PyAV is installed.
    Raises: UserError naming the file, the key, and the columns of the file.
    """
    files = data.train_files if key == "train_files" else data.val_files
    if not isinstance(files, str) and not (isinstance(files, list) and all(isinstance(name, str) for name in files)):
        raise UserError(f"data.{key} must be a path, a hub name or a list of them, got {files}")
    if data.image_dir is not None and not Path(data.image_dir).is_dir():
        raise UserError(f"data.image_dir: no such folder {data.image_dir!r}")
    names = list_names(files, f"data.{key}")
    return DataSummary(tuple(_look_at(name, data, f"data.{key}", model) for name in names))


def _look_at(name: str, data: DataConfig, key: str, model: ModelConfig) -> FileSummary:
    path_text, split = split_name(name)
    path = Path(path_text)
    if not os.path.exists(path):
        return FileSummary(name, is_local=False, num_rows=None, has_images=None)
    parts = _data_files(path, split, key) if path.is_dir() else [path]
    if not parts:
        raise UserError(f"{key}: the folder {path} holds no data files ({', '.join(BUILDERS)})")
    counts = [_readable(_count_rows, part, key) for part in parts]
    num_rows = None if None in counts else sum(count for count in counts if count is not None)
    if num_rows == 0:
        raise UserError(f"{key}: {name!r} has no rows")
    columns = _readable(_columns, parts[0], key)
    if columns is not None:
        check_columns(name, columns, data)
        _check_images(name, parts[0], data, key, model_takes_images(model))
        check_first_videos(name, path, _readable(_first_rows, parts[0], key), data, model_takes_images(model))
    return FileSummary(name, True, num_rows, _has(data.image_key, columns), _has(data.video_key, columns))


def _has(key: str | None, columns: list[str] | None) -> bool | None:
    if columns is None:
        return None
    return key is not None and column_of(key, columns) is not None


def _check_images(name: str, part: Path, data: DataConfig, key: str, takes_images: bool | None) -> None:
    """Raises: UserError for images that would be passed over; a warning where the model may take none."""
    if takes_images is False:
        return
    try:
        check_images_are_read(name, _readable(_first_rows, part, key), data)
    except UserError as error:
        if takes_images:
            raise
        logger.warning("%s", error)


def _data_files(folder: Path, split: str, key: str) -> list[Path]:
    """List the files of one split of a folder: a saved data set, or files named after the split or after none."""
    if (folder / split / "state.json").is_file():
        folder = folder / split
    if (folder / "state.json").is_file():
        state = _json_object(folder / "state.json", key)
        try:
            return [folder / part["filename"] for part in state["_data_files"]]
        except (KeyError, TypeError):
            raise UserError(f"{key}: {folder / 'state.json'} lists no _data_files; save the data set again") from None
    files = sorted(path for path in folder.rglob("*") if path.suffix in BUILDERS and path.is_file())
    words = {path: set(re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())) for path in files}
    named = [path for path in files if split.lower() in words[path]]
    return named or [path for path in files if not words[path] & {"train", "test", "validation", "val", "dev"}]


def _readable(read: Callable[[Path], Result], path: Path, key: str) -> Result:
    """Return what `read` finds in a data file. Raises: UserError naming the file it cannot read."""
    if path.suffix not in BUILDERS:
        raise UserError(f"{key}: unknown kind of file {str(path)!r}; known: {', '.join(BUILDERS)}")
    try:
        return read(path)
    except (OSError, ValueError) as error:  # pyarrow's and json's errors are ValueErrors
        raise UserError(f"{key}: cannot read {str(path)!r}: {str(error).splitlines()[0]}") from None


def _json_object(path: Path, key: str) -> dict[str, Any]:
    """Raises: UserError naming the file when it is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: cannot read {str(path)!r} as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{key}: {str(path)!r} must hold a JSON object")
    return content


def _columns(path: Path) -> list[str] | None:
    """Return the column names of a data file, from its schema or first row; None if that takes reading it all."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(path).names)
    if path.suffix == ".arrow":
        return list(_open_arrow(path).schema.names)
    if path.suffix == ".csv":
        with path.open(encoding=_TEXT) as file:
            return [name.strip().strip('"') for name in file.readline().split(",")]
    rows = _first_json_rows(path, 1)
    return list(rows[0]) if rows else None


def _first_rows(path: Path) -> list[dict[str, Any]]:
    """Return rows of a data file with all their columns, from its beginning; few or none where rows are large."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=ROWS_LOOKED_AT)
            return next((batch.to_pylist() for batch in batches), [])
    if path.suffix == ".arrow":
        reader = _open_arrow(path)
        batch = reader.get_batch(0) if hasattr(reader, "get_batch") else reader.read_next_batch()
        return list(batch.slice(0, ROWS_LOOKED_AT).to_pylist())
    if path.suffix == ".csv":
        with path.open(encoding=_TEXT, newline="") as file:
            return list(itertools.islice(csv.DictReader(file), ROWS_LOOKED_AT))
    return _first_json_rows(path, ROWS_LOOKED_AT)


def _open_arrow(path: Path) -> Any:
    """Open an Arrow stream (what `datasets` writes) or file."""
    import pyarrow

    source = pyarrow.memory_map(str(path))
    try:
        return pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(source)


def _first_json_rows(path: Path, most: int) -> list[dict[str, Any]]:
    """Return the first objects of JSON lines or of a JSON list, as far as they lie in the first megabyte."""
    with path.open(encoding=_TEXT) as file:
        head = file.read(2**20).lstrip()
    decoder = json.JSONDecoder()
    rows: list[dict[str, Any]] = []
    position = len(head) - len(head.removeprefix("[").lstrip())
    while len(rows) < most and position < len(head):
        try:
            row, position = decoder.raw_decode(head, position)
        except json.JSONDecodeError:
            if not rows and len(head) < 2**19:
                raise
            break  # a row that is cut: images inside; or the end of the list
        if not isinstance(row, dict):
            raise ValueError("its rows are not objects")
        rows.append(row)
        position += len(head[position:]) - len(head[position:].lstrip(", \t\r\n")) if len(rows) < most else 0
    return rows


def _count_rows(path: Path) -> int | None:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.read_metadata(path).num_rows)
    if path.suffix == ".arrow":
        return sum(_arrow_batches(path))
    if path.stat().st_size > _MAX_COUNTED_BYTES or path.suffix == ".csv":
        return None  # quoted line breaks: a CSV is counted by reading it
    with path.open(encoding=_TEXT) as file:
        if file.read(2**16).lstrip().startswith("["):
            file.seek(0)
            return len(json.load(file))
        file.seek(0)
        return sum(1 for line in file if line.strip())


def _arrow_batches(path: Path) -> Iterator[int]:
    reader = _open_arrow(path)
    if hasattr(reader, "num_record_batches"):
        yield from (reader.get_batch(index).num_rows for index in range(reader.num_record_batches))
    else:
        yield from (batch.num_rows for batch in reader)


# --- model --------------------------------------------------------------------------------------------------------


def check_model(model: ModelConfig) -> None:
    """Check that the model is a folder with safetensors weights, or looks like a hub id.

    Raises: UserError naming what is missing and how to get it.
    """
    check_model_path(model.model_path, "worker.actor.model.model_path")
    if model.tokenizer_path and _is_folder(model.tokenizer_path, "worker.actor.model.tokenizer_path"):
        _check_json_files(Path(model.tokenizer_path), "worker.actor.model.tokenizer_path")


def check_model_path(path: str | None, key: str) -> None:
    """Check a path or hub id alone. Raises: UserError that names `key`."""
    if not path:
        raise UserError(f"{key} is not set; give a model folder, or a hub id like Qwen/Qwen2.5-VL-3B-Instruct")
    if _is_folder(path, key):
        _check_model_folder(path, key)


def _is_folder(name: str, key: str) -> bool:
    """Return True for a path that exists, False for a hub id. Raises: UserError for neither."""
    if os.path.exists(name):
        return True
    if _HUB_ID.fullmatch(name):
        return False
    raise UserError(f"{key}: no such folder {name!r}, and not a hub id of the form org/name")


def _check_model_folder(name: str, key: str) -> None:
    path = Path(name)
    if not path.is_dir() or not (path / "config.json").is_file():
        raise UserError(f"{key}: {name!r} is not a model folder; it needs a config.json beside the weights")
    _check_json_files(path, key)
    content = _json_object(path / "config.json", key)
    tied, text = content.get("tie_word_embeddings"), content.get("text_config") or {}
    if content.get("model_type") in ("qwen3_5", "qwen3_5_moe") and tied and not text.get("tie_word_embeddings"):
        raise UserError(
            f"{key}: tie_word_embeddings is true in {name!r} but not in its text_config, where vLLM looks: it would "
            "leave the output layer random; set it there too"
        )
    if not any(path.glob("*.safetensors")):
        if any(path.glob("*.bin")):
            raise UserError(
                f"{key}: {name!r} has *.bin weights, which can run code when loaded; convert them to safetensors "
                "(from_pretrained(...).save_pretrained(...) of transformers)"
            )
        raise UserError(f"{key}: {name!r} has no weights; it needs *.safetensors")


def _check_json_files(folder: Path, key: str) -> None:
    """Check files on which transformers fails somewhere inside when they hold anything but an object."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"):
        content = _json_object(folder / name, key) if (folder / name).is_file() else {}
        if not isinstance(content.get("text_config") or {}, dict):
            raise UserError(f"{key}: text_config in {str(folder / name)!r} must be an object")


def model_carries_states(model: ModelConfig) -> bool:
    """Return whether a local model's config.json lists layers that carry a state along a sequence (Qwen3.5's)."""
    return "linear_attention" in (_text_config(model).get("layer_types") or ())


def _text_config(model: ModelConfig) -> dict[str, Any]:
    """The part of a local model's config.json on its text; empty for a hub model, which is not read."""
    path = Path(model.model_path or "") / "config.json"
    content = _json_object(path, "worker.actor.model.model_path") if model.model_path and path.is_file() else {}
    text = content.get("text_config")
    return text if isinstance(text, dict) else content


def model_has_experts(model: ModelConfig) -> bool | None:
    """Return whether a local model's config.json is that of a mixture of experts; None for a hub model, not read."""
    text = _text_config(model)
    return bool(text.get("num_experts_per_tok") or text.get("num_experts")) if text else None


def model_takes_images(model: ModelConfig) -> bool | None:
    """Return whether a local model's config.json says that it takes images; None for a hub model, which is not read."""
    path = Path(model.model_path or "") / "config.json"
    if not model.model_path or not os.path.isfile(path):
        return None
    return "vision_config" in _json_object(path, "worker.actor.model.model_path")


def model_hidden_size(model: ModelConfig) -> int | None:
    """Return the width of a local model's text part; None for a hub model, which is not read."""
    path = Path(model.model_path or "") / "config.json"
    if not model.model_path or not os.path.isfile(path):
        return None
    content = _json_object(path, "worker.actor.model.model_path")
    width = content.get("hidden_size") or (content.get("text_config") or {}).get("hidden_size")
    return width if isinstance(width, int) else None


# --- reward, format prompt ----------------------------------------------------------------------------------------


def check_reward(reward: RewardConfig) -> None:
    """Check that the reward is built in, or a function of its file that takes the list of responses.

    The file is read, not run: a function that it may define in other ways is left to the reward processes.
    Raises: UserError.
    """
    if reward.functions:
        for one in each_function(reward):
            check_reward(one)
        return
    if reward.reward_function in BUILT_IN:
        return
    key = "worker.reward.reward_function"
    file, function = split_reference(reward.reward_function)
    node = _function_of(key, file, function)
    if node is not None:
        _check_signature(node, reward, f"{key}: {file}:{function}")


def check_functions(config: RunConfig) -> None:
    """Check that a loss, an average and an estimator of the user's own are functions of their files, which are not run.

    Raises: UserError.
    """
    for key in user_files.FUNCTION_KEYS:
        if names_a_file(value := value_at(config, key)):
            _function_of(key, *user_files.split_reference(key, value))


def _function_of(key: str, file: str, function: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """Return the function's node, or None where the file may define it in other ways. Raises: UserError."""
    try:
        tree = ast.parse(Path(file).read_bytes())  # bytes: the file may name its encoding
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {file}: cannot be read: {error}") from None
    except SyntaxError as error:
        raise UserError(f"{key}: {file}, line {error.lineno}: not Python: {error.msg}") from None
    names = dict(_top_level_names(tree))
    if function not in names and _binds(tree, function):
        return None
    if function not in names:
        known = ", ".join(name for name, node in names.items() if node is not None) or "none"
        raise UserError(f"{key}: {file} has no function {function!r}; its functions are: {known}")
    return names[function]


def _top_level_names(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | None]]:
    """Yield a module's names: functions with their node; decorated ones, and what else may be callable, with None."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, None if node.decorator_list else node
        elif isinstance(node, ast.ClassDef):
            yield node.name, None
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name, None) for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from ((target.id, None) for target in node.targets if isinstance(target, ast.Name))


def _binds(tree: ast.Module, name: str) -> bool:
    """Return whether the module may bind the name anywhere: inside if or try, by assignment, by import *."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            return True
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name:
            return True
        if isinstance(node, ast.alias) and (node.name == "*" or name == (node.asname or node.name)):
            return True
    return False


def _check_signature(node: ast.FunctionDef | ast.AsyncFunctionDef, reward: RewardConfig, where: str) -> None:
    """Check for one argument, or two texts; the others need defaults or stand in reward_function_kwargs."""
    arguments = node.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    given = reward.reward_function_kwargs
    required = [name for name in positional[: len(positional) - len(arguments.defaults)] if name not in given]
    keyword_only = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    style = call_style(required, reward.reward_type)
    if style.keywords:
        return  # the worker says what does not fit
    missing = required[style.num_arguments :]
    missing += [argument.arg for argument, default in keyword_only if default is None and argument.arg not in given]
    if missing:
        raise UserError(
            f"{where} needs {', '.join(missing)}; a reward takes one list of dictionaries (response, response_length, "
            "ground_truth), further arguments come from worker.reward.reward_function_kwargs"
        )
    if not positional and arguments.vararg is None:
        raise UserError(f"{where} takes no argument; a reward takes one list of dictionaries")


def check_format_prompt(data: DataConfig) -> None:
    """Check data.format_prompt. Raises: UserError for a missing file, or no template."""
    load_format_prompt(data.format_prompt)


# --- output -------------------------------------------------------------------------------------------------------


def check_output_folder(path: Path, key: str) -> None:
    """Check that files can be written in the folder, made first where it is missing. Nothing of it stays.

    Raises: UserError naming what is in the way.
    """
    nearest = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not nearest.is_dir():
        raise UserError(f"{key}: {str(path)!r} cannot be made, {str(nearest)!r} is not a folder; name another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {str(path)!r} cannot be written, {str(nearest)!r} is not writable; name another")
    try:
        # Permissions alone do not say it: of a read-only, a full or a kernel's file system, of a name too long.
        with tempfile.TemporaryDirectory(prefix=".mmr1_ds_", dir=nearest) as folder:
            inner = Path(folder, *path.absolute().parts[len(nearest.absolute().parts) :])
            inner.mkdir(parents=True, exist_ok=True)
            (inner / "probe").write_bytes(b"written")
    except (OSError, ValueError) as error:  # the second for characters that no path has
        words = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise UserError(f"{key}: {str(path)!r} cannot be written: {words}; name another") from None
