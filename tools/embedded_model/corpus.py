"""Build the text corpus of the embedded demonstration model from Debian packages.

Every text is an English work in the public domain that a Debian ``main`` package happens to
carry as test or example data. This script downloads those packages with ``apt-get download``,
unpacks them into a cache folder, cleans the text and writes

* ``train.jsonl`` and ``valid.jsonl``: one chapter a line, ``{"source", "title", "paragraphs"}``;
* ``manifest.json``: package, version, file, SHA-256, licence and size of every text.

The texts themselves are never stored in the repository; run this again to get them back::

    python tools/embedded_model/corpus.py
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import random
import re
import struct
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_CACHE = Path("~/.cache/tokenflow-corpus")

R_LIBRARY = "usr/lib/R/site-library"
LZ4_DATA = "usr/share/gocode/src/github.com/pierrec/lz4/testdata"
WEB_MODULE = "usr/share/sword/modules/texts/ztext/engWEB2015eb"

# Only the narrative books: law, genealogy and verse teach a small model lists, not prose.
WEB_BOOKS = {
    "Gen", "Ruth", "1Sam", "2Sam", "1Kgs", "2Kgs", "Esth", "Jonah",
    "Matt", "Mark", "Luke", "John", "Acts",
}  # fmt: skip

# Paragraphs with these words are left out: they are of their time and have no place in
# what a shipped demonstration model may say.
BLOCKED = re.compile(
    r"\b(nigg(er|ah)s?|negro(es)?|injuns?|squaws?|half-?breeds?|darkies|darky)\b", re.IGNORECASE
)

HEADING = re.compile(
    r"^((chapter|volume|book|adventure|conclusion|preface|epilogue|finis|the end)\b"
    r"|p r e f a c e|[ivxlc]+\.?$|\d+\.?$)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Source:
    """One text: where it is, how to read it, and why it may be used."""

    key: str
    title: str
    author: str
    package: str
    path: str
    read: Callable[[Path], list[list[str]]]
    rights: str
    also: tuple[str, ...] = ()  # further files that the reader opens next to ``path``


class RData:
    """Reader of the part of R's XDR serialisation that character data sets use."""

    def __init__(self, data: bytes) -> None:
        if data[:2] != b"X\n":
            raise ValueError("not an XDR serialisation")
        self._data = data
        self._at = 2
        self._refs: list[Any] = []
        version = self._int()
        self._int(), self._int()
        if version == 3:
            encoding_size = self._int()
            self._at += encoding_size

    def _int(self) -> int:
        (value,) = struct.unpack_from(">i", self._data, self._at)
        self._at += 4
        return int(value)

    def item(self) -> Any:
        """The next object: str, list, dict (named list) or pair list."""
        flags = self._int()
        kind = flags & 0xFF
        if kind in (254, 253, 251, 242):  # NULL, global env, missing arg, empty env
            return None
        if kind == 255:  # back reference
            return self._refs[((flags >> 8) or self._int()) - 1]
        if kind == 1:  # symbol
            name = self.item()
            self._refs.append(name)
            return name
        if kind == 2:  # pair list
            if flags & 0x200:
                self.item()
            tag = self.item() if flags & 0x400 else None
            head = self.item()
            return [(tag, head), *(self.item() or [])]
        if kind == 9:  # one string
            size = self._int()
            if size == -1:
                return None
            raw = self._data[self._at : self._at + size]
            self._at += size
            return raw.decode("latin-1" if flags & (1 << 14) else "utf-8")
        value: Any
        if kind in (10, 13):  # logical, integer
            count = self._int()
            value = list(struct.unpack_from(f">{count}i", self._data, self._at))
            self._at += 4 * count
        elif kind in (16, 19):  # strings, generic list
            value = [self.item() for _ in range(self._int())]
        else:
            raise ValueError(f"R type {kind} at byte {self._at} is not supported")
        if flags & 0x200:
            names = dict(self.item()).get("names")
            if names and kind == 19:
                return dict(zip(names, value, strict=True))
        return value


def read_r_dataset(database: Path, name: str) -> list[str]:
    """One character data set out of an R lazy-load database (``Rdata.rdb``/``.rdx``)."""
    index = RData(gzip.decompress(database.with_suffix(".rdx").read_bytes())).item()
    start, size = index["variables"][name]
    chunk = database.read_bytes()[start : start + size]
    if chunk[4:5] == b"Z":
        data = lzma.decompress(
            chunk[5:], format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}]
        )
    else:
        data = zlib.decompress(chunk[4:])
    lines: list[str] = RData(data).item()
    return lines


