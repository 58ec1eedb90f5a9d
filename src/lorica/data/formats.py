"""The formats of data files: the bytes of one file become a table, every row with its line.

A format is one function and its suffix in `READERS`. What is wrong with a file is a ValueError that
names the file, the line, what is allowed and what to do.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.data.words import INDEX, WHERE, excerpt, keep_as_json, keep_as_text, kind_of, listing
from lorica.text import check_depth, clear_errors, parse_json, refusal

if TYPE_CHECKING:
    import pyarrow as pa

TXT_SPLITS = ("paragraph", "line", "file")
# Texts shrink to a third or a tenth, a log of one line repeated to a hundredth.
RATIO = 200  # a packed file's size times this is what it may unpack to, ...
PLAIN = 1 << 26  # ... or so many bytes, where that is more
CHUNK = 1 << 16
PARQUET_ROWS = 1 << 12  # decoded at a time
DICTIONARY = 1 << 28  # bytes of memory for .xz; `xz -9` needs 65 MiB


@dataclass(frozen=True)
class Options:
    """What the format readers may be told."""

    header: tuple[str, ...] | None
    txt_split: str | None
    table: bool = False  # a file of another ending is a table too: its columns were asked for


def suffix_of(path: Path) -> tuple[str, str]:
    """(suffix of the format, suffix of the compression or "")."""
    suffixes = [part.lower() for part in path.suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        return (suffixes[-2] if len(suffixes) > 1 else "", suffixes[-1])
    return (suffixes[-1] if suffixes else "", "")


def formats() -> str:
    return (
        f"readable are {listing(READERS)}, each also with {listing(OPENERS)} behind, and a `.zip` "
        "of them (other archives, such as .tar, must be unpacked first)"
    )


def read_file(path: Path, options: Options, data: bytes | None = None) -> pa.Table:
    """The table of a file, of which `data` may hold the bytes already (those in an archive)."""
    suffix, _ = suffix_of(path)
    if is_table(path, options):
        data = _bytes_of(path, data)
        delimiter = _delimiter(_text_of(path, data))
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        return _separated(delimiter, quoting)(path, data, options)
    if suffix not in READERS:
        raise ValueError(
            f"{path} has the suffix {suffix or 'of no format'!r}: {formats()}. Rename the file if "
            "it is one of these."
        )
    return READERS[suffix](path, _bytes_of(path, data), options)


def is_table(path: Path, options: Options) -> bool:
    """Whether a file that isn't one by its ending is read as a table, because a header or columns
    were given for it."""
    suffix, _ = suffix_of(path)
    asked = options.header is not None or options.table
    return asked and options.txt_split is None and (suffix == ".txt" or suffix not in READERS)


def _delimiter(text: str) -> str:
    """What separates the fields of a table: what its first line has most of, tabs before all."""
    line = _head_line(text)
    return "\t" if "\t" in line else max((",", ";", "|"), key=line.count)


def _head_line(text: str) -> str:
    return next((line for line in text[:100_000].splitlines() if line.strip()), "")


def _bytes_of(path: Path, data: bytes | None = None) -> bytes:
    """The file's bytes, unpacked in memory."""
    _, packed = suffix_of(path)
    if data is None and not path.is_file():
        raise ValueError(
            f"{path} is no ordinary file (a folder, a pipe, a device, or a link that leads "
            "nowhere): data is read from files. Name a file, or a folder of files."
        )
    if data is None:
        with clear_errors():
            data = path.read_bytes()
    try:
        most = max(PLAIN, RATIO * len(data))
        plain = OPENERS[packed](data, most + 1) if packed else data
    except (OSError, EOFError, ValueError, MemoryError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(
            f"{path} can't be read{f' as a {packed} file' if packed else ''}: "
            f"{error or type(error).__name__}. It must be whole and readable: copy or download it "
            "again."
        ) from error
    if packed and len(plain) > most:
        raise ValueError(
            f"{path} has {len(data):,} bytes and unpacks to more than {most:,}, which no text "
            f"does: at most {RATIO} times its size is allowed. If it is what you want, unpack it "
            "yourself and name the unpacked file."
        )
    return plain


def unzipped(path: Path) -> dict[Path, bytes]:
    """The files of a .zip, by the path of the archive and theirs in it."""
    most = max(PLAIN, RATIO * path.stat().st_size)
    found: dict[Path, bytes] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.is_dir():
                    continue
                with archive.open(member) as file:
                    found[path / member.filename] = file.read(most + 1)
                most -= len(found[path / member.filename])
                if most < 0:
                    break
    except (OSError, RuntimeError, ValueError, NotImplementedError, EOFError) as error:
        raise ValueError(refusal(error) or _no_zip(path, error)) from error
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise ValueError(_no_zip(path, error)) from error
    if most < 0:
        raise ValueError(
            f"{path} unpacks to more than {RATIO} times its size, which no text does. If it is "
            "what you want, unpack it yourself and name the folder."
        )
    return found


def _no_zip(path: Path, error: Exception) -> str:
    return (
        f"{path} can't be read as a .zip file: {_first_line(error)}. It must be whole, and without "
        "a password: copy or download it again, or unpack it and name the folder."
    )


def _streams(data: bytes, most: int, make: Callable[[], Any]) -> bytes:
    """At most so many bytes of the streams that stand one behind the other; zeros may pad them, and
    anything else there is an error: Python's own readers would end without a word."""
    packed, parts, size = io.BytesIO(data), [], 0
    stream = make()
    fed = packed.read(CHUNK)
    while size < most:
        part = stream.decompress(fed, most - size)
        parts.append(part)
        size += len(part)
        fed = b""
        if stream.eof:
            fed = (stream.unused_data or packed.read(CHUNK)).lstrip(b"\0")
            while not fed and packed.tell() < len(data):
                fed = packed.read(CHUNK).lstrip(b"\0")
            if not fed:
                break
            stream = make()
        elif stream.needs_input and not (fed := packed.read(CHUNK)):
            raise EOFError("the file ends before its end mark")
    return b"".join(parts)


def _unxz(data: bytes, most: int) -> bytes:
    """A header that asks for a dictionary beyond reason gets none."""
    return _streams(data, most, lambda: lzma.LZMADecompressor(memlimit=DICTIONARY))


def _unbzip(data: bytes, most: int) -> bytes:
    return _streams(data, most, bz2.BZ2Decompressor)


def _ungzip(data: bytes, most: int) -> bytes:
    return gzip.GzipFile(fileobj=io.BytesIO(data)).read(most)


def _text_of(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise ValueError(
            f"{path}, line {line}: the byte 0x{data[error.start]:02x} is not UTF-8, and text files "
            f"must be. Convert it: `iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8 "
            f"{path.name}`."
        ) from error


def _json(path: Path, data: bytes, options: Options) -> pa.Table:
    text = _text_of(path, data)
    rows = _json_array(path, text) if text.lstrip()[:1] == "[" else _json_lines(path, text)
    return _table_of(path, list(rows))


def _jsonl(path: Path, data: bytes, options: Options) -> pa.Table:
    return _table_of(path, list(_json_lines(path, _text_of(path, data))))


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # `str.splitlines` would also cut at U+2028 and its like, which JSON allows inside texts.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except json.JSONDecodeError as error:
            raise ValueError(_broken(path, number, error.colno, error.msg, line, text)) from error
        except ValueError as error:
            raise ValueError(_too_much(path, number, line)) from error
        yield number, _object(path, number, value)


def _broken(path: Path, line: int, column: int, reason: str, found: str, text: str) -> str:
    try:
        whole = parse_json(text)
    except ValueError:
        return (
            f"{path}, line {line}, column {column}: not valid JSON: {reason}, in "
            f"{excerpt(found)}. Each line must hold one whole object; mend or remove that line."
        )
    keys = f" (its keys: {listing(whole)})" if isinstance(whole, dict) else ""
    return (
        f"{path} holds a single JSON {kind_of(whole).split()[-1]}{keys}: an array of objects, or "
        "one object a line, is needed. Write out the list of rows alone."
    )


def _too_much(path: Path, line: int, found: str) -> str:
    return (
        f"{path}, line {line}: a number of thousands of digits, or lists within lists beyond any "
        f"need, in {excerpt(found)}. Write such a number as a text, and rows plainly."
    )


def _json_array(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Element by element, so that each knows its line."""
    decoder = json.JSONDecoder()
    space = re.compile(r"[ \t\r\n]*")

    def skip(at: int) -> int:
        found = space.match(text, at)
        assert found is not None
        return found.end()

    def expected(what: str, at: int) -> ValueError:
        row, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        return ValueError(
            f"{path}, line {row}, column {column}: not valid JSON: {what}. The file must be one "
            "array of objects, `[{...}, {...}]`; mend it there."
        )

    at, line, counted = skip(skip(0) + 1), 1, 0
    while text[at : at + 1] != "]":
        try:
            value, end = decoder.raw_decode(text, at)
            check_depth(value)
        except json.JSONDecodeError as error:
            raise expected(error.msg, error.pos) from error
        except (ValueError, RecursionError) as error:
            raise ValueError(_too_much(path, line, text[at : at + 80])) from error
        line += text.count("\n", counted, at)
        counted = at
        yield line, _object(path, line, value)
        at = skip(end)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
        elif text[at : at + 1] != "]":
            raise expected("expecting ',' or ']'", at)
    if skip(at + 1) != len(text):
        raise expected("more text after the array", skip(at + 1))


def _object(path: Path, line: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}, line {line}: {excerpt(value)} is {kind_of(value)}: each row must be an "
            'object such as {"text": "..."}. Wrap it in one.'
        )
    check_names(f"{path}, line {line}", value)
    return value


MOST_COLUMNS = 1000  # a table's cost grows with them, even where most are left aside


def check_names(place: str, names: Iterable[str]) -> None:
    """Names of columns that can be shown, not too many, and none that this reader uses itself.

    Raises:
        ValueError: naming the place and the first that is not.
    """
    names = list(names)
    if len(names) > MOST_COLUMNS:
        raise ValueError(
            f"{place}: {len(names):,} columns, of {MOST_COLUMNS:,} at most; data to train on have a"
            " few. Check the separator, and keep the columns that are needed."
        )
    for name in names:
        if name.startswith("__"):
            raise ValueError(
                f"{place}: the key `{name}` starts with two underscores, which is kept for this "
                "reader's own columns. Rename it."
            )
        if len(name) > 200 or not name.isprintable():
            raise ValueError(
                f"{place}: the key {excerpt(name)} is no name: a column's name is at most 200 "
                "printable characters. Rename it."
            )


def _table_of(path: Path, rows: list[tuple[int, dict[str, Any]]]) -> pa.Table:
    """Objects to columns; a key that a row lacks is null there."""
    import pyarrow as pa

    names = list(dict.fromkeys(key for _, row in rows for key in row))
    check_names(str(path), names)
    first = rows[0] if rows else (0, {})
    for line, row in rows:
        if not first[1].keys() & row.keys():
            raise ValueError(
                f"{path}, line {line}: its keys ({listing(row)}) have none in common with those "
                f"of line {first[0]} ({listing(first[1])}): the rows of a file are of one shape. "
                "Keep the two kinds in two files."
            )
    lines = [line for line, _ in rows]
    arrays = [_column(path, name, [row.get(name) for _, row in rows], lines) for name in names]
    places = pa.array([f"{path}, line {line}" for line in lines], type=pa.string())
    return pa.table([*arrays, places], names=[*names, WHERE])


def _column(path: Path, name: str, values: list[Any], lines: list[int]) -> pa.Array:
    import pyarrow as pa

    families = {int: "number", float: "number", list: "nested", dict: "nested"}
    seen: dict[str, int] = {}
    for index, value in enumerate(values):
        if value is not None:
            seen.setdefault(families.get(type(value), type(value).__name__), index)
    kinds = {type(value) for value in values if value is not None}
    # Each stays what it is (as a text 3 is `3`, not `3.0`); a shape decides what it takes.
    if seen.keys() == {"number", "str"} or kinds == {int, float}:
        return pa.array([keep_as_json(value) for value in values], type=pa.string())
    if len(seen) > 1:
        one, other = list(seen.values())[:2]
        raise ValueError(
            f"{path}, line {lines[other]}: `{name}` is {kind_of(values[other])} "
            f"({excerpt(values[other])}), but {kind_of(values[one])} on line {lines[one]}: a "
            "column holds one type. Write both the same way."
        )
    if "nested" not in seen:
        try:
            return pa.array([keep_as_text(value) for value in values])
        except (pa.ArrowInvalid, OverflowError, UnicodeEncodeError) as error:
            line = next(n for n, value in zip(lines, values, strict=True) if not _fits(value))
            raise ValueError(
                f"{path}, line {line}: `{name}` can't be stored: {error}. Numbers must fit in 64 "
                "bits (write larger ones as texts), and texts hold no half surrogate pairs."
            ) from error
    try:
        if any(map(_wide, values)):
            raise OverflowError  # Arrow's cost grows with the square of the fields
        array = pa.array(values)
        back = array.to_pylist()
        if back == values and repr(back) == repr(values):  # 3 == 3.0, and they are other texts
            return array
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path}: `{name}` holds half a surrogate pair ({error}); texts hold whole characters"
        ) from error
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        pass
    # Arrow would give every dictionary the keys of all the others, or refuses their types.
    return pa.array([keep_as_json(value) for value in values], type=pa.string())


def _wide(value: Any) -> bool:
    """Whether an object in it has more keys than a table may have columns."""
    if isinstance(value, dict):
        return len(value) > MOST_COLUMNS or any(map(_wide, value.values()))
    return isinstance(value, list) and any(map(_wide, value))


def _fits(value: Any) -> bool:
    import pyarrow as pa

    try:
        pa.array([value])
    except (pa.ArrowInvalid, OverflowError, UnicodeEncodeError):
        return False
    return True


def _separated(delimiter: str, quoting: Any) -> Callable[[Path, bytes, Options], pa.Table]:
    def reader(path: Path, data: bytes, options: Options) -> pa.Table:
        text, between = _text_of(path, data), delimiter
        # A .csv of a program that writes semicolons or tabs has no comma in its first line.
        unlike = delimiter == "," and "," not in _head_line(text)
        if unlike and len(options.header or ("", "")) > 1:
            between = _delimiter(text)
        rows = list(_fields(path, text, between, quoting))
        if options.header is not None:
            header = list(options.header)
        elif rows:
            header = [name.strip() for name in rows.pop(0)[1]]
        else:
            header = []
        table = _field_table(path, header, rows, given=options.header is not None)
        return without_index(table)

    return reader


def _fields(path: Path, text: str, delimiter: str, quoting: Any) -> Iterator[tuple[int, list[str]]]:
    if quoting == csv.QUOTE_NONE:
        # Not the csv module: without quotes a row is a line, and a lone "\r" is no line's end.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip("\r"):
                yield number, line.rstrip("\r").split(delimiter)
        return
    limit = csv.field_size_limit(1 << 30)  # the default, 128 KiB, is less than a long document
    try:
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True
        )
        start = 1
        try:
            for row in reader:
                if row:
                    yield start, row
                start = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {start}: not valid CSV: {error}. A field with a quote, a comma or a "
                'line end in it must stand in "...", with a quote inside doubled (""); mend that '
                "row. A file without quoting is a .tsv."
            ) from error
    finally:
        csv.field_size_limit(limit)


def _field_table(
    path: Path, header: list[str], rows: list[tuple[int, list[str]]], *, given: bool
) -> pa.Table:
    import pyarrow as pa

    named = [name for name in header if name != "_"] if given else header
    if not given and len(header) > 1 and not header[0] and "" not in header[1:]:
        header = named = ["", *header[1:]]  # the index of a data frame
        named = header[1:]
    check_names(f"{path}, {'`header`' if given else 'line 1'}", named)
    times = Counter(named)
    bad = [name for name in named if not name.strip() or times[name] > 1]
    if bad:
        raise ValueError(
            f"{path}, {'`header`' if given else 'line 1'}: the column name {bad[0]!r} is "
            f"{'empty' if not bad[0].strip() else 'there twice'} in {excerpt(header)}: names must "
            "differ. "
            + (
                'Name a column that you don\'t need "_".'
                if given
                else "If the file has no header line, give the names: "
                + f"`header={['text', 'label', *'_' * len(header)][: len(header)]}`."
            )
        )
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {line}: {len(row)} field(s) where {len(header)} are needed "
                f"({listing(header)}): {excerpt(row)}. Mend that row"
                + ("." if not given else ", or give `header` one name for each field.")
            )
    keep = [(i, name) for i, name in enumerate(header) if not (given and name == "_")]
    arrays = [
        pa.array([keep_as_text(row[i]) for _, row in rows], type=pa.string()) for i, _ in keep
    ]
    places = pa.array([f"{path}, line {line}" for line, _ in rows], type=pa.string())
    return pa.table([*arrays, places], names=[*(name for _, name in keep), WHERE])


def marked_indexed(table: pa.Table) -> pa.Table:
    """With the hidden column that tells of an index that was dropped."""
    import pyarrow as pa

    if INDEX in table.column_names:
        return table
    return table.append_column(INDEX, pa.nulls(table.num_rows, pa.string()))


def without_index(table: pa.Table) -> pa.Table:
    """Without the index of a data frame, which a hidden column then tells of.

    Pandas writes an index as a column without a name, which reading and writing again turns into
    `Unnamed: 0`, and into Parquet as `__index_level_0__`.
    """
    found = [name for name in table.column_names if not name or _INDEX.fullmatch(name)]
    return marked_indexed(table.drop_columns(found)) if found else table


_INDEX = re.compile(r"Unnamed: 0(\.\d+)?|__index_level_\d+__")


def _parquet(path: Path, data: bytes, options: Options) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    most = max(PLAIN, RATIO * len(data))
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        batches, size = [], 0
        for batch in file.iter_batches(PARQUET_ROWS):
            batches.append(batch)
            # Every row also gets the text that says where it stood.
            size += sum(map(_plain_bytes, batch.columns)) + batch.num_rows * len(f"{path}, row 0")
            if size > most:
                break
        table = pa.Table.from_batches(batches, schema=file.schema_arrow)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, MemoryError) as error:
        raise ValueError(
            f"{path} is not a whole parquet file: {_first_line(error)}. Write or download it again."
        ) from error
    if size > most:
        raise ValueError(
            f"{path} has {len(data):,} bytes and unpacks to more than {most:,}, which no text "
            f"does: at most {RATIO} times its size is allowed. If it is what you want, write it as "
            "JSON lines and name that file."
        )
    return _columns_of(path, table)


def _arrow(path: Path, data: bytes, options: Options) -> pa.Table:
    """What `datasets` saves to disk: a stream of record batches."""
    import pyarrow as pa

    most = max(PLAIN, RATIO * len(data))
    try:
        reader = pa.ipc.open_stream(pa.BufferReader(data))
        batches, size = [], 0
        for batch in reader:
            batches.append(batch)
            size += sum(map(_plain_bytes, batch.columns)) + batch.num_rows * len(f"{path}, row 0")
            if size > most:
                break
        table = pa.Table.from_batches(batches, schema=reader.schema)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, MemoryError) as error:
        raise ValueError(
            f"{path} is not a whole arrow file: {_first_line(error)}. Save or download it again."
        ) from error
    if size > most:
        raise ValueError(
            f"{path} has {len(data):,} bytes and unpacks to more than {most:,}, which no text "
            f"does: at most {RATIO} times its size is allowed. If it is what you want, write it as "
            "JSON lines and name that file."
        )
    return _columns_of(path, table)


def _columns_of(path: Path, table: pa.Table) -> pa.Table:
    """The table with its rows' places, without an index, with the features it tells of."""
    import pyarrow as pa

    raw = (table.schema.metadata or {}).get(b"huggingface")
    table = without_index(table)
    check_names(f"{path}, its columns", [n for n in table.column_names if n != INDEX])
    if len(set(table.column_names)) < table.num_columns:
        raise ValueError(
            f"{path} has the columns {listing(table.column_names)}: names must differ. Write the "
            "file again with one name for each."
        )
    places = pa.array([f"{path}, row {i}" for i in range(table.num_rows)], type=pa.string())
    table = table.replace_schema_metadata(None).append_column(WHERE, places)
    return table if raw is None else _with_features(path, table, raw)


def _plain_bytes(column: pa.Array) -> int:
    """Bytes of a column with each value written out, where it has words for repeated ones."""
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute  # made at run time, so no checker knows what is in it

    if not isinstance(column, pa.DictionaryArray):
        return column.nbytes
    values = column.dictionary
    try:
        lengths = pc.binary_length(values)
    except pa.ArrowNotImplementedError:  # numbers and the like
        return column.indices.nbytes + len(column) * (values.nbytes // max(len(values), 1))
    return column.indices.nbytes + (pc.sum(lengths.take(column.indices)).as_py() or 0)


def _with_features(path: Path, table: pa.Table, raw: bytes) -> pa.Table:
    """Of the metadata the features of `datasets`, which don't know our column."""
    import datasets

    try:
        told = json.loads(raw)["info"]["features"]
        told = {name: kind for name, kind in told.items() if name in table.column_names}
        for name in {WHERE, INDEX} & set(table.column_names):
            told[name] = {"dtype": "string", "_type": "Value"}
        noted = json.dumps({"info": {"features": told}})
        table = table.replace_schema_metadata({"huggingface": noted})
        datasets.Dataset(table)
    except Exception as error:  # whatever `datasets` makes of what it didn't write
        raise ValueError(
            f"{path}: what the file says of its own columns (the note `huggingface` of its schema) "
            f"can't be read: {type(error).__name__}: {_first_line(error)}. Write the file again, "
            "without that note."
        ) from error
    return table


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _txt(path: Path, data: bytes, options: Options) -> pa.Table:
    import pyarrow as pa

    text = _text_of(path, data).replace("\r\n", "\n")
    documents = list(_DOCUMENTS[options.txt_split or "paragraph"](text))
    return pa.table(
        [
            pa.array([keep_as_text(document) for _, document in documents], type=pa.string()),
            pa.array([f"{path}, line {line}" for line, _ in documents], type=pa.string()),
        ],
        names=["text", WHERE],
    )


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    held: list[str] = []
    start = 1
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.strip():
            start = start if held else number
            held.append(line)
        elif held:
            yield start, "\n".join(held)
            held = []


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return ((n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip())


def _whole(text: str) -> Iterator[tuple[int, str]]:
    return iter([(1, text)] if text.strip() else [])


_DOCUMENTS: dict[str, Callable[[str], Iterator[tuple[int, str]]]] = {
    "paragraph": _paragraphs,
    "line": _lines,
    "file": _whole,
}

OPENERS: dict[str, Callable[[bytes, int], bytes]] = {
    ".xz": _unxz,
    ".gz": _ungzip,
    ".bz2": _unbzip,
}

READERS: dict[str, Callable[[Path, bytes, Options], Any]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _separated(",", csv.QUOTE_MINIMAL),
    ".tsv": _separated("\t", csv.QUOTE_NONE),
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _txt,
}
