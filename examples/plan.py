# %% [markdown]
# # Will it fit?
#
# What a model takes on a GPU that need not be here, under several placements of its experts, and how quick each is predicted to be.
# Only the file's header is read.
#
# `python plan.py [MODEL]`: a GGUF file, a URL, or OWNER/REPOSITORY/FILE of the Hugging Face hub. Default: the demo model.

# %%
import sys

import llama_moe
from llama_moe import DeviceSpec, ExpertPlacement
from llama_moe.demo_model import demo_model_path

model = sys.argv[1] if len(sys.argv) > 1 else demo_model_path()
gpu = DeviceSpec("GPU", "8GiB", overhead="512MiB")
print(llama_moe.inspect(model))

# %% [markdown]
# ## As many experts on the GPU as fit

# %%
plan = llama_moe.plan(model, devices=gpu, ram="64GiB", context_size=4096)
print(plan)
print(plan.summary)
print(plan.predict())

# %% [markdown]
# ## Other placements
#
# `predict()` measures this machine's memory once; the GPU's speed is assumed, or stated with `DeviceRates.stated`.

# %%
half = llama_moe.inspect(model).layer_count // 2
placements = {
    "all on the GPU": ExpertPlacement.gpu(),
    "all in host memory": ExpertPlacement.cpu(),
    f"{half} layers' in host memory": ExpertPlacement.cpu_first(half),
}
for name, experts in placements.items():
    plan = llama_moe.plan(model, devices=gpu, ram="64GiB", context_size=4096, experts=experts)
    on_gpu = sum(row.bytes for row in plan.rows if row.device == "GPU")
    print(f"{name:30} {on_gpu / 2**30:6.2f} GiB on the GPU, fits: {plan.fits}, {plan.predict()}")
