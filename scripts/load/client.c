/* The load generator of scripts/bench: TLS 1.3 (AES-128-GCM, X25519) clients that open WebSocket tunnels.
 *
 * Usage: client PORT      connects to 127.0.0.1:PORT; reads commands from standard input, responds to each with one line
 *                         of JSON, and exits at the end of the input or at the first error that prevents a measurement
 *
 *   open COUNT PATH [AT_ONCE]        opens COUNT more tunnels; one that is refused or aborted is retried
 *   echo BUSY BYTES SECONDS [COUNT]  one message of BYTES in flight on each of BUSY tunnels, spread over all of them;
 *                                    COUNT messages are enough
 *   move UNITS                       transfers UNITS times the bytes of the path on every tunnel at once, and counts them
 *   handshakes AT_ONCE SECONDS full|resumed [COUNT [RATE]]
 *                                    TLS, upgrade, 101, close_notify and FIN, until the proxy has closed as well;
 *                                    COUNT are enough, and at most RATE begin in a second, evenly spaced
 *   close | abort                    ends all tunnels: close_notify and FIN, or RST
 *
 * The clients use 127.0.0.2 to 127.0.0.51 in turn: there are enough ports for any number of handshakes, and no limit
 * per address is reached. The request is the one that a browser sends. "cpu" is the CPU time of this process in seconds.
 * One thread, level-triggered epoll.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <malloc.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CHUNK (256 * 1024)  /* bytes moved for a tunnel before the next gets its turn */
#define SOURCES 50
#define STALL 20.0          /* seconds without an event after which a command fails */
#define ERRORS 10000        /* failed connections after which a command fails */

enum state { CONNECT, TLS, REQUEST, OPEN, CLOSING };

struct tunnel {
    int fd;
    SSL *ssl;
    enum state state;
    bool wants_out, busy;
    uint64_t to_send, to_receive;  /* remaining bytes of this message or unit */
    double since;                  /* when the connection or the message began */
    unsigned head;                 /* how much of the blank line at the end of the head has been seen */
};

static struct { const char *path; uint64_t up, down; } unit;  /* what `move` sends and receives on each tunnel */
static struct sockaddr_in server;
static SSL_CTX *context;
static SSL_SESSION *ticket;
static int poller;
static struct tunnel **tunnels;
static unsigned tunnel_count, next_source;
static char buffer[CHUNK];
static const char filler[CHUNK];

/* The counters of the current command. */
static unsigned unfinished, errors, resumed;
static uint64_t done;
static uint64_t message;          /* size of an echo in bytes; 0 if none is running */
static double deadline;           /* no message and no connection begins after it */
static uint64_t left;             /* how many messages or connections may still begin */
static double interval, due;      /* seconds between the beginnings of connections, 0 for none; when the next may begin */
static struct tunnel **parked;    /* those that wait for it */
static unsigned parked_count;
static bool resume;               /* TLS handshakes use the last ticket */
static const char *last_error = "";

/* Latencies, in buckets of 1/32 of a power of two nanoseconds: percentiles are exact to 3 %. */
static uint64_t histogram[64 * 32];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static double cpu(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void give_up(const char *what) {
    printf("{\"error\": \"%s: %s\"}\n", what, last_error);
    exit(1);
}

static void observe(double seconds) {
    uint64_t ns = seconds * 1e9;
    unsigned power = ns < 32 ? 0 : 58 - __builtin_clzll(ns);
    histogram[power * 32 + (ns >> power)]++;
}

static double percentile(double share) {
    uint64_t total = 0, seen = 0;
    for (unsigned i = 0; i < 64 * 32; i++) total += histogram[i];
    for (unsigned i = 0; i < 64 * 32; i++) {
        seen += histogram[i];
        if (histogram[i] && seen >= total * share) {
            unsigned power = i < 64 ? 0 : i / 32 - 1;
            return ((uint64_t)(i - power * 32) << power) / 1e3;
        }
    }
    return 0;
}

static void want_out(struct tunnel *t, bool out) {
    if (t->wants_out == out) return;
    t->wants_out = out;
    struct epoll_event event = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.ptr = t};
    if (epoll_ctl(poller, EPOLL_CTL_MOD, t->fd, &event)) give_up("epoll_ctl");
}

