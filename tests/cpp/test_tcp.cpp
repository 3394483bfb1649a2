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

    int connect() const {
        const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        REQUIRE(::connect(fd, reinterpret_cast<const sockaddr*>(&address_), sizeof(address_)) == 0);
        return fd;
    }
    int accept() const {
        const int fd = ::accept(fd_, nullptr, nullptr);
        REQUIRE(fd >= 0);
        return fd;
    }

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

TEST_CASE("connected is true while neither side has closed") {
    const LocalSocket listening(true);
    CHECK(!connected(listening.endpoint()));
    for (const bool here : {true, false}) {
        const int client = listening.connect();
        const int server = listening.accept();
        CHECK(connected(listening.endpoint()));
        ::close(here ? client : server);
        CHECK(!connected(listening.endpoint()));
        ::close(here ? server : client);
    }
    CHECK(!connected({"name.invalid", 1}));
}

TEST_CASE("connected is false once the other side broke the connection") {
    const LocalSocket listening(true);
    const int client = listening.connect();
    const int server = listening.accept();
    REQUIRE(::send(client, "unread", 6, 0) == 6);
    ::close(server);  // with something unread in it: a reset, after which a socket has no peer
    CHECK(!connected(listening.endpoint()));
    ::close(client);
}
