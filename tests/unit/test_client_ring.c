// The client's end of the rings: what is larger than a ring goes on without the caller's help, with one thread and with
// several; replies are found by callers with no patience; a wake-up that is lost costs a second.
#include "client_setup.h"

#include "client/ring.h"

#define RING       RING_BYTES_MIN
#define PATIENCE   (10u * 1000000u)
#define HOLD_HINTS (1u << ICECACHE__WIRE__REQUEST__BODY_HINT)

enum { LARGE = 256 }; // query positions: 32 KiB of vectors, eight times the ring

static const uint16_t large_queries[LARGE * QUERY_HEADS * HEAD_DIM];

static struct setup set_up_ring(void)
{
    struct setup setup = {.fake = fake_start()};
    FAKE_SET(setup.fake, ring_bytes, RING);
    struct ice_client_options options = {.socket_directory = setup.fake->directory,
                                         .name = "test",
                                         .deadline_us = PATIENCE,
                                         .transport = ICE_TRANSPORT_RING};
    assert_int_equal(ice_client_connect(&options, &setup.client), ICE_OK);
    open_handles(&setup);
    return setup;
}

static struct ice_retrieve_options large_retrieve(struct setup *setup, const uint32_t *row)
{
    struct ice_retrieve_options options = one_retrieve(setup, row);
    options.queries = LARGE;
    options.query_vectors = large_queries;
    return options;
}

static ice_status hint(struct setup *setup, uint64_t deadline_us)
{
    const struct ice_hint_options options = {.sequence_count = 1,
                                             .sequences = &setup->sequence,
                                             .queries = LARGE,
                                             .query_vectors = large_queries,
                                             .query_dtype = ICE_BF16,
                                             .budget = 4,
                                             .deadline_us = deadline_us};
    return ice_hint(setup->client, &options, NULL);
}

static void set_deaf(struct fake *fake, bool deaf)
{
    FAKE_SET(fake, ring_deaf, deaf);
    fake_do(fake, FAKE_LOOK, 0);
}

static void pause_us(uint64_t us)
{
    const struct timespec pause = {0, (long)us * 1000};
    (void)nanosleep(&pause, NULL);
}

static bool ask_ring(struct fake *fake, bool (*is_so)(const struct fake_ring *ring))
{
    pthread_mutex_lock(&fake->lock);
    const bool so = is_so(&fake->ring);
    pthread_mutex_unlock(&fake->lock);
    return so;
}

static void await_ring(struct fake *fake, bool (*is_so)(const struct fake_ring *ring))
{
    for (uint64_t begun_us = now_us(); !ask_ring(fake, is_so); pause_us(100)) {
        assert_true(now_us() - begun_us < PATIENCE);
    }
}

// With no call of the library.
static void await_held(struct fake *fake, size_t count)
{
    for (uint64_t begun_us = now_us(); FAKE_GET(fake, held_count) < count; pause_us(100)) {
        assert_true(now_us() - begun_us < PATIENCE);
    }
}

// ---- the ring alone ----

struct bare {
    struct client_ring ring;
    struct ring daemon;
};

