# %% [markdown]
# # Which experts does a text use?
#
# Counts what the routers choose while text is generated, draws it, and asks how often a cache of experts would have had the ones needed.
#
# `python routing_heatmap.py [MODEL]`: a GGUF file of a Mixture-of-Experts model. Default: the demo model. Writes routing.png
# (`pip install "llama-moe[plot]"`).

# %%
import sys

import llama_moe
from llama_moe import SamplingParams
from llama_moe.demo_model import demo_model_path

llm = llama_moe.load(sys.argv[1] if len(sys.argv) > 1 else demo_model_path(), experts="cpu", context_size=1024, max_sequences=2)

# %%
with llm.trace_routing(choices=True) as routing:
    llm.generate(["The museum of railways", "Once upon a time"], SamplingParams(max_tokens=48, temperature=0))
print(routing.tokens, "tokens; counts of", routing.counts.shape, "layers and experts")
for layer in routing.by_layer(top=3):
    print(f"layer {layer.layer}: most used {layer.top}, entropy {layer.entropy:.2f}")

# %%
figure = routing.plot("routing.png")  # in a notebook, `figure` shows it

# %% [markdown]
# ## What a cache of hot experts would be worth

# %%
everything = len(routing.layers) * routing.expert_count
for share in (0.125, 0.25, 0.5):
    slots = max(1, int(everything * share))
    lru, best = (routing.simulate_cache(slots, policy).hit_rate for policy in ("lru", "static"))
    print(f"{slots} of {everything} experts: {lru:.0%} hits of a least-recently-used cache, {best:.0%} of the best fixed choice")

# %%
llm.close()
