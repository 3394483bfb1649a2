"""What a message of the Messages API becomes as its answer comes, and the events that tell of it."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import pydantic_core

from .messages_models import AnswerText, AnswerThinking, AnswerToolUse, Message, Usage
from .stop_sequences import StopFinder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llama_moe.chat import ChatCompletion, ChatDelta, ToolCallDelta

    from .messages_models import AnswerBlock, StopReason

    Event = dict[str, Any]

# Clients want a signature of what the model thought, and give it back. Ours is checked by nobody.
_SIGNATURE = "unsigned"


class MessageBuilder:
    """Puts a message together from what its answer gains.

    Every method gives the events that a stream has there. One block is open at a time: text, thinking or a tool use, and what is of another
    kind closes it.

    Args:
        model: the model's name.
        prompt_tokens: length of the prompt.
        stops: strings of which the first to appear ends the text.
    """

    def __init__(self, model: str, *, prompt_tokens: int, stops: Sequence[str] = ()) -> None:
        self.message = Message(
            id=f"msg_{secrets.token_hex(12)}",
            model=model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=Usage(input_tokens=prompt_tokens, cache_read_input_tokens=0, output_tokens=0),
        )
        self._stops = StopFinder(stops)
        self._open: AnswerBlock | None = None
        self._arguments = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop sequence ended the answer: nothing more is taken."""
        return self._stops.found is not None

    def begin(self) -> list[Event]:
        """The events before the answer."""
        return [{"type": "message_start", "message": self.message.model_dump()}, {"type": "ping"}]

    def add(self, delta: ChatDelta) -> Iterator[Event]:
        """Takes what the answer gained."""
        if delta.reasoning and not self.stopped:
            yield from self._rest_of_text()
            yield from self._add_thinking(delta.reasoning)
        if delta.content:
            yield from self._add_text(self._stops.push(delta.content))
        for call in delta.tool_calls:
            if self.stopped:
                return
            yield from self._rest_of_text()
            yield from self._add_call(call)

    def finish(self, completion: ChatCompletion, *, max_tokens: int) -> Iterator[Event]:
        """Takes the end of the answer.

        Args:
            completion: the answer, as far as it was given to `add`.
            max_tokens: the limit of its length; an answer that was cut off before came to the end of the context.
        """
        yield from self._rest_of_text()
        yield from self._close()
        message = self.message
        message.stop_reason = self._stop_reason(completion, max_tokens)
        message.stop_sequence = self._stops.found
        message.usage = Usage(
            input_tokens=completion.prompt_tokens - completion.cached_tokens,
            cache_read_input_tokens=completion.cached_tokens,
            output_tokens=len(completion.tokens),
        )
        yield {
            "type": "message_delta",
            "delta": {"stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence},
            "usage": message.usage.model_dump(),
        }
        yield {"type": "message_stop"}

    def _stop_reason(self, completion: ChatCompletion, max_tokens: int) -> StopReason:
        if self.stopped:
            return "stop_sequence"
        match completion.finish_reason:
            case "tool_calls":
                return "tool_use"
            case "length":
                return "max_tokens" if len(completion.tokens) >= max_tokens else "model_context_window_exceeded"
        return "end_turn"

    def _add_thinking(self, text: str) -> Iterator[Event]:
        block = self._open
        if not isinstance(block, AnswerThinking):
            block = AnswerThinking(thinking="", signature="")
            yield from self._begin(block)
        block.thinking += text
        yield self._delta({"type": "thinking_delta", "thinking": text})

    def _add_text(self, text: str) -> Iterator[Event]:
        if not text:
            return
        block = self._open
        if not isinstance(block, AnswerText):
            block = AnswerText(text="")
            yield from self._begin(block)
        block.text += text
        yield self._delta({"type": "text_delta", "text": text})

    def _rest_of_text(self) -> Iterator[Event]:
        """What was held back because a stop sequence might have begun in it."""
        yield from self._add_text(self._stops.finish())

    def _add_call(self, call: ToolCallDelta) -> Iterator[Event]:
        if call.id is not None:
            yield from self._begin(AnswerToolUse(id=call.id, name=call.name or "", input={}))
        if call.arguments and isinstance(self._open, AnswerToolUse):
            self._arguments += call.arguments
            yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})

    def _begin(self, block: AnswerBlock) -> Iterator[Event]:
        yield from self._close()
        self._open = block
        self.message.content.append(block)
        yield {"type": "content_block_start", "index": self._index, "content_block": block.model_dump()}

    def _close(self) -> Iterator[Event]:
        match self._open:
            case None:
                return
            case AnswerThinking() as block:
                block.signature = _SIGNATURE
                yield self._delta({"type": "signature_delta", "signature": _SIGNATURE})
            case AnswerToolUse() as block:
                block.input = _tool_input(self._arguments)
                self._arguments = ""
        yield {"type": "content_block_stop", "index": self._index}
        self._open = None

    def _delta(self, delta: dict[str, str]) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    @property
    def _index(self) -> int:
        return len(self.message.content) - 1


def _tool_input(arguments: str) -> dict[str, Any]:
    """The input of a tool; of one whose JSON was cut off what is whole of it, as clients have it that read the stream."""
    try:
        value = pydantic_core.from_json(arguments, allow_partial="trailing-strings")
    except ValueError:  # not even the beginning of JSON, such as nothing at all
        return {}
    return value if isinstance(value, dict) else {}
