// icecachectl's connection to the daemon: an admin session, one request at a time.
#ifndef ICECACHE_CACHED_CTL_CONNECTION_H
#define ICECACHE_CACHED_CTL_CONNECTION_H

#include "proto/wire.h"

struct ctl_connection {
    int control_fd;
    void *context, *socket;
    uint64_t session_id;
    uint8_t session_token[16];
    char daemon_version[64];
    int timeout_ms;
    char error[256];
};

// ICE_NO_DAEMON, ICE_TIMEOUT, ...; connection->error says more. Close in every case.
ice_status ctl_connect(struct ctl_connection *connection, const char *directory, int timeout_ms);
// One part of a list, from an index on. *out is freed with icecache__wire__reply__free_unpacked(x, NULL).
ice_status ctl_stats(struct ctl_connection *connection, uint32_t sequences_from, Icecache__Wire__Reply **out);
ice_status ctl_prefixes(struct ctl_connection *connection, uint32_t from, Icecache__Wire__Reply **out);
ice_status ctl_leases(struct ctl_connection *connection, uint32_t from, Icecache__Wire__Reply **out);
ice_status ctl_namespaces(struct ctl_connection *connection, uint32_t from, Icecache__Wire__Reply **out);
ice_status ctl_remove_prefix(struct ctl_connection *connection, uint64_t prefix_id);
void ctl_close(struct ctl_connection *connection);

#endif
