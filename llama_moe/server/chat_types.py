"""Requests and answers of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .bodies import MAX_TOOLS, Items
from .results import TokenLogprob, Usage
from .sampling import MAX_TOP_LOGPROBS, SamplingFields


class ContentPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description='"text"; no other kind is supported.')
    text: str | None = Field(default=None, description="The text.")


class FunctionCall(BaseModel):
    """A function that the model asks to call."""

    name: str = Field(description="Of the function.")
    arguments: str = Field(description="JSON.")


class MessageToolCall(BaseModel):
    """A tool call of an earlier answer, or of this one."""

    id: str = Field(description="The message with its result names it.")
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """A message of the conversation. Fields that are not known are left out of it."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(description="Who says it.")
    content: str | Items[ContentPart] | None = Field(default=None, description="What is said: text, or parts that are text.")
    name: str | None = Field(default=None, description="Of who says it, for templates that have a place for it.")
    reasoning_content: str | None = Field(default=None, description="What the assistant thought first.")
    tool_calls: Items[MessageToolCall] | None = Field(default=None, description="What the assistant asked to call.")
    tool_call_id: str | None = Field(default=None, description="Of a tool's message: whose result it is.")


class FunctionDefinition(BaseModel):
    """A function that may be called."""

    name: str = Field(description="Its name.", min_length=1)
    description: str | None = Field(default=None, description="When to call it.")
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema of its arguments.")
    strict: bool | None = Field(default=None, description="Arguments are always of the schema, whatever this says.")


class Tool(BaseModel):
    """A tool that may be used."""

    type: Literal["function"]
    function: FunctionDefinition


class ChosenFunction(BaseModel):
    """The name of a function."""

    name: str


class ToolChoiceObject(BaseModel):
    """The function to call."""

    type: Literal["function"] = "function"
    function: ChosenFunction


class JsonSchema(BaseModel):
    """What the answer must be JSON of."""

    model_config = ConfigDict(populate_by_name=True)

    name: str | None = Field(default=None, description="For people.")
    description: str | None = Field(default=None, description="For people.")
    schema_: dict[str, Any] = Field(alias="schema", description="The JSON schema.")
    strict: bool | None = Field(default=None, description="The answer is always of the schema, whatever this says.")


class ResponseFormat(BaseModel):
    """What the answer must be."""

    model_config = ConfigDict(populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(default=None, description='With "json_schema".')
    schema_: dict[str, Any] | None = Field(default=None, alias="schema", description='With "json_object": what it must be of.')


class ChatRequest(SamplingFields):
    """A conversation to answer."""

    model: str | None = Field(default=None, description="Which model; may be left out where there is one only.")
    messages: Annotated[Items[Message], Field(min_length=1)] = Field(description="The conversation so far.")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="Most tokens of the answer, its reasoning included.")
    max_tokens: int | None = Field(default=None, ge=1, description="The same, by its older name.")
    logprobs: bool | None = Field(default=None, description="Give the log-probability of each token.")
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS, description="And of this many alternatives.")
    tools: Items[Tool] | None = Field(default=None, max_length=MAX_TOOLS, description="Functions that the model may ask to call.")
    tool_choice: Literal["none", "auto", "required"] | ToolChoiceObject | None = Field(
        default=None, description='"auto": as the model likes; "none": not; "required": at least one; or the one named.'
    )
    parallel_tool_calls: bool | None = Field(default=None, description="Whether it may ask for several at once; true if not given.")
    response_format: ResponseFormat | None = Field(default=None, description="What the answer must be.")
    reasoning_effort: str | None = Field(default=None, description='For templates that ask for it; "none": it does not think first.')
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Further variables of the model's chat template, such as `enable_thinking`."
    )
    continue_final_message: bool | None = Field(default=None, description="Go on with the last message, the assistant's.")


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="Its text; null if there are only tool calls.")
    refusal: None = None
    reasoning_content: str | None = Field(default=None, description="What the model thought first; left out if nothing.")
    tool_calls: list[MessageToolCall] | None = Field(default=None, description="What it asks to call; left out if nothing.")


class ChoiceLogprobs(BaseModel):
    """The log-probabilities of all generated tokens, those of reasoning and tool calls included."""

    content: list[TokenLogprob]
    refusal: None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(BaseModel):
    """One of the answers asked for."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason


class ChatReply(BaseModel):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class DeltaFunction(BaseModel):
    """What a call's function gained."""

    name: str | None = None
    arguments: str


class DeltaToolCall(BaseModel):
    """What a tool call gained; `id` and name come with the first of it."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: DeltaFunction


class Delta(BaseModel):
    """What an answer gained; fields that gained nothing are left out."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[DeltaToolCall] | None = None


class ChunkChoice(BaseModel):
    """What one of the answers gained."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """An event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
