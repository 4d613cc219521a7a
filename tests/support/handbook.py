"""The code blocks of the documentation, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "deploy" / "README.md",
    ROOT / "deploy" / "images" / "README.md",
    ROOT / "deploy" / "helm" / "tokenflow" / "README.md",
]
ADDRESS = "127.0.0.1:8000"
"""Where the pages expect a running server."""
_PROGRAMS = re.compile(
    r"(\w+=\S+ +)*(\S*/)?"
    r"(make|tokenflow|python3?(\.11)?|pip|curl|helm|kubectl|docker|kind|uv|buildah|debootstrap"
    r"|cyclonedx-py|serve|ray|grpcurl|c=\$\(buildah)( |$)"
)
_SHELL = ("sh", "bash")


@dataclass(frozen=True, slots=True)
class Block:
    page: Path
    line: int
    language: str
    """Of a fenced block; "indented" for the other kind."""
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_shell(self) -> bool:
        return self.language in _SHELL or _PROGRAMS.match(self.text) is not None

    def commands(self) -> list[str]:
        """One string per command: continued lines and quotes over several lines are joined."""
        found: list[str] = []
        begun = ""
        for line in self.text.splitlines():
            begun += line
            if begun.endswith("\\"):
                begun = begun[:-1]
                continue
            try:
                shlex.split(begun)
            except ValueError:  # within quotes
                begun += "\n"
                continue
            if begun.strip():
                found.append(begun)
            begun = ""
        assert not begun, f"{self.where} ends within a command"
        return found


def blocks(page: Path) -> list[Block]:
    """All code blocks of a page, in order."""
    found: list[Block] = []
    language: str | None = None
    lines: list[str] = []
    begun = 0

    def end(kind: str) -> None:
        nonlocal lines
        if any(line.strip() for line in lines):
            found.append(Block(page, begun, kind, "\n".join(lines).strip("\n")))
        lines = []

    before = ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if language is not None:
            if line.startswith("```"):
                end(language)
                language = None
            else:
                lines.append(line)
        elif line.startswith("```"):
            end("indented")
            language, begun = line[3:].strip(), number
        elif line.startswith("    ") and (lines or not before.strip()):
            begun = begun if lines else number
            lines.append(line[4:])
        elif line.strip():
            end("indented")
        elif lines:
            lines.append("")
        before = line
    assert language is None, f"{page} ends within a block"
    end("indented")
    return found


def words(command: str) -> list[str]:
    """A command as a shell splits it, without variables before it, comments and its path."""
    split = shlex.split(command, comments=True)
    while re.fullmatch(r"\w+=.*", split[0], re.DOTALL):
        split = split[1:]
    return [split[0].rpartition("/")[2], *split[1:]]


def commands() -> list[tuple[Block, str]]:
    """Every command that the pages tell to type."""
    return [
        (block, command)
        for page in PAGES
        for block in blocks(page)
        if block.is_shell
        for command in block.commands()
    ]


def asks_a_server(command: str) -> bool:
    """Whether it goes to a server that runs, and comes to an end."""
    return ADDRESS in command and words(command)[0] in ("curl", "tokenflow")
