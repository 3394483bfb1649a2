#include "tcp.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "llama_moe/error.h"

namespace llama_moe {
namespace {

class Socket {
   public:
    explicit Socket(int fd) : fd_(fd) {}
    ~Socket() {
        if (fd_ >= 0) {
            ::close(fd_);
        }
    }
    Socket(const Socket&) = delete;
    Socket& operator=(const Socket&) = delete;
    int get() const { return fd_; }

   private:
    int fd_;
};

// 0 when connected, else the errno of the failure.
int try_connect(const addrinfo& address, std::chrono::milliseconds timeout, const Poll& poll_signals) {
    const Socket socket(::socket(address.ai_family, address.ai_socktype | SOCK_NONBLOCK | SOCK_CLOEXEC, address.ai_protocol));
    if (socket.get() < 0) {
        return errno;
    }
    if (::connect(socket.get(), address.ai_addr, address.ai_addrlen) == 0) {
        return 0;
    }
    if (errno != EINPROGRESS) {
        return errno;
    }
    const auto deadline = std::chrono::steady_clock::now() + timeout;
    pollfd waiting{socket.get(), POLLOUT, 0};
    while (::poll(&waiting, 1, static_cast<int>(kPollInterval.count())) <= 0) {
        if (poll_signals) {
            poll_signals();
        }
        if (std::chrono::steady_clock::now() > deadline) {
            return ETIMEDOUT;
        }
    }
    int error = 0;
    socklen_t size = sizeof(error);
    ::getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &error, &size);
    return error;
}

}  // namespace

Endpoint parse_endpoint(const std::string& text) {
    const std::size_t colon = text.rfind(':');
    const std::string port = colon == std::string::npos ? "" : text.substr(colon + 1);
    const bool digits = !port.empty() && port.size() <= 5 && port.find_first_not_of("0123456789") == std::string::npos;
    const int number = digits ? std::stoi(port) : 0;
    if (colon == 0 || number < 1 || number > 65535) {
        throw InvalidOptionError("'" + text + "' is not an endpoint; it must be HOST:PORT with a port from 1 to 65535, like 127.0.0.1:50052");
    }
    return {text.substr(0, colon), static_cast<std::uint16_t>(number)};
}

void check_listening(const Endpoint& endpoint, std::chrono::milliseconds timeout, const Poll& poll) {
    addrinfo hints{};
    hints.ai_family = AF_UNSPEC;
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* found = nullptr;
    const std::string name = endpoint.host + ":" + std::to_string(endpoint.port);
    const int failure = ::getaddrinfo(endpoint.host.c_str(), std::to_string(endpoint.port).c_str(), &hints, &found);
    if (failure != 0) {
        throw Error("no RPC worker at " + name + ": " + ::gai_strerror(failure));
    }
    const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> addresses(found, ::freeaddrinfo);
    int error = 0;
    for (const addrinfo* address = found; address != nullptr; address = address->ai_next) {
        error = try_connect(*address, timeout, poll);
        if (error == 0) {
            return;
        }
    }
    throw Error("no RPC worker at " + name + ": " + std::strerror(error) + "; start one with `llama-moe worker --bind " + name + "`");
}

}  // namespace llama_moe
