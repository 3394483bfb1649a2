#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "llama_moe/model.h"
#include "llama_moe/wait.h"

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

struct ImatrixOptions {
    int chunk_size = 512;       // tokens that are computed together; each chunk is a text of its own
    int chunks = 0;             // how many of the text; 0: all
    bool output = false;        // the output matrix, too
    int threads = 0;            // 0: one for each usable core
    std::string dataset;        // name of the text

    void validate() const;
};

// Computes the chunks of a text and sums the squares of what goes into each weight matrix of the layers. A rest that fills no chunk is left
// out. When `poll` throws, or `on_progress` does, which is called on this thread with the share done, the work stops.
std::shared_ptr<Imatrix> collect_imatrix(const std::shared_ptr<Model>& model, const std::vector<std::int32_t>& tokens, const ImatrixOptions& options,
                                         const std::function<void(float)>& on_progress = {}, const Poll& poll = {});

// Throws FileNotFoundError, or ModelLoadError for a file that is no importance matrix.
Imatrix read_imatrix(const std::string& path);

// Writes llama.cpp's GGUF format.
void write_imatrix(const Imatrix& imatrix, const std::string& path);

}  // namespace llama_moe
