// The reactor: one thread, one epoll. It alone touches ZeroMQ, sessions, sequences' books and operations' beginnings
// and ends; nothing it does waits for a disk, a copy or a lock held long.
//
// ZeroMQ's descriptor is edge-triggered in spirit: any send or receive may swallow its signal. So a round in which it
// was readable, or something was sent, ends with receiving until the bus says that it is empty (bus_due), and nothing
// is sent between that and the next wait. Other rounds leave the bus alone: to find it empty takes two system calls.
#include "cached/log.h"
#include "cached/server.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <unistd.h>

#define EVENTS_MAX  32
#define WAIT_MS_MAX 1000 // every wait has an end, also where no timer is set

int reactor_watch(struct server *server, int fd, void *what)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = what};
    return epoll_ctl(server->epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

// For edges: each write to an eventfd is one event, and nobody needs to read it.
static int watch_edges(struct server *server, int fd, void *what)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.ptr = what};
    return epoll_ctl(server->epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

// Sessions are aligned: the lowest bit of what comes back says that it is the session's ring.
int reactor_watch_ring(struct server *server, int fd, struct session *session)
{
    return watch_edges(server, fd, (char *)session + 1);
}

void reactor_unwatch(struct server *server, int fd)
{
    epoll_ctl(server->epoll_fd, EPOLL_CTL_DEL, fd, NULL); // only fails where it is not watched
}

void reactor_pause_accepting(struct server *server)
{
    reactor_unwatch(server, server->listener_fd);
    server->accept_from_ns = env_now_ns(server->env) + SERVER_ACCEPT_PAUSE_NS;
}

// Watches the listener again after a pause. Returns the next time to look, or UINT64_MAX.
static uint64_t resume_accepting(struct server *server, uint64_t now_ns)
{
    if (server->accept_from_ns == 0)
        return UINT64_MAX;
    if (now_ns >= server->accept_from_ns) {
        bool watched = reactor_watch(server, server->listener_fd, &server->listener_fd) == 0;
        server->accept_from_ns = watched ? 0 : now_ns + SERVER_ACCEPT_PAUSE_NS;
    }
    return server->accept_from_ns ? server->accept_from_ns : UINT64_MAX;
}

static int open_sockets(struct server *server)
{
    struct env *env = server->env;
    mode_t mode = (mode_t)server->config->socket_mode;
    // The lock is ours, so whatever lies there is left from a daemon that is gone.
    int error = env->unlink(env, server->control_path);
    if (!error)
        error = env->unlink(env, server->data_path);
    server->bus_due = true;
    if (!error)
        error = env->bus_open(env, server->data_path, mode, &server->bus);
    if (!error)
        error = env->listen(env, server->control_path, mode, &server->listener_fd);
    if (error)
        log_error("cannot open the sockets in %s: %s", server->config->socket_directory, strerror(-error));
    return error;
}

static int open_signals(struct server *server)
{
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT); // blocked in main before any thread
    server->signal_fd = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
    return server->signal_fd < 0 ? -errno : 0;
}

int reactor_init(struct server *server)
{
    server->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    int error = server->epoll_fd < 0 ? -errno : open_signals(server);
    if (!error)
        error = open_sockets(server);
    if (!error)
        error = reactor_watch(server, server->listener_fd, &server->listener_fd);
    if (!error)
        error = reactor_watch(server, server->signal_fd, &server->signal_fd);
    if (!error)
        error = watch_edges(server, server->completions.event_fd, &server->completions);
    if (!error)
        error = reactor_watch(server, server->env->bus_fd(server->env, server->bus), server->bus);
    if (error) {
        reactor_fini(server);
        return error;
    }
    return 0;
}

void reactor_fini(struct server *server)
{
    struct env *env = server->env;
    session_bury(server);
    if (server->bus) {
        env->bus_close(env, server->bus);
        env->unlink(env, server->data_path);
    }
    if (server->listener_fd >= 0) {
        env->close_fd(env, server->listener_fd);
        env->unlink(env, server->control_path);
    }
    env->close_fd(env, server->signal_fd);
    env->close_fd(env, server->epoll_fd);
    server->bus = NULL;
    server->listener_fd = server->signal_fd = server->epoll_fd = -1;
}

// First signal: take no more work, answer what is in flight. Second: do not wait for that.
static void stop(struct server *server)
{
    struct signalfd_siginfo info;
    if (read(server->signal_fd, &info, sizeof info) != sizeof info)
        return;
    uint64_t now = env_now_ns(server->env);
    if (server->stopping) {
        log_warn("stopping now, %u requests in flight are lost", server->ops);
        server->stop_deadline_ns = now;
        return;
    }
    log_info("stopping: %u requests in flight, %u sessions", server->ops, server->session_count);
    server->stopping = true;
    server->stop_deadline_ns = now + server->config->drain_ms * 1000000u;
    server->farewell_ns = server->session_count > 0 ? UINT64_MAX : now;
}

