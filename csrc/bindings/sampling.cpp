#include "llama_moe/sampling.h"

#include "bindings.h"

namespace llama_moe::bindings {

void bind_sampling(py::module_& m) {
    py::class_<SamplingOptions>(m, "SamplingOptions")
        .def(py::init<>())
        .def_readwrite("max_tokens", &SamplingOptions::max_tokens)
        .def_readwrite("temperature", &SamplingOptions::temperature)
        .def_readwrite("dynatemp_range", &SamplingOptions::dynatemp_range)
        .def_readwrite("dynatemp_exponent", &SamplingOptions::dynatemp_exponent)
        .def_readwrite("top_k", &SamplingOptions::top_k)
        .def_readwrite("top_p", &SamplingOptions::top_p)
        .def_readwrite("min_p", &SamplingOptions::min_p)
        .def_readwrite("typical_p", &SamplingOptions::typical_p)
        .def_readwrite("top_n_sigma", &SamplingOptions::top_n_sigma)
        .def_readwrite("min_keep", &SamplingOptions::min_keep)
        .def_readwrite("repeat_penalty", &SamplingOptions::repeat_penalty)
        .def_readwrite("presence_penalty", &SamplingOptions::presence_penalty)
        .def_readwrite("frequency_penalty", &SamplingOptions::frequency_penalty)
        .def_readwrite("penalty_window", &SamplingOptions::penalty_window)
        .def_readwrite("xtc_probability", &SamplingOptions::xtc_probability)
        .def_readwrite("xtc_threshold", &SamplingOptions::xtc_threshold)
        .def_readwrite("dry_multiplier", &SamplingOptions::dry_multiplier)
        .def_readwrite("dry_base", &SamplingOptions::dry_base)
        .def_readwrite("dry_allowed_length", &SamplingOptions::dry_allowed_length)
        .def_readwrite("dry_penalty_window", &SamplingOptions::dry_penalty_window)
        .def_readwrite("dry_sequence_breakers", &SamplingOptions::dry_sequence_breakers)
        .def_readwrite("mirostat", &SamplingOptions::mirostat)
        .def_readwrite("mirostat_tau", &SamplingOptions::mirostat_tau)
        .def_readwrite("mirostat_eta", &SamplingOptions::mirostat_eta)
        .def_readwrite("adaptive_target", &SamplingOptions::adaptive_target)
        .def_readwrite("adaptive_decay", &SamplingOptions::adaptive_decay)
        .def_readwrite("infill", &SamplingOptions::infill)
        .def_readwrite("seed", &SamplingOptions::seed)
        .def_readwrite("stop", &SamplingOptions::stop)
        .def_readwrite("logprobs", &SamplingOptions::logprobs)
        .def_readwrite("logit_bias", &SamplingOptions::logit_bias)
        .def_readwrite("ignore_eos", &SamplingOptions::ignore_eos)
        .def_readwrite("grammar", &SamplingOptions::grammar)
        .def_readwrite("json_schema", &SamplingOptions::json_schema)
        .def("validate", [](const SamplingOptions& options) { without_gil([&] { options.validate(); }); });  // a schema starts llama.cpp
}

}  // namespace llama_moe::bindings
