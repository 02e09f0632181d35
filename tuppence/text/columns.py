"""The column of a parquet file that has the text, and how much of it to read at a time."""

from __future__ import annotations

from typing import Any

from tuppence.errors import UserError
from tuppence.text.inputs import InputFile, some_of

MOST_ROWS = 256  # read at a time
BATCH_BYTES = 1 << 20  # about; so of long texts fewer


def text_path(file: InputFile, schema: Any, *, text_field: str) -> list[str]:
    """The names that lead to the text: one, or those of fields in fields (`meta.text`).

    Raises UserError where there is no such field, or it holds no text.
    """
    for path in ([text_field], text_field.split(".")):
        kind = _kind_at(file, schema, path)
        if kind is not None:
            break
    else:
        raise UserError(
            f"{file.shown}: row 1 has no field {text_field!r}; it has {some_of(_names(schema))}: "
            "choose one with data.text_field"
        )
    if not _is_text(kind):
        raise UserError(
            f"{file.shown}: field {text_field!r} holds {str(kind)[:80]}, not strings; "
            "choose another with data.text_field"
        )
    return path


def rows_at_once(group: Any, column: str) -> int:
    """How many rows of a row group to read together, by the mean size of their text."""
    chunks = (group.column(index) for index in range(group.num_columns))
    sizes = [c.total_uncompressed_size for c in chunks if c.path_in_schema == column]
    mean_bytes: int = sum(sizes) // max(1, group.num_rows)
    return max(1, min(MOST_ROWS, BATCH_BYTES // max(1, mean_bytes)))


def cells_of(batch: Any, path: list[str], *, most_bytes: int) -> list[bytes | int | None]:
    """The text of each row; of one with more bytes only how many they are."""
    import pyarrow
    import pyarrow.compute

    column = batch.column(path[0])
    if len(path) > 1:
        column = pyarrow.compute.struct_field(column, path[1:])
    column = column.cast(pyarrow.large_binary())
    lengths: list[int | None] = pyarrow.compute.binary_length(column).to_pylist()
    if max((n for n in lengths if n is not None), default=0) <= most_bytes:
        cells: list[bytes | int | None] = column.to_pylist()
        return cells
    return [
        n if n is not None and n > most_bytes else column[row].as_py()
        for row, n in enumerate(lengths)
    ]


def _kind_at(file: InputFile, schema: Any, path: list[str]) -> Any:
    """The type of the field that the names lead to; None where they do not lead to one."""
    import pyarrow

    here = schema
    for name in path:
        if not isinstance(here, pyarrow.Schema | pyarrow.StructType):
            return None
        found = here.get_all_field_indices(name)
        if len(found) > 1:
            raise UserError(
                f"{file.shown}: {len(found)} fields are called {name!r}; rename them, or choose "
                "another with data.text_field"
            )
        if not found:
            return None
        here = here.field(found[0]).type
    return here


def _names(fields: Any) -> list[str]:
    """The names of all fields, of those inside others as data.text_field would have them."""
    import pyarrow

    found = []
    for field in fields:
        if isinstance(field.type, pyarrow.StructType):
            found += [f"{field.name}.{name}" for name in _names(field.type)]
        else:
            found.append(field.name)
    return found


def _is_text(kind: Any) -> bool:
    """Whether a type holds strings, or bytes, which may be UTF-8."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return str(kind) in names
