"""Requests and responses of the Messages API, as Anthropic's clients send and read them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag

from .bodies import MAX_TOOLS, Items
from .sampling import FurtherSampling

StopReason: TypeAlias = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class RequestModel(BaseModel):
    """A part of a request. Types are not converted; fields that are not known are ignored, as newer clients send more of them."""

    model_config = ConfigDict(strict=True)


def _text_or_list(value: object) -> str:
    return "text" if isinstance(value, str) else "list"


# ---- what a conversation is made of


class TextBlock(RequestModel):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(RequestModel):
    """What the model thought before an earlier answer."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = Field(default=None, description="Ignored.")


class RedactedThinkingBlock(RequestModel):
    """The same, but of another server, which did not tell it. Ignored."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(RequestModel):
    """A tool that an earlier answer asked to use."""

    type: Literal["tool_use"]
    id: str
    name: str = Field(min_length=1)
    input: dict[str, JsonValue]


TextContent: TypeAlias = Annotated[Annotated[str, Tag("text")] | Annotated[Items[TextBlock], Tag("list")], Discriminator(_text_or_list)]


class ToolResultBlock(RequestModel):
    """What a tool returned."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: TextContent | None = None
    is_error: bool | None = Field(default=None, description='The content is that of an error; the model is told by "Error: " before it.')


Block: TypeAlias = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock,
    Discriminator("type"),
]
Content: TypeAlias = Annotated[Annotated[str, Tag("text")] | Annotated[Items[Block], Tag("list")], Discriminator(_text_or_list)]


class InputMessage(RequestModel):
    """A message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Content


# ---- what is asked for


class Tool(RequestModel):
    """A tool that the model may ask to use."""

    type: Literal["custom"] | None = None
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    input_schema: dict[str, JsonValue] = Field(description="A JSON schema of its input.")


class AutoChoice(RequestModel):
    """As the model likes."""

    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class AnyChoice(RequestModel):
    """At least one tool."""

    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoice(RequestModel):
    """This tool."""

    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class NoChoice(RequestModel):
    """No tool."""

    type: Literal["none"]


class ThinkingEnabled(RequestModel):
    """The model thinks first."""

    type: Literal["enabled"]
    budget_tokens: int | None = Field(default=None, ge=1, description="Ignored: only `max_tokens` limits it.")


class ThinkingAdaptive(RequestModel):
    """The model thinks first if it likes."""

    type: Literal["adaptive"]


class ThinkingDisabled(RequestModel):
    """The model does not think first, where its chat template asks."""

    type: Literal["disabled"]


class OutputFormat(RequestModel):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: dict[str, JsonValue] = Field(alias="schema")


class OutputConfig(RequestModel):
    """The form of the answer."""

    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(default=None, description="Given to the chat template.")


class CountRequest(FurtherSampling):
    """The body of a request for the length of a prompt."""

    model: str | None = Field(default=None, description="Which model; may be left out where there is one only.")
    messages: Items[InputMessage] = Field(min_length=1)
    system: TextContent | None = None
    tools: Items[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Annotated[AutoChoice | AnyChoice | ToolChoice | NoChoice, Discriminator("type")] | None = None
    thinking: Annotated[ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled, Discriminator("type")] | None = Field(
        default=None, description="None: disabled."
    )
    output_config: OutputConfig | None = None


class MessageRequest(CountRequest):
    """The body of a request for a message."""

    max_tokens: int = Field(ge=1, le=2**31 - 1)
    stop_sequences: Items[Annotated[str, Field(min_length=1)]] | None = Field(
        default=None, max_length=64, description="The first of them to appear in the answer's text ends it, and is not part of it."
    )
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = Field(default=None, ge=0, le=1)
    stream: bool | None = None
    metadata: dict[str, JsonValue] | None = Field(default=None, description="Ignored.")
    service_tier: str | None = Field(default=None, description="Ignored.")


# ---- what is returned


class AnswerText(BaseModel):
    """Text of the answer."""

    type: Literal["text"] = "text"
    text: str
    citations: None = None


class AnswerThinking(BaseModel):
    """What the model thought first."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = Field(description="Not a signature of anything.")


class AnswerToolUse(BaseModel):
    """The model asks to use a tool."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


AnswerBlock: TypeAlias = Annotated[AnswerText | AnswerThinking | AnswerToolUse, Discriminator("type")]


class Usage(BaseModel):
    """Counts of tokens. The prompt's are those of the first three together."""

    input_tokens: int
    cache_read_input_tokens: int = Field(description="Tokens of the prompt that were not computed again.")
    cache_creation_input_tokens: int = 0
    output_tokens: int


class Message(BaseModel):
    """An answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: Usage


class TokenCount(BaseModel):
    """The length of a prompt."""

    input_tokens: int


class MessagesErrorDetail(BaseModel):
    """What was wrong."""

    type: str = Field(description='The kind, such as "invalid_request_error".')
    message: str = Field(description="For a person: what was wrong, and what would be right.")


class MessagesErrorBody(BaseModel):
    """The body of every response of this API that is an error."""

    type: Literal["error"]
    error: MessagesErrorDetail
