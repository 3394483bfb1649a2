#pragma once

namespace llama_moe {

// fork() copies one thread. In the child, ours and llama.cpp's threads are missing, and locks they held stay locked: whatever
// waits for one of them would wait for ever. There nothing may be used, and nothing is freed.

// From now on forks are noticed: llama.cpp belongs to this process. Called before llama.cpp starts.
void belong_to_this_process();

// Whether this is a forked child of the process that llama.cpp belongs to.
bool forked();

// Throws a ClosedError that names `subject` in a forked child.
void require_same_process(const char* subject);

}  // namespace llama_moe
