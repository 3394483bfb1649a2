#include "llama_moe/context.h"

#include "bindings.h"
#include "llama_moe/error.h"

namespace llama_moe::bindings {
namespace {

DecodeInput decode_input(const py::object& tokens, const py::object& positions, const py::object& sequence_ids, const py::object& outputs) {
    DecodeInput input;
    input.tokens = to_integers(tokens, "tokens");
    if (!positions.is_none()) {
        input.positions = to_integers(positions, "positions");
    }
    if (!sequence_ids.is_none()) {
        input.sequence_ids = to_integers(sequence_ids, "sequence_ids");
    }
    if (py::isinstance<py::str>(outputs)) {
        const auto name = outputs.cast<std::string>();
        if (name != "last" && name != "all") {
            throw InvalidOptionError("outputs is '" + name + "'; it must be 'last', 'all' or a mask of bools");
        }
        input.outputs = name == "last" ? Outputs::last : Outputs::all;
        return input;
    }
    const auto mask = py::array::ensure(outputs);
    if (!mask || mask.ndim() != 1 || mask.dtype().kind() != 'b') {
        PyErr_Clear();
        throw InvalidOptionError("outputs must be 'last', 'all' or a one-dimensional mask of bools");
    }
    const auto flags = py::array_t<bool, py::array::c_style>::ensure(mask);
    input.outputs = Outputs::mask;
    input.mask.assign(flags.data(), flags.data() + flags.size());
    return input;
}

// The array shares the logits' memory and keeps it.
py::array_t<float> to_array(std::shared_ptr<Logits> logits) {
    const std::vector<py::ssize_t> shape = {static_cast<py::ssize_t>(logits->rows), static_cast<py::ssize_t>(logits->columns)};
    float* data = logits->values.data();
    const py::capsule owner(new std::shared_ptr<Logits>(std::move(logits)), [](void* held) { delete static_cast<std::shared_ptr<Logits>*>(held); });
    return py::array_t<float>(shape, data, owner);
}

}  // namespace

void bind_context(py::module_& m) {
    py::class_<ContextHandle> context(m, "Context");
    def_tracing(context);
    context
        .def(py::init([](const ModelHandle& model, const ContextOptions& options) {
                 return std::make_unique<ContextHandle>(
                     without_gil([&, native = model.get()] { return Context::create(native, options, poll_signals()); }));
             }),
             py::arg("model"), py::arg("options"))
        .def(
            "decode",
            [](const ContextHandle& context, const py::object& tokens, const py::object& positions, const py::object& sequence_ids,
               const py::object& outputs) {
                auto input = decode_input(tokens, positions, sequence_ids, outputs);
                return to_array(without_gil([&] { return context->decode(std::move(input), poll_signals()); }));
            },
            py::arg("tokens"), py::arg("positions"), py::arg("sequence_ids"), py::arg("outputs"))
        .def(
            "remove",
            [](const ContextHandle& context, int sequence_id, int start, int end) {
                without_gil([&] { context->remove(sequence_id, start, end, poll_signals()); });
            },
            py::arg("sequence_id"), py::arg("start"), py::arg("end"))
        .def(
            "copy",
            [](const ContextHandle& context, int source, int destination, int start, int end) {
                without_gil([&] { context->copy(source, destination, start, end, poll_signals()); });
            },
            py::arg("source"), py::arg("destination"), py::arg("start"), py::arg("end"))
        .def(
            "keep",
            [](const ContextHandle& context, int sequence_id) { without_gil([&] { context->keep(sequence_id, poll_signals()); }); },
            py::arg("sequence_id"))
        .def("clear", [](const ContextHandle& context) { without_gil([&] { context->clear(poll_signals()); }); })
        .def(
            "sequence_length",
            [](const ContextHandle& context, int sequence_id) {
                return without_gil([&] { return context->sequence_length(sequence_id, poll_signals()); });
            },
            py::arg("sequence_id"))
        .def(
            "save_state",
            [](const ContextHandle& context, int sequence_id) {
                return to_bytes(without_gil([&] { return context->save_state(sequence_id, poll_signals()); }));
            },
            py::arg("sequence_id"))
        .def(
            "load_state",
            [](const ContextHandle& context, const py::bytes& data, int sequence_id) {
                without_gil([&, view = std::string_view(data)] { context->load_state(view, sequence_id, poll_signals()); });
            },
            py::arg("data"), py::arg("sequence_id"))
        .def("memory", [](const ContextHandle& context) { return to_tuples(without_gil([&] { return context->memory(poll_signals()); })); })
        .def("breakdown", [](const ContextHandle& context) { return to_tuples(without_gil([&] { return context->breakdown(poll_signals()); })); })
        .def_property_readonly("context_size", [](const ContextHandle& context) { return context->limits().context_size; })
        .def_property_readonly("max_sequences", [](const ContextHandle& context) { return context->limits().max_sequences; })
        .def_property_readonly("batch_size", [](const ContextHandle& context) { return context->limits().batch_size; })
        .def_property_readonly("micro_batch_size", [](const ContextHandle& context) { return context->limits().micro_batch_size; })
        .def_property_readonly("threads", [](const ContextHandle& context) { return context->limits().threads; })
        .def_property_readonly("threads_batch", [](const ContextHandle& context) { return context->limits().threads_batch; })
        .def("close", [](const ContextHandle& context) { without_gil([&] { context->close(); }); })
        .def_property_readonly("closed", [](const ContextHandle& context) { return without_gil([&] { return context->closed(); }); });
}

}  // namespace llama_moe::bindings
