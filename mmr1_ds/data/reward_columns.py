"""What rewards see of a row beside the ground truth, read when a response is scored: its columns, its messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmr1_ds.config import DataConfig
from mmr1_ds.data.chat import ChatFormat
from mmr1_ds.data.paths import at_path, column_of
from mmr1_ds.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

KEY = "data.reward_columns"
SOURCE = "data_source"  # verl's rewards ask it which of them is meant, and many pay 0 for an empty one


class RewardColumns:
    """Reads rows of one source, memory-mapped: nothing of them is kept."""

    def __init__(self, name: str, rows: Dataset, data: DataConfig) -> None:
        """Choose the columns, SOURCE among them where it is there. Raises: UserError naming one that `name` lacks."""
        check_reward_columns(name, rows.column_names, data)
        read = (data.prompt_key, data.answer_key, data.image_key, data.video_key)
        others = [column for column in rows.column_names if column not in read and not _has_media(rows, column)]
        columns = others if data.reward_columns == "all" else list(data.reward_columns)
        if SOURCE in others and SOURCE not in columns:
            columns.append(SOURCE)
        self._features = undecoded_features(rows, columns)
        self._rows = rows.select_columns(columns).with_format("arrow") if columns else None
        self._name, self._prompt_key = name, data.prompt_key
        prompt = [column for column in [column_of(data.prompt_key, rows.column_names)] if column is not None]
        self._prompt_features = undecoded_features(rows, prompt)
        self._prompts = rows.select_columns(prompt).with_format("arrow")
        self._format = ChatFormat(None, None, data.assistant_prefill, is_multimodal=False)

    def read(self, row: int) -> Mapping[str, Any]:
        """Return the columns of a row; an image is its bytes, or its path where the data has a path."""
        if self._rows is None:
            return {}
        (found,) = self._rows[row : row + 1].to_pylist()
        return {name: _plain(cell) for name, cell in self._features.decode_example(found).items()}

    def messages(self, row: int) -> list[dict[str, Any]]:
        """Return the messages of a row's prompt, as the data has them but for an answer; none where it is a text."""
        (found,) = self._prompts[row : row + 1].to_pylist()
        cell = at_path(self._prompt_features.decode_example(found), self._prompt_key)
        return [_plain(message) for message in self._format.messages(cell, f"{self._name}, row {row}")]


def check_reward_columns(name: str, columns: Sequence[str], data: DataConfig) -> None:
    """Check the key. Raises: UserError where it is neither all nor a list, or names a column that `name` lacks."""
    wanted = data.reward_columns
    if wanted == "all":
        return
    if not isinstance(wanted, list) or not all(isinstance(column, str) for column in wanted):
        raise UserError(f"{KEY} must be all or a list like [task, rubric], got {wanted!r}")
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise UserError(f"{name} has no column {missing[0]!r} ({KEY}); it has {', '.join(columns)}")


def undecoded_features(rows: Dataset, columns: Sequence[str]) -> Any:
    """Return the features of columns, images and videos left as bytes and path, wherever a column holds them."""
    from datasets import Features

    return Features({column: _undecoded(rows.features[column]) for column in columns})


def _undecoded(feature: Any) -> Any:
    from datasets import Image, LargeList, List, Video

    if isinstance(feature, (Image, Video)):
        return type(feature)(decode=False)
    if isinstance(feature, (List, LargeList)):
        return type(feature)(_undecoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _undecoded(part) for name, part in feature.items()}
    return feature


def _has_media(rows: Dataset, column: str) -> bool:
    """Return whether a column holds images, videos or other bytes, at whatever depth."""

    def found(feature: Any) -> bool:
        from datasets import Audio, Image, LargeList, List, Video

        if isinstance(feature, dict):
            return any(found(part) for part in feature.values())
        if isinstance(feature, (List, LargeList)):
            return found(feature.feature)
        return isinstance(feature, (Audio, Image, Video)) or "binary" in str(getattr(feature, "dtype", ""))

    return found(rows.features[column])


def _plain(cell: Any) -> Any:
    if isinstance(cell, dict) and cell.keys() == {"bytes", "path"}:
        return cell["path"] if cell["bytes"] is None else cell["bytes"]
    if isinstance(cell, dict):
        return {name: _plain(part) for name, part in cell.items()}
    return [_plain(part) for part in cell] if isinstance(cell, list) else cell
