#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "llama_moe/wait.h"

namespace llama_moe {

struct Endpoint {
    std::string host;
    std::uint16_t port;
};

// Parses "host:port". Throws InvalidOptionError.
Endpoint parse_endpoint(const std::string& text);

// Connects and hangs up again. Throws Error when nobody answers in time.
void check_listening(const Endpoint& endpoint, std::chrono::milliseconds timeout, const Poll& poll);

// Whether this process has a connection to that endpoint which neither side has closed. Asks the system alone: a worker serves
// one connection after the other, and each that it is offered besides takes a place in its queue.
bool connected(const Endpoint& endpoint);

}  // namespace llama_moe
