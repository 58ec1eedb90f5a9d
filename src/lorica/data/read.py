"""A path, a hub id or the name of embedded tasks becomes a `datasets.Dataset`, without a registry
and without files on disk.

Every row carries the file and line it came from in a hidden column (`words.WHERE`), and whatever is
wrong with a file is reported with that place. Everything is read into memory: nothing is cached,
compressed files are never unpacked to disk, and the same bytes give the same rows.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.data.formats import (
    READERS,
    TXT_SPLITS,
    Options,
    formats,
    is_table,
    marked_indexed,
    read_file,
    suffix_of,
    unzipped,
)
from lorica.data.loaded import load
from lorica.data.words import INDEX, listing, visible
from lorica.embedded.source import dataset as embedded
from lorica.embedded.source import is_embedded
from lorica.text import clear_errors, nearest, refusal, to_path

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

# Split names by which a folder's files are told apart, and what other words people use for them.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


@clear_errors()
def read(
    source: str | Path,
    *,
    split: str | None = None,
    header: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    max_samples: int | None = None,
    txt_split: str | None = None,
) -> Dataset:
    """Reads a local file, a folder or .zip of files, or a data set of the Hugging Face hub.

    Formats are told by the file's suffix: `.json` (an array of objects, or an object a line),
    `.jsonl`/`.ndjson`, `.csv` (with `"` as the quote), `.tsv` (no quoting: a `"` is an ordinary
    character), `.parquet`, `.arrow`, `.txt`; each of them also with `.xz`, `.gz` or `.bz2` behind.
    Text is UTF-8. A folder means its data files in the order of their names, which must be of one
    set of columns; where it holds none itself, those of its folders (a downloaded data repository,
    or what `datasets` saved with `save_to_disk`). The index of a data frame is dropped.

    Args:
        source: path, or a hub id (`org/name`, or `org/name:config` where it has configurations),
            or embedded tasks (`lorica:new`, see `lorica.embedded.source`).
        split: of a hub data set its split (also in the form `"train[:10%]"`); of a folder the files
            named after it (`train.jsonl`, `train-00000-of-00002.parquet`), or in a folder so named.
            Default: `train` where there is one, else everything.
        header: names of the columns of a table that has no header line; `"_"` drops a column.
        columns: `{name of the shape: name in the data}`, for example `{"text": "sentence"}`. A
            column that already had the first name is dropped; `{"text": "_"}` only drops it. With
            this or `header`, a file of any other ending (`.txt`, `.dat`) is read as a table.
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
    to_path(source)
    given = tuple(header) if header is not None else None
    options = Options(given, txt_split, table=bool(columns) and not Path(source).is_dir())
    if is_embedded(source):
        _check_options([Path(source)], options, tables=False)
        dataset = embedded(str(source), split, max_samples)
    elif _is_local(source):
        dataset = _local(source, split, options)
    else:
        dataset = _hub(str(source), split)
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
        rows = max_samples if is_embedded(source) else None  # as many are made as are asked for
        every = read(source, split=split, max_samples=rows, **how)
        train, held = hold_out(every, eval_fraction, seed=seed)
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
    path = to_path(source)
    if isinstance(source, Path) or path.exists():
        return True
    text = str(source)
    looks = text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text
    in_folder = len(path.parts) == 2 and Path(path.parts[0]).is_dir()
    return looks or in_folder or suffix_of(path)[0] in READERS or path.suffix.lower() == ".zip"


def _local(source: str | Path, split: str | None, options: Options) -> Dataset:
    import datasets

    path = to_path(source)
    if not path.exists():
        raise ValueError(_missing(path))
    inside: dict[Path, bytes] = {}
    if path.is_dir():
        files = _files_of(path, data_files(path), split)
    elif path.suffix.lower() == ".zip":
        inside = unzipped(path)
        files = _files_of(path, _data_files(path, list(inside)), split)
    elif split is not None:
        raise ValueError(
            f"`split={split!r}` was given for the file {path}: one file has no splits. Leave it "
            "out, or name the folder that holds the splits' files."
        )
    else:
        files = [path]
    _check_options(files, options)
    tables = [read_file(file, options, inside.get(file)) for file in files]
    if any(INDEX in table.column_names for table in tables):
        tables = [marked_indexed(table) for table in tables]
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


MOST_FILES = 100_000  # in a folder of data and the folders in it

# What lies beside data and is none.
_ABOUT = re.compile(
    r"(dataset_infos?|dataset_dict|state|config|tokenizer.*|package)\.json"
    r"|(readme|license|licence|notice|requirements)\.txt",
    re.IGNORECASE,
)