/* OpenSSL marks a TLS 1.3 session as used after a handshake, so the first one is kept and copies of it are used. */
static int keep_ticket(SSL *ssl, SSL_SESSION *session) {
    (void)ssl;
    if (!ticket) ticket = SSL_SESSION_dup(session);
    return 0;
}

static void use_ticket(SSL *ssl) {
    SSL_SESSION *copy = SSL_SESSION_dup(ticket);
    SSL_set_session(ssl, copy);
    SSL_SESSION_free(copy);
}

/* The load must be lighter than any proxy, but OpenSSL 3.0 spends half of a client's full handshake on a certificate that
 * is always the same. So the chain is not verified, and these two functions replace OpenSSL's for libssl (the program
 * exports them): the certificate is decoded once, and the signature over the handshake is accepted unchecked. The work
 * of the proxy is the same, and the tests check that it is correct. */
static int take_chain(X509_STORE_CTX *chain, void *none) {
    (void)chain, (void)none;
    return 1;
}

X509 *d2i_X509(X509 **slot, const unsigned char **der, long size) {
    static unsigned char known[8192];
    static long known_size;
    static X509 *certificate;
    if (size == known_size && !memcmp(known, *der, size)) {
        *der += size;
    } else {
        if (size > (long)sizeof known) return NULL;
        memcpy(known, *der, known_size = size);
        X509_free(certificate);
        certificate = (X509 *)ASN1_item_d2i(NULL, der, size, ASN1_ITEM_rptr(X509));
        if (!certificate) return NULL;
    }
    X509_up_ref(certificate);
    X509_free(*slot);
    return *slot = certificate;
}

int EVP_DigestVerify(EVP_MD_CTX *digest, const unsigned char *signature, size_t signature_size,
                     const unsigned char *signed_bytes, size_t size) {
    (void)digest, (void)signature, (void)signature_size, (void)signed_bytes, (void)size;
    return 1;
}

static void start(struct tunnel *t) {
    int on = 1;
    struct sockaddr_in source = {.sin_family = AF_INET};
    source.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1 + next_source++ % SOURCES);
    t->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (t->fd < 0) {
        last_error = strerror(errno);
        give_up("socket");
    }
    setsockopt(t->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(t->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    if (bind(t->fd, (struct sockaddr *)&source, sizeof source)) give_up("bind");
    if (connect(t->fd, (struct sockaddr *)&server, sizeof server) && errno != EINPROGRESS) {
        last_error = strerror(errno);
        give_up("connect");
    }
    t->ssl = SSL_new(context);
    SSL_set_fd(t->ssl, t->fd);
    SSL_set_tlsext_host_name(t->ssl, "localhost");
    SSL_set_connect_state(t->ssl);
    if (resume && ticket) use_ticket(t->ssl);
    t->state = CONNECT;
    t->head = 0;
    t->busy = false;
    t->to_send = t->to_receive = 0;
    t->since = now();
    t->wants_out = true;
    struct epoll_event event = {.events = EPOLLOUT, .data.ptr = t};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, t->fd, &event)) give_up("epoll_ctl");
}

static void drop(struct tunnel *t) {
    SSL_free(t->ssl);
    t->ssl = NULL;
    close(t->fd);
}

enum io { DONE, WAIT, ENDED, FAILED };

static enum io outcome(struct tunnel *t, int result) {
    switch (SSL_get_error(t->ssl, result)) {
    case SSL_ERROR_WANT_READ:
    case SSL_ERROR_WANT_WRITE: return WAIT;
    case SSL_ERROR_ZERO_RETURN: return ENDED;
    case SSL_ERROR_SSL: last_error = ERR_reason_error_string(ERR_get_error()); break;
    default: last_error = errno ? strerror(errno) : "end without close_notify";
    }
    ERR_clear_error();
    return FAILED;
}

