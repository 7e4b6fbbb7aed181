"""One pass over the rows by the trainer's own scan, which continues where training would stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from mmr1_ds.config import DataConfig
from mmr1_ds.data.rows import Row, RowReader
from mmr1_ds.data.scan import BATCH_ROWS, ROWS_A_PROCESS, BatchScan, work_of
from mmr1_ds.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from mmr1_ds.data.encoding import PromptEncoder

AT_ITS_START, WHEN_DRAWN = "would stop the run at its start", "would stop the run when drawn"


_Span = tuple[int, range]  # rows of one source that are surveyed in one call: the source's place, the rows


def survey_rows(
    readers: list[RowReader],
    data: DataConfig,
    prompt_encoder: PromptEncoder,
    decode_images: bool,
    advance: Callable[[int], None],
) -> pa.Table:
    """Look at every row of every source, in their order.

    Args: decode_images: read images and frames whole, not only headers; advance: takes how many more are done.
    Returns: R rows of `schema()`.
    """
    import pyarrow as pa

    survey = _SpanSurvey(readers, prompt_encoder, decode_images)
    spans = [
        (source, range(start, min(start + BATCH_ROWS, len(reader))))
        for source, reader in enumerate(readers)
        for start in range(0, len(reader), BATCH_ROWS)
    ]
    wanted = sum(map(work_of, readers)) // ROWS_A_PROCESS
    processes = min(data.filter_overlong_prompts_workers, os.cpu_count() or 1, wanted)
    parts = []
    for span, part in zip(spans, _run(survey, spans, processes), strict=True):
        parts.append(part)
        advance(len(span[1]))
    return pa.concat_tables(parts).combine_chunks()


def schema() -> pa.Schema:
    """Return the columns of a surveyed row; what could not be measured is null."""
    import pyarrow as pa

    return pa.schema(
        [
            ("source", pa.int32()),  # its place among the sources
            ("row", pa.int64()),  # in its source, from 0
            ("prompt_id", pa.large_string()),
            ("length", pa.int32()),  # tokens, images included
            ("category", pa.large_string()),
            ("num_images", pa.int32()),
            ("num_videos", pa.int32()),
            ("has_answer", pa.bool_()),  # the assistant's last turn was taken off the prompt
            ("passed_over", pa.string()),  # the column of an image beside an empty data.image_key
            ("answer", pa.large_string()),
            ("widths", pa.large_list(pa.int32())),  # of its images, as they came
            ("heights", pa.large_list(pa.int32())),
            ("effect", pa.string()),  # what becomes of the run: AT_ITS_START, WHEN_DRAWN, null = the row is fine
            ("problem", pa.large_string()),  # the trainer's words for it, the row's name left out
        ]
    )


class _SpanSurvey:
    """Looks at a span of rows."""

    def __init__(self, readers: list[RowReader], prompt_encoder: PromptEncoder, decode_images: bool) -> None:
        self._readers, self._encoder, self._decode_images = readers, prompt_encoder, decode_images

    def __call__(self, span: _Span) -> pa.Table:
        import pyarrow as pa

        source, indices = span
        reader = self._readers[source]
        table = reader.rows[indices.start : indices.stop]
        scan = BatchScan(reader, self._encoder)
        try:
            measured: list[dict[str, Any]] = scan(table, indices).to_pylist()
        except UserError:  # of one row at least: which ones?
            measured = [_measured_alone(scan, table, place, reader, index) for place, index in enumerate(indices)]
        rows = reader.decode(table)
        lines = []
        for index, row, found in zip(indices, rows, measured, strict=True):
            if "problem" not in found:
                found = self._looked_at(row, found, reader, index)
            lines.append({"source": source, "row": index, **found})
        return pa.Table.from_pylist(lines, schema=schema())

    def _looked_at(self, row: Row, measured: dict[str, Any], reader: RowReader, index: int) -> dict[str, Any]:
        where, references = reader.where(index), reader.references(row)
        if self._decode_images:
            try:
                for reference in references:
                    reader.image_source.load(reference, where).close()
                for video in reader.video_references(row):
                    self._encoder.sampled(reader.video_source.open(video, where), where)
            except UserError as error:
                return _refused(error, WHEN_DRAWN, where)
        sizes = [reader.image_source.size(reference, where) for reference in references]
        return measured | {
            "answer": reader.ground_truth(row, where),
            "widths": [width for width, _ in sizes],
            "heights": [height for _, height in sizes],
        }


def _measured_alone(scan: BatchScan, table: pa.Table, place: int, reader: RowReader, index: int) -> dict[str, Any]:
    try:
        (measured,) = scan(table.slice(place, 1), [index]).to_pylist()
    except UserError as error:
        return _refused(error, AT_ITS_START, reader.where(index))
    return measured


def _refused(error: UserError, effect: str, where: str) -> dict[str, Any]:
    return {"effect": effect, "problem": " ".join(str(error).split()).removeprefix(f"{where}: ")}


# --- several processes, for large sets ----------------------------------------------------------------------------


def _run(survey: _SpanSurvey, spans: list[_Span], processes: int) -> Iterator[pa.Table]:
    """What the survey says of each span, in their order."""
    if processes < 2:
        yield from map(survey, spans)
        return
    # Forked, as `datasets` does for the trainer's scan: tokenizer and tables need not be sent.
    pool = ProcessPoolExecutor(processes, get_context("fork"), initializer=_begin, initargs=(survey,))
    try:
        yield from pool.map(_survey_span, spans)
    finally:
        pool.shutdown(cancel_futures=True)


_survey_here: _SpanSurvey | None = None  # of a worker process


def _begin(survey: _SpanSurvey) -> None:
    global _survey_here
    _survey_here = survey
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # after a fork it would say that it turns it off
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers


def _survey_span(span: _Span) -> pa.Table:
    assert _survey_here is not None
    return _survey_here(span)