static struct bare bare_create(void)
{
    struct bare bare = {.ring = {.capacity = RING, .event_fd = eventfd(0, EFD_CLOEXEC), .poll_fd = -1}};
    bare.ring.mapping =
        mmap(NULL, ring_mapping_bytes(RING), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(bare.ring.mapping != MAP_FAILED && bare.ring.event_fd >= 0);
    ring_requests(&bare.ring.requests, bare.ring.mapping, RING);
    ring_replies(&bare.ring.replies, bare.ring.mapping, RING);
    ring_requests(&bare.daemon, bare.ring.mapping, RING);
    return bare;
}

static void bare_destroy(struct bare *bare)
{
    munmap(bare->ring.mapping, ring_mapping_bytes(RING));
    close(bare->ring.event_fd);
    free(bare->ring.rest);
}

// Whoever sleeps slept before there was anything to send: only the flag tells the daemon to wake him.
static void full_ring_asks_to_be_woken(void **state)
{
    (void)state;
    struct bare bare = bare_create();
    uint8_t header[100], vectors[3 * RING], seen[4 * RING];
    for (size_t i = 0; i < sizeof vectors; i++) {
        vectors[i] = (uint8_t)(i * 7u + i / 256u);
    }
    memset(header, 0x5a, sizeof header);
    const uint64_t whole = sizeof(struct ring_record) + sizeof header + sizeof vectors;
    assert_int_equal(ring_submit(&bare.ring, header, sizeof header, vectors, sizeof vectors), 0);
    assert_true(ring_kept_end(&bare.ring) == whole);
    uint64_t taken = 0;
    for (uint32_t turns = 0; taken < whole; turns++) {
        const uint64_t filled = ring_filled(&bare.daemon), left = whole - taken;
        assert_true(filled == (left < RING ? left : RING));
        assert_true(bare.ring.kept_sent == taken + filled);
        ring_read(&bare.daemon, seen + taken, filled);
        taken += filled;
        assert_int_equal(ring_consume(&bare.daemon), left > filled);
        assert_int_equal(ring_flush(&bare.ring), whole - taken <= RING);
    }
    assert_true(bare.ring.kept_sent == whole && ring_kept_end(&bare.ring) == whole);
    assert_memory_equal(seen + sizeof(struct ring_record), header, sizeof header);
    assert_memory_equal(seen + sizeof(struct ring_record) + sizeof header, vectors, sizeof vectors);
    bare_destroy(&bare);
}

static void full_ring_that_is_spoilt_ends(void **state)
{
    (void)state;
    struct bare bare = bare_create();
    uint8_t header[3 * RING] = {0};
    assert_int_equal(ring_submit(&bare.ring, header, sizeof header, NULL, 0), 0);
    atomic_store(&bare.daemon.shared->tail, UINT64_MAX);
    assert_false(ring_flush(&bare.ring));
    assert_true(ring_is_corrupt(&bare.ring));
    assert_false(ring_flush(&bare.ring));
    bare_destroy(&bare);
}

// ---- messages larger than the ring ----

struct caller {
    struct setup *setup;
    uint32_t row;
    bool is_large, is_hint;
    uint64_t deadline_us;
    ice_ticket *ticket; // of a submit
    ice_status status;
    char text[256];
    uint64_t took_us;
    pthread_t thread;
};

static void *retrieve(void *argument)
{
    struct caller *caller = argument;
    struct ice_retrieve_options options =
        caller->is_large ? large_retrieve(caller->setup, &caller->row) : one_retrieve(caller->setup, &caller->row);
    const uint64_t begun_us = now_us();
    caller->status = ice_retrieve(caller->setup->client, &options, NULL);
    caller->took_us = now_us() - begun_us;
    return NULL;
}

static void *submit(void *argument)
{
    struct caller *caller = argument;
    const uint64_t begun_us = now_us();
    if (caller->is_hint) {
        caller->status = hint(caller->setup, caller->deadline_us);
    } else {
        struct ice_retrieve_options options = large_retrieve(caller->setup, &caller->row);
        options.deadline_us = caller->deadline_us;
        caller->status = ice_retrieve_submit(caller->setup->client, &options, &caller->ticket);
    }
    caller->took_us = now_us() - begun_us;
    (void)snprintf(caller->text, sizeof caller->text, "%s", ice_last_error());
    return NULL;
}

static void begin(struct caller *caller, void *(*run)(void *argument))
{
    assert_int_equal(pthread_create(&caller->thread, NULL, run, caller), 0);
}

static void end(struct caller *caller)
{
    assert_int_equal(pthread_join(caller->thread, NULL), 0);
}

// One thread sleeps for a long request, with nothing to send, when another one fills the ring. The best of several
// rounds, because a machine may be busy; a sleeper that is not woken looks up after a second in each.
static void large_message_does_not_wait_for_the_sleeper(void **state)
{
    (void)state;
    struct setup setup = set_up_ring();
    struct caller sleeper = {.setup = &setup, .row = 0};
    FAKE_SET(setup.fake, hold, HOLD_RETRIEVES);
    begin(&sleeper, retrieve);
    await_held(setup.fake, 1);
    FAKE_SET(setup.fake, hold, 0);
    uint64_t best_us = UINT64_MAX;
    for (uint32_t round = 0; round < 6 && best_us > 500000; round++) {
        struct caller other = {.setup = &setup, .row = 1, .is_large = true};
        await_ring(setup.fake, fake_ring_client_sleeps);
        set_deaf(setup.fake, true);
        begin(&other, retrieve);
        await_ring(setup.fake, fake_ring_is_full);
        pause_us(2000); // it goes to sleep behind the first
        set_deaf(setup.fake, false);
        end(&other);
        assert_int_equal(other.status, ICE_OK);
        best_us = other.took_us < best_us ? other.took_us : best_us;
    }
    assert_true(best_us <= 500000);
    fake_do(setup.fake, FAKE_ANSWER, 0);
    end(&sleeper);
    assert_int_equal(sleeper.status, ICE_OK);
    tear_down(&setup);
}

// Another thread's message, of which the daemon takes nothing yet, stands behind it in the ring.
static void submit_waits_for_its_own_message(void **state)
{
    (void)state;
    struct setup setup = set_up_ring();
    struct caller receiver = {.setup = &setup, .row = 0};
    struct caller first = {.setup = &setup, .row = 1}, second = {.setup = &setup, .row = 2};
    FAKE_SET(setup.fake, hold, HOLD_RETRIEVES);
    begin(&receiver, retrieve);
    await_held(setup.fake, 1);
    set_deaf(setup.fake, true);
    begin(&first, submit);
    await_ring(setup.fake, fake_ring_is_full);
    begin(&second, submit);
    pause_us(20000);
    FAKE_SET(setup.fake, ring_deafens, true);
    set_deaf(setup.fake, false);
    end(&first);
    assert_int_equal(first.status, ICE_OK);
    assert_true(first.took_us < PATIENCE / 2);
    assert_int_equal(FAKE_GET(setup.fake, held_count), 2);

    FAKE_SET(setup.fake, ring_deafens, false);
    set_deaf(setup.fake, false);
    end(&second);
    assert_int_equal(second.status, ICE_OK);
    await_held(setup.fake, 3);
    for (size_t i = 0; i < 3; i++) {
        fake_do(setup.fake, FAKE_ANSWER, i);
    }
    end(&receiver);
    assert_int_equal(receiver.status, ICE_OK);
    ice_ticket_close(first.ticket);
    ice_ticket_close(second.ticket);
    tear_down(&setup);
}

// Nobody calls the library once the submit has returned.
static void submit_leaves_nothing_behind(void **state)
{
    (void)state;
    struct setup setup = set_up_ring();
    FAKE_SET(setup.fake, hold, HOLD_RETRIEVES | HOLD_HINTS);
    for (uint32_t is_hint = 0; is_hint < 2; is_hint++) {
        struct caller caller = {.setup = &setup, .is_hint = is_hint != 0};
        set_deaf(setup.fake, true);
        begin(&caller, submit);
        await_ring(setup.fake, fake_ring_is_full);
        pause_us(2000);
        set_deaf(setup.fake, false);
        end(&caller);
        assert_int_equal(caller.status, ICE_OK);
        assert_string_equal(caller.text, "");
        await_held(setup.fake, is_hint + 1u);
        fake_do(setup.fake, FAKE_ANSWER, is_hint);
        if (caller.ticket != NULL) {
            assert_int_equal(ice_retrieve_wait(caller.ticket, 0, NULL), ICE_OK);
            ice_ticket_close(caller.ticket);
        }
    }
    tear_down(&setup);
}

// The message counts as sent: its row is taken, and the rest goes with later calls.
static void daemon_that_takes_nothing_costs_the_deadline(void **state)
{
    (void)state;
    struct setup setup = set_up_ring();
    FAKE_SET(setup.fake, hold, HOLD_HINTS);
    set_deaf(setup.fake, true);
    uint32_t row = 2;
    struct ice_retrieve_options options = large_retrieve(&setup, &row);
    options.deadline_us = 30000;
    ice_ticket *ticket = NULL;
    uint64_t begun_us = now_us();
    assert_int_equal(ice_retrieve_submit(setup.client, &options, &ticket), ICE_OK);
    assert_true(now_us() - begun_us >= 30000);
    assert_string_equal(ice_last_error(), "");
    begun_us = now_us();
    assert_int_equal(hint(&setup, 30000), ICE_OK);
    assert_true(now_us() - begun_us >= 30000);
    assert_string_equal(ice_last_error(), "");
    struct ice_landing_view view;
    assert_int_equal(ice_landing_view(setup.landing, row, 0, 0, &view), ICE_BUSY);
    assert_int_equal(ice_retrieve_wait(ticket, 10000, NULL), ICE_TIMEOUT);
    assert_string_not_equal(ice_last_error(), "");

    set_deaf(setup.fake, false);
    assert_int_equal(ice_retrieve_wait(ticket, 0, NULL), ICE_OK);
    ice_ticket_close(ticket);
    row = 3;
    options.deadline_us = 0;
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_OK); // behind the hint
    assert_int_equal(FAKE_GET(setup.fake, held_count), 1);
    tear_down(&setup);
}

