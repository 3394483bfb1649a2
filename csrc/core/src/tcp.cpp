#include "tcp.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <system_error>

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

using Addresses = std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)>;

// Null when there are none; `failure` is getaddrinfo's result.
Addresses resolve(const Endpoint& endpoint, int& failure) {
    addrinfo hints{};
    hints.ai_family = AF_UNSPEC;
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* found = nullptr;
    failure = ::getaddrinfo(endpoint.host.c_str(), std::to_string(endpoint.port).c_str(), &hints, &found);
    return {failure == 0 ? found : nullptr, ::freeaddrinfo};
}

bool same_address(const sockaddr_storage& one, const sockaddr* other) {
    if (one.ss_family != other->sa_family) {
        return false;
    }
    if (one.ss_family == AF_INET) {
        const auto& a = reinterpret_cast<const sockaddr_in&>(one);
        const auto& b = *reinterpret_cast<const sockaddr_in*>(other);
        return a.sin_port == b.sin_port && a.sin_addr.s_addr == b.sin_addr.s_addr;
    }
    if (one.ss_family == AF_INET6) {
        const auto& a = reinterpret_cast<const sockaddr_in6&>(one);
        const auto& b = *reinterpret_cast<const sockaddr_in6*>(other);
        return a.sin6_port == b.sin6_port && std::memcmp(&a.sin6_addr, &b.sin6_addr, sizeof(a.sin6_addr)) == 0;
    }
    return false;
}

bool peer_is(int fd, const addrinfo* addresses) {
    sockaddr_storage peer{};
    socklen_t size = sizeof(peer);
    if (::getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &size) != 0) {
        return false;  // no socket, or not connected any more
    }
    for (const addrinfo* address = addresses; address != nullptr; address = address->ai_next) {
        if (same_address(peer, address->ai_addr)) {
            return true;
        }
    }
    return false;
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
    const std::string name = endpoint.host + ":" + std::to_string(endpoint.port);
    int failure = 0;
    const Addresses addresses = resolve(endpoint, failure);
    if (failure != 0) {
        throw Error("no RPC worker at " + name + ": " + ::gai_strerror(failure));
    }
    int error = 0;
    for (const addrinfo* address = addresses.get(); address != nullptr; address = address->ai_next) {
        error = try_connect(*address, timeout, poll);
        if (error == 0) {
            return;
        }
    }
    throw Error("no RPC worker at " + name + ": " + std::strerror(error) + "; start one with `llama-moe worker --bind " + name + "`");
}

bool connected(const Endpoint& endpoint) {
    int failure = 0;
    const Addresses addresses = resolve(endpoint, failure);
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd", error)) {
        const int fd = std::atoi(entry.path().filename().c_str());
        if (!peer_is(fd, addresses.get())) {
            continue;
        }
        pollfd state{fd, POLLRDHUP, 0};
        if (::poll(&state, 1, 0) >= 0 && (state.revents & (POLLRDHUP | POLLHUP | POLLERR)) == 0) {
            return true;
        }
    }
    return false;
}

}  // namespace llama_moe