static enum io send_request(struct tunnel *t) {
    char request[1024];
    int size = snprintf(request, sizeof request,
        "GET %s HTTP/1.1\r\nHost: localhost:%d\r\nConnection: Upgrade\r\nPragma: no-cache\r\nCache-Control: no-cache\r\n"
        "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 "
        "Safari/537.36\r\nUpgrade: websocket\r\nOrigin: https://localhost\r\nSec-WebSocket-Version: 13\r\n"
        "Accept-Encoding: gzip, deflate, br, zstd\r\nAccept-Language: en-GB,en;q=0.9\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n",
        unit.path, ntohs(server.sin_port));
    int n = SSL_write(t->ssl, request, size);
    return n > 0 ? DONE : outcome(t, n);
}

static enum io read_answer(struct tunnel *t) {
    static const char status[] = "HTTP/1.1 101 ", blank[] = "\r\n\r\n";
    char answer[4096];
    int n = SSL_read(t->ssl, answer, sizeof answer - 1);
    if (n <= 0) return outcome(t, n);
    if (t->head == 0 && strncmp(answer, status, sizeof status - 1)) {
        static char text[64];
        snprintf(text, sizeof text, "answer %.20s", answer);
        text[strcspn(text, "\r\n\"")] = '\0';
        last_error = text;
        return FAILED;
    }
    for (int i = 0; i < n; i++) {
        if (t->head == 4) {
            last_error = "bytes behind the 101";
            return FAILED;
        }
        t->head = answer[i] == blank[t->head] ? t->head + 1 : answer[i] == '\r';
    }
    return t->head == 4 ? DONE : WAIT;
}

/* Advances a tunnel towards OPEN as far as possible now. */
static enum io establish(struct tunnel *t) {
    enum io result = DONE;
    if (t->state == CONNECT || t->state == TLS) {
        t->state = TLS;
        int n = SSL_do_handshake(t->ssl);
        want_out(t, n != 1 && SSL_get_error(t->ssl, n) == SSL_ERROR_WANT_WRITE);
        if (n != 1) return outcome(t, n);
        if ((result = send_request(t)) != DONE) return result == WAIT ? FAILED : result;
        t->state = REQUEST;
        resumed += SSL_session_reused(t->ssl);
    }
    result = read_answer(t);
    if (result == DONE) t->state = OPEN;
    return result;
}

static enum io pump_out(struct tunnel *t) {
    for (uint64_t turn = 0; t->to_send && turn < CHUNK;) {
        int n = SSL_write(t->ssl, filler, t->to_send < CHUNK ? t->to_send : CHUNK);
        if (n <= 0) {
            enum io result = outcome(t, n);
            if (result == WAIT) want_out(t, true);
            return result;
        }
        t->to_send -= n;
        turn += n;
    }
    want_out(t, t->to_send > 0);
    return DONE;
}

static enum io pump_in(struct tunnel *t) {
    for (uint64_t turn = 0; turn < CHUNK || SSL_has_pending(t->ssl);) {
        int n = SSL_read(t->ssl, buffer, sizeof buffer);
        if (n <= 0) return outcome(t, n);
        if ((uint64_t)n > t->to_receive) {
            last_error = "more bytes than requested";
            return FAILED;
        }
        t->to_receive -= n;
        turn += n;
        if (message && !t->to_receive) break;  /* with one in flight there is no more, and another read would cost a call */
    }
    return DONE;
}

static void fail(struct tunnel *t) {
    if (++errors >= ERRORS) give_up("too many errors");
    drop(t);
}

/* Sends the next message, unless the deadline has passed. */
static void next_message(struct tunnel *t, double at) {
    t->busy = at < deadline && left;
    if (!t->busy) {
        unfinished--;
        return;
    }
    left--;
    t->to_send = t->to_receive = message;
    t->since = at;
    if (pump_out(t) >= ENDED) give_up("echo");
}

static void on_open_event(struct tunnel *t, uint32_t events) {
    enum io result = DONE;
    if (events & EPOLLOUT) result = pump_out(t);
    if (result <= WAIT && events & ~EPOLLOUT) result = pump_in(t);
    if (result >= ENDED) give_up(result == ENDED ? "the proxy ended a tunnel" : "a tunnel failed");
    if (!t->busy || t->to_send || t->to_receive) return;
    done++;
    if (message) {
        double at = now();
        observe(at - t->since);
        next_message(t, at);
    } else {
        t->busy = false;
        unfinished--;
    }
}

