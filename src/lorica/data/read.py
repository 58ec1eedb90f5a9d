"""A path or a hub id becomes a `datasets.Dataset`, without a registry and without files on disk.

Every row carries the file and line it came from in a hidden column (`words.WHERE`), and whatever is
wrong with a file is reported with that place. Everything is read into memory: nothing is cached,
compressed files are never unpacked to disk, and the same bytes give the same rows.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.data.words import WHERE, excerpt, keep_as_json, kind_of, listing, nearest, visible

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

TXT_SPLITS = ("paragraph", "line", "file")

# Split names by which a folder's files are told apart, and what other words people use for them.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class _Options:
    """What the format readers may be told."""

    header: tuple[str, ...] | None
    txt_split: str | None


def read(
    source: str | Path,
    *,
    split: str | None = None,
    header: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    max_samples: int | None = None,
    txt_split: str | None = None,
) -> Dataset:
    """Reads a local file, a folder of files, or a data set of the Hugging Face hub.

    Formats are told by the file's suffix: `.json` (an array of objects, or an object a line),
    `.jsonl`/`.ndjson`, `.csv` (with `"` as the quote), `.tsv` (no quoting: a `"` is an ordinary
    character), `.parquet`, `.txt`; each of them also with `.xz`, `.gz` or `.bz2` behind. Text is
    UTF-8. A folder means its data files in the order of their names, which must be of one set of
    columns.

    Args:
        source: path, or a hub id (`org/name`, or `org/name:config` where it has configurations).
        split: of a hub data set its split (also in the form `"train[:10%]"`); of a folder the files
            named after it (`train.jsonl`, `train-00000-of-00002.parquet`). Default: `train` where
            there is one, else everything.
        header: names of the columns of a csv or tsv file that has no header line; `"_"` drops
            a column.
        columns: `{name of the shape: name in the data}`, for example `{"text": "sentence"}`. A
            column that already had the first name is dropped.
        max_samples: at most so many rows, from the start. Default: all.
        txt_split: what a document of a `.txt` file is: `"paragraph"` (default: blank lines
            separate documents), `"line"`, or `"file"`.

    Returns:
        a data set in memory with the data's own columns and the hidden column `__where__` (for hub
        data sets there is none).

    Raises:
        ValueError: for a missing file, broken JSON, bytes that aren't UTF-8, a wrong number of
            fields, values of mixed types, an absent column, no rows, or an option that the format
            has no use for. File and line are named.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp(), "a.tsv")
        >>> _ = path.write_text('s1\\t1\\t\\tHe said "no.\\n')
        >>> read(path, header=["source", "label", "_", "text"])["text"][0]
        'He said "no.'
    """
    if max_samples is not None and max_samples < 1:
        raise ValueError(
            f"`max_samples` is {max_samples} for {source}: it must be at least 1. Leave it out to "
            "use all rows."
        )
    if txt_split is not None and txt_split not in TXT_SPLITS:
        raise ValueError(
            f"`txt_split` is {txt_split!r} for {source}: it must be one of {listing(TXT_SPLITS)}."
            + nearest(txt_split, TXT_SPLITS)
        )
    options = _Options(tuple(header) if header is not None else None, txt_split)
    dataset = _local(source, split, options) if _is_local(source) else _hub(str(source), split)
    dataset = _rename(dataset, columns or {}, str(source))
    if max_samples is not None and max_samples < len(dataset):
        dataset = dataset.select(range(max_samples))
    return dataset


def read_splits(
    source: str | Path,
    *,
    split: str | None = None,
    eval_source: str | Path | None = None,
    eval_split: str | None = None,
    eval_fraction: float | None = None,
    seed: int = 0,
    header: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    max_samples: int | None = None,
    max_eval_samples: int | None = None,
    txt_split: str | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Training rows and, if asked for, evaluation rows: from a file, from a split, or held out.

    Args:
        source, split, header, columns, txt_split: as of `read`, for both sets.
        eval_source: a second path or hub id to evaluate on (with `eval_split` if it has several).
        eval_split: alone, the split of `source` to evaluate on.
        eval_fraction: the fraction of the rows to hold out, see `hold_out`.
        seed: of the rows held out.
        max_samples, max_eval_samples: at most so many rows of each set. A fraction is held out
            before either limit.

    Raises:
        ValueError: as `read`; for both a fraction and an evaluation source; for `max_eval_samples`
            without anything to evaluate on.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp(), "a.txt")
        >>> _ = path.write_text("one\\n\\ntwo\\n\\nthree\\n\\nfour")
        >>> [len(part) for part in read_splits(path, eval_fraction=0.25)]
        [3, 1]
    """
    if eval_fraction is not None and (eval_source is not None or eval_split is not None):
        raise ValueError(
            f"`eval_fraction={eval_fraction}` was given together with "
            f"{'`eval_source`' if eval_source is not None else '`eval_split`'} for {source}: the "
            "rows to evaluate on come from one place. Leave one of the two out."
        )
    if max_eval_samples is not None and eval_source is eval_split is eval_fraction is None:
        raise ValueError(
            f"`max_eval_samples={max_eval_samples}` was given for {source}, but nothing to "
            "evaluate on: give `eval_source`, `eval_split` or `eval_fraction` too."
        )
    if max_eval_samples is not None and max_eval_samples < 1:
        raise ValueError(f"`max_eval_samples` is {max_eval_samples}: it must be at least 1.")
    how: dict[str, Any] = {"header": header, "columns": columns, "txt_split": txt_split}
    if eval_fraction is not None:
        train, held = hold_out(read(source, split=split, **how), eval_fraction, seed=seed)
        return _first(train, max_samples), _first(held, max_eval_samples)
    train = read(source, split=split, max_samples=max_samples, **how)
    if eval_source is None and eval_split is None:
        return train, None
    other = source if eval_source is None else eval_source
    return train, read(other, split=eval_split, max_samples=max_eval_samples, **how)


