#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace llama_moe {

// An importance matrix: how large the inputs of each weight matrix are, by column.
struct Imatrix {
    struct Entry {
        std::vector<float> sums;    // of the squared inputs: columns of the first matrix, of the second, ...
        std::vector<float> counts;  // rows of inputs seen, one for each matrix (expert), or one for all
    };

    std::string path;                      // the file it was read from
    std::map<std::string, Entry> entries;  // by the name of the weights
    std::vector<std::string> datasets;     // what it was computed from
    std::uint32_t chunk_count = 0;
    std::uint32_t chunk_size = 0;  // tokens

    // What the quantiser takes for the weights `name`: mean squares by column; ones for an expert that no token used. Empty: nothing is
    // known of them.
    std::vector<float> weights(const std::string& name) const;
};

// Throws FileNotFoundError, or ModelLoadError for a file that is no importance matrix.
Imatrix read_imatrix(const std::string& path);

// Writes llama.cpp's GGUF format.
void write_imatrix(const Imatrix& imatrix, const std::string& path);

}  // namespace llama_moe
