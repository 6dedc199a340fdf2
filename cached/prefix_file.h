// Manifests of sealed prefixes, as files. Keeper thread, or the main thread before it starts.
#ifndef ICECACHE_CACHED_PREFIX_FILE_H
#define ICECACHE_CACHED_PREFIX_FILE_H

#include "cached/prefix.h"

#define PREFIX_FILE_BYTES_MAX (1ull << 30) // of a manifest: 4 bytes a page, so a prefix of about 4 billion token rows

// Writes the manifest, durably. ICE_NO_MEMORY, ICE_TOO_LARGE, ICE_DISK_FAILED (logged).
ICE_MUST_CHECK ice_status prefix_file_write(const struct prefix *prefix);
ICE_MUST_CHECK ice_status prefix_file_unlink(const struct prefix *prefix);
// The manifest's bytes; *bytes_out how many. Owned by the caller, released with that size. NULL: no memory.
uint8_t *prefix_encode(const struct prefix *prefix, size_t *bytes_out);
// A prefix from a manifest's bytes, whatever they are: NULL where they are no whole manifest of this version, or there
// is no memory (*status). Takes no extents yet.
struct prefix *prefix_decode(struct server *server, const uint8_t *bytes, size_t count, ice_status *status);

#endif
