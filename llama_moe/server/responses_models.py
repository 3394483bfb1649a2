"""Requests and responses of the Responses API, as OpenAI's clients send and read them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag

from .bodies import MAX_TOOLS, Entries, Items
from .results import TokenLogprob
from .sampling import MAX_TOP_LOGPROBS, FurtherSampling

Status: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed"]


class RequestModel(BaseModel):
    """A part of a request. Types are not converted; fields that are not known are ignored, as newer clients send more of them."""

    model_config = ConfigDict(strict=True)


# ---- what a conversation is made of


class InputText(RequestModel):
    """Text of a message."""

    type: Literal["input_text"]
    text: str


class OutputText(RequestModel):
    """Text of an earlier answer."""

    type: Literal["output_text"]
    text: str


class Refusal(RequestModel):
    """An earlier answer that refused."""

    type: Literal["refusal"]
    refusal: str


InputPart: TypeAlias = Annotated[InputText | OutputText | Refusal, Discriminator("type")]


def _text_or_list(value: object) -> str:
    return "text" if isinstance(value, str) else "list"


InputContent: TypeAlias = Annotated[Annotated[str, Tag("text")] | Annotated[Items[InputPart], Tag("list")], Discriminator(_text_or_list)]


class InputMessage(RequestModel):
    """A message, also one that was the answer of an earlier response."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: InputContent


class InputFunctionCall(RequestModel):
    """A function that an earlier answer asked to call."""

    type: Literal["function_call"]
    call_id: str
    name: str = Field(min_length=1)
    arguments: str = Field(description="JSON.")


class InputFunctionCallOutput(RequestModel):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: InputContent


class ReasoningText(RequestModel):
    """What an earlier answer thought first."""

    type: Literal["reasoning_text"]
    text: str


class SummaryText(RequestModel):
    """A summary of that."""

    type: Literal["summary_text"]
    text: str


class InputReasoning(RequestModel):
    """The reasoning before an earlier answer."""

    type: Literal["reasoning"]
    summary: Items[SummaryText] = []
    content: Items[ReasoningText] | None = None


def _item_type(value: object) -> object:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "message" if kind is None else kind


InputItem: TypeAlias = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputFunctionCall, Tag("function_call")]
    | Annotated[InputFunctionCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_item_type),
]

# ---- what is asked for


class FunctionTool(RequestModel):
    """A function that the model may ask to call."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, JsonValue] | None = Field(default=None, description="A JSON schema of its arguments.")
    strict: bool | None = Field(default=None, description="Calls always conform to the schema.")


class ChosenFunction(RequestModel):
    """One of the tools, by its name."""

    type: Literal["function"]
    name: str


class AllowedTools(RequestModel):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Items[ChosenFunction]


class TextFormat(RequestModel):
    """No particular form."""

    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(RequestModel):
    """JSON of a schema."""

    model_config = ConfigDict(strict=True, serialize_by_alias=True)

    type: Literal["json_schema"]
    name: str
    json_schema: dict[str, JsonValue] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(default=None, description="Answers always conform to the schema.")


class TextConfig(RequestModel):
    """The form of the answer's text."""

    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Discriminator("type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(default=None, description="Ignored.")


class Reasoning(RequestModel):
    """How much the model thinks first."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description='"none" and "minimal": it does not, where its chat template asks; others are given to the template.'
    )
    summary: Literal["auto", "concise", "detailed"] | None = Field(default=None, description="Ignored: the reasoning itself is returned.")


class ResponseRequest(FurtherSampling):
    """The body of a request for a response."""

    model: str | None = Field(default=None, description="Which model; may be left out where there is one only.")
    input: Annotated[
        Annotated[str, Tag("text")] | Annotated[Items[InputItem], Field(min_length=1), Tag("list")], Discriminator(_text_or_list)
    ] = Field(description="The question, or the whole conversation.")
    instructions: str | None = Field(default=None, description="A system message before the input.")
    max_output_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS, description="With log-probabilities of that many tokens.")
    include: Items[str] | None = Field(
        default=None, description='"message.output_text.logprobs": with log-probabilities; others are ignored.'
    )
    tools: Items[FunctionTool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none", "required"] | Annotated[ChosenFunction | AllowedTools, Discriminator("type")] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    metadata: Entries[str] | None = Field(default=None, description="Returned as it is.")
    store: bool | None = Field(default=None, description="Ignored: no response is ever stored.")
    truncation: Literal["auto", "disabled"] | None = Field(default=None, description="Ignored: nothing is left out of a conversation.")
    previous_response_id: str | None = Field(default=None, description="Not supported.")
    conversation: str | dict[str, JsonValue] | None = Field(default=None, description="Not supported.")
    prompt: dict[str, JsonValue] | None = Field(default=None, description="Not supported.")
    background: bool | None = Field(default=None, description="Not supported.")
    safety_identifier: str | None = Field(default=None, description="Ignored.")
    prompt_cache_key: str | None = Field(default=None, description="Ignored: every prompt's beginning is reused.")
    service_tier: str | None = Field(default=None, description="Ignored.")
    user: str | None = Field(default=None, description="Ignored.")
    stop: str | Items[str] | None = Field(default=None, description="The answer ends before any of these. Not OpenAI's.")
    continue_final_message: bool | None = Field(default=None, description="Go on with the last message, the assistant's. Not OpenAI's.")


# ---- what is returned


class ResponseText(BaseModel):
    """Text of the answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] | None = None


class ResponseMessage(BaseModel):
    """The answer's text."""

    type: Literal["message"] = "message"
    id: str
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[ResponseText]


class ResponseReasoningText(BaseModel):
    """What the model thought."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class ResponseReasoning(BaseModel):
    """What the model thought first."""

    type: Literal["reasoning"] = "reasoning"
    id: str
    status: Status
    summary: list[Any] = []
    content: list[ResponseReasoningText]


class ResponseFunctionCall(BaseModel):
    """The model asks to call a function."""

    type: Literal["function_call"] = "function_call"
    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


OutputItem: TypeAlias = Annotated[ResponseMessage | ResponseReasoning | ResponseFunctionCall, Discriminator("type")]


class InputDetails(BaseModel):
    """Tokens of the prompt."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    """Tokens of the answer."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Counts of tokens."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    """Why a response is not complete."""

    reason: Literal["max_output_tokens"]


class ResponseFailure(BaseModel):
    """Why a response failed."""

    code: Literal["server_error"] = "server_error"
    message: str


class Response(BaseModel):
    """A response, or what there is of it."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    background: bool = False
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None = None
    reasoning: Reasoning
    store: bool = False
    temperature: float
    text: TextConfig
    tool_choice: Literal["auto", "none", "required"] | Annotated[ChosenFunction | AllowedTools, Discriminator("type")]
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