def strip_gutenberg(text: str) -> str:
    """Drop a distributor's header and licence, keeping the work alone."""
    text = text.replace("\r\n", "\n").lstrip("\ufeff")
    start = re.search(r"\*\*\* ?START OF TH[^\n]*\n", text)
    end = re.search(r"\n[^\n]*(\*\*\* ?END OF TH|End of (the )?Project Gutenberg)", text)
    return text[start.end() if start else 0 : end.start() if end else len(text)]


def clean(paragraph: str) -> str:
    """Join the wrapped lines of a paragraph and make its punctuation uniform."""
    text = " ".join(paragraph.split())
    for old, new in (("“", '"'), ("”", '"'), ("‘", "'"), ("’", "'"), ("_", ""), ("--", "—")):
        text = text.replace(old, new)
    text = re.sub(r"\[\d+\]|\*", "", text)
    text = re.sub(r"\s*—+\s*", "—", text)
    return re.sub(r"\s+([,;.!?])", r"\1", text).strip()


def is_heading(text: str) -> bool:
    """Whether a paragraph is a chapter break and not prose."""
    if len(text) > 100 or text[:1] in "\"'":
        return False
    letters = [c for c in text if c.isalpha()]
    return not letters or bool(HEADING.match(text)) or text.upper() == text


def chapters_of(text: str) -> list[list[str]]:
    """Split a plain text into chapters of clean paragraphs.

    Whatever stands before the first chapter heading (title page, contents, advertisement) goes.
    """
    chapters: list[list[str]] = [[]]
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        paragraph = clean(block)
        if is_heading(paragraph):
            chapters.append([])
        elif sum(line.startswith("    ") for line in lines) * 2 > len(lines):
            continue  # verse, centred captions, tables
        elif not BLOCKED.search(paragraph) and len(paragraph) > 1:
            chapters[-1].append(paragraph)
    # Title pages and contents leave tiny "chapters" behind.
    return [c for c in chapters[1:] if sum(map(len, c)) >= 1500]


def austen(name: str) -> Callable[[Path], list[list[str]]]:
    """Reader of one novel of the janeaustenr data set."""

    def read(database: Path) -> list[list[str]]:
        text = "\n".join(read_r_dataset(database, name))
        # An editor's note on the edition follows one of the novels.
        text = re.split(r"\n\s*(?:A NOTE ON THE TEXT|NOTE ON THE TEXT)", text)[0]
        return chapters_of(text)

    return read


def moby_dick(database: Path) -> list[list[str]]:
    """Moby Dick without its etymology and extracts."""
    text = strip_gutenberg(read_r_dataset(database, "mobydick")[0])
    return chapters_of(text[text.index("CHAPTER 1. Loomings") :])


def plain(path: Path) -> list[list[str]]:
    """A plain text file."""
    return chapters_of(strip_gutenberg(path.read_text(encoding="utf-8", errors="strict")))


def sword(module: Path) -> list[list[str]]:
    """Chapters of the narrative books of a compressed SWORD module (zText, OSIS mark-up)."""
    chapters: list[list[str]] = []
    folder = module.parent
    for part in ("ot", "nt"):
        index = (folder / f"{part}.bzs").read_bytes()
        data = (folder / f"{part}.bzz").read_bytes()
        for start, size, _ in struct.iter_unpack("<III", index):
            if not size:
                continue
            text = zlib.decompress(data[start : start + size]).decode("utf-8")
            book = re.search(r'osisID="(\w+)" sID="\w+" type="book"', text)
            if not book or book.group(1) not in WEB_BOOKS:
                continue
            text = re.sub(r"<note\b.*?</note>|<title\b.*?</title>", " ", text, flags=re.DOTALL)
            for chapter in re.split(r'<chapter [^>]*sID="[^>]*>', text)[1:]:
                blocks = re.split(r'<div [^>]*type="x-p"[^>]*>', chapter)
                paragraphs = [clean(re.sub(r"<[^>]+>", "", b)) for b in blocks]
                chapters.append([p for p in paragraphs if len(p) > 1 and not BLOCKED.search(p)])
    return chapters


AGE = "Public domain: author died in {died}, first published {year}"
AUSTEN_DB = f"{R_LIBRARY}/janeaustenr/data/Rdata.rdb"

