// Sessions through a scripted daemon: connecting, the daemon's death, restart and refusals, reconnecting, and fork.
#include "client_setup.h"

#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>

static void connect_and_refusals(void **state)
{
    (void)state;
    struct fake *fake = fake_start();
    struct ice_client_options options = {.socket_directory = fake->directory, .name = "test", .deadline_us = 500000};
    ice_client *client = NULL;
    assert_int_equal(ice_client_connect(&options, NULL), ICE_INVALID_ARGUMENT);
    assert_int_equal(ice_client_connect(&options, &client), ICE_OK);
    assert_true(ice_client_boot_token(client) == 0xb007);
    ice_client_close(client);
    client = NULL;
    ice_client_close(NULL);
    assert_true(ice_client_boot_token(NULL) == 0);

    FAKE_SET(fake, refuse_hello, true);
    assert_int_equal(ice_client_connect(&options, &client), ICE_VERSION_MISMATCH);
    assert_non_null(strstr(ice_last_error(), "speak version 2"));
    FAKE_SET(fake, refuse_hello, false);
    FAKE_SET(fake, short_hello, true); // an endpoint that is not on this node
    assert_int_equal(ice_client_connect(&options, &client), ICE_BAD_MESSAGE);
    FAKE_SET(fake, short_hello, false);
    char name[WIRE_NAME_BYTES_MAX + 2];
    memset(name, 'n', sizeof name);
    name[sizeof name - 1] = '\0';
    options.name = name;
    assert_int_equal(ice_client_connect(&options, &client), ICE_TOO_LARGE);
    options.name = NULL;
    options.socket_directory = "/nowhere/at/all";
    assert_int_equal(ice_client_connect(&options, &client), ICE_NO_DAEMON);
    assert_non_null(strstr(ice_last_error(), "/nowhere/at/all/control.sock"));
    char path[300];
    memset(path, 'p', sizeof path);
    path[sizeof path - 1] = '\0';
    options.socket_directory = path;
    assert_int_equal(ice_client_connect(&options, &client), ICE_TOO_LARGE);
    assert_null(client);

    assert_int_equal(setenv("ICECACHE_SOCKET_DIR", fake->directory, 1), 0);
    assert_int_equal(ice_client_connect(NULL, &client), ICE_OK);
    ice_client_close(client);
    assert_int_equal(unsetenv("ICECACHE_SOCKET_DIR"), 0);
    fake_stop(fake);
}

// A listener that accepts and says nothing.
static void silent_daemon_times_out(void **state)
{
    (void)state;
    char directory[] = "/tmp/icecache-test-XXXXXX";
    assert_non_null(mkdtemp(directory));
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    assert_int_equal(control_path(address.sun_path, sizeof address.sun_path, directory, CONTROL_SOCKET_NAME), ICE_OK);
    int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(listener, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(listen(listener, 1), 0);
    struct ice_client_options options = {.socket_directory = directory, .name = "test", .deadline_us = 50000};
    ice_client *client = NULL;
    assert_int_equal(ice_client_connect(&options, &client), ICE_TIMEOUT);
    close(listener);
    unlink(address.sun_path);
    rmdir(directory);
}

enum { WAITERS = 6 };
struct waiter {
    struct setup *setup;
    uint32_t row;
    ice_status status;
    char text[128];
    pthread_t thread;
};

static void *wait_for_retrieve(void *argument)
{
    struct waiter *waiter = argument;
    struct ice_retrieve_options options = one_retrieve(waiter->setup, &waiter->row);
    waiter->status = ice_retrieve(waiter->setup->client, &options, NULL);
    (void)snprintf(waiter->text, sizeof waiter->text, "%s", ice_last_error());
    return NULL;
}

static void end_of_file_wakes_all_waiters(void **state)
{
    (void)state;
    struct setup setup = set_up(60000000, 0);
    FAKE_SET(setup.fake, hold, HOLD_RETRIEVES);
    struct waiter waiters[WAITERS];
    for (uint32_t i = 0; i < WAITERS; i++) {
        waiters[i] = (struct waiter){.setup = &setup, .row = i};
        assert_int_equal(pthread_create(&waiters[i].thread, NULL, wait_for_retrieve, &waiters[i]), 0);
    }
    uint32_t row = WAITERS;
    struct ice_retrieve_options options = one_retrieve(&setup, &row);
    ice_ticket *ticket = NULL;
    assert_int_equal(ice_retrieve_submit(setup.client, &options, &ticket), ICE_OK);
    fake_wait_held(setup.fake, WAITERS + 1);
    uint64_t begun_us = now_us();
    fake_do(setup.fake, FAKE_HANG_UP, 0);
    for (uint32_t i = 0; i < WAITERS; i++) {
        assert_int_equal(pthread_join(waiters[i].thread, NULL), 0);
        assert_int_equal(waiters[i].status, ICE_DISCONNECTED);
        assert_non_null(strstr(waiters[i].text, "closed the control socket"));
    }
    assert_true(now_us() - begun_us < 5000000);
    // And so does everything later, at once.
    assert_int_equal(ice_retrieve_wait(ticket, 0, NULL), ICE_DISCONNECTED);
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_DISCONNECTED);
    struct ice_sequence_info info;
    assert_int_equal(ice_sequence_info(setup.sequence, 0, &info), ICE_DISCONNECTED);
    struct ice_landing_view view;
    assert_int_equal(ice_landing_view(setup.landing, 0, 0, 0, &view), ICE_DISCONNECTED);
    ice_landing *landing = NULL;
    struct ice_landing_shape shape = landing_shape();
    assert_int_equal(ice_landing_open(setup.client, &shape, 0, &landing), ICE_DISCONNECTED);
    assert_true(ice_client_boot_token(setup.client) == 0);
    ice_ticket_close(ticket);
    tear_down(&setup);
    assert_true(now_us() - begun_us < 5000000);
}

