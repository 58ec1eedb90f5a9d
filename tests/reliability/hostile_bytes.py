"""Hostile files out of good ones: one change each, drawn from a generator that is handed in.

Blind changes know nothing of the format. The others parse the file, change exactly one thing (a
type, a size, a value, a name, a shape, an offset, a key), and write the rest back as it was.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

_HOLE = "@@hole@@"
_KIB = 1 << 10

# JSON texts that stand where something else was.
VALUES = (
    "null", "true", "false", "0", "1", "2", "-1", "3.5", "-0.0", "1e308", "1e999", "NaN",
    "Infinity", "-Infinity", "2147483648", "1000000000", "-1000000000", "9223372036854775808",
    "1000000000000000000000", "9" * 5000, '""', '" "', '"x"', '"none"', '"float32"', '"../../x"',
    '"/etc/passwd"', '"a\\u0000b"', '"\\ud800"', '"\\u001b[2J"', '"' + "a" * 100_000 + '"',
    '"("', '"*"', '"(a+)+$"', '"(.*)*!"', '"(\\\\w+\\\\.?)*!"', '".*.*.*.*.*.*.*.*.*.*!"',
    '"all-linear"', '"{{ 7 * 7 }}"', "[]", "[null]", "[[]]", "[1]", '["x"]', '["q_proj", 3]',
    "[true, false]", "{}", '{"a": 1}', '{"": null}', '{"x": {"y": []}}', "[" * 200 + "]" * 200,
    "[" * 100_000 + "]" * 100_000, '{"a":' * 20_000 + "1" + "}" * 20_000,
    json.dumps(list(range(20_000))), "undefined", "'x'", "1 2", "",
)  # fmt: skip


# -- blind -----------------------------------------------------------------------------------------


def blind(data: bytes, draw: Random) -> tuple[str, bytes]:
    """(what was done, the bytes): flips, cuts, insertions, nothing that knows the format."""
    body = bytearray(data)
    n = len(body)
    at = draw.randrange(n) if n else 0
    size = min(draw.choice((1, 2, 8, 64, 1024)), max(1, n))
    several = ("flip", "truncate", "insert", "delete", "repeat", "zero", "noise") * 3
    what = draw.choice((*several, "empty"))
    if what == "flip":
        for _ in range(draw.randint(1, 8)):
            if n:
                body[draw.randrange(n)] ^= 1 << draw.randrange(8)
    elif what == "truncate":
        del body[at:]
    elif what == "insert":
        body[at:at] = draw.randbytes(size)
    elif what == "delete":
        del body[at : at + size]
    elif what == "repeat":
        body[at:at] = body[at : at + size] * draw.choice((1, 2, 50))
    elif what == "zero":
        body[at : at + size] = bytes(len(body[at : at + size]))
    elif what == "noise":
        body[at : at + size] = draw.randbytes(len(body[at : at + size]))
    else:
        body.clear()
    return f"blind/{what}", bytes(body)


# -- JSON ------------------------------------------------------------------------------------------


def in_json(data: bytes, draw: Random) -> tuple[str, bytes]:
    """One node of a JSON text changed; the rest stays."""
    whole = json.loads(data)
    what = draw.choice(
        ("value",) * 6 + ("drop", "rename", "add", "twice", "wrap", "near", "text", "root")
    )
    nodes = list(_nodes(whole))
    holders = [node for node in nodes if isinstance(node, dict) and node]
    slots = [(n, k) for n in nodes for k in _keys(n)]
    if what == "root" or not slots or not holders:
        return "json/root", draw.choice(VALUES).encode()
    if what == "text":
        text = data.decode()
        return "json/text", draw.choice(
            (
                b"\xef\xbb\xbf" + data, text.encode("utf-16"), text.encode("latin-1", "replace"),
                data + b",", data + data, data[:-2] + b",}", b"// a comment\n" + data,
                data.replace(b"\n", b"\r"), data.replace(b'"', b"'"),
            )
        )  # fmt: skip
    node, key = draw.choice(slots)
    raw = draw.choice(VALUES)
    if what == "value":
        node[key] = _HOLE
    elif what == "wrap":
        node[key], raw = _HOLE, f"[{json.dumps(node[key])}]"
    elif what == "near":
        old = node[key]
        near = old + draw.choice((-1, 1, 7)) if isinstance(old, int) else f"{old}x"
        node[key], raw = _HOLE, json.dumps(near)
    else:
        holder = draw.choice(holders)
        name = draw.choice(list(holder))
        if what == "drop":
            del holder[name]
        elif what == "rename":
            holder[draw.choice((name + "x", name.upper(), "", "../" + name))] = holder.pop(name)
        elif what == "add":
            holder[draw.choice(("strange", "", "\x00", "use_dora", "__proto__"))] = _HOLE
        else:
            return "json/twice", _with_twice(whole, holder, name, raw)
    return f"json/{what}", json.dumps(whole).replace(json.dumps(_HOLE), raw).encode()


def _with_twice(whole: Any, holder: dict[str, Any], name: str, raw: str) -> bytes:
    first, holder[name] = holder[name], _HOLE
    pair = f"{json.dumps(first)}, {json.dumps(name)}: {raw}"
    return json.dumps(whole).replace(json.dumps(_HOLE), pair).encode()


def _nodes(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        yield value
        for key in _keys(value):
            yield from _nodes(value[key])


def _keys(node: Any) -> list[Any]:
    return list(node) if isinstance(node, dict) else list(range(len(node)))[:50]


def in_json_lines(data: bytes, draw: Random) -> tuple[str, bytes]:
    """One line of a file of JSON lines changed."""
    lines = data.split(b"\n")
    at = draw.randrange(max(1, len(lines) - 1))
    what, lines[at] = in_json(lines[at], draw)
    return what.replace("json", "jsonl"), b"\n".join(lines)


# -- safetensors -----------------------------------------------------------------------------------


def in_safetensors(data: bytes, draw: Random) -> tuple[str, bytes]:
    """One thing of a safetensors file changed: its header, or a tensor with its header agreeing."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [n for n in header if n != "__metadata__"]
    name = draw.choice(names)
    entry = header[name]
    start, end = entry["data_offsets"]
    what = draw.choice(
        ("shape", "dtype", "offsets", "length", "metadata", "rename", "drop", "add", "values",
         "reshape", "retype", "header", "json", "axes", "empty")
    )  # fmt: skip
    if what == "length":
        claim = draw.choice((0, 1, size - 1, size + 1, len(data), 10**13, 2**63, 2**64 - 1, 10**8))
        return "safetensors/length", struct.pack("<Q", claim) + data[8:]
    if what == "json":
        made, changed = in_json(data[8 : 8 + size].rstrip(), draw)
        return made.replace("json", "header"), struct.pack("<Q", len(changed)) + changed + body
    if what == "shape":
        entry["shape"] = draw.choice(
            ([], [0], [-1, -1], [10**13], [2**63, 2], [2**32, 2**32], [1] * 2000, [1.5], ["4"],
             [None], entry["shape"][::-1], [*entry["shape"], 1], [2 * d for d in entry["shape"]])
        )  # fmt: skip
    elif what == "dtype":
        entry["dtype"] = draw.choice(
            ("F16", "F64", "I32", "BOOL", "F8_E4M3", "F4", "C64", "", "X", 3, None, "f32", "U64")
        )
    elif what == "offsets":
        entry["data_offsets"] = draw.choice(
            ([0, end], [start, len(body) + 4], [end, start], [start, 10**13], [-4, end], [start],
             [start, end, end], [str(start), str(end)], [2**63, 2**64], [start + 1, end + 1], {},
             [0, end - start])
        )  # fmt: skip
    elif what == "metadata":
        header["__metadata__"] = draw.choice(
            ({"format": 3}, [], "pt", {"format": "tf"}, {"a": {"b": 1}}, {"format": "x" * 10**5})
        )
    elif what == "rename":
        header = _renamed(header, name, draw)
    elif what in ("drop", "empty", "reshape", "retype", "axes"):
        return f"safetensors/{what}", _rebuilt(header, body, name, what, draw)
    elif what == "add":
        extra = draw.choice(("strange", "", "../../x", "base_model.model.x.lora_A.weight", "\x00"))
        header[extra] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
        body += struct.pack("<f", draw.choice((1.0, float("nan"))))
    elif what == "values":
        bad = struct.pack("<f", draw.choice((float("nan"), float("inf"), 3e38, -1e-45)))
        at = start + 4 * draw.randrange(max(1, (end - start) // 4))
        body = body[:at] + bad + body[at + 4 :]
    else:
        size = draw.choice((0, 10, 50_000))
        header = {
            f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(size)
        }
        body = b""
    return f"safetensors/{what}", _file(header, body)


def _file(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _renamed(header: dict[str, Any], name: str, draw: Random) -> dict[str, Any]:
    new = draw.choice(
        (name + "x", "", "../../x", "/etc/passwd", "\x00", "a" * 10_000, name.upper(),
         "__metadata__", name.replace("lora_A", "lora_B"), "base_model.model." + name)
    )  # fmt: skip
    return {(new if n == name else n): e for n, e in header.items()}


def _rebuilt(header: dict[str, Any], body: bytes, name: str, what: str, draw: Random) -> bytes:
    """A sound file in which the tensor `name` is gone, or of another shape or type."""
    out, parts, at = {}, [], 0
    for n, entry in header.items():
        if n == "__metadata__":
            out[n] = entry
            continue
        dtype, shape = entry["dtype"], list(entry["shape"])
        piece = body[slice(*entry["data_offsets"])]
        if n == name and what == "drop":
            continue
        if n == name and what == "empty":
            shape, piece = draw.choice(([0], [0, 4], [4, 0])), b""
        elif n == name and what == "axes":
            shape = [1, *shape] if draw.random() < 0.5 else shape[::-1]
        elif n == name and what == "reshape":
            count = draw.choice((1, 3, 1 << 10, 1 << 18))
            shape, piece, dtype = (
                draw.choice(([count], [count, 1], [1, count])),
                bytes(4 * count),
                "F32",
            )
        elif n == name:
            dtype, width = draw.choice((("F16", 2), ("BF16", 2), ("F64", 8), ("I64", 8), ("BOOL",
            1),
                                        ("F8_E4M3", 1), ("U16", 2), ("C64", 8), ("F8_E8M0",
                                        1)))  # fmt: skip
            piece = bytes(width * _count(shape))
        out[n] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(piece)]}
        parts.append(piece)
        at += len(piece)
    return _file(out, b"".join(parts))


def _count(shape: list[int]) -> int:
    count = 1
    for d in shape:
        count *= d
    return count


# -- YAML ------------------------------------------------------------------------------------------


def _bomb(levels: int, wide: int) -> str:
    """Aliases of aliases: wide ** levels nodes out of a few lines."""
    lines = ["&a0 [x, x, x, x, x, x, x, x, x, x]"]
    for i in range(1, levels):
        lines.append(f"&a{i} [" + ", ".join([f"*a{i - 1}"] * wide) + "]")
    return "[" + ", ".join(lines) + "]"


def yaml_values(canary: Path) -> tuple[str, ...]:
    """YAML nodes that stand where something else was; `canary` is a file that code would make."""
    touch = f"touch {canary}"
    return (
        f'!!python/object/apply:os.system ["{touch}"]',
        f'!!python/object/new:os.system ["{touch}"]',
        "!!python/name:os.system", "!!python/module:os", "!!python/tuple [1, 2]",
        "!!python/object:lorica.recipe.recipe.Recipe {}", "!!binary aGVsbG8=", "!!binary '*'",
        "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!int x", "!!float x", "!!bool x",
        "!!timestamp x", "!!null x", "!!str 3", "!unknown x", "!<tag:x,2000:y> z", "2026-11-22",
        "2026-13-45", "2026-11-22T10:00:00Z", "190:20:30", "0o17", "0x1F", "1_000", ".nan", ".inf",
        "-.inf", "1e3", "1e-4", "~", "null", "yes", "off", "true", '""', "' '", "-1", "0", "1", "2",
        "3.5", "1000000000", "99999999999999999999999", "9" * 5000, "1e999", "x", "[]", "[x, y]",
        "[[]]",
        "[null]", "[1, true]", "{}", "{a: 1}", "{1: 2}", "{a: {b: [c]}}", "{? [a] : b}", "&x [*x]",
        "&y {k: *y}", "*missing", _bomb(9, 9), "{<<: {a: 1}, b: 2}", "{<<: 3}",
        "[" * 3000 + "]" * 3000,
        "{a: " * 800 + "1" + "}" * 800, "|\n  text\n  more", ">-\n  a\n", '"\\ud800"', '"\\x00"',
        '"\\e[2J"', '"a\\nb"', "'" + "a" * 100_000 + "'", "../../x", "/etc/passwd", "/dev/zero",
        "lora(r=9**9**9)", "lora(" * 500, "pissa(niter=" + "(" * 300 + ")" * 300 + ")",
        "pissa(niter=-1)",
        "pissa(niter=1000000000)", "lora+lora", "dora+nothing", "__import__('os')", "'{{ 7 * 7 }}'",
        "relora(every=0)", "relora(every=1)", "lora(x=1)", "'melora(n=1000000000)'", "(a+)+$",
        "'('",
        "'(\\w+\\.?)*!'", "all-linear", "none", "cosine", "q_proj",
    )  # fmt: skip


def in_yaml(data: bytes, draw: Random, keys: tuple[str, ...], canary: Path) -> tuple[str, bytes]:
    """One line of a file `key: value` changed, or a line put in; `keys` are names that may be."""
    lines = data.decode().splitlines()
    at = draw.randrange(len(lines))
    key = lines[at].split(":")[0]
    node = draw.choice(yaml_values(canary))
    what = draw.choice(("value",) * 5 + ("other",) * 6 + ("twice", "drop", "key", "text"))
    if what == "value":
        lines[at] = f"{key}: {node}"
    elif what == "other":
        name = draw.choice(keys)
        lines = [line for line in lines if line.split(":")[0] != name] + [f"{name}: {node}"]
    elif what == "twice":
        lines.append(f"{key}: {node}")
    elif what == "drop":
        del lines[at]
    elif what == "key":
        strange = (
            "? [a, b]\n",
            "3",
            "null",
            "<<",
            "methd",
            "''",
            "&a b",
            "!!python/name:os.system",
            "json",
        )
        lines.append(f"{draw.choice(strange)}: {node}")
    else:
        text = "\n".join(lines)
        whole = draw.choice(
            (f"---\n{text}\n---\n{text}\n", f"%YAML 9.9\n---\n{text}\n", f"\ufeff{text}",
            f"- {key}\n",
             "null\n", node, f"{text}\n\tx: 1\n", f"{text}\nx: [1\n", f"{text}\nx: 'a\n",
             f"{{{text}\n",
             text.replace("\n", "\n  "), text.replace(":", " :"), text.replace(": ", ":"),
             f"{text}\n\x07")
        )  # fmt: skip
        return "yaml/text", whole.encode(draw.choice(("utf-8", "utf-8", "utf-16")))
    return f"yaml/{what}", "\n".join([*lines, ""]).encode()


# -- tables ----------------------------------------------------------------------------------------


def in_table(data: bytes, draw: Random, delimiter: str) -> tuple[str, bytes]:
    """One row of a csv or tsv file changed."""
    rows = list(csv.reader(io.StringIO(data.decode()), delimiter=delimiter))
    at = draw.randrange(len(rows))
    what = draw.choice(
        ("more", "less", "quote", "null", "wide", "head", "value", "only", "text", "value")
    )
    if what == "more":
        rows[at].append("x")
    elif what == "less":
        rows[at].pop()
    elif what == "wide":
        rows[at][0] = "a" * draw.choice((1000, 200_000))
    elif what == "head":
        rows[0] = draw.choice(
            (["text", "text"], ["", "label"], ["__where__", "label"], ["a\x00", "b"], ["text"], [],
             ["messages", "label"], ["input_ids", "labels"], ["prompt", "completion"], ["é",
             "\u202e"])
        )  # fmt: skip
    elif what == "only":
        rows = rows[:1]
    elif what == "value":
        rows[at][-1] = draw.choice(
            ("", " ", "nan", "inf", "-1", "1e999", "9" * 5000, "True", "\x1e[1]", "\x1e[", "\x1e",
            "NULL",
             "=1+1", "a\nb", '"', "\ufffe", "٣", "²", "1_0")
        )  # fmt: skip
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator="\n").writerows(rows)
    text = out.getvalue()
    if what == "quote":
        text = text[: len(text) // 2] + draw.choice(('"', 'x"y', '"x"y')) + text[len(text) // 2 :]
    elif what == "null":
        text = text[: len(text) // 2] + "\x00" + text[len(text) // 2 :]
    elif what == "text":
        coded = draw.choice(("utf-16", "latin-1", "utf-8-sig", "utf-32"))
        return "table/text", text.replace("a", "é").encode(coded, "replace")
    return f"table/{what}", text.encode()


def in_text(data: bytes, draw: Random) -> tuple[str, bytes]:
    """A plain text changed as a whole."""
    text = data.decode()
    made = draw.choice(
        (b"", b"\n" * 1000, b"\xef\xbb\xbf", text.encode("utf-16"), b"\x00" * 64, data + b"\xff",
         data.replace(b"\n", b"\r"), data.replace(b"\n", b"\x0b"), ("\u2028" * 50).encode(),
         b"\xed\xa0\x80",
         b"a" * 300_000, data.replace(b" ", b"\x00"), b" \t\n", ("\u202e" + text).encode())
    )  # fmt: skip
    return "text/whole", made


# -- archives and pickles --------------------------------------------------------------------------

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".gz": lambda data: gzip.compress(data, 1, mtime=0),
    ".bz2": lambda data: bz2.compress(data, 9),
}
BOMB = 100 << 20  # bytes that a bomb unpacks to
_bombs: dict[str, bytes] = {}


def bomb(suffix: str) -> bytes:
    """A small file that unpacks to `BOMB` bytes."""
    if suffix not in _bombs:
        _bombs[suffix] = PACKERS[suffix](b'{"text": "' + b" " * (BOMB - 12) + b'"}')
    return _bombs[suffix]


def wide_dictionary() -> bytes:
    """An .xz file of few bytes whose header asks for a dictionary of 1.5 GiB."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}]
    return _declare_dictionary(lzma.compress(b'{"text": "a"}\n' * 9, filters=filters))


def _declare_dictionary(data: bytes) -> bytes:
    import zlib

    head = 12  # the stream's header; then the block's: size, flags, filter, its size, dictionary
    size = (data[head] + 1) * 4
    block = bytearray(data[head : head + size])
    block[block.index(b"\x21\x01") + 2] = 39  # 3 GiB, LZMA2's code for it
    block[-4:] = struct.pack("<I", zlib.crc32(bytes(block[:-4])))
    return data[:head] + bytes(block) + data[head + size :]


def in_packed(plain: bytes, suffix: str, draw: Random) -> tuple[str, bytes]:
    """A compressed file that is no plain one."""
    pack = PACKERS[suffix]
    packed = pack(plain)
    what = draw.choice(
        ("bomb", "cut", "twice", "junk", "wrong", "nested", "checksum", "dictionary", "none")
    )
    if what == "bomb":
        return "packed/bomb", bomb(suffix)
    if what == "dictionary" and suffix == ".xz":
        return "packed/dictionary", wide_dictionary()
    made = {
        "cut": packed[: len(packed) // 2],
        "twice": packed + packed,
        "junk": packed + b"junk",
        "wrong": PACKERS[draw.choice([s for s in PACKERS if s != suffix])](plain),
        "nested": pack(packed),
        "checksum": packed[:-9] + bytes([packed[-9] ^ 1]) + packed[-8:],
    }
    return f"packed/{what}", made.get(what, plain)


class _Runs:
    """Unpickled with anything but weights alone, it runs a command."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def in_torch(data: bytes, draw: Random, canary: Path) -> tuple[str, bytes]:
    """One thing of a file of `torch.save` changed."""
    import torch

    what = draw.choice(
        ("pickle", "plain", "value", "value", "value", "size", "drop", "names", "entry")
    )
    if what == "plain":
        return "torch/plain", pickle.dumps(_Runs(canary))
    if what in ("pickle", "names", "entry"):
        return f"torch/{what}", _zip(data, what, draw, canary)
    state = torch.load(io.BytesIO(data), weights_only=False)  # our own file
    nodes = [node for node in _nodes(state) if len(node)]
    node = draw.choice(nodes)
    key = draw.choice(_keys(node))
    old = node[key]
    if what == "drop" and isinstance(node, dict):
        del node[key]
    elif isinstance(old, torch.Tensor):
        node[key] = draw.choice(
            (old.flatten()[:1], old.new_zeros(3, 5, 7), torch.full_like(old, 1) * float("nan")
             if old.is_floating_point() else old[:0], old.to(torch.int8), None, 3, "x",
             torch.zeros(1).expand(10**6, 10**6) if what == "size" else old.new_zeros(0))
        )  # fmt: skip
    else:
        node[key] = draw.choice(
            (None, 10**9, -1, float("nan"), "x", [], {}, torch.zeros(2), [None], {"a": 1}, True)
        )
    out = io.BytesIO()
    torch.save(state, out)
    return f"torch/{what}", out.getvalue()


def _zip(data: bytes, what: str, draw: Random, canary: Path) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        victim = draw.choice(names)
        for name in names:
            inside = old.read(name)
            if what == "pickle" and name.endswith("data.pkl"):
                inside = pickle.dumps(_Runs(canary), protocol=2)
            if what == "entry" and name == victim:
                inside = inside[: len(inside) // 2]
            new.writestr(f"../{name}" if what == "names" and name == victim else name, inside)
    return out.getvalue()
