#include "child_process.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <stdexcept>
#include <thread>

#include "llama_moe/error.h"
#include "tcp.h"

namespace test {
namespace {

std::string own_program() {
    char path[4096];
    const ssize_t size = ::readlink("/proc/self/exe", path, sizeof(path));
    if (size <= 0) {
        throw std::runtime_error("/proc/self/exe cannot be read");
    }
    return {path, static_cast<std::size_t>(size)};
}

// A port nobody listens on. Another process could take it before the worker does; the kernel hands them out in turn.
std::string free_endpoint() {
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    auto* generic = reinterpret_cast<sockaddr*>(&address);
    const bool bound = ::bind(fd, generic, size) == 0 && ::getsockname(fd, generic, &size) == 0;
    ::close(fd);
    if (!bound) {
        throw std::runtime_error("no free port on 127.0.0.1");
    }
    return "127.0.0.1:" + std::to_string(ntohs(address.sin_port));
}

int exit_status(int status) {
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

ChildProcess::ChildProcess(const std::vector<std::string>& arguments) {
    const std::string program = own_program();
    std::vector<char*> argv = {const_cast<char*>(program.c_str())};
    for (const auto& argument : arguments) {
        argv.push_back(const_cast<char*>(argument.c_str()));
    }
    argv.push_back(nullptr);
    const pid_t parent = ::getpid();
    pid_ = ::fork();
    if (pid_ < 0) {
        throw std::runtime_error("fork failed");
    }
    if (pid_ == 0) {
        // It ends with its parent, also when that is killed.
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (::getppid() == parent) {
            if (arguments.front() == "--worker") {  // ggml's server prints what it does
                const int null = ::open("/dev/null", O_WRONLY);
                ::dup2(null, STDOUT_FILENO);
            }
            ::execv(program.c_str(), argv.data());
        }
        ::_exit(127);
    }
}

ChildProcess::~ChildProcess() {
    kill();
}

int ChildProcess::wait() {
    int status = 0;
    while (::waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
    pid_ = -1;
    return exit_status(status);
}

bool ChildProcess::running() {
    int status = 0;
    if (pid_ > 0 && ::waitpid(pid_, &status, WNOHANG) == pid_) {
        pid_ = -1;
    }
    return pid_ > 0;
}

void ChildProcess::kill() {
    if (pid_ > 0) {
        ::kill(pid_, SIGKILL);
        wait();
    }
}

Worker::Worker() : endpoint_(free_endpoint()), process_({"--worker", endpoint_}) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    for (;;) {
        try {
            llama_moe::check_listening(llama_moe::parse_endpoint(endpoint_), std::chrono::seconds(5), {});
            return;
        } catch (const llama_moe::Error&) {
            if (!process_.running() || std::chrono::steady_clock::now() > deadline) {
                throw;
            }
            std::this_thread::yield();
        }
    }
}

}  // namespace test