static void begin_close(struct tunnel *t) {
    t->state = CLOSING;
    SSL_shutdown(t->ssl);
    shutdown(t->fd, SHUT_WR);
}

/* Returns whether the proxy has closed as well. */
static bool on_closing_event(struct tunnel *t) {
    ssize_t n;
    while ((n = recv(t->fd, buffer, sizeof buffer, 0)) > 0) {}
    if (n < 0 && errno == EAGAIN) return false;
    drop(t);
    return true;
}

/* Passes events to `handler` until everything is finished. */
static void start_parked(void) {
    double time = now();
    while (parked_count && time >= due) {
        struct tunnel *t = parked[--parked_count];
        due += interval;
        if (time < deadline) {
            start(t);
        } else {
            unfinished--;
            free(t);
        }
    }
}

static void run(void (*handler)(struct tunnel *, uint32_t)) {
    struct epoll_event events[512];
    double heard = now();
    while (unfinished) {
        int count = epoll_wait(poller, events, 512, parked_count ? 1 : 1000);
        start_parked();
        if (count > 0) heard = now();
        else if (now() - heard > STALL) give_up("nothing happened for 20 seconds");
        for (int i = 0; i < count; i++) handler(events[i].data.ptr, events[i].events);
    }
}

static void report(const char *unit_name, double seconds, double cpu_seconds) {
    printf("{\"%s\": %lu, \"seconds\": %.6f, \"cpu\": %.6f, \"errors\": %u, \"resumed\": %u, \"p50_us\": %.2f, "
           "\"p99_us\": %.2f, \"p999_us\": %.2f}\n", unit_name, done, seconds, cpu_seconds, errors, resumed,
           percentile(0.5), percentile(0.99), percentile(0.999));
    fflush(stdout);
}

/* ---- open ---- */

static unsigned waiting;  /* connections not yet begun */

static void on_opening_event(struct tunnel *t, uint32_t events) {
    if (t->state == OPEN) return on_open_event(t, events);
    enum io result = establish(t);
    if (result == WAIT) return;
    if (result >= ENDED) {
        fail(t);
        start(t);
        return;
    }
    observe(now() - t->since);
    done++;
    unfinished--;
    if (waiting) {
        waiting--;
        start(tunnels[tunnel_count++] = calloc(1, sizeof *t));
    }
}

static void command_open(unsigned count, const char *path, unsigned at_once) {
    unit.path = strdup(path);
    const char *bytes = strchr(path, '=');
    uint64_t n = bytes ? strtoull(bytes + 1, NULL, 10) : 0;
    unit.up = !strncmp(path, "/down", 5) ? 1 : n;
    unit.down = !strncmp(path, "/up", 3) ? 1 : n + !strncmp(path, "/both", 5);
    tunnels = realloc(tunnels, (tunnel_count + count) * sizeof *tunnels);
    unfinished = count;
    waiting = count > at_once ? count - at_once : 0;
    for (unsigned i = count - waiting; i; i--) start(tunnels[tunnel_count++] = calloc(1, sizeof(struct tunnel)));
    run(on_opening_event);
}

/* ---- echo and move ---- */

static void command_echo(unsigned busy, uint64_t bytes, double seconds, uint64_t limit) {
    if (!tunnel_count || busy > tunnel_count) give_up("echo: not that many tunnels");
    message = bytes;
    unfinished = busy;
    left = limit;
    deadline = now() + seconds;
    for (unsigned i = 0; i < busy; i++) next_message(tunnels[(uint64_t)i * tunnel_count / busy], now());
    run(on_open_event);
    message = 0;
}

static void command_move(unsigned units) {
    unfinished = tunnel_count;
    for (unsigned i = 0; i < tunnel_count; i++) {
        struct tunnel *t = tunnels[i];
        t->busy = true;
        t->to_send = units * unit.up;
        t->to_receive = units * unit.down;
        if (pump_out(t) >= ENDED) give_up("move");
    }
    run(on_open_event);
}

/* ---- handshakes ---- */

