"""Parquet: a row is one document, `name#ROW`, counted from 0. Groups of rows are read alone, in batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from core.errors import UserError
from llm.data.sources.document import Broken, Document, from_value, import_extra
from llm.data.sources.listing import File, open_file

_ROWS = 256  # at a time: few, for the sake of long documents
_BUFFER = 1 << 20  # bytes; without one, all of a column in a row group is read at once


def read_parquet(file: File, begin: int, end: int, field: str) -> Iterator[Document | Broken]:
    """The rows of the groups that start at bytes `begin` to `end` of a file.

    Raises:
        UserError: for a file that is gone, changed or damaged, or has no column `field` of strings.
    """
    pyarrow, parquet = import_extra("pyarrow"), import_extra("pyarrow.parquet")
    with open_file(file) as opened:
        try:
            table = parquet.ParquetFile(opened, buffer_size=_BUFFER, page_checksum_verification=True)
            _check_column(file, table.schema_arrow, field, pyarrow.types)
            row = 0
            for number in range(table.num_row_groups):
                group = table.metadata.row_group(number)
                if begin <= _offset(group) < end:
                    batches = table.iter_batches(_ROWS, row_groups=[number], columns=[field])
                    yield from _rows(file, field, row, batches, pyarrow)
                row += group.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{file.path} is damaged or no Parquet file ({str(error).splitlines()[0]}): "
                "copy it again, or leave it out of data.sources"
            ) from None


def _offset(group: Any) -> int:
    """Where a row group starts in its file."""
    column = group.column(0)
    return min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset)


def _rows(file: File, field: str, row: int, batches: Any, pyarrow: Any) -> Iterator[Document | Broken]:
    for batch in batches:
        column = batch.column(0)
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        # As bytes: pyarrow never looks whether a string is UTF-8.
        for row, value in enumerate(column.cast(pyarrow.large_binary()).to_pylist(), row):  # noqa: B020
            yield from_value(value, field, f"{file.name}#{row}", f"{file.path}, row {row}")
        row += 1


def _check_column(file: File, schema: Any, field: str, types: Any) -> None:
    if field not in schema.names:
        raise UserError(f"{file.path} has no column {field!r}; there are: {', '.join(schema.names)}")
    kind = schema.field(field).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    if not any(test(value) for test in (*strings, types.is_binary, types.is_large_binary)):
        raise UserError(f"{file.path}: the column {field!r} holds {kind}, not strings")
