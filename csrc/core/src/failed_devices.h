#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "llama_moe/wait.h"

namespace llama_moe {

// RPC workers that died or do not answer any more. ggml's connection to one stays broken for as long as this process lives: a
// call that needs it never returns. Null devices, which end llama.cpp's lists, are passed over.
bool any_failed(const std::vector<ggml_backend_dev_t>& devices);
bool any_remote(const std::vector<ggml_backend_dev_t>& devices);

// "device 'RPC0' (127.0.0.1:50052) failed: why" for those of `devices` that failed; empty when none did.
std::string describe_failed(const std::vector<ggml_backend_dev_t>& devices);

// Whether it was ggml's RPC client that aborted.
bool is_remote_failure(const std::string& abort_message);

// For a call that uses `devices` and did not return after such an abort: finds out which workers are gone. Returns those of
// `devices` of which only a Ping can tell.
std::vector<ggml_backend_dev_t> find_failed(const std::vector<ggml_backend_dev_t>& devices, const std::string& abort_message);

// How long a call may wait for a worker before the worker is asked whether it still answers.
void set_answer_limit(ggml_backend_dev_t device, std::chrono::milliseconds limit);
std::chrono::milliseconds answer_limit(const std::vector<ggml_backend_dev_t>& devices);  // the shortest

// Closing something waits this long for a worker; then what lies there is left behind.
constexpr std::chrono::seconds kCloseLimit{10};
// What is then said of the workers among `devices`.
std::string not_answered(const std::vector<ggml_backend_dev_t>& devices);
// A poll that throws that as a DecodeError; none when there are no workers among them.
Poll within_close_limit(const std::vector<ggml_backend_dev_t>& devices);

// A small question to each worker among `devices`, on its connection: answered when all that was sent before is done.
class Ping {
   public:
    explicit Ping(const std::vector<ggml_backend_dev_t>& devices);
    // Who has not answered yet.
    std::vector<ggml_backend_dev_t> missing() const;
    // Has them counted as failed.
    void fail_missing(std::chrono::milliseconds waited) const;

   private:
    struct State;
    std::shared_ptr<State> state_;  // threads that wait for an answer may never end
};

}  // namespace llama_moe