// Nobody waits when the daemon dies; the first call afterwards finds out by itself.
static void death_between_calls(void **state)
{
    (void)state;
    struct setup setup = set_up(5000000, 0);
    fake_do(setup.fake, FAKE_HANG_UP, 0);
    uint32_t row = 0;
    struct ice_retrieve_options options = one_retrieve(&setup, &row);
    uint64_t begun_us = now_us();
    FAKE_SET(setup.fake, hold, HOLD_RETRIEVES);
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_DISCONNECTED);
    assert_true(now_us() - begun_us < 2000000);
    tear_down(&setup);
}

static void wrong_boot_token_is_a_restart(void **state)
{
    (void)state;
    struct setup setup = set_up(5000000, 0);
    FAKE_SET(setup.fake, wrong_boot_token, 1);
    uint32_t row = 0;
    struct ice_retrieve_options options = one_retrieve(&setup, &row);
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_DISCONNECTED);
    assert_non_null(strstr(ice_last_error(), "boot token"));
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_DISCONNECTED);
    FAKE_SET(setup.fake, wrong_boot_token, 0);
    assert_int_equal(ice_client_reconnect(setup.client), ICE_OK);
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_UNKNOWN_SESSION);
    tear_down(&setup);
}

static void reconnect_makes_a_new_session(void **state)
{
    (void)state;
    struct setup setup = set_up(5000000, 1 << 16);
    uint8_t bytes[2 * LAYERS * KV_HEADS * ROW_BYTES] = {0};
    struct ice_kv_source source = {bytes,     bytes, sizeof bytes, sizeof bytes, (size_t)KV_HEADS * ROW_BYTES,
                                   ROW_BYTES, 0};
    uint64_t length = 0;
    assert_int_equal(ice_append(setup.sequence, ICE_ALL_LAYERS, 0, 1, &source, 0, &length), ICE_OK);
    uint32_t row = 0;
    struct ice_retrieve_options options = one_retrieve(&setup, &row);
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_OK);
    struct ice_landing_view view;
    assert_int_equal(ice_landing_view(setup.landing, 0, 0, 0, &view), ICE_OK);

    FAKE_SET(setup.fake, hold, HOLD_RETRIEVES);
    row = 2;
    ice_ticket *ticket = NULL;
    assert_int_equal(ice_retrieve_submit(setup.client, &options, &ticket), ICE_OK);
    fake_wait_held(setup.fake, 1);
    FAKE_SET(setup.fake, boot_token, 0xb008);
    assert_int_equal(ice_client_reconnect(setup.client), ICE_OK);
    assert_true(ice_client_boot_token(setup.client) == 0xb008);
    assert_int_equal(ice_retrieve_wait(ticket, 0, NULL), ICE_DISCONNECTED);
    ice_ticket_close(ticket);

    struct setup old = setup;
    struct ice_sequence_info info;
    assert_int_equal(ice_sequence_info(old.sequence, 0, &info), ICE_UNKNOWN_SESSION);
    assert_int_equal(ice_append(old.sequence, 0, 1, 1, &source, 0, &length), ICE_UNKNOWN_SESSION);
    assert_int_equal(length, 1);
    assert_int_equal(ice_landing_view(old.landing, 0, 0, 0, &view), ICE_UNKNOWN_SESSION);
    assert_int_equal(*(const uint8_t *)view.keys, 42); // still mapped
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_UNKNOWN_SESSION);

    FAKE_SET(setup.fake, hold, 0);
    open_handles(&setup);
    options = one_retrieve(&setup, &row);
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_OK);
    options.landing = old.landing;
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_UNKNOWN_SESSION);
    assert_int_equal(ice_append(setup.sequence, ICE_ALL_LAYERS, 0, 1, &source, 0, &length), ICE_OK);
    // Closing old handles tells the new session nothing.
    ice_sequence_close(old.sequence);
    ice_landing_close(old.landing);
    assert_int_equal(FAKE_GET(setup.fake, sequences_closed), 0);
    assert_int_equal(FAKE_GET(setup.fake, landings_closed), 0);
    tear_down(&setup);
}

