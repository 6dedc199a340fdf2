// Requests on the control socket: refused with a text, or in range.
#include "fuzz.h"

#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/shm.h"
#include "proto/wire.h"

#include <stdalign.h>
#include <string.h>

static alignas(max_align_t) uint8_t memory[WIRE_ARENA_BYTES_MAX];

static void check_landing(const Icecache__Wire__LandingOpen *landing)
{
    const struct landing_shape shape = {.rows = landing->rows,
                                        .layers = landing->layers,
                                        .kv_heads = landing->kv_heads,
                                        .slots = landing->slots,
                                        .head_dim = landing->head_dim,
                                        .dtype = landing->dtype};
    struct landing_layout layout;
    FUZZ_CHECK(landing_layout_init(&layout, &shape));
    FUZZ_CHECK(layout.total_bytes <= WIRE_SHARED_BYTES_MAX && landing->head_dim % WIRE_HEAD_DIM_STEP == 0);
    const uint64_t last = landing_block(&layout, &shape, shape.rows - 1, shape.layers - 1);
    FUZZ_CHECK(shape.kv_heads * layout.head_bytes <= layout.positions_offset);
    FUZZ_CHECK(layout.positions_offset + 4ull * shape.kv_heads * shape.slots <= layout.counts_offset);
    FUZZ_CHECK(layout.counts_offset + 4ull * shape.kv_heads <= layout.block_bytes);
    FUZZ_CHECK(last + layout.block_bytes <= layout.total_bytes);
    FUZZ_CHECK(landing->place <= LANDING_PUSH && (landing->place == LANDING_PUSH) == (landing->gpu != NULL));
    const Icecache__Wire__GpuMemory *gpu = landing->gpu;
    FUZZ_CHECK(!gpu || (gpu->uuid.len == WIRE_GPU_UUID_BYTES && gpu->probe.len == WIRE_GPU_PROBE_BYTES));
    FUZZ_CHECK(!gpu || (gpu->handle.len == WIRE_GPU_HANDLE_BYTES) != (gpu->n_piece_bytes > 0));
    FUZZ_CHECK(!gpu || (gpu->n_piece_bytes <= WIRE_DESCRIPTORS_MAX && gpu->offset <= WIRE_SHARED_BYTES_MAX));
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    struct wire_arena arena;
    struct wire_error error;
    Icecache__Wire__ControlRequest *request = NULL;
    uint64_t id = 0;
    wire_arena_init(&arena, memory, sizeof(memory));
    const ice_status status = wire_control_request_decode(bytes, size, &arena, &request, &id, &error);
    FUZZ_CHECK(error.status == status);
    FUZZ_CHECK((status == ICE_OK) == (request != NULL) && (status == ICE_OK) == (error.text[0] == '\0'));
    FUZZ_CHECK(strnlen(error.text, sizeof(error.text)) < sizeof(error.text) - 1);
    if (!request) {
        return 0;
    }
    FUZZ_CHECK(request->request_id == id);
    switch (request->body_case) {
    case ICECACHE__WIRE__CONTROL_REQUEST__BODY_HELLO:
        FUZZ_CHECK(request->hello->protocol_version == WIRE_PROTOCOL_VERSION);
        FUZZ_CHECK(strlen(request->hello->client_name) <= WIRE_NAME_BYTES_MAX);
        break;
    case ICECACHE__WIRE__CONTROL_REQUEST__BODY_STAGING_OPEN:
        FUZZ_CHECK(request->staging_open->bytes >= 1 && request->staging_open->bytes <= WIRE_SHARED_BYTES_MAX);
        break;
    case ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_OPEN:
        check_landing(request->landing_open);
        break;
    case ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_CLOSE:
    case ICECACHE__WIRE__CONTROL_REQUEST__BODY_RING_OPEN:
        break;
    case ICECACHE__WIRE__CONTROL_REQUEST__BODY__NOT_SET:
    default:
        FUZZ_CHECK(false); // a body that wire.h does not promise
    }
    return 0;
}
