// Replies on the control socket as a client sees them: no crash, no leak, a whole session token.
#include "fuzz.h"

#include "proto/limits.h"
#include "proto/wire.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    Icecache__Wire__ControlReply *reply = NULL;
    const ice_status status = wire_control_reply_decode(bytes, size, &reply);
    FUZZ_CHECK((status == ICE_OK) == (reply != NULL));
    if (!reply) {
        return 0;
    }
    if (reply->body_case == ICECACHE__WIRE__CONTROL_REPLY__BODY_HELLO) {
        FUZZ_CHECK(reply->hello->session_token.len == WIRE_SESSION_TOKEN_BYTES);
    }
    icecache__wire__control_reply__free_unpacked(reply, NULL);
    return 0;
}
