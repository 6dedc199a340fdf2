# The target `portable`: build/<preset>/portable/ holds the programs, the library and every third-party .so that they
# need, so that it can be copied to any x86-64 machine whose glibc is that of the building machine or newer.
#
# The run path is the old DT_RPATH: unlike DT_RUNPATH it also holds for what the carried libraries need themselves.
set(portable_folder ${CMAKE_BINARY_DIR}/portable)
if(TARGET test_gpu_landing) # for tests/gpu/run on a machine with a GPU
    list(APPEND programs test_gpu_landing test_gpu_append test_gpu_queries test_gpu_stream_wait retrieve_times)
endif()
foreach(target icecache ${programs})
    set_target_properties(${target} PROPERTIES BUILD_RPATH "$ORIGIN" INSTALL_RPATH "$ORIGIN" BUILD_WITH_INSTALL_RPATH ON)
    target_link_options(${target} PRIVATE -Wl,--disable-new-dtags)
    list(APPEND portable_files $<TARGET_FILE:${target}>)
endforeach()

add_custom_target(portable ALL
    COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/carry-libraries ${portable_folder} ${portable_files}
    DEPENDS ${programs} icecache
    COMMENT "Filling ${portable_folder}"
    VERBATIM)
install(DIRECTORY ${portable_folder}/ DESTINATION portable USE_SOURCE_PERMISSIONS COMPONENT portable EXCLUDE_FROM_ALL)
