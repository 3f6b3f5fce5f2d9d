/* The origin of scripts/bench: it responds to the upgrade request like a WebSocket server, and then counts bytes.
 *
 * Usage: origin [PORT]           prints {"port": N}, serves 127.0.0.1 until it is killed
 *
 *   GET /echo                    returns what it receives
 *   GET /down?bytes=N            returns N bytes for each byte it receives
 *   GET /up?bytes=N              returns 1 byte for each N it receives
 *   GET /both?bytes=N            returns N bytes for the first of each N it receives, and 1 for the last
 *
 * A tunnel does not parse frames, so these are plain bytes: a WebSocket library here would only use CPU time that the
 * load needs. One thread, level-triggered epoll.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/evp.h>
#include <openssl/sha.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHUNK (256 * 1024)  /* bytes moved for a connection before the next gets its turn */
#define HEAD 16384          /* the longest request head */
#define GUID "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

enum mode { HANDSHAKE, ECHO, DOWN, UP, BOTH };

struct tunnel {
    int fd;
    enum mode mode;
    uint64_t unit;      /* N of the path */
    uint64_t received;  /* of this unit, in UP and BOTH */
    uint64_t owed;      /* bytes still to send in DOWN, UP and BOTH */
    char *held;         /* an incomplete head, or what an echo could not send yet */
    size_t held_size, held_sent;
    bool wants_out, ended;
};

static int poller;
static char buffer[CHUNK];
static const char filler[CHUNK];

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void finish(struct tunnel *t) {
    close(t->fd);
    free(t->held);
    free(t);
}

static void want_out(struct tunnel *t, bool out) {
    if (t->wants_out == out) return;
    t->wants_out = out;
    /* An echo that cannot send does not read either, which is its backpressure. */
    uint32_t in = t->ended || (out && t->mode == ECHO) ? 0 : EPOLLIN;
    struct epoll_event event = {.events = in | (out ? EPOLLOUT : 0), .data.ptr = t};
    if (epoll_ctl(poller, EPOLL_CTL_MOD, t->fd, &event)) die("epoll_ctl");
}

static void hold(struct tunnel *t, const char *bytes, size_t size) {
    char *held = malloc(size);
    if (!held) die("malloc");
    memcpy(held, bytes, size);
    free(t->held);
    t->held = held;
    t->held_size = size;
    t->held_sent = 0;
}

/* Sends what is held and owed. Returns false if the connection is gone. */
static bool flush(struct tunnel *t) {
    while (t->held_sent < t->held_size) {
        ssize_t n = send(t->fd, t->held + t->held_sent, t->held_size - t->held_sent, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) return false;
        if (n < 0) return want_out(t, true), true;
        t->held_sent += n;
    }
    for (size_t turn = 0; t->owed && turn < CHUNK;) {
        ssize_t n = send(t->fd, filler, t->owed < CHUNK ? t->owed : CHUNK, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) return false;
        if (n < 0) break;
        t->owed -= n;
        turn += n;
    }
    want_out(t, t->owed > 0);
    return t->owed || !t->ended;
}

static bool take(struct tunnel *t, const char *bytes, size_t size) {
    if (t->mode == ECHO) {
        ssize_t n = send(t->fd, bytes, size, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) return false;
        if (n < 0) n = 0;
        if ((size_t)n < size) {
            hold(t, bytes + n, size - n);
            want_out(t, true);
        }
        return true;
    }
    if (t->mode == DOWN) t->owed += size * t->unit;
    while (t->mode != DOWN && size) {
        if (t->mode == BOTH && t->received == 0) t->owed += t->unit;
        uint64_t part = t->unit - t->received < size ? t->unit - t->received : size;
        t->received += part;
        size -= part;
        if (t->received == t->unit) {
            t->owed++;
            t->received = 0;
        }
    }
    return flush(t);
}

