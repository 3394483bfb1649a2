# %% [markdown]
# # Generate
#
# Text, chat and JSON from a model with its experts in host memory.
#
# `python generate.py [MODEL]`: a GGUF file. Default: the demo model.

# %%
import json
import sys
from collections.abc import Mapping

import llama_moe
from llama_moe import SamplingParams
from llama_moe.demo_model import demo_model_path

llm = llama_moe.load(sys.argv[1] if len(sys.argv) > 1 else demo_model_path(), experts="cpu", context_size=2048)
print(llm.model.placement)

# %% [markdown]
# ## A stream of tokens

# %%
with llm.stream("The capital of France is", SamplingParams(max_tokens=32, temperature=0)) as stream:
    for token in stream:
        print(token, end="", flush=True)
print("\n", stream.completion.finish_reason, stream.completion.timings)

# %% [markdown]
# ## A conversation

# %%
messages: list[Mapping[str, object]] = [{"role": "user", "content": "Name a river in Italy."}]
answer = llm.chat(messages, SamplingParams(max_tokens=32))
print(answer.text)
messages += [answer.to_message(), {"role": "user", "content": "And one in Spain?"}]
for delta in llm.stream_chat(messages, SamplingParams(max_tokens=32)):  # computes only what is new
    print(delta, end="", flush=True)
print()

# %% [markdown]
# ## JSON of a schema

# %%
person = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
}
text = llm.generate("Somebody, as JSON:", SamplingParams(json_schema=person, max_tokens=128)).text
print(json.loads(text))

# %%
llm.close()
