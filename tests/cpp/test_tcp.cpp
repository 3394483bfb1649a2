#include "tcp.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <stdexcept>
#include <string>

#include "llama_moe/error.h"
#include "test_support.h"

using namespace llama_moe;

namespace {

// A socket on a port of 127.0.0.1, listening or only taken.
class LocalSocket {
   public:
    explicit LocalSocket(bool listening) : fd_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
        address_.sin_family = AF_INET;
        address_.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        socklen_t size = sizeof(address_);
        auto* generic = reinterpret_cast<sockaddr*>(&address_);
        REQUIRE(::bind(fd_, generic, size) == 0 && ::getsockname(fd_, generic, &size) == 0);
        REQUIRE(!listening || ::listen(fd_, 1) == 0);
    }
    ~LocalSocket() { ::close(fd_); }
    LocalSocket(const LocalSocket&) = delete;
    LocalSocket& operator=(const LocalSocket&) = delete;

    Endpoint endpoint() const { return {"127.0.0.1", ntohs(address_.sin_port)}; }

   private:
    int fd_;
    sockaddr_in address_{};
};

}  // namespace

TEST_CASE("parse_endpoint reads HOST:PORT") {
    CHECK_EQ(parse_endpoint("127.0.0.1:50052").host, "127.0.0.1");
    CHECK_EQ(parse_endpoint("127.0.0.1:50052").port, 50052);
    CHECK_EQ(parse_endpoint("worker.example:1").port, 1);
    CHECK_EQ(parse_endpoint("worker.example:65535").host, "worker.example");
}

TEST_CASE("parse_endpoint refuses anything else, and shows it") {
    for (const char* text : {"", ":", "host", "host:", ":50052", "host:0", "host:65536", "host:123456", "host:5x", "host:-1", "host:+1", "host: 1", "1.2.3.4"}) {
        const auto message = CHECK_THROWS(InvalidOptionError, parse_endpoint(text));
        CHECK(message.find("'" + std::string(text) + "' is not an endpoint") != std::string::npos);
    }
}

TEST_CASE("check_listening tells who listens from who does not") {
    const LocalSocket listening(true);
    check_listening(listening.endpoint(), std::chrono::seconds(20), {});
    const LocalSocket taken(false);
    const auto message = CHECK_THROWS(Error, check_listening(taken.endpoint(), std::chrono::seconds(20), {}));
    CHECK(message.find("no RPC worker at 127.0.0.1:" + std::to_string(taken.endpoint().port)) != std::string::npos);
}

TEST_CASE("check_listening says that a name is unknown") {
    const auto message = CHECK_THROWS(Error, check_listening({"name.invalid", 1}, std::chrono::seconds(20), {}));
    CHECK(message.find("no RPC worker at name.invalid:1") != std::string::npos);
}
