"""The description of a benchmark run: what `tokenflow bench run FILE` reads, flags override and
the report repeats. Data only; its JSON schema is `schemas/run.schema.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tokenflow.loadgen.arrivals import Arrivals, Burst, Replay
from tokenflow.loadgen.figures import Objectives
from tokenflow.loadgen.lengths import Fixed, FromTrace, Lengths
from tokenflow.loadgen.readers import Behaviours, Readers
from tokenflow.replicas.errors import ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OpenAIServer(_Section):
    """Any server with OpenAI's API."""

    kind: Literal["openai"] = "openai"
    url: str = Field(description="Base URL; /v1 is added where there is no path.")
    model: str | None = Field(default=None, description="null = the first that the server lists.")
    endpoint: Literal["chat", "completions"] = "chat"
    api_key_env: str = Field(
        default="OPENAI_API_KEY", description="Environment variable that holds the API key, if any."
    )
    tokenizer: str | None = Field(
        default=None,
        description="Folder or tokenizer.json; counts prompts, and answers of servers that do not.",
    )
    exact_output: bool = Field(
        default=True,
        description="Ask for exactly the planned output (min_tokens, ignore_eos), where the server "
        "takes that; false = it ends when the model ends.",
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="Further fields of each request, as temperature."
    )

    @field_validator("url")
    @classmethod
    def _complete(cls, url: str) -> str:
        from urllib.parse import urlsplit

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no http:// or https:// address")
        return url.rstrip("/") + ("/v1" if parts.path in ("", "/") else "")


class GrpcServer(_Section):
    """tokenflow.v1.Inference, as `tokenflow serve` offers it."""

    kind: Literal["grpc"] = "grpc"
    address: str = Field(pattern=r"^[^/\s]+:[0-9]+$", description="HOST:PORT")


class InProcess(_Section):
    """The engine inside this process: no HTTP, no Ray."""

    kind: Literal["engine"] = "engine"
    model: str | None = Field(default=None, description="Model folder; null = the embedded one.")
    kv_tokens: int | None = Field(default=4096, ge=16, description="null = what fits.")
    host_kv_tokens: int = Field(default=65_536, ge=0)
    policy: str = "slack"
    options: dict[str, Any] = Field(
        default_factory=dict, description="Further keys of the configuration's `engine` section."
    )


class Simulated(_Section):
    """The engine on a simulated GPU and a virtual clock; takes no time to speak of."""

    kind: Literal["simulator"] = "simulator"
    machine: str = Field(
        default="h200:llama3-8b", description="GPU:MODEL, or a calibration (.json)."
    )
    memory_fraction: float = Field(default=0.9, gt=0, le=1)
    policy: str = "slack"
    options: dict[str, Any] = Field(
        default_factory=dict, description="Further keys of the configuration's `engine` section."
    )


Server = Annotated[
    OpenAIServer | GrpcServer | InProcess | Simulated, Field(discriminator="kind")
]  # fmt: skip


class Conversation(_Section):
    """How many questions everybody asks, each with all that was said before."""

    turns: Lengths = Fixed(tokens=1)
    think_s: float = Field(
        default=0.0,
        ge=0,
        le=3600,
        description="Mean pause between reading an answer to its end and asking again; drawn from "
        "an exponential distribution.",
    )


class ClosedLoop(_Section):
    """A fixed number of users, each asking when its last answer has come. Hides how long others
    would have waited; the arrival times of the workload are not used."""

    users: int = Field(ge=1, le=1_000_000)
    think_s: float = Field(default=0.0, ge=0, le=3600)


