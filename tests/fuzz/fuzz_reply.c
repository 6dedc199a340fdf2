// Replies of the data plane as a client sees them: no crash, no leak, and arrays that agree.
#include "fuzz.h"

#include "proto/limits.h"
#include "proto/wire.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    Icecache__Wire__Reply *reply = NULL;
    const ice_status status = wire_reply_decode(bytes, size, &reply);
    FUZZ_CHECK((status == ICE_OK) == (reply != NULL));
    if (!reply) {
        return 0;
    }
    if (reply->body_case == ICECACHE__WIRE__REPLY__BODY_RETRIEVE) {
        const Icecache__Wire__RetrieveReply *retrieve = reply->retrieve;
        uint64_t positions = 0;
        for (size_t i = 0; i < retrieve->n_counts; i++) {
            positions += retrieve->counts[i];
        }
        FUZZ_CHECK(retrieve->n_positions == 0 || retrieve->n_positions == positions);
        FUZZ_CHECK(retrieve->n_masses == retrieve->n_counts && retrieve->n_indexed == retrieve->n_counts &&
                   retrieve->n_versions == retrieve->n_counts && retrieve->n_changed == retrieve->n_counts);
    } else if (reply->body_case == ICECACHE__WIRE__REPLY__BODY_SEQUENCE_INFO) {
        FUZZ_CHECK(reply->sequence_info->n_lengths == reply->sequence_info->n_indexed);
    } else if (reply->body_case == ICECACHE__WIRE__REPLY__BODY_STATS) {
        FUZZ_CHECK(reply->stats->n_sequence <= WIRE_STATS_SEQUENCES_MAX);
    } else if (reply->body_case == ICECACHE__WIRE__REPLY__BODY_SEAL) {
        FUZZ_CHECK(reply->seal->tokens <= WIRE_TOKENS_MAX);
    } else if (reply->body_case == ICECACHE__WIRE__REPLY__BODY_LOOKUP) {
        FUZZ_CHECK(reply->lookup->tokens <= WIRE_TOKENS_MAX);
    } else if (reply->body_case == ICECACHE__WIRE__REPLY__BODY_ATTACH) {
        FUZZ_CHECK(reply->attach->tokens <= WIRE_TOKENS_MAX);
    } else if (reply->body_case == ICECACHE__WIRE__REPLY__BODY_SEQUENCE_FORK) {
        FUZZ_CHECK(reply->sequence_fork->tokens <= WIRE_TOKENS_MAX);
    } else if (reply->body_case == ICECACHE__WIRE__REPLY__BODY_PREFIX_LIST) {
        FUZZ_CHECK(reply->prefix_list->n_prefix <= WIRE_PREFIXES_LISTED_MAX);
    } else if (reply->body_case == ICECACHE__WIRE__REPLY__BODY_LEASE_LIST) {
        FUZZ_CHECK(reply->lease_list->n_lease <= WIRE_LEASES_LISTED_MAX);
    } else if (reply->body_case == ICECACHE__WIRE__REPLY__BODY_NAMESPACE_LIST) {
        FUZZ_CHECK(reply->namespace_list->n_name_space <= WIRE_NAMESPACES_LISTED_MAX);
    }
    icecache__wire__reply__free_unpacked(reply, NULL);
    return 0;
}
