// Between wire.c and wire_check.c only: the checks that follow decoding. Nothing else includes this.
#ifndef ICECACHE_PROTO_WIRE_CHECK_H
#define ICECACHE_PROTO_WIRE_CHECK_H

#include "proto/wire.h"

// A limit as two arguments: its value and its name, for the texts.
#define LIMIT(name) (name), #name

// wire_error_set that returns the status.
ICE_MUST_CHECK ice_status wire_refuse(struct wire_error *error, ice_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

// peer: who speaks, as the text's subject.
ICE_MUST_CHECK ice_status wire_check_version(const char *peer, uint32_t version, struct wire_error *error);
// The body's fields; defaults are filled in for what is zero or empty (name_space, tp_size, block_tokens).
ICE_MUST_CHECK ice_status wire_check_request(Icecache__Wire__Request *request, struct wire_error *error);
ICE_MUST_CHECK ice_status wire_check_control_request(const Icecache__Wire__ControlRequest *request,
                                                     struct wire_error *error);

#endif