/* Parses `path` into mode and unit. Returns false if there is no such path. */
static bool route(struct tunnel *t, const char *path) {
    static const struct { const char *prefix; enum mode mode; } routes[] = {
        {"/echo ", ECHO}, {"/down?bytes=", DOWN}, {"/up?bytes=", UP}, {"/both?bytes=", BOTH}};
    for (size_t i = 0; i < sizeof routes / sizeof *routes; i++) {
        size_t length = strlen(routes[i].prefix);
        if (strncmp(path, routes[i].prefix, length)) continue;
        t->mode = routes[i].mode;
        t->unit = t->mode == ECHO ? 0 : strtoull(path + length, NULL, 10);
        return t->mode == ECHO || t->unit > 0;
    }
    return false;
}

static bool answer(struct tunnel *t, const char *head) {
    static const char name[] = "\r\nSec-WebSocket-Key:";
    const char *key = strcasestr(head, name);
    if (strncmp(head, "GET ", 4) || !key || !route(t, head + 4)) return false;
    char text[24 + sizeof GUID], accept[32], reply[256];
    unsigned char digest[SHA_DIGEST_LENGTH];
    key += sizeof name - 1;
    key += strspn(key, " \t");
    snprintf(text, sizeof text, "%.24s" GUID, key);
    SHA1((unsigned char *)text, strlen(text), digest);
    EVP_EncodeBlock((unsigned char *)accept, digest, sizeof digest);
    int size = snprintf(reply, sizeof reply,
                        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                        "Sec-WebSocket-Accept: %s\r\n\r\n", accept);
    return send(t->fd, reply, size, MSG_NOSIGNAL) == size;
}

/* Adds to the head. Once it is complete, responds and passes the bytes after it to the mode. */
static bool read_head(struct tunnel *t, const char *bytes, size_t size) {
    char head[HEAD + 1];
    if (t->held_size + size > HEAD) return false;
    if (t->held_size) memcpy(head, t->held, t->held_size);
    memcpy(head + t->held_size, bytes, size);
    size += t->held_size;
    head[size] = '\0';
    char *end = strstr(head, "\r\n\r\n");
    if (!end) return hold(t, head, size), true;
    size_t length = end + 4 - head;
    free(t->held);
    t->held = NULL;
    t->held_size = t->held_sent = 0;
    return answer(t, head) && (length == size || take(t, head + length, size - length));
}

static bool on_input(struct tunnel *t) {
    /* Bytes that are only counted are not copied out of the kernel. */
    ssize_t n = recv(t->fd, buffer, sizeof buffer, t->mode > ECHO ? MSG_TRUNC : 0);
    if (n < 0) return errno == EAGAIN;
    if (n == 0) {
        t->ended = true;
        if (!t->owed) return false;
        t->wants_out = false;
        want_out(t, true);
        return true;
    }
    return t->mode == HANDSHAKE ? read_head(t, buffer, n) : take(t, buffer, n);
}

static void on_accept(int listener) {
    for (int i = 0; i < 64; i++) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) return;
        struct tunnel *t = calloc(1, sizeof *t);
        if (!t) die("calloc");
        t->fd = fd;
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = t};
        if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event)) die("epoll_ctl");
    }
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGKILL);  /* so that it does not outlive the benchmark */
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(argc > 1 ? atoi(argv[1]) : 0)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8192)) die("listen");
    socklen_t size = sizeof address;
    getsockname(listener, (struct sockaddr *)&address, &size);
    poller = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event)) die("epoll");
    printf("{\"port\": %d}\n", ntohs(address.sin_port));
    fflush(stdout);

    struct epoll_event events[512];
    for (;;) {
        int count = epoll_wait(poller, events, 512, -1);
        for (int i = 0; i < count; i++) {
            struct tunnel *t = events[i].data.ptr;
            if (!t) {
                on_accept(listener);
                continue;
            }
            bool alive = true;
            if (events[i].events & EPOLLOUT) alive = flush(t);
            if (alive && events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP)) alive = on_input(t);
            if (!alive) finish(t);
        }
    }
}