def data_files(folder: Path) -> list[Path]:
    """The data files of a folder, in order; where it holds none itself, those of its folders.

    Raises:
        ValueError: it is no folder of data, by the number of files in it.
    """
    every: list[Path] = []
    denied: list[OSError] = []
    for place, folders, names in os.walk(folder, onerror=denied.append):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        every += [Path(place, name) for name in names]
        if len(every) > MOST_FILES:
            raise ValueError(
                f"The folder {folder} holds more than {MOST_FILES:,} files: that is no folder of "
                "data. Name the one that holds the data files."
            )
    files = [file for file in _data_files(folder, every) if os.path.isfile(file)]
    if denied and (not files or files[0].parent != folder):  # else it holds all of the data itself
        raise ValueError(refusal(denied[0])) from denied[0]
    return files


def _data_files(folder: Path, every: list[Path]) -> list[Path]:
    files = sorted(
        file
        for file in every
        if suffix_of(file)[0] in READERS
        and not _ABOUT.fullmatch(file.name)
        and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    )
    return [file for file in files if file.parent == folder] or files


def _files_of(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    if not files:
        raise ValueError(
            f"{'The folder ' if folder.is_dir() else ''}{folder} holds no data file: {formats()}. "
            "Name a file, or put one there."
        )
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file, folder), []).append(file)
    wanted = split if split is not None else "train"
    wanted = next((key for key, words in _SPLIT_WORDS.items() if wanted in words), wanted)
    named = [key for key in by_split if key is not None]
    if wanted in by_split:
        return _of_one_set(folder, by_split[wanted])
    if split is None and not named:
        return _of_one_set(folder, files)
    if split is None and len(by_split) == 1:  # a data set of a test split alone
        return _of_one_set(folder, files)
    raise ValueError(
        f"The folder {folder} has no split {wanted!r}: its files are "
        f"{listing(file.name for file in files)}. "
        + (
            f"Give `split` as one of {listing(sorted(named))}, or name a file."
            if named
            else "Name a file, or leave `split` out to read them all."
        )
    )


def _of_one_set(folder: Path, files: list[Path]) -> list[Path]:
    """The files, which lie in one folder, or in folders named after splits."""
    folders = {file.parent for file in files if _split_of(file.parent, folder.parent) is None}
    if len(folders) > 1:
        names = sorted(str(each.relative_to(folder)) for each in folders)
        raise ValueError(
            f"The data files of {folder} lie in several folders, {listing(names)}, which are "
            f"different data sets. Name one, for example {folder / names[0]}."
        )
    return files


def _split_of(file: Path, folder: Path) -> str | None:
    """The split that the file's name begins with, or that of a folder it lies in."""
    for part in reversed(file.relative_to(folder).parts):
        word = re.split(r"[-_.]", part.lower())[0]
        found = next((key for key, words in _SPLIT_WORDS.items() if word in words), None)
        if found is not None:
            return found
    return None


def _check_options(files: list[Path], options: Options, *, tables: bool = True) -> None:
    """An option that no file has a use for was meant for something else.

    Args:
        tables: False: none of them is a table, whatever its name.
    """
    suffixes = {suffix_of(file)[0] for file in files}
    found = any(is_table(file, options) for file in files) or suffixes & {".csv", ".tsv"}
    if options.header is not None and not (tables and found):
        raise ValueError(
            f"`header` was given for {files[0]}: only tables, such as .csv and .tsv files, can "
            "lack a header line. Leave it out; to rename columns use `columns`."
        )
    if options.txt_split is not None and ".txt" not in suffixes:
        raise ValueError(
            f"`txt_split={options.txt_split!r}` was given for {files[0]}: only .txt files are "
            "split into documents. Leave it out."
        )


def _hub(name: str, split: str | None) -> Dataset:
    import datasets

    loaded = load(name, split)
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded and len(loaded) > 1:
            raise ValueError(
                f"`{name}` has the splits {listing(map(str, loaded))} and none called `train`: "
                "give `split`."
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
    gone = [target for target, name in columns.items() if name == "_" and "_" not in have]
    for target in gone:
        if target not in have:
            raise ValueError(
                f"`columns={{{target!r}: '_'}}` drops a column that {source} lacks: it has "
                f"{listing(have)}.{nearest(target, have)}"
            )
    dataset = dataset.remove_columns(gone) if gone else dataset
    have = [name for name in have if name not in gone]
    columns = {target: name for target, name in columns.items() if target not in gone}
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