class Description(_Section):
    """A benchmark run."""

    name: str = Field(default="run", min_length=1, max_length=80)
    target: Server
    seed: int = Field(default=1, ge=0, description="Everything random comes from it.")
    repeats: int = Field(default=1, ge=1, le=1000, description="Repeat k has the seed plus k.")
    arrivals: Arrivals = Burst(count=40)
    prompt: Lengths = Fixed(tokens=128)
    output: Lengths = Fixed(tokens=128)
    content: Literal["words", "stories", "ids"] = Field(
        default="words",
        description="What prompts are made of: words, short requests for stories (of no particular "
        "length), or random token ids (of exactly the length; not for chats).",
    )
    readers: tuple[Readers, ...] = Field(default=(Readers(token_rate=20),), min_length=1)
    conversation: Conversation = Conversation()
    behaviours: tuple[Behaviours, ...] = ()
    closed_loop: ClosedLoop | None = None
    objectives: Objectives = Objectives()
    timeout_s: float = Field(
        default=600.0, gt=0, le=86_400, description="After which a request counts as failed."
    )
    pause_s: float = Field(default=1.0, ge=0, le=3600, description="Between repeats.")

    @model_validator(mode="after")
    def _fits_together(self) -> Description:
        traced = isinstance(self.arrivals, Replay)
        for name in ("prompt", "output"):
            if isinstance(getattr(self, name), FromTrace) and not traced:
                raise ValueError(f"{name} is to come from a trace, but the arrivals do not")
        if isinstance(self.conversation.turns, FromTrace):
            raise ValueError("conversation.turns cannot come from a trace")
        if sum(b.share for b in self.behaviours) > 1:
            raise ValueError("the shares of behaviours add up to more than 1")
        several = self.conversation.turns != Fixed(tokens=1)
        chat = isinstance(self.target, OpenAIServer) and self.target.endpoint == "chat"
        if self.content == "ids" and (several or chat):
            raise ValueError(
                "content: ids needs endpoint: completions, gRPC or an engine, and a single turn"
            )
        blind = isinstance(self.target, OpenAIServer) and self.target.tokenizer is None
        if self.content == "ids" and blind:
            raise ValueError("content: ids needs a tokenizer, for the size of the vocabulary")
        if isinstance(self.target, Simulated) and (
            several or self.behaviours or self.closed_loop is not None
        ):
            raise ValueError(
                "the simulator takes no conversations, behaviours or closed loops; use the engine"
            )
        return self


def load_description(path: str | Path | None, overrides: dict[str, Any]) -> Description:
    """A YAML file (None = defaults) with top-level keys replaced by `overrides`.

    Raises ConfigError that names the file and every wrong key.
    """
    tree: dict[str, Any] = {}
    where = "the run"
    if path is not None:
        where = str(path)
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot read the run description {path}: {reason}.") from None
        except (yaml.YAMLError, RecursionError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            mark = getattr(error, "problem_mark", None)
            line = f" (line {mark.line + 1})" if mark else ""
            raise ConfigError(f"{path} is not valid YAML: {first}{line}.") from None
        if not isinstance(loaded, dict):
            raise ConfigError(f"{path} must hold a mapping, as `target: ...`.")
        tree = loaded
        trace = tree.get("arrivals")
        if isinstance(trace, dict) and isinstance(trace.get("path"), str):
            # Relative to the file that says it, so that it can be run from anywhere.
            trace["path"] = str(Path(path).parent / trace["path"])
    tree = {**tree, **overrides}
    if "target" not in tree:
        raise ConfigError(
            f"{where} has no target: give --url, --grpc, --engine or --simulator, or target: in "
            "the file."
        )
    try:
        return Description.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {'; '.join(map(_explain, error.errors()))}.") from None


def _explain(item: Any) -> str:
    # The tags of the unions are of no help to whoever wrote the file.
    loc = [str(part) for i, part in enumerate(item["loc"]) if not _is_tag(item["loc"], i)]
    key = ".".join(loc)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}"
    if item["type"] == "missing":
        return f"{key} is missing"
    if not key or item["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, got {item['input']!r}"


_TAGS = {
    "burst", "poisson", "gamma", "ramp", "trace", "fixed", "normal", "uniform", "lognormal",
    "disconnect", "stall", "change_speed", "openai", "grpc", "engine", "simulator",
}  # fmt: skip


def _is_tag(loc: tuple[Any, ...], i: int) -> bool:
    return i > 0 and loc[i] in _TAGS
