// A worker that appends, retrieves, seals, attaches, removes and lets its sequences sleep, until its daemon dies; and
// what it was told until then, which whoever started it holds against the daemon's files.
#ifndef ICECACHE_TESTS_LOAD_H
#define ICECACHE_TESTS_LOAD_H

#include "worker.h"

#define LOAD_ROLE        "load"
#define LOAD_SEALS_MAX   512u
#define LOAD_TOKENS_MAX  1280u // of a document: its hashes, K and V are functions of its number
#define LOAD_BLOCKS_MAX  (LOAD_TOKENS_MAX / 16u)
#define LOAD_HIBERNATION "60" // --hibernate-ms

extern const struct shape load_shape;

enum load_state {
    LOAD_SEALING, // asked for, not answered: it may be there
    LOAD_SEALED,
    LOAD_REMOVING, // asked for, not answered: it may be gone
    LOAD_REMOVED,
};

struct load_seal {
    uint64_t id; // 0: not known
    uint32_t document, blocks;
    uint64_t digest; // of what retrieves at its end gave before the sealing was asked for
    enum load_state state;
};

// Those that have ended one way or the other are left out.
struct load_ledger {
    struct load_seal seals[LOAD_SEALS_MAX];
    uint32_t count;
};

#define LOAD_WORKERS   2u    // at once: one seals and is given room while the other removes
#define LOAD_DOCUMENTS 1000u // at most, of a worker in a round
struct load {
    struct child children[LOAD_WORKERS];
};
// The role's arguments: sockets, seed, number of the first document, of the worker.
int load_role(int argc, char **argv);
void load_start(struct load *load, const struct daemon *daemon, uint64_t seed, uint32_t round);
// Lets them work for a random time, which is longer, and of which there are fewer, under a sanitizer.
void load_run(uint64_t *random, uint64_t most_us);
uint32_t load_rounds(uint32_t scaled, uint32_t full);
// Enters all that the workers have told until their ends, which must be good ones.
void load_end(struct load_ledger *ledger, struct load *load);

// What the daemon lists must be what the ledger says, up to what was not answered: that is entered one way or the
// other. Each that is listed is attached to, read and asked as before; and nothing else has room in the spill file.
void load_check(struct load_ledger *ledger, const struct daemon *daemon);
void load_remove(struct load_ledger *ledger, const struct daemon *daemon, uint32_t keep); // the oldest ones
// What retrieves at the end of `length` tokens return: positions, K and V, and the estimated masses.
ice_status load_look(struct worker *worker, const struct history *history, uint64_t length, uint64_t *digest);
// Reads all of it, and compares.
ice_status load_read(const struct worker *worker, const struct history *history, uint64_t length, bool *equal);
// Appends a document of so many blocks by the worker, which closes its sequence first, seals it, and enters that.
void load_seal(struct load_ledger *ledger, struct worker *worker, uint32_t document, uint32_t blocks);
void load_open(struct worker *worker, const struct daemon *daemon); // with a landing, without a sequence
void load_hashes(uint32_t document, uint8_t hashes[LOAD_BLOCKS_MAX][ICE_HASH_BYTES]);
void load_history(struct history *history, uint32_t document);

#endif
