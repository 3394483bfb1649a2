// This program, started again as another process.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

namespace test {

class ChildProcess {
   public:
    explicit ChildProcess(const std::vector<std::string>& arguments);
    ~ChildProcess();  // kills it
    ChildProcess(const ChildProcess&) = delete;
    ChildProcess& operator=(const ChildProcess&) = delete;

    // Its exit status; 128 and the signal's number when a signal ended it.
    int wait();
    bool running();
    void kill();

   private:
    pid_t pid_ = -1;
};

// An RPC worker with this machine's CPU as its device, ready to be connected to.
class Worker {
   public:
    Worker();
    const std::string& endpoint() const { return endpoint_; }
    void kill() { process_.kill(); }

   private:
    std::string endpoint_;
    ChildProcess process_;
};

}  // namespace test
