#include "llama_moe/live_objects.h"

namespace llama_moe {

LiveObjects& live_objects() {
    static auto* objects = new LiveObjects;  // never destroyed: objects may outlive static destruction
    return *objects;
}

}  // namespace llama_moe
