#pragma once

// Stands in for the header that llama.cpp's tools/ui generates from a web page, which is not unpacked: no page, no assets.
// Without LLAMA_UI_HAS_ASSETS the server asks for nothing else.

#include <string>
#include <vector>

struct llama_ui_asset {
    std::string name;
};

inline const std::vector<llama_ui_asset>& llama_ui_get_assets() {
    static const std::vector<llama_ui_asset> none;
    return none;
}