static void end_of_the_session_is_told(void **state)
{
    (void)state;
    struct setup setup = set_up_ring();
    for (uint32_t is_hint = 0; is_hint < 2; is_hint++) {
        struct caller caller = {.setup = &setup, .is_hint = is_hint != 0};
        set_deaf(setup.fake, true);
        begin(&caller, submit);
        await_ring(setup.fake, fake_ring_is_full);
        fake_do(setup.fake, FAKE_HANG_UP, 0);
        end(&caller);
        assert_int_equal(caller.status, ICE_DISCONNECTED);
        assert_non_null(strstr(caller.text, "closed the control socket"));
        assert_null(caller.ticket);
        set_deaf(setup.fake, false);
        ice_sequence_close(setup.sequence);
        ice_landing_close(setup.landing);
        assert_int_equal(ice_client_reconnect(setup.client), ICE_OK);
        open_handles(&setup);
    }
    tear_down(&setup);
}

static void reconnect_ends_a_submit(void **state)
{
    (void)state;
    struct setup setup = set_up_ring();
    struct caller caller = {.setup = &setup};
    set_deaf(setup.fake, true);
    begin(&caller, submit);
    await_ring(setup.fake, fake_ring_is_full);
    assert_int_equal(ice_client_reconnect(setup.client), ICE_OK);
    end(&caller);
    assert_true(caller.status == ICE_DISCONNECTED || caller.status == ICE_UNKNOWN_SESSION);
    assert_string_not_equal(caller.text, "");
    set_deaf(setup.fake, false);
    tear_down(&setup);
}

