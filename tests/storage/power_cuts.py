"""What a power cut may leave of a folder: what a program did to it, recorded by strace, cut short at any point.

The file system here promises what POSIX does and no more (Pillai et al. 2014, "All File Systems Are Not Created Equal",
OSDI): of a file that was not fsynced since it was written to, what is new may be there, missing, cut, or other bytes of
the same number; of the names that were made, changed or removed in a folder since its own last fsync, any may be so
already, in any combination. A rename within a folder is there as a whole or not at all.
"""

from __future__ import annotations

import itertools
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

CALLS = (
    *("open", "openat", "creat", "write", "pwrite64", "writev", "lseek", "ftruncate", "truncate", "fallocate"),
    *("rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat", "link", "linkat"),
    *("symlink", "symlinkat", "fsync", "fdatasync", "sync", "syncfs", "copy_file_range", "sendfile"),
)
ATTACH_SECONDS = 20
PROMISES = "/promise/"

# -- recording ---------------------------------------------------------------------------------------------------------


@contextmanager
def recorded(log: Path, pids: Iterable[int]) -> Iterator[None]:
    """Writes the CALLS of these processes to `log` while it lasts.

    Raises PermissionError where the system lets nobody look."""
    targets = [part for pid in pids for part in ("-p", str(pid))]
    options = ["-f", "-y", "-xx", "-s", str(2**24), "-e", f"trace={','.join(CALLS)}", "-o", str(log)]
    tracer = subprocess.Popen(["strace", *options, *targets], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + ATTACH_SECONDS
    while not all(tracer_of(int(pid)) for pid in targets[1::2]):
        if tracer.poll() is not None or time.monotonic() > deadline:
            tracer.kill()
            raise PermissionError(f"strace could not attach: {tracer.communicate()[1]}")
        time.sleep(0.01)
    try:
        yield
    finally:
        tracer.terminate()
        tracer.wait()


def tracer_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("TracerPid:")[1].split()[0])


def promise(text: str) -> None:
    """Says in the record that from here on something is on the disk."""
    try:
        Path(PROMISES, text).rmdir()
    except FileNotFoundError:
        return


@dataclass
class Call:
    name: str
    arguments: list[str]
    """As strace shows them; strings and the paths of descriptors as they are."""
    result: str


def calls(log: Path) -> Iterator[Call]:
    """In the order in which they ended."""
    begun: dict[str, str] = {}
    for line in log.read_text().splitlines():
        thread, _, text = line.partition(" ")
        text = text.strip()
        if text.endswith("<unfinished ...>"):
            begun[thread] = text.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>", text):
            text = begun.pop(thread) + text[resumed.end() :]
        if found := re.fullmatch(r"(\w+)\((.*)\)\s+= (.*)", text):
            arguments = [_unescaped(each.strip()) for each in found[2].split(", ")]
            yield Call(found[1], arguments, _unescaped(found[3]))


