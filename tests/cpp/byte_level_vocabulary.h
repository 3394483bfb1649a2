// A vocabulary whose tokens are any bytes, as byte-pair tokenizers have them, loaded without a model.
#pragma once

#include <string>
#include <vector>

#include "llama-cpp.h"

namespace test {

// Tokens in this order: each byte, `texts`, then control tokens with the names `controls`, of which the first ends a text.
llama_model_ptr load_byte_level_vocabulary(const std::vector<std::string>& texts, const std::vector<std::string>& controls);

}  // namespace test
