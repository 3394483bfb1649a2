"""Run Mixture-of-Experts models that are larger than the GPU's memory, at native speed.

Example:
    with llama_moe.load("model.gguf", experts="cpu") as llm:
        for token in llm.stream("Explain quantum computing", llama_moe.SamplingParams(max_tokens=128)):
            print(token, end="", flush=True)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from . import _core, _logging, errors
from .build import build_info
from .chat import (
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    ChatParser,
    ChatPrompt,
    ChatStream,
    ChatTemplate,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
)
from .context import Context
from .devices import Device, add_rpc_device, devices
from .engine import Engine
from .inspection import ModelInfo, TensorInfo, inspect
from .loading import load
from .lora import LoraAdapter
from .memory import MemoryReport, MemoryRow
from .model import Model
from .placement import ExpertPlacement, Placement, TensorPlacement
from .planning import DeviceSpec, Plan, plan
from .results import Completion, FinishReason, Timings, Token
from .sampling import SamplingParams
from .scoring import Pooling, Score
from .speculative import Speculative
from .stream import TokenStream
from .tokens import Prompt

if TYPE_CHECKING:
    from .aio import AsyncChatStream, AsyncTokenStream
    from .bandwidth import Bandwidths, DeviceRates, DiskRate, ProductKind, bandwidths
    from .benchmark_report import BenchmarkReport, BenchmarkRow, ModelFacts
    from .benchmarking import benchmark
    from .diagnosis import Diagnosis, Finding, diagnose
    from .drivers import Driver
    from .hub import pull
    from .importance import ImatrixEntry, ImatrixReport, imatrix
    from .plugins import Plugin
    from .prediction import PlacedTensor, Prediction, predict_decode
    from .profiles import Profile, ProfileKey, TunedOptions
    from .quality import Quality, QualityReport, QualityRow, compare
    from .quantization import QuantizedTensor, QuantizeReport, quantization_types, quantize, tensor_types
    from .routing import LayerRouting, RoutingTrace
    from .routing_cache import CacheSimulation
    from .trials import Trial
    from .tuning import TuningProgress, tune
    from .tuning_report import TuningReport

    __version__: str

__all__ = [
    "AsyncChatStream",
    "AsyncTokenStream",
    "Bandwidths",
    "BenchmarkReport",
    "BenchmarkRow",
    "CacheSimulation",
    "ChatCompletion",
    "ChatDelta",
    "ChatMessage",
    "ChatParser",
    "ChatPrompt",
    "ChatStream",
    "ChatTemplate",
    "Completion",
    "Context",
    "Device",
    "DeviceRates",
    "DeviceSpec",
    "Diagnosis",
    "DiskRate",
    "Driver",
    "Engine",
    "ExpertPlacement",
    "Finding",
    "FinishReason",
    "ImatrixEntry",
    "ImatrixReport",
    "LayerRouting",
    "LoraAdapter",
    "MemoryReport",
    "MemoryRow",
    "Model",
    "ModelFacts",
    "ModelInfo",
    "PlacedTensor",
    "Placement",
    "Plan",
    "Plugin",
    "Pooling",
    "Prediction",
    "ProductKind",
    "Profile",
    "ProfileKey",
    "Prompt",
    "Quality",
    "QualityReport",
    "QualityRow",
    "QuantizeReport",
    "QuantizedTensor",
    "RoutingTrace",
    "SamplingParams",
    "Score",
    "Speculative",
    "TensorInfo",
    "TensorPlacement",
    "Timings",
    "Token",
    "TokenStream",
    "ToolCall",
    "ToolCallDelta",
    "ToolChoice",
    "Trial",
    "TunedOptions",
    "TuningProgress",
    "TuningReport",
    "__version__",
    "add_rpc_device",
    "bandwidths",
    "benchmark",
    "build_info",
    "compare",
    "devices",
    "diagnose",
    "errors",
    "imatrix",
    "inspect",
    "load",
    "plan",
    "predict_decode",
    "pull",
    "quantization_types",
    "quantize",
    "tensor_types",
    "tune",
]

# What few need, by its module: asyncio alone takes longer to import than this package.
_LATE = {
    "AsyncChatStream": "aio",
    "AsyncTokenStream": "aio",
    "Bandwidths": "bandwidth",
    "BenchmarkReport": "benchmark_report",
    "BenchmarkRow": "benchmark_report",
    "CacheSimulation": "routing_cache",
    "DeviceRates": "bandwidth",
    "Diagnosis": "diagnosis",
    "DiskRate": "bandwidth",
    "Driver": "drivers",
    "Finding": "diagnosis",
    "ImatrixEntry": "importance",
    "ImatrixReport": "importance",
    "LayerRouting": "routing",
    "ModelFacts": "benchmark_report",
    "PlacedTensor": "prediction",
    "Plugin": "plugins",
    "Prediction": "prediction",
    "ProductKind": "bandwidth",
    "Profile": "profiles",
    "ProfileKey": "profiles",
    "Quality": "quality",
    "QualityReport": "quality",
    "QualityRow": "quality",
    "QuantizeReport": "quantization",
    "QuantizedTensor": "quantization",
    "RoutingTrace": "routing",
    "Trial": "trials",
    "TunedOptions": "profiles",
    "TuningProgress": "tuning",
    "TuningReport": "tuning_report",
    "bandwidths": "bandwidth",
    "benchmark": "benchmarking",
    "compare": "quality",
    "diagnose": "diagnosis",
    "imatrix": "importance",
    "predict_decode": "prediction",
    "pull": "hub",
    "quantization_types": "quantization",
    "quantize": "quantization",
    "tensor_types": "quantization",
    "tune": "tuning",
}

_logging.connect()
_core.set_plugin_loader(lambda: importlib.import_module(".plugins", __name__).load_all())


def __getattr__(name: str) -> object:
    if name == "__version__":
        return build_info()["version"]
    if name in _LATE:
        return getattr(importlib.import_module(f".{_LATE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