def hold_out(dataset: Dataset, fraction: float, *, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Parts the rows into (training, evaluation), the same way on every machine and version.

    A row belongs to the held-out ones if the hash of (seed, row number) is among the smallest: no
    library's random generator takes part. Both parts keep the order of the data.

    Args:
        dataset: as `read` returns it.
        fraction: of the rows, above 0 and below 1; at least one row is held out.
        seed: another seed holds out other rows.

    Raises:
        ValueError: if the fraction is out of range or leaves no row to train on.

    Example:
        >>> from datasets import Dataset
        >>> train, held = hold_out(Dataset.from_dict({"text": list("abcdefgh")}), 0.25)
        >>> len(train), len(held)
        (6, 2)
    """
    if not 0 < fraction < 1:
        raise ValueError(
            f"`eval_fraction` is {fraction}: it is a fraction of the rows, above 0 and below 1. "
            "Type 0.1 for a tenth."
        )
    rows = len(dataset)
    count = max(1, round(rows * fraction))
    if count >= rows:
        raise ValueError(
            f"`eval_fraction={fraction}` of {rows} row(s) leaves none to train on. Give a smaller "
            "fraction, more data, or a second file with `eval_source`; a text file of one document "
            'has more rows with `txt_split="paragraph"`.'
        )
    order = sorted(range(rows), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())
    held = set(order[:count])
    kept = [i for i in range(rows) if i not in held]
    return dataset.select(kept), dataset.select(sorted(held))


def _first(dataset: Dataset, limit: int | None) -> Dataset:
    return dataset if limit is None or limit >= len(dataset) else dataset.select(range(limit))


# --- where the data is -----------------------------------------------------------------------


def _is_local(source: str | Path) -> bool:
    """Whether `source` means a path: it exists, or it looks like nothing but one."""
    path = Path(source).expanduser()
    if isinstance(source, Path) or path.exists():
        return True
    text = str(source)
    looks = text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text
    in_folder = len(path.parts) == 2 and Path(path.parts[0]).is_dir()
    return looks or in_folder or _suffix(path)[0] in _READERS


def _suffix(path: Path) -> tuple[str, str]:
    """(suffix of the format, suffix of the compression or "")."""
    suffixes = [part.lower() for part in path.suffixes]
    if suffixes and suffixes[-1] in _OPENERS:
        return (suffixes[-2] if len(suffixes) > 1 else "", suffixes[-1])
    return (suffixes[-1] if suffixes else "", "")


def _local(source: str | Path, split: str | None, options: _Options) -> Dataset:
    import datasets

    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(_missing(path))
    if path.is_dir():
        files = _files_of(path, split)
    elif split is not None:
        raise ValueError(
            f"`split={split!r}` was given for the file {path}: one file has no splits. Leave it "
            "out, or name the folder that holds the splits' files."
        )
    else:
        files = [path]
    _check_options(files, options)
    tables = [_read_file(file, options) for file in files]
    for file, table in zip(files[1:], tables[1:], strict=True):
        here, first = visible(table.column_names), visible(tables[0].column_names)
        if set(here) != set(first):
            raise ValueError(
                f"The files of {path} have different columns: {files[0].name} has "
                f"{listing(first)}, {file.name} has {listing(here)}. Files read together have the "
                "same columns: name one file, or keep the others in another folder."
            )
    table = tables[0] if len(tables) == 1 else _concatenate(files, tables)
    if not table.num_rows:
        raise ValueError(
            f"{path} holds no rows: at least one is needed. Check that it is the file you meant."
        )
    return datasets.Dataset(table)


def _concatenate(files: list[Path], tables: list[pa.Table]) -> pa.Table:
    import pyarrow as pa

    try:
        names = tables[0].column_names
        return pa.concat_tables(
            [table.select(names) for table in tables], promote_options="permissive"
        )
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(
            f"The files of {files[0].parent} ({listing(file.name for file in files)}) have columns "
            f"of different types: {error}. Give the same column the same type in every file."
        ) from error


def _missing(path: Path) -> str:
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    there = sorted(child.name for child in parent.iterdir()) if parent.is_dir() else []
    lost = path.relative_to(parent).parts[0]
    close = nearest(lost, there)
    return f"There is no file or folder {path}: {parent.resolve()} has no {lost!r}." + (
        close or " Check the path (it is taken from the current folder)."
    )


def _files_of(folder: Path, split: str | None) -> list[Path]:
    files = sorted(
        child for child in folder.iterdir() if child.is_file() and _suffix(child)[0] in _READERS
    )
    if not files:
        raise ValueError(
            f"The folder {folder} holds no data file: {_formats()}. Name a file, or put one there."
        )
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file), []).append(file)
    wanted = split if split is not None else "train"
    wanted = next((key for key, words in _SPLIT_WORDS.items() if wanted in words), wanted)
    if wanted in by_split:
        return by_split[wanted]
    named = [key for key in by_split if key is not None]
    if split is None and not named:
        return files
    raise ValueError(
        f"The folder {folder} has no split {wanted!r}: its files are "
        f"{listing(file.name for file in files)}. "
        + (
            f"Give `split` as one of {listing(sorted(named))}, or name a file."
            if named
            else "Name a file, or leave `split` out to read them all."
        )
    )


def _split_of(file: Path) -> str | None:
    word = re.split(r"[-_.]", file.name.lower())[0]
    return next((key for key, words in _SPLIT_WORDS.items() if word in words), None)


def _check_options(files: list[Path], options: _Options) -> None:
    """An option that no file has a use for was meant for something else."""
    suffixes = {_suffix(file)[0] for file in files}
    if options.header is not None and not suffixes & {".csv", ".tsv"}:
        raise ValueError(
            f"`header` was given for {files[0]}: only .csv and .tsv files can lack a header line. "
            "Leave it out; to rename columns use `columns`."
        )
    if options.txt_split is not None and ".txt" not in suffixes:
        raise ValueError(
            f"`txt_split={options.txt_split!r}` was given for {files[0]}: only .txt files are "
            "split into documents. Leave it out."
        )


def _hub(name: str, split: str | None) -> Dataset:
    import datasets

    path, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(path, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"`{name}` is no file or folder here, and as a data set of the Hugging Face hub it "
            f"could not be loaded: {reason} Check the path (it is taken from "
            f"{Path.cwd()}), the id (`org/name`, or `org/name:config`), the split "
            f"({split or 'not given'}), and the network (`HF_HUB_OFFLINE=1` forbids it)."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded and len(loaded) > 1:
            raise ValueError(
                f"`{name}` has the splits {listing(loaded)} and none called `train`: give `split`."
            )
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    if not isinstance(loaded, datasets.Dataset):
        raise ValueError(
            f"`{name}` is a {type(loaded).__name__}, which has no rows by number: a "
            "`datasets.Dataset` is needed. Download it as files and name their folder."
        )
    if not len(loaded):
        raise ValueError(f"`{name}` (split {split or 'train'}) holds no rows: name another split.")
    return loaded


def _rename(dataset: Dataset, columns: Mapping[str, str], source: str) -> Dataset:
    have = visible(dataset.column_names)
    for target, name in columns.items():
        if name not in have:
            raise ValueError(
                f"`columns={{{target!r}: {name!r}}}` names a column that {source} lacks: it has "
                f"{listing(have)}.{nearest(name, have)}"
            )
    moved = {name: target for target, name in columns.items() if name != target}
    if len(moved) < len([1 for target, name in columns.items() if name != target]):
        raise ValueError(
            f"`columns={dict(columns)}` gives one column of {source} two names: each column of the "
            "data can take one. Leave one of them out."
        )
    dropped = [target for target in moved.values() if target in have and target not in moved]
    dataset = dataset.remove_columns(dropped) if dropped else dataset
    return dataset.rename_columns(moved) if moved else dataset


# --- one file --------------------------------------------------------------------------------


def _formats() -> str:
    return (
        f"readable are {listing(_READERS)}, each also with {listing(_OPENERS)} behind (other "
        "archives, such as .zip, must be unpacked first)"
    )


def _read_file(path: Path, options: _Options) -> pa.Table:
    suffix, _ = _suffix(path)
    if suffix not in _READERS:
        raise ValueError(
            f"{path} has the suffix {suffix or 'of no format'!r}: {_formats()}. Rename the file if "
            "it is one of these."
        )
    return _READERS[suffix](path, _bytes_of(path), options)


def _bytes_of(path: Path) -> bytes:
    """The file's bytes, unpacked in memory."""
    _, packed = _suffix(path)
    try:
        data = path.read_bytes()
        return _OPENERS[packed](data) if packed else data
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(
            f"{path} can't be read{f' as a {packed} file' if packed else ''}: {error}. It must be "
            "whole and readable: copy or download it again."
        ) from error


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


def _json(path: Path, data: bytes, options: _Options) -> pa.Table:
    text = _text_of(path, data)
    rows = _json_array(path, text) if text.lstrip()[:1] == "[" else _json_lines(path, text)
    return _table_of(path, list(rows))


def _jsonl(path: Path, data: bytes, options: _Options) -> pa.Table:
    return _table_of(path, list(_json_lines(path, _text_of(path, data))))


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # `str.splitlines` would also cut at U+2028 and its like, which JSON allows inside texts.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(_broken(path, number, error.colno, error.msg, line, text)) from error
        yield number, _object(path, number, value)


def _broken(path: Path, line: int, column: int, reason: str, found: str, text: str) -> str:
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return (
            f"{path}, line {line}, column {column}: not valid JSON: {reason}, in "
            f"{excerpt(found)}. Each line must hold one whole object; mend or remove that line."
        )
    keys = f" (its keys: {listing(whole)})" if isinstance(whole, dict) else ""
    return (
        f"{path} holds a single JSON {kind_of(whole).split()[-1]}{keys}: an array of objects, or "
        "one object a line, is needed. Write out the list of rows alone."
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
        except json.JSONDecodeError as error:
            raise expected(error.msg, error.pos) from error
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
    hidden = [key for key in value if key.startswith("__")]
    if hidden:
        raise ValueError(
            f"{path}, line {line}: the key `{hidden[0]}` starts with two underscores, which is "
            "kept for this reader's own columns. Rename it."
        )
    return value


def _table_of(path: Path, rows: list[tuple[int, dict[str, Any]]]) -> pa.Table:
    """Objects to columns; a key that a row lacks is null there."""
    import pyarrow as pa

    names = list(dict.fromkeys(key for _, row in rows for key in row))
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
    if len(seen) > 1:
        one, other = list(seen.values())[:2]
        raise ValueError(
            f"{path}, line {lines[other]}: `{name}` is {kind_of(values[other])} "
            f"({excerpt(values[other])}), but {kind_of(values[one])} on line {lines[one]}: a "
            "column holds one type. Write both the same way."
        )
    if "nested" not in seen:
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, OverflowError, UnicodeEncodeError) as error:
            line = next(n for n, value in zip(lines, values, strict=True) if not _fits(value))
            raise ValueError(
                f"{path}, line {line}: `{name}` can't be stored: {error}. Numbers must fit in 64 "
                "bits (write larger ones as texts), and texts hold no half surrogate pairs."
            ) from error
    try:
        array = pa.array(values)
        if array.to_pylist() == values:
            return array
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        pass
    # Arrow would give every dictionary the keys of all the others, or refuses their types.
    return pa.array([keep_as_json(value) for value in values], type=pa.string())


def _fits(value: Any) -> bool:
    import pyarrow as pa

    try:
        pa.array([value])
    except (pa.ArrowInvalid, OverflowError, UnicodeEncodeError):
        return False
    return True


def _separated(delimiter: str, quoting: Any) -> Callable[[Path, bytes, _Options], pa.Table]:
    def reader(path: Path, data: bytes, options: _Options) -> pa.Table:
        text = _text_of(path, data)
        rows = list(_fields(path, text, delimiter, quoting))
        if options.header is not None:
            header = list(options.header)
        elif rows:
            header = rows.pop(0)[1]
        else:
            header = []
        return _field_table(path, header, rows, given=options.header is not None)

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
    bad = [name for name in named if not name.strip() or named.count(name) > 1]
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
    arrays = [pa.array([row[i] for _, row in rows], type=pa.string()) for i, _ in keep]
    places = pa.array([f"{path}, line {line}" for line, _ in rows], type=pa.string())
    return pa.table([*arrays, places], names=[*(name for _, name in keep), WHERE])


def _parquet(path: Path, data: bytes, options: _Options) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is not a whole parquet file: {error}. Write or download it again."
        ) from error
    places = pa.array([f"{path}, row {i}" for i in range(table.num_rows)], type=pa.string())
    # Of the metadata only the features of `datasets` are wanted, and they don't know our column.
    table = _with_features(table)
    metadata = table.schema.metadata
    return table.append_column(WHERE, places).replace_schema_metadata(metadata)


def _with_features(table: pa.Table) -> pa.Table:
    raw = (table.schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return table.replace_schema_metadata(None)
    info = json.loads(raw)
    info["info"]["features"][WHERE] = {"dtype": "string", "_type": "Value"}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": info["info"]})})


def _txt(path: Path, data: bytes, options: _Options) -> pa.Table:
    import pyarrow as pa

    text = _text_of(path, data).replace("\r\n", "\n")
    documents = list(_DOCUMENTS[options.txt_split or "paragraph"](text))
    return pa.table(
        [
            pa.array([document for _, document in documents], type=pa.string()),
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

_OPENERS: dict[str, Callable[[bytes], bytes]] = {
    ".xz": lzma.decompress,
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
}

_READERS: dict[str, Callable[[Path, bytes, _Options], Any]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _separated(",", csv.QUOTE_MINIMAL),
    ".tsv": _separated("\t", csv.QUOTE_NONE),
    ".parquet": _parquet,
    ".txt": _txt,
}
