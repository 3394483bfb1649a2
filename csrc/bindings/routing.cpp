#include "llama_moe/routing.h"

#include "bindings.h"

namespace llama_moe::bindings {
namespace {

// The array takes the vector's memory.
template <typename T>
py::array_t<T> to_array(std::vector<T> values, const std::vector<py::ssize_t>& shape) {
    auto* kept = new std::vector<T>(std::move(values));
    const py::capsule owner(kept, [](void* vector) { delete static_cast<std::vector<T>*>(vector); });
    return py::array_t<T>(shape, kept->data(), owner);
}

py::dict to_python(const RoutingTrace& trace, RoutingTrace::Counts counts, RoutedTokens records) {
    const auto& shape = trace.shape();
    const auto tokens = static_cast<py::ssize_t>(records.tokens.size());
    const std::vector<py::ssize_t> each = {tokens, static_cast<py::ssize_t>(shape.moe_layers.size()), shape.used};
    std::vector<std::int32_t> ids, positions, sequences;
    std::vector<std::int64_t> requests;
    for (const auto& token : records.tokens) {
        ids.push_back(token.token);
        positions.push_back(token.position);
        sequences.push_back(token.sequence);
        requests.push_back(token.request);
    }
    py::dict result;
    result["tokens"] = counts.tokens;
    result["counts"] = to_array(std::move(counts.counts), {shape.layers, shape.experts});
    if (trace.options().choices || trace.options().weights) {
        result["token_ids"] = to_array(std::move(ids), {tokens});
        result["positions"] = to_array(std::move(positions), {tokens});
        result["sequences"] = to_array(std::move(sequences), {tokens});
        result["requests"] = to_array(std::move(requests), {tokens});
    }
    if (trace.options().choices) {
        result["choices"] = to_array(std::move(records.choices), each);
    }
    if (trace.options().weights) {
        result["weights"] = to_array(std::move(records.weights), each);
    }
    return result;
}

}  // namespace

void bind_routing(py::module_& m) {
    m.attr("NO_EXPERT") = static_cast<int>(kNoExpert);
    py::class_<RoutingTraceHandle>(m, "RoutingTrace")
        .def_property_readonly("layers", [](const RoutingTraceHandle& trace) { return trace->shape().layers; })
        .def_property_readonly("experts", [](const RoutingTraceHandle& trace) { return trace->shape().experts; })
        .def_property_readonly("used", [](const RoutingTraceHandle& trace) { return trace->shape().used; })
        .def_property_readonly("moe_layers", [](const RoutingTraceHandle& trace) { return trace->shape().moe_layers; })
        .def_property_readonly("first_request", [](const RoutingTraceHandle& trace) { return trace->first_request(); })
        .def_property_readonly("active", [](const RoutingTraceHandle& trace) { return without_gil([&] { return trace->active(); }); })
        .def("counts",
             [](const RoutingTraceHandle& trace) {
                 auto counts = without_gil([&] { return trace->counts(); });
                 auto array = to_array(std::move(counts.counts), {trace->shape().layers, trace->shape().experts});
                 return py::typing::Tuple<int, py::array_t<std::int64_t>>(py::make_tuple(counts.tokens, std::move(array)));
             })
        .def("records", [](const RoutingTraceHandle& trace) {
            RoutedTokens records;
            auto counts = without_gil([&] { return trace->records(records); });
            return to_python(*trace, std::move(counts), std::move(records));
        });
}

}  // namespace llama_moe::bindings
