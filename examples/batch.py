# %% [markdown]
# # Many prompts at once
#
# Requests are computed together, from a list, from threads or from tasks; what prompts have in common is computed once.
#
# `python batch.py [MODEL]`: a GGUF file. Default: the demo model.

# %%
import asyncio
import sys
import time

import llama_moe
from llama_moe import SamplingParams
from llama_moe.demo_model import demo_model_path

llm = llama_moe.load(sys.argv[1] if len(sys.argv) > 1 else demo_model_path(), experts="cpu", context_size=1024, max_sequences=4)
params = SamplingParams(max_tokens=16, temperature=0)

# %% [markdown]
# ## A list
#
# Four are computed at once; the others wait, and each that ends is replaced by the next.

# %%
prompts = [f"A fact about the number {number}:" for number in range(8)]
begin = time.perf_counter()
completions = llm.generate(prompts, params)
seconds = time.perf_counter() - begin
for prompt, completion in zip(prompts, completions, strict=True):
    print(f"{prompt} {completion.text!r}")
print(f"{sum(len(completion.tokens) for completion in completions) / seconds:.0f} tokens/s together")

# %% [markdown]
# ## A common beginning

# %%
rules = "You are a guide to the museum of railways. Answer in one short sentence, and be kind.\n"
for question in ("Where is the café?", "When do you close?"):
    completion = llm.generate(rules + question, params)
    print(f"{completion.cached_tokens} of {completion.prompt_tokens} prompt tokens were not computed again")


# %% [markdown]
# ## Tasks
#
# No thread waits for a stream. Cancelling a task frees its place in the batch. (In a notebook, `await main()`.)


# %%
async def answer(prompt: str) -> str:
    async with llm.astream(prompt, params, timeout=60) as stream:
        return "".join([str(token) async for token in stream])


async def main() -> None:
    print(await asyncio.gather(*(answer(prompt) for prompt in prompts[:4])))


asyncio.run(main())

# %%
print(llm.stats())
llm.close()
