"""docs/api.md has all there is: routes, fields, headers, methods, errors."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.handbook import ROOT
from tokenflow.cluster.api import protocol
from tokenflow.cluster.api.errors import error_body
from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc.mapping import status_of
from tokenflow.cluster.rpc.stub import SERVICE
from tokenflow.replicas.errors import (
    CapacityError,
    DeadlineExceededError,
    EngineDeadError,
    InvalidRequestError,
    QuotaError,
    ReaderReplacedError,
    RequestCancelledError,
)

PAGE = (ROOT / "docs" / "api.md").read_text()
SOURCES = [*(ROOT / "cluster").rglob("*.py"), *(ROOT / "replicas").rglob("*.py")]
CODE_PLACES = {"_reject": 2, "_body": 3}
"""Functions that take an error's code, and where."""
DEFAULT_CODES = {
    "invalid_value",
    "missing_required_parameter",
    "not_found",
    "method_not_allowed",
    "rate_limit_exceeded",
    "overloaded",
}
"""Those that stand in no call."""


def section(title: str) -> str:
    """The text under a heading, up to the next one of its level or above."""
    level, _, _ = title.partition(" ")
    _, _, rest = PAGE.partition(f"\n{title}\n")
    assert rest, title
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def in_code(text: str) -> set[str]:
    """All words that stand in backticks."""
    return {word for code in re.findall(r"`([^`]+)`", text) for word in re.split(r"[\s,:]+", code)}


def test_every_route():
    source = (ROOT / "cluster" / "ingress.py").read_text()
    routes = re.findall(r'@app\.([a-z]+)\("([^"]+)"\)', source)
    assert len(routes) == len(re.findall(r"@app\.(?!exception_handler)", source)) >= 9
    for method, path in routes:
        written = f"`{method.upper()} {path.replace(':path', '')}`"
        assert f"| {written} |" in section("## HTTP")


@pytest.mark.parametrize("model", [protocol._Completion, protocol._Chat, protocol._StreamOptions])
def test_every_field_of_a_request(model):
    assert in_code(section("### Fields of a request")) >= set(model.model_fields)


def test_every_field_of_a_change():
    change = section("## Coming back to a stream, and changing one")
    assert in_code(change) >= set(protocol._Change.model_fields)
    assert in_code(section("### Fields of a request")) >= set(protocol._CHAT_UNSUPPORTED)


def test_every_header():
    text = "".join((ROOT / "cluster" / name).read_text() for name in ("ingress.py", "api/http.py"))
    found = set(re.findall(r'headers\.get\("([a-z-]+)"', text)) - {"content-length"}
    found |= {"x-request-timeout-s", "traceparent", "retry-after", "www-authenticate"}
    assert len(found) >= 8
    assert {name.lower() for name in in_code(section("### Headers"))} >= found


def test_every_method_message_and_field_of_grpc():
    words = in_code(section("## gRPC"))
    assert words >= {method.name for method in SERVICE.methods}
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        # Entries of a map are no message of their own; a message's kind is named by its field.
        assert message.name in words | {"ChatMessage"}, message.name
        assert words >= {field.name for field in message.fields}, message.name


def codes() -> set[str]:
    """Every `error.code` that the sources can give."""
    found = set()
    for path in SOURCES:
        if "client" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            given = [k.value for k in node.keywords if k.arg == "code"]
            place = CODE_PLACES.get(node.func.id)
            given += node.args[place : place + 1] if place is not None else []
            found |= {n.value for n in given if isinstance(n, ast.Constant) and n.value}
    return found | DEFAULT_CODES


def rows() -> list[tuple[int, str | None, str]]:
    """(HTTP status, code, gRPC code or nothing) of the table of errors."""
    found = []
    for line in section("## Errors").splitlines():
        cells = re.split(r"\s*\|\s*", line.strip("| "))
        if len(cells) < 3 or not re.match(r"\d", cells[0]):
            continue
        for status in re.findall(r"\d+", cells[0]):
            for code in re.findall(r"`(\w+)`", cells[1]):
                rpc = cells[2].strip("`| ")
                found.append((int(status), None if code == "null" else code, rpc))
    return found


def test_every_code_of_an_error():
    assert {code for _, code, _ in rows() if code} == codes()


@pytest.mark.parametrize(
    "error",
    [
        CapacityError(""),
        QuotaError(""),
        DeadlineExceededError(""),
        RequestCancelledError(""),
        ReaderReplacedError(""),
        EngineDeadError(""),
        ValueError(""),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_have_the_statuses_of_the_table(error):
    status, body, _ = error_body(error)
    assert (status, body["error"]["code"], status_of(error)[0].name) in rows()


def test_refusals_have_the_statuses_of_the_table():
    refusals = [row for row in rows() if row[0] < 499 and row[2] and row[1] != "replaced"]
    for status, code, rpc in refusals:
        if code not in ("overloaded", "rate_limit_exceeded"):
            assert status_of(InvalidRequestError("", status=status, code=code))[0].name == rpc
    assert len(refusals) >= 12
