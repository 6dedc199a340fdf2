// Names, texts and scopes of the status codes, generated from the one list in status.h.
//
// Invariants: every answer is a constant; values outside the list (a newer peer's) get an answer too.
// Threads: stateless, any thread.
#include "proto/status.h"

#include <stddef.h>

struct entry {
    int value;
    enum ice_scope scope;
    const char *name;
    const char *text;
};

// Values are dense from 0, so that the value is the index; the assertions below keep it so.
#define STATUS_ENTRY(name, value, scope, text) [value] = {value, ICE_SCOPE_##scope, #name, text},
static const struct entry entries[] = {ICE_STATUS_LIST(STATUS_ENTRY)};
#undef STATUS_ENTRY

#define STATUS_COUNT(name, value, scope, text) +1
_Static_assert(sizeof(entries) / sizeof(entries[0]) == 0 ICE_STATUS_LIST(STATUS_COUNT),
               "status values have a gap or a duplicate");
#undef STATUS_COUNT

static const struct entry *find(int status)
{
    if (status < 0 || (size_t)status >= sizeof(entries) / sizeof(entries[0])) {
        return NULL;
    }
    return &entries[status];
}

const char *status_name(int status)
{
    const struct entry *entry = find(status);
    return entry ? entry->name : "ICE_UNKNOWN";
}

const char *status_text(int status)
{
    const struct entry *entry = find(status);
    return entry ? entry->text : "a status that this version does not know; install the same release of both sides";
}

enum ice_scope status_scope(int status)
{
    // A code from a newer peer: the narrowest scope that still counts as a failure.
    const struct entry *entry = find(status);
    return entry ? entry->scope : ICE_SCOPE_REQUEST;
}

bool status_is_known(int status)
{
    return find(status) != NULL;
}