SOURCES = [
    Source(key, title, "Jane Austen", "r-cran-janeaustenr", AUSTEN_DB, austen(key),
           AGE.format(died=1817, year=year), also=("Rdata.rdx",))
    for key, title, year in (
        ("emma", "Emma", 1815),
        ("mansfieldpark", "Mansfield Park", 1814),
        ("northangerabbey", "Northanger Abbey", 1817),
        ("persuasion", "Persuasion", 1817),
        ("prideprejudice", "Pride and Prejudice", 1813),
        ("sensesensibility", "Sense and Sensibility", 1811),
    )
] + [
    Source("mobydick", "Moby Dick; or, The Whale", "Herman Melville", "r-cran-tokenizers",
           f"{R_LIBRARY}/tokenizers/data/Rdata.rdb", moby_dick, AGE.format(died=1891, year=1851),
           also=("Rdata.rdx",)),
    Source("tomsawyer", "The Adventures of Tom Sawyer", "Mark Twain",
           "golang-github-pierrec-lz4-dev", f"{LZ4_DATA}/Mark.Twain-Tom.Sawyer.txt", plain,
           AGE.format(died=1910, year=1876)),
    Source("sherlock", "The Adventures of Sherlock Holmes", "Arthur Conan Doyle",
           "golang-github-pierrec-lz4-dev", f"{LZ4_DATA}/pg1661.txt", plain,
           AGE.format(died=1930, year=1892)),
    Source("web", "World English Bible, narrative books", "various", "sword-text-web",
           f"{WEB_MODULE}/ot.bzz", sword,
           "Public domain: dedicated by its translators (stated in debian/copyright)",
           also=("ot.bzs", "nt.bzz", "nt.bzs")),
]  # fmt: skip


def fetch(package: str, cache: Path) -> tuple[Path, str]:
    """Download and unpack a package once; its root folder and version."""
    debs = cache / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    found = sorted(debs.glob(f"{package}_*.deb"))
    if not found:
        subprocess.run(["apt-get", "download", package], cwd=debs, check=True)
        found = sorted(debs.glob(f"{package}_*.deb"))
    root = cache / "packages" / package
    if not root.is_dir():
        root.mkdir(parents=True)
        subprocess.run(["dpkg-deb", "-x", str(found[-1]), str(root)], check=True)
    version = subprocess.run(
        ["dpkg-deb", "-f", str(found[-1]), "Version"], check=True, capture_output=True, text=True
    ).stdout.strip()
    return root, version


def package_licences(root: Path, package: str) -> list[str]:
    """The licence names that debian/copyright states for the package."""
    path = root / "usr/share/doc" / package / "copyright"
    if not path.is_file():
        return []
    names = re.findall(r"^License: *(\S.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return sorted(set(names))


def main() -> None:
    """Build the corpus."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where to build it")
    parser.add_argument("--valid", type=float, default=0.01, help="share held out, by characters")
    parser.add_argument("--seed", type=int, default=20)
    args = parser.parse_args()
    cache: Path = args.cache.expanduser()
    cache.mkdir(parents=True, exist_ok=True)

    manifest: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for source in SOURCES:
        root, version = fetch(source.package, cache)
        path = root / source.path
        chapters = source.read(path)
        rows += [
            {"source": source.key, "title": source.title, "paragraphs": c} for c in chapters if c
        ]
        entry = {
            "title": source.title,
            "author": source.author,
            "package": source.package,
            "version": version,
            "file": "/" + source.path,
            "sha256": {
                name: hashlib.sha256(path.with_name(name).read_bytes()).hexdigest()
                for name in (path.name, *source.also)
            },
            "rights": source.rights,
            "package_licences": package_licences(root, source.package),
            "chapters": len(chapters),
            "characters": sum(len(p) for c in chapters for p in c),
        }
        manifest.append(entry)
        print(f"{source.title}: {entry['chapters']} chapters, {entry['characters']} characters")

    # Whole chapters are held out, so that validation never shares a scene with training.
    budget = args.valid * sum(e["characters"] for e in manifest)
    order = list(range(len(rows)))
    random.Random(args.seed).shuffle(order)
    held: set[int] = set()
    for at in order:
        size = sum(map(len, rows[at]["paragraphs"]))
        if size <= budget:
            held.add(at)
            budget -= size
        if budget < 2000:
            break
    for name, keep in (("train", False), ("valid", True)):
        with (cache / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            for at, row in enumerate(rows):
                if (at in held) is keep:
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
    (cache / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    print(f"{len(rows) - len(held)} chapters to train on, {len(held)} held out, in {cache}")


if __name__ == "__main__":
    main()