static void reconnect_while_others_wait(void **state)
{
    (void)state;
    struct setup setup = set_up(60000000, 0);
    FAKE_SET(setup.fake, hold, HOLD_RETRIEVES);
    struct waiter waiters[WAITERS];
    for (uint32_t i = 0; i < WAITERS; i++) {
        waiters[i] = (struct waiter){.setup = &setup, .row = i};
        assert_int_equal(pthread_create(&waiters[i].thread, NULL, wait_for_retrieve, &waiters[i]), 0);
    }
    fake_wait_held(setup.fake, WAITERS);
    assert_int_equal(ice_client_reconnect(setup.client), ICE_OK);
    for (uint32_t i = 0; i < WAITERS; i++) {
        assert_int_equal(pthread_join(waiters[i].thread, NULL), 0);
        assert_int_equal(waiters[i].status, ICE_DISCONNECTED);
    }
    FAKE_SET(setup.fake, refuse_hello, true);
    assert_int_equal(ice_client_reconnect(setup.client), ICE_VERSION_MISMATCH);
    struct ice_sequence_options options = sequence_options();
    ice_sequence *sequence = NULL;
    assert_int_equal(ice_sequence_open(setup.client, &options, 0, &sequence), ICE_DISCONNECTED);
    FAKE_SET(setup.fake, refuse_hello, false);
    assert_int_equal(ice_client_reconnect(setup.client), ICE_OK);
    assert_int_equal(ice_sequence_open(setup.client, &options, 0, &sequence), ICE_OK);
    ice_sequence_close(sequence);
    tear_down(&setup);
}

// What the daemon made for a caller who gave up is given back.
static void late_opens_are_closed(void **state)
{
    (void)state;
    struct setup setup = set_up(5000000, 0);
    FAKE_SET(setup.fake, hold, 1u << ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_OPEN);
    struct ice_sequence_options options = sequence_options();
    ice_sequence *sequence = NULL;
    assert_int_equal(ice_sequence_open(setup.client, &options, 20000, &sequence), ICE_TIMEOUT);
    assert_null(sequence);
    fake_wait_held(setup.fake, 1);
    fake_do(setup.fake, FAKE_ANSWER, 0);
    struct ice_sequence_info info;
    uint64_t begun_us = now_us();
    while (FAKE_GET(setup.fake, sequences_closed) == 0 && now_us() - begun_us < 5000000) {
        assert_int_equal(ice_sequence_info(setup.sequence, 0, &info), ICE_OK);
    }
    assert_int_equal(FAKE_GET(setup.fake, sequences_closed), 1);
    tear_down(&setup);
}

