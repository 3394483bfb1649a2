"""What a response of the Responses API becomes as its answer comes, and the events that tell of it."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

from .responses_models import (
    IncompleteDetails,
    InputDetails,
    OutputDetails,
    ResponseFailure,
    ResponseFunctionCall,
    ResponseMessage,
    ResponseReasoning,
    ResponseReasoningText,
    ResponseText,
    ResponseUsage,
)
from .results import token_logprobs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llama_moe.chat import ChatCompletion, ChatDelta, ToolCallDelta
    from llama_moe.model import Model
    from llama_moe.results import Token

    from .errors import ApiError
    from .responses_models import OutputItem, Response, Status

    Event = dict[str, Any]


def new_id(prefix: str) -> str:
    """The id of something new: a response or a part of one."""
    return f"{prefix}_{secrets.token_hex(16)}"


class ResponseBuilder:
    """Puts a response together from what its answer gains.

    Every method gives the events that a stream has there, each with its place in the sequence. One item is open at a time: text, reasoning
    or a function call, and what is of another kind closes it.

    Args:
        response: the response before its answer.
        model: the model that answers.
    """

    def __init__(self, response: Response, model: Model) -> None:
        self.response = response
        self._model = model
        self._events = 0
        self._open: OutputItem | None = None
        self._reasoning_tokens = 0

    def begin(self) -> list[Event]:
        """The events before the answer."""
        return [self._whole("response.created"), self._whole("response.in_progress")]

    def add(self, delta: ChatDelta, tokens: Sequence[Token] = ()) -> Iterator[Event]:
        """Takes what the answer gained, and the tokens that it did so by; their log-probabilities are told, if they have some."""
        if delta.reasoning:
            if not isinstance(self._open, ResponseReasoning):
                yield from self._open_item(ResponseReasoning(id=new_id("rs"), status="in_progress", content=[]))
            yield self._event("response.reasoning_text.delta", content_index=0, delta=delta.reasoning)
            self._reasoning().text += delta.reasoning
            self._reasoning_tokens += len(tokens)
        if delta.content:
            if not isinstance(self._open, ResponseMessage):
                yield from self._open_item(ResponseMessage(id=new_id("msg"), status="in_progress", content=[]))
            logprobs = token_logprobs(self._model, (each for each in _last(tokens, delta.content) if each.logprob is not None))
            told = [each.model_dump() for each in logprobs]
            yield self._event("response.output_text.delta", content_index=0, delta=delta.content, logprobs=told)
            part = self._text()
            part.text += delta.content
            if logprobs:
                part.logprobs = (part.logprobs or []) + logprobs
        for call in delta.tool_calls:
            yield from self._add_call(call)

    def finish(self, completion: ChatCompletion) -> Iterator[Event]:
        """Takes the end of the answer, whose parts were all given to `add`."""
        if not self.response.output:  # an empty answer is one, too
            yield from self._open_item(ResponseMessage(id=new_id("msg"), status="in_progress", content=[]))
        cut = completion.finish_reason == "length"
        yield from self._close_item("incomplete" if cut else "completed")
        self.response.usage = ResponseUsage(
            input_tokens=completion.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=completion.cached_tokens),
            output_tokens=len(completion.tokens),
            output_tokens_details=OutputDetails(reasoning_tokens=self._reasoning_tokens),
            total_tokens=completion.prompt_tokens + len(completion.tokens),
        )
        if cut:
            self.response.status = "incomplete"
            self.response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        else:
            self.response.status = "completed"
            self.response.completed_at = int(time.time())
        yield self._whole(f"response.{self.response.status}")

    def fail(self, error: ApiError) -> Event:
        """Takes an error that ends the answer."""
        self.response.status = "failed"
        self.response.error = ResponseFailure(message=error.message)
        return self._whole("response.failed")

    def _add_call(self, call: ToolCallDelta) -> Iterator[Event]:
        if call.id is not None:
            item = ResponseFunctionCall(id=new_id("fc"), status="in_progress", call_id=call.id, name=call.name or "", arguments="")
            yield from self._open_item(item)
        if call.arguments and isinstance(self._open, ResponseFunctionCall):
            yield self._event("response.function_call_arguments.delta", delta=call.arguments)
            self._open.arguments += call.arguments

    def _open_item(self, item: OutputItem) -> Iterator[Event]:
        yield from self._close_item("completed")
        self._open = item
        self.response.output.append(item)
        yield self._item("response.output_item.added")
        match item:
            case ResponseReasoning():
                item.content.append(ResponseReasoningText(text=""))
            case ResponseMessage():
                item.content.append(ResponseText(text=""))
            case _:
                return
        yield self._event("response.content_part.added", content_index=0, part=item.content[0].model_dump())

    def _close_item(self, status: Status) -> Iterator[Event]:
        match self._open:
            case None:
                return
            case ResponseReasoning(content=[part]):
                yield self._event("response.reasoning_text.done", content_index=0, text=part.text)
                yield self._event("response.content_part.done", content_index=0, part=part.model_dump())
            case ResponseMessage(content=[part]):
                logprobs = [each.model_dump() for each in part.logprobs or ()]
                yield self._event("response.output_text.done", content_index=0, text=part.text, logprobs=logprobs)
                yield self._event("response.content_part.done", content_index=0, part=part.model_dump())
            case ResponseFunctionCall() as call:
                yield self._event("response.function_call_arguments.done", name=call.name, arguments=call.arguments)
        self._open.status = status
        yield self._item("response.output_item.done")
        self._open = None

    def _reasoning(self) -> ResponseReasoningText:
        assert isinstance(self._open, ResponseReasoning)  # noqa: S101 - opened by the caller
        return self._open.content[0]

    def _text(self) -> ResponseText:
        assert isinstance(self._open, ResponseMessage)  # noqa: S101 - opened by the caller
        return self._open.content[0]

    def _whole(self, kind: str) -> Event:
        return self._numbered(kind, response=self.response.model_dump(by_alias=True))

    def _item(self, kind: str) -> Event:
        assert self._open is not None  # noqa: S101 - opened by the caller
        return self._numbered(kind, output_index=len(self.response.output) - 1, item=self._open.model_dump())

    def _event(self, kind: str, **fields: object) -> Event:
        assert self._open is not None  # noqa: S101 - opened by the caller
        return self._numbered(kind, item_id=self._open.id, output_index=len(self.response.output) - 1, **fields)

    def _numbered(self, kind: str, **fields: object) -> Event:
        event = {"type": kind, "sequence_number": self._events, **fields}
        self._events += 1
        return event


def _last(tokens: Sequence[Token], text: str) -> Sequence[Token]:
    """The last of the tokens, as many as a text is made of; marks of the answer's format come before them."""
    length, first = 0, len(tokens)
    while first > 0 and length < len(text):
        first -= 1
        length += len(tokens[first].text)
    return tokens[first:]
