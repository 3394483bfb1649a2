#pragma once

#include <exception>
#include <string>
#include <vector>

#include "request.h"

namespace llama_moe {

// What a request made of its rows of logits.
struct Advance {
    int tokens = 0;    // generated
    int accepted = 0;  // of the draft: their places in the KV cache stay
    std::string end;   // reason, when the generation is over
    std::exception_ptr error;
};

// Chooses tokens and delivers them. Row 0 follows the request's last token; row i + 1 follows `draft[i]` and counts only when the
// token chosen before it is that one, so that the outcome is the same with any draft. `room` is how many tokens the KV cache
// could take after the request's last one.
Advance generate(Request& request, const SamplingVocabulary& vocabulary, const std::vector<const float*>& rows, const std::vector<std::int32_t>& draft,
                 int room);

// Delivers the text that was held back, for a generation that ends here.
void deliver_held(Request& request, const SamplingVocabulary& vocabulary);

// Appends the log-probabilities of the tokens from `first` on, one for each row.
Advance score(Request& request, const SamplingVocabulary& vocabulary, const std::vector<const float*>& rows, std::size_t first);

// Takes one token's embedding, and at the prompt's end makes the result of what was taken.
void embed(Request& request, const float* row, int size, std::size_t index);

}  // namespace llama_moe
