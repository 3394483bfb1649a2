"""llama.cpp's Vulkan backend for llama_moe, which finds it by its entry point. There is nothing to import."""
