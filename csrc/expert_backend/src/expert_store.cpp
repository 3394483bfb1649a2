#include "expert_store.h"

#include "threads.h"

namespace llama_moe::experts {

ExpertWeights::ExpertWeights(const Format& format, std::int64_t k, std::int64_t rows, std::int64_t experts, std::uint8_t* memory)
    : format_(&format),
      k_(k),
      rows_(rows),
      experts_(experts),
      group_bytes_(static_cast<std::size_t>(k / format.block) * format.block_bytes * kGroupRows),
      memory_(memory) {}

void ExpertWeights::place(std::int64_t first, std::int64_t rows, const std::uint8_t* from) {
    for_each_in_parallel(all_threads(), rows / kGroupRows, [&](std::int64_t i) {
        pack_group(*format_, k_, from + static_cast<std::size_t>(i) * group_bytes_, group(first + i * kGroupRows));
    });
}

void ExpertWeights::read_back(std::int64_t first, std::int64_t rows, std::uint8_t* to) const {
    for_each_in_parallel(all_threads(), rows / kGroupRows, [&](std::int64_t i) {
        unpack_group(*format_, k_, group(first + i * kGroupRows), to + static_cast<std::size_t>(i) * group_bytes_);
    });
}

}  // namespace llama_moe::experts