static void on_handshake_event(struct tunnel *t, uint32_t events) {
    (void)events;
    if (t->state == CLOSING) {
        if (!on_closing_event(t)) return;
    } else {
        enum io result = establish(t);
        if (result == WAIT) return;
        if (result == DONE) {
            observe(now() - t->since);
            done++;
            begin_close(t);
            return;
        }
        fail(t);
    }
    if (now() < deadline && left) {
        left--;
        if (interval) parked[parked_count++] = t;
        else start(t);
    } else {
        unfinished--;
        free(t);
    }
}

static void command_handshakes(unsigned at_once, double seconds, uint64_t limit, double rate) {
    unit.path = "/echo";
    unfinished = at_once;
    left = limit - at_once;
    due = now();
    deadline = due + seconds;
    interval = rate > 0 ? 1 / rate : 0;
    parked = calloc(at_once, sizeof(struct tunnel *));
    for (unsigned i = 0; i < at_once; i++) {
        struct tunnel *t = calloc(1, sizeof(struct tunnel));
        if (interval) parked[parked_count++] = t;
        else start(t);
    }
    start_parked();
    run(on_handshake_event);
    free(parked);
}

/* ---- close and abort ---- */

static void on_close_event(struct tunnel *t, uint32_t events) {
    (void)events;
    if (!on_closing_event(t)) return;
    unfinished--;
    done++;
}

static void command_end(bool politely) {
    struct linger hard = {.l_onoff = 1};
    unfinished = politely ? tunnel_count : 0;
    for (unsigned i = 0; i < tunnel_count; i++) {
        if (politely) {
            begin_close(tunnels[i]);
        } else {
            setsockopt(tunnels[i]->fd, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
            drop(tunnels[i]);
            done++;
        }
    }
    run(on_close_event);
    for (unsigned i = 0; i < tunnel_count; i++) free(tunnels[i]);
    tunnel_count = 0;
}

static void prepare(int port) {
    server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port)};
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    context = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
    SSL_CTX_set_ciphersuites(context, "TLS_AES_128_GCM_SHA256");
    SSL_CTX_set1_groups_list(context, "X25519");
    SSL_CTX_set1_sigalgs_list(context, "ECDSA+SHA256");
    SSL_CTX_set_cert_verify_callback(context, take_chain, NULL);
    SSL_CTX_set_alpn_protos(context, (const unsigned char *)"\x08http/1.1", 9);
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_set_read_ahead(context, 1);
    SSL_CTX_set_default_read_buffer_len(context, 64 * 1024);
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
    SSL_CTX_sess_set_new_cb(context, keep_ticket);
    poller = epoll_create1(0);
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: client PORT\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);  /* memory returned to the system would soon be needed again */
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    prepare(atoi(argv[1]));
    char line[512], path[256], kind[16];
    while (fgets(line, sizeof line, stdin)) {
        unsigned count, at_once = 64;
        uint64_t bytes, limit = UINT64_MAX;
        double seconds, rate = 0, began = now(), cpu_began = cpu();
        done = errors = resumed = 0;
        resume = false;
        memset(histogram, 0, sizeof histogram);
        const char *counted;
        if (sscanf(line, "open %u %255s %u", &count, path, &at_once) >= 2) {
            command_open(count, path, at_once);
            counted = "opened";
        } else if (sscanf(line, "echo %u %lu %lf %lu", &count, &bytes, &seconds, &limit) >= 3) {
            command_echo(count, bytes, seconds, limit);
            counted = "messages";
        } else if (sscanf(line, "handshakes %u %lf %15s %lu %lf", &count, &seconds, kind, &limit, &rate) >= 3) {
            resume = !strcmp(kind, "resumed");
            command_handshakes(count, seconds, limit, rate);
            counted = "handshakes";
        } else if (sscanf(line, "move %u", &count) == 1) {
            command_move(count);
            counted = "units";
        } else if (!strcmp(line, "close\n") || !strcmp(line, "abort\n")) {
            command_end(line[0] == 'c');
            counted = "ended";
        } else {
            last_error = "open, echo, move, handshakes, close or abort";
            give_up("unknown command");
        }
        report(counted, now() - began, cpu() - cpu_began);
    }
    return 0;
}