// Runs in the child; the number of the first check that failed, or 0.
static int child(struct setup *setup, ice_ticket *ticket)
{
    uint32_t row = 0;
    struct ice_retrieve_options options = one_retrieve(setup, &row);
    uint8_t bytes[64] = {0};
    struct ice_kv_source source = {bytes, bytes, sizeof bytes, sizeof bytes, 0, 0, 0};
    struct ice_kv_target target = {bytes, bytes, sizeof bytes, sizeof bytes, 32, 32, 32};
    struct ice_landing_shape shape = landing_shape();
    struct ice_sequence_options open = sequence_options();
    struct ice_sequence_info info;
    struct ice_landing_view view;
    ice_ticket *other;
    ice_landing *landing;
    ice_sequence *sequence;
    const ice_status statuses[] = {
        ice_retrieve(setup->client, &options, NULL),
        ice_retrieve_submit(setup->client, &options, &other),
        ice_retrieve_wait(ticket, 0, NULL),
        ice_landing_view(setup->landing, 0, 0, 0, &view),
        ice_landing_open(setup->client, &shape, 0, &landing),
        ice_sequence_open(setup->client, &open, 0, &sequence),
        ice_sequence_info(setup->sequence, 0, &info),
        ice_append(setup->sequence, 0, 0, 1, &source, 0, NULL),
        ice_read(setup->sequence, 0, 0, 1, &target, 0),
        ice_client_reconnect(setup->client),
    };
    for (size_t i = 0; i < sizeof statuses / sizeof statuses[0]; i++) {
        if (statuses[i] != ICE_FORKED || ice_last_error()[0] == '\0') {
            return (int)i + 1;
        }
    }
    if (ice_client_boot_token(setup->client) != 0) {
        return 90;
    }
    ice_ticket_close(ticket);
    ice_sequence_close(setup->sequence);
    ice_landing_close(setup->landing);
    ice_client_close(setup->client);
    return 0;
}

static void forked_child_disturbs_nothing(void **state)
{
    (void)state;
    struct setup setup = set_up(5000000, 0);
    FAKE_SET(setup.fake, hold, HOLD_RETRIEVES);
    uint32_t row = 1;
    struct ice_retrieve_options options = one_retrieve(&setup, &row);
    ice_ticket *ticket = NULL;
    assert_int_equal(ice_retrieve_submit(setup.client, &options, &ticket), ICE_OK);
    fake_wait_held(setup.fake, 1);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        _exit(child(&setup, ticket));
    }
    int status = 0;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    // The parent goes on: the ticket, the session, and a new retrieve.
    fake_do(setup.fake, FAKE_ANSWER, 0);
    assert_int_equal(ice_retrieve_wait(ticket, 0, NULL), ICE_OK);
    ice_ticket_close(ticket);
    FAKE_SET(setup.fake, hold, 0);
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_OK);
    assert_int_equal(FAKE_GET(setup.fake, sequences_closed), 0);
    assert_int_equal(FAKE_GET(setup.fake, landings_closed), 0);
    tear_down(&setup);
}

static void last_error_survives_closing(void **state)
{
    (void)state;
    struct setup setup = set_up(5000000, 0);
    struct ice_sequence_info info;
    assert_int_equal(ice_sequence_info(NULL, 0, &info), ICE_INVALID_ARGUMENT);
    fake_do(setup.fake, FAKE_HANG_UP, 0);
    tear_down(&setup);
    assert_string_equal(ice_last_error(), "sequence is NULL");
    assert_string_equal(ice_status_name(ICE_BUSY), "ICE_BUSY");
    assert_non_null(ice_status_text((ice_status)12345));
    assert_string_not_equal(ice_version(), "");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(connect_and_refusals),          cmocka_unit_test(silent_daemon_times_out),
        cmocka_unit_test(end_of_file_wakes_all_waiters), cmocka_unit_test(death_between_calls),
        cmocka_unit_test(wrong_boot_token_is_a_restart), cmocka_unit_test(reconnect_makes_a_new_session),
        cmocka_unit_test(reconnect_while_others_wait),   cmocka_unit_test(late_opens_are_closed),
        cmocka_unit_test(forked_child_disturbs_nothing), cmocka_unit_test(last_error_survives_closing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
