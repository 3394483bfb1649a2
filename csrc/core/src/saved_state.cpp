#include "saved_state.h"

#include <cstring>

#include "llama_moe/error.h"

namespace llama_moe {
namespace {

struct StateHeader {
    char magic[8] = {'L', 'M', 'O', 'E', 'S', 'T', 'A', 'T'};
    std::uint32_t version = 1;
    std::int32_t kind = 0;
    std::uint64_t model_fingerprint = 0;
    std::uint64_t payload_bytes = 0;
    std::uint64_t payload_checksum = 0;
};

std::uint64_t checksum(std::string_view data) {
    std::uint64_t hash = 1469598103934665603ull;  // FNV-1a over 8-byte words, 64 bits
    std::size_t i = 0;
    for (; i + 8 <= data.size(); i += 8) {
        std::uint64_t word = 0;
        std::memcpy(&word, data.data() + i, 8);
        hash = (hash ^ word) * 1099511628211ull;
    }
    for (; i < data.size(); i++) {
        hash = (hash ^ static_cast<unsigned char>(data[i])) * 1099511628211ull;
    }
    return hash;
}

StateHeader read_header(std::string_view data) {
    StateHeader header;
    const StateHeader expected;
    if (data.size() < sizeof(header)) {
        throw InvalidOptionError("the saved state has " + std::to_string(data.size()) + " bytes; that is less than its header");
    }
    std::memcpy(&header, data.data(), sizeof(header));
    if (std::memcmp(header.magic, expected.magic, sizeof(header.magic)) != 0 || header.version != expected.version) {
        throw InvalidOptionError("this is not a saved state of this version of llama_moe");
    }
    return header;
}

const char* describe(std::int32_t kind) {
    switch (static_cast<StateKind>(kind)) {
        case StateKind::sequence:
            return "of one sequence; load it into a context, and name the sequence to load it into";
        case StateKind::context:
            return "of a whole context; load it with sequence_id=-1";
        case StateKind::prefix:
            return "a saved prefix; load it with Engine.load_prefix()";
    }
    return "of a kind that this version does not know";
}

}  // namespace

void write_state_header(std::string& data, StateKind kind, std::uint64_t model_fingerprint) {
    static_assert(sizeof(StateHeader) == kStateHeaderBytes);
    const auto payload = std::string_view(data).substr(kStateHeaderBytes);
    StateHeader header;
    header.kind = static_cast<std::int32_t>(kind);
    header.model_fingerprint = model_fingerprint;
    header.payload_bytes = payload.size();
    header.payload_checksum = checksum(payload);
    std::memcpy(data.data(), &header, sizeof(header));
}

std::string_view unpack_state(std::string_view data, StateKind kind) {
    const StateHeader header = read_header(data);
    const std::string_view payload = data.substr(sizeof(header));
    if (header.payload_bytes != payload.size() || header.payload_checksum != checksum(payload)) {
        throw InvalidOptionError("the saved state is truncated or damaged");
    }
    if (header.kind != static_cast<std::int32_t>(kind)) {
        throw InvalidOptionError(std::string("the saved state is ") + describe(header.kind));
    }
    return payload;
}

void check_state_model(std::string_view data, std::uint64_t model_fingerprint) {
    if (read_header(data).model_fingerprint != model_fingerprint) {
        throw InvalidOptionError("the saved state is of another model, or of other LoRA adapters");
    }
}

}  // namespace llama_moe