// ---- waiting ----

// As a worker polls that has other things to do: each wait is over before it could sleep.
static void reply_is_found_without_patience(void **state)
{
    (void)state;
    struct setup setup = set_up_ring();
    FAKE_SET(setup.fake, hold, HOLD_RETRIEVES);
    for (uint32_t i = 0; i < FAKE_HELD_MAX / 2; i++) { // a microsecond is sometimes longer than the call
        uint32_t row = 0;
        struct ice_retrieve_options options = one_retrieve(&setup, &row);
        struct ice_retrieve_result result;
        ice_ticket *ticket = NULL;
        assert_int_equal(ice_retrieve_submit(setup.client, &options, &ticket), ICE_OK);
        assert_int_equal(ice_retrieve_wait(ticket, 1, NULL), ICE_TIMEOUT);
        await_held(setup.fake, i + 1);
        fake_do(setup.fake, FAKE_ANSWER, i);
        assert_int_equal(ice_retrieve_wait(ticket, 1, &result), ICE_OK);
        assert_int_equal(result.head_count, KV_HEADS);
        ice_ticket_close(ticket);
    }
    tear_down(&setup);
}

// Another thread receives, and has not woken yet.
static void reply_is_found_beside_the_receiver(void **state)
{
    (void)state;
    struct setup setup = set_up_ring();
    struct caller receiver = {.setup = &setup, .row = 0};
    FAKE_SET(setup.fake, hold, HOLD_RETRIEVES);
    begin(&receiver, retrieve);
    await_held(setup.fake, 1);
    FAKE_SET(setup.fake, ring_quiet, true);
    for (uint32_t i = 1; i < 20; i++) {
        uint32_t row = 1;
        struct ice_retrieve_options options = one_retrieve(&setup, &row);
        ice_ticket *ticket = NULL;
        assert_int_equal(ice_retrieve_submit(setup.client, &options, &ticket), ICE_OK);
        await_held(setup.fake, i + 1);
        fake_do(setup.fake, FAKE_ANSWER, i);
        assert_int_equal(ice_retrieve_wait(ticket, 1, NULL), ICE_OK);
        ice_ticket_close(ticket);
    }
    FAKE_SET(setup.fake, ring_quiet, false);
    fake_do(setup.fake, FAKE_ANSWER, 0);
    end(&receiver);
    assert_int_equal(receiver.status, ICE_OK);
    tear_down(&setup);
}

static void lost_wake_up_costs_a_second(void **state)
{
    (void)state;
    struct setup setup = set_up_ring();
    struct caller caller = {.setup = &setup};
    FAKE_SET(setup.fake, hold, HOLD_RETRIEVES);
    FAKE_SET(setup.fake, ring_quiet, true);
    begin(&caller, retrieve);
    await_held(setup.fake, 1);
    await_ring(setup.fake, fake_ring_client_sleeps);
    fake_do(setup.fake, FAKE_ANSWER, 0);
    end(&caller);
    assert_int_equal(caller.status, ICE_OK);
    assert_true(caller.took_us < PATIENCE / 2);
    FAKE_SET(setup.fake, ring_quiet, false);
    tear_down(&setup);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(full_ring_asks_to_be_woken),
        cmocka_unit_test(full_ring_that_is_spoilt_ends),
        cmocka_unit_test(large_message_does_not_wait_for_the_sleeper),
        cmocka_unit_test(submit_waits_for_its_own_message),
        cmocka_unit_test(submit_leaves_nothing_behind),
        cmocka_unit_test(daemon_that_takes_nothing_costs_the_deadline),
        cmocka_unit_test(end_of_the_session_is_told),
        cmocka_unit_test(reconnect_ends_a_submit),
        cmocka_unit_test(reply_is_found_without_patience),
        cmocka_unit_test(reply_is_found_beside_the_receiver),
        cmocka_unit_test(lost_wake_up_costs_a_second),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