def _unescaped(text: str) -> str:
    """Bytes as latin-1; what is escaped here holds neither quotes nor commas."""
    return re.sub(r"\\x([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), text)


# -- the file system ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class File:
    content: bytes = b""
    durable: bytes = b""

    def choices(self, chance: random.Random) -> list[bytes]:
        """What may be found of it after a cut, what was written first."""
        old, new = self.durable, self.content
        if old == new:
            return [new]
        kept = old if new.startswith(old) else b""
        rest = new[len(kept) :]
        found = [
            new,
            old,
            kept,
            kept + rest[: len(rest) // 2],
            kept + bytes(len(rest)),
            kept + chance.randbytes(len(rest)),
        ]
        return list(dict.fromkeys(found))


@dataclass
class Change:
    """Of names in a folder, there as a whole or not at all."""

    removed: str | None
    added: str | None
    node: File | Folder | None

    def apply(self, names: dict[str, File | Folder]) -> None:
        if self.removed is not None:
            names.pop(self.removed, None)
        if self.added is not None and self.node is not None:
            names[self.added] = self.node


@dataclass(eq=False)
class Folder:
    names: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    """Since its last fsync."""

    @classmethod
    def read(cls, path: Path) -> Folder:
        """A folder that has been on the disk for long."""
        names: dict[str, File | Folder] = {}
        for each in path.iterdir():
            content = b"" if each.is_dir() else each.read_bytes()
            names[each.name] = cls.read(each) if each.is_dir() else File(content, content)
        return cls(names, dict(names))

    def change(self, removed: str | None, added: str | None, node: File | Folder | None) -> None:
        self.changes.append(Change(removed, added, node))
        self.changes[-1].apply(self.names)

    def nodes(self) -> Iterator[File | Folder]:
        """It and everything that may be below it after a cut, each once."""
        seen, left = set[int](), list[File | Folder]([self])
        while left:
            node = left.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            yield node
            if isinstance(node, Folder):
                added = [change.node for change in node.changes if change.node is not None]
                left += [*node.durable.values(), *node.names.values(), *added]


Tree = dict[str, bytes | None]
"""Path -> content, None for a folder."""


class Disk:
    """A folder, under the calls of a record."""

    def __init__(self, root: Path) -> None:
        """As `root` is now."""
        self._root, self.folder, self.promises = root.resolve(), Folder.read(root), list[str]()
        self._positions: dict[tuple[str, int], int | None] = {}
        """(Descriptor, file) -> where it writes next; None: at the end."""
        self.replaced: dict[str, list[bytes]] = {}
        """Path -> the contents that were given that name by a rename, one after the other."""

    def take(self, call: Call) -> bool:
        """Whether the call did something to this folder."""
        name, arguments, failed = call.name, call.arguments, call.result.startswith("-1")
        if name == "rmdir" and PROMISES in arguments[0]:
            self.promises.append(arguments[0].strip('"').removeprefix(PROMISES))
            return True
        if failed:
            return False
        match name:
            case "open" | "openat" | "creat":
                return self._open(call.result, " ".join(arguments))
            case "write":
                return self._write(arguments[0], arguments[1][1:-1].encode("latin-1"))
            case "ftruncate":
                return self._resize(arguments[0], int(arguments[1]))
            case "fsync" | "fdatasync":
                return self._sync(arguments[0])
            case "lseek":
                self._seek(arguments[0], int(call.result))
                return False
            case "mkdir" | "rmdir" | "unlink" | "rename" | "link":
                places = [self._place(None, each) for each in arguments[:2]]
                return self._rename_or_so(name, places)
            case "mkdirat" | "unlinkat":
                what = {"mkdirat": "mkdir", "unlinkat": "unlink"}[name]
                return self._rename_or_so(what, [self._place(arguments[0], arguments[1])])
            case "renameat" | "renameat2" | "linkat":
                places = [self._place(*arguments[:2]), self._place(*arguments[2:4])]
                return self._rename_or_so("link" if name == "linkat" else "rename", places)
        touched = [each for each in arguments if self._below(each) is not None]
        assert not touched, f"{name}({', '.join(touched)}) is not understood"
        return False

    def cuts(self, limit: int, chance: random.Random) -> Iterator[Tree]:
        """What a cut now may leave: all of it where that is at most `limit` trees, else as many at random, among them
        the two ends."""
        nodes = list(self.folder.nodes())
        changes = [change for node in nodes if isinstance(node, Folder) for change in node.changes]
        files = [(node, node.choices(chance)) for node in nodes if isinstance(node, File)]
        dirty = [(node, choices) for node, choices in files if len(choices) > 1]
        kinds = [choices for _, choices in dirty]
        outcomes: Iterable[tuple[Sequence[bool], Sequence[bytes]]]
        if 2 ** len(changes) * prod(map(len, kinds)) <= limit:
            outcomes = itertools.product(
                itertools.product((True, False), repeat=len(changes)), itertools.product(*kinds)
            )
        else:
            everything, nothing = [True] * len(changes), [False] * len(changes)
            outcomes = [
                (everything, [kind[0] for kind in kinds]),
                (nothing, [kind[1] for kind in kinds]),
                (everything, [chance.choice(kind[1:]) for kind in kinds]),  # the names without the bytes
                *(
                    ([chance.random() < 0.5 for _ in changes], [chance.choice(kind) for kind in kinds])
                    for _ in range(limit - 3)
                ),
            ]
        for there, found in outcomes:
            done = {id(change) for change, made in zip(changes, there, strict=True) if made}
            contents = {id(node): content for (node, _), content in zip(dirty, found, strict=True)}
            yield _tree(self.folder, "", done, contents)

    def now(self) -> Tree:
        """The folder as every other process sees it."""
        changes = [change for node in self.folder.nodes() if isinstance(node, Folder) for change in node.changes]
        return _tree(self.folder, "", {id(change) for change in changes}, {})

    # -- single calls --------------------------------------------------------------------------------------------------

    def _below(self, text: str) -> Path | None:
        """The path below the folder that strace shows for a descriptor, `5</a/b>`."""
        found = re.search(r"<(.*)>$", text)  # a file that is deleted has a word behind it
        if found is None:
            return None
        path = Path(found[1])
        return path.relative_to(self._root) if path.is_relative_to(self._root) else None

    def _place(self, folder: str | None, text: str) -> Path | None:
        """Of a name, relative to an open folder or none."""
        if not text.startswith('"'):
            return None
        base = re.search(r"<(.*)>", folder or "")
        path = Path(base[1] if base else "/", text.strip('"'))
        return path.relative_to(self._root) if path.is_relative_to(self._root) else None

    def _find(self, path: Path) -> File | Folder | None:
        node: File | Folder | None = self.folder
        for part in path.parts:
            node = node.names.get(part) if isinstance(node, Folder) else None
        return node

    def _folder(self, path: Path) -> Folder:
        node = self._find(path)
        assert isinstance(node, Folder), path
        return node

    def _file(self, descriptor: str) -> File | None:
        path = self._below(descriptor)
        node = self._find(path) if path is not None else None
        return node if isinstance(node, File) else None

    def _open(self, descriptor: str, flags: str) -> bool:
        path = self._below(descriptor)
        if path is None:
            return False
        made = self._find(path) is None
        if made:
            assert "O_CREAT" in flags, path
            self._folder(path.parent).change(None, path.name, File())
        node = self._find(path)
        if not isinstance(node, File):
            return False
        self._positions[descriptor.partition("<")[0], id(node)] = None if "O_APPEND" in flags else 0
        emptied = "O_TRUNC" in flags and node.content != b""
        if emptied:
            node.content = b""
        return made or emptied

    def _write(self, descriptor: str, data: bytes) -> bool:
        if (node := self._file(descriptor)) is None:
            return False
        place = descriptor.partition("<")[0], id(node)
        at = self._positions[place]
        start = len(node.content) if at is None else at
        padded = node.content.ljust(start, b"\0")
        node.content = padded[:start] + data + padded[start + len(data) :]
        self._positions[place] = None if at is None else start + len(data)
        return True

    def _seek(self, descriptor: str, position: int) -> None:
        if (node := self._file(descriptor)) is not None:
            place = descriptor.partition("<")[0], id(node)
            if self._positions.get(place) is not None:
                self._positions[place] = position

    def _resize(self, descriptor: str, size: int) -> bool:
        if (node := self._file(descriptor)) is None:
            return False
        node.content = node.content[:size].ljust(size, b"\0")
        return True

    def _sync(self, descriptor: str) -> bool:
        path = self._below(descriptor)
        node = self._find(path) if path is not None else None
        match node:
            case File():
                node.durable = node.content
            case Folder():
                node.durable, node.changes = dict(node.names), []
        return node is not None

    def _rename_or_so(self, name: str, places: list[Path | None]) -> bool:
        first = places[0]
        if first is None:
            assert name not in ("rename", "link") or places[1] is None, "from outside"
            return False
        match name:
            case "mkdir":
                self._folder(first.parent).change(None, first.name, Folder())
            case "rmdir" | "unlink":
                self._folder(first.parent).change(first.name, None, None)
            case "rename" | "link":
                second, node = places[1], self._find(first)
                assert second is not None
                assert second.parent == first.parent, "within a folder"
                self._folder(first.parent).change(first.name if name == "rename" else None, second.name, node)
                if isinstance(node, File) and name == "rename":
                    self.replaced.setdefault(str(second), []).append(node.content)
        return True


def _tree(folder: Folder, prefix: str, done: set[int], contents: dict[int, bytes]) -> Tree:
    names = dict(folder.durable)
    for change in folder.changes:
        if id(change) in done:
            change.apply(names)
    tree: Tree = {}
    for name, node in names.items():
        path = f"{prefix}{name}"
        if isinstance(node, Folder):
            tree[path] = None
            tree |= _tree(node, f"{path}/", done, contents)
        else:
            tree[path] = contents.get(id(node), node.content)
    return tree


def write(tree: Tree, root: Path) -> None:
    """Makes `root` hold this and nothing else."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for path, content in tree.items():
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)


def read(root: Path) -> Tree:
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in sorted(root.rglob("*"))
    }
