// How icecachectl shows statistics and prefixes: a table for people, JSON with stable keys for programs.
#ifndef ICECACHE_CACHED_CTL_PRINT_H
#define ICECACHE_CACHED_CTL_PRINT_H

#include "proto/wire.h"

// pages: the replies of one listing in order; totals are the first one's.
void ctl_print_table(Icecache__Wire__Reply *const *pages, size_t count);
void ctl_print_json(Icecache__Wire__Reply *const *pages, size_t count);
// The same for sealed prefixes.
void ctl_print_prefixes_table(Icecache__Wire__Reply *const *pages, size_t count);
void ctl_print_prefixes_json(Icecache__Wire__Reply *const *pages, size_t count);
void ctl_print_leases_table(Icecache__Wire__Reply *const *pages, size_t count);
void ctl_print_leases_json(Icecache__Wire__Reply *const *pages, size_t count);
void ctl_print_namespaces_table(Icecache__Wire__Reply *const *pages, size_t count);
void ctl_print_namespaces_json(Icecache__Wire__Reply *const *pages, size_t count);

#endif
