// The list of status codes: dense, complete, and answered for also outside it.
// cmocka.h wants these four first.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "proto/status.h"

#include <limits.h>
#include <string.h>

static void every_code_has_its_name_text_and_scope(void **state)
{
    (void)state;
#define CHECK(code, value, scope, text)                                                                                \
    assert_int_equal(code, value);                                                                                     \
    assert_true(status_is_known(code));                                                                                \
    assert_string_equal(status_name(code), #code);                                                                     \
    assert_string_equal(status_text(code), text);                                                                      \
    assert_int_equal(status_scope(code), ICE_SCOPE_##scope);
    ICE_STATUS_LIST(CHECK)
#undef CHECK
}

static void wire_values_never_change(void **state)
{
    (void)state;
    assert_int_equal(ICE_OK, 0);
    assert_int_equal(ICE_BAD_MESSAGE, 2);
    assert_int_equal(ICE_VERSION_MISMATCH, 4);
    assert_int_equal(ICE_POOL_FULL, 14);
    assert_int_equal(ICE_TIMEOUT, 20);
    assert_int_equal(ICE_INTERNAL, 29);
    assert_int_equal(ICE_DISK_FAILED, 33);
    assert_int_equal(ICE_OVERLOADED, 34);
    assert_int_equal(ICE_QUOTA, 35);
}

static void unknown_codes_are_answered(void **state)
{
    (void)state;
    static const int unknown[] = {-1, 36, 1000, INT_MAX, INT_MIN};
    for (size_t i = 0; i < sizeof(unknown) / sizeof(unknown[0]); i++) {
        assert_false(status_is_known(unknown[i]));
        assert_string_equal(status_name(unknown[i]), "ICE_UNKNOWN");
        assert_non_null(strstr(status_text(unknown[i]), "does not know"));
        assert_int_equal(status_scope(unknown[i]), ICE_SCOPE_REQUEST);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_code_has_its_name_text_and_scope),
        cmocka_unit_test(wire_values_never_change),
        cmocka_unit_test(unknown_codes_are_answered),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