static void handle_event(struct server *server, void *what)
{
    if (what == &server->listener_fd)
        session_accept(server);
    else if (what == &server->signal_fd)
        stop(server);
    else if (((uintptr_t)what & 1) != 0)
        rings_wake(server, (struct session *)(void *)((char *)what - 1));
    else if (what == server->bus)
        server->bus_due = true;
    else if (what != &server->completions) // they are looked at every round
        session_readable(server, what);
}

// False: the bus is empty.
static bool receive_messages(struct server *server)
{
    struct env *env = server->env;
    if (!server->bus_due)
        return false;
    for (uint32_t i = 0; i < INTAKE_RECEIVED_PER_TURN; i++) {
        struct env_message message;
        int error = env->bus_receive(env, server->bus, &message);
        if (error == -EAGAIN) {
            server->bus_due = false;
            return false;
        }
        if (error) {
            log_warn("receiving failed: %s", strerror(-error));
            return true;
        }
        intake_take(server, NULL, &message);
    }
    return true;
}

// What has come meanwhile is looked at between any two messages: one that is served first may be among it, and replies
// do not wait for requests. True when there may be more.
static bool serve_messages(struct server *server)
{
    for (uint32_t i = 0; i < INTAKE_SERVED_PER_ROUND; i++) {
        const bool more = receive_messages(server);
        if (!intake_serve(server))
            return more;
        if (!completion_list_is_empty(&server->completions))
            completion_run(&server->completions, server);
    }
    return true;
}

static int wait_ms(struct server *server, uint64_t now_ns, uint64_t until_ns)
{
    if (server->stopping && server->stop_deadline_ns < until_ns)
        until_ns = server->stop_deadline_ns;
    if (server->stopping && server->ops == 0 && server->farewell_ns < until_ns)
        until_ns = server->farewell_ns;
    if (until_ns <= now_ns)
        return 0;
    uint64_t ms = (until_ns - now_ns) / 1000000u + 1;
    return ms < WAIT_MS_MAX ? (int)ms : WAIT_MS_MAX;
}

static void one_round(struct server *server, bool *more)
{
    struct epoll_event events[EVENTS_MAX];
    uint64_t now = env_now_ns(server->env);
    gpus_look(&server->gpus, now);
    uint64_t expire_ns = session_expire(server, now);
    uint64_t accept_ns = resume_accepting(server, now);
    uint64_t idle_ns = idle_look(server, now), first_ns = expire_ns < accept_ns ? expire_ns : accept_ns;
    int timeout_ms = *more ? 0 : wait_ms(server, now, first_ns < idle_ns ? first_ns : idle_ns);
    int count = epoll_wait(server->epoll_fd, events, EVENTS_MAX, timeout_ms);
    for (int i = 0; i < count; i++)
        handle_event(server, events[i].data.ptr);
    completion_run(&server->completions, server);
    const bool rings = rings_run(server); // before the bus: nothing may be sent there behind the last look at it
    *more = serve_messages(server) || rings;
    session_bury(server);
}

// Ends all sessions and waits until what they held is gone, so that nothing is left when the shards stop.
static void end_sessions(struct server *server)
{
    for (struct session *session = server->sessions, *next; session; session = next) {
        next = session->next;
        session_end(server, session, SESSION_STOPPED);
    }
    bool more = true;
    uint64_t until_ns = env_now_ns(server->env) + SERVER_LEAVE_NS;
    while (server->session_count > 0) {
        if (server->gpus.used && env_now_ns(server->env) >= until_ns)
            server_abandon("what workers held is not given back");
        if (server->disk && disk_hangs(server->disk))
            server_abandon("the disk does not answer");
        one_round(server, &more);
    }
}

// Until nothing is in flight, and a little longer: the last replies must have reached their workers before the closing
// of the control sockets tells these that the daemon is gone.
static bool serves(struct server *server)
{
    if (!server->stopping)
        return true;
    uint64_t now = env_now_ns(server->env);
    if (server->ops > 0)
        server->farewell_ns = UINT64_MAX;
    else if (server->farewell_ns == UINT64_MAX)
        server->farewell_ns = now + SERVER_FAREWELL_NS;
    return now < server->stop_deadline_ns && now < server->farewell_ns;
}

void reactor_run(struct server *server)
{
    bool more = true;
    while (serves(server))
        one_round(server, &more);
    reactor_unwatch(server, server->listener_fd);
    server->accept_from_ns = UINT64_MAX; // never again
    end_sessions(server);
}
