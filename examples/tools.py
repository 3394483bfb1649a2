# %% [markdown]
# # Tools
#
# A model that calls Python functions.
#
# `python tools.py [MODEL]`: a GGUF file, best of a model that was trained for tools. Default: the demo model, which was not.

# %%
import json
import sys

import llama_moe
from llama_moe import SamplingParams
from llama_moe.demo_model import demo_model_path
from llama_moe.errors import InvalidOptionError

llm = llama_moe.load(sys.argv[1] if len(sys.argv) > 1 else demo_model_path(), experts="cpu", context_size=2048)


def weather(city: str) -> dict[str, object]:
    """What a real tool would ask somebody else for."""
    return {"city": city, "sky": "sunny", "degrees": len(city) + 18}


CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo", "Quito"]}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather of a city now.", "parameters": CITY}}]
messages: list[dict[str, object]] = [{"role": "user", "content": "What is the weather in Rome?"}]

# %% [markdown]
# ## As the model's template writes it
#
# The template says how calls are written, and the engine reads them. One without a place for tools is an error.

# %%
try:
    answer = llm.chat(messages, SamplingParams(max_tokens=128), tools=TOOLS)
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": json.dumps(weather(**json.loads(call.arguments)))}
        for call in answer.tool_calls
        if call.name == "weather"
    ]
    if results:
        answer = llm.chat([*messages, answer.to_message(), *results], SamplingParams(max_tokens=64), tools=TOOLS)
    print(answer.text)
except InvalidOptionError as error:
    print(error)

# %% [markdown]
# ## As JSON of a schema
#
# Works with any model and template: the answer is the arguments, because nothing else is allowed.

# %%
request = [{"role": "user", "content": "What is the weather in Rome? Answer with JSON that has the city."}]
arguments = llm.chat(request, SamplingParams(json_schema=CITY, max_tokens=64, temperature=0)).text
print("arguments:", arguments)
messages += [
    {"role": "assistant", "content": f"I look up {arguments}."},
    {"role": "user", "content": f"It is {json.dumps(weather(**json.loads(arguments)))}. Say it in one sentence."},
]
print(llm.chat(messages, SamplingParams(max_tokens=48, temperature=0)).text)

# %%
llm.close()
