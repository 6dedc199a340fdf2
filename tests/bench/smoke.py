"""Runs all commands at tiny sizes and checks that the contract's keys are there and plausible.

usage: smoke.py ICECACHE_BENCH TRACE FAKE_CUDA"""
import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile

OBJECT_KEYS = {"command", "version", "args", "seed", "machine", "rows", "ratios"}
MACHINE_KEYS = {"cpu", "cores", "isa", "ram_bytes", "huge_pages", "kernel", "gpu"}
SEARCH_KEYS = {"method", "tokens", "head_dim", "query_heads", "build_us_per_key", "bytes_per_key", "at_recall",
               "at_share", "scanned_share"}
TREE_KEYS = SEARCH_KEYS | {"insert_us_per_key", "insert_p50_us", "insert_p99_us", "insert_behind", "moved_per_1000", "fill",
                           "mass", "coverage_error", "coverage", "efforts", "default"}
DEFAULT_KEYS = {"recall", "share", "scanned_share", "alone_us", "together_us"}
COVERAGE_KEYS = {"reachable_share", "mass", "reached_share", "tokens", "tokens_exact", "scanned_share"}
MASS_KEYS = {"exact", "token_wise", "page_wise", "partition_optimum", "sequential_optimum"}
STEP_KEYS = {"method", "budget", "cores", "search_ms", "gather_ms", "share", "share_mean", "bytes_per_key",
             "scanned_share", "lanes", "cold", "build_s", "insert_us_per_key"}
COPY_KEYS = {"path", "bytes", "changed", "pieces", "us", "gb_per_s"}
SPILL_KEYS = {"engine", "op", "depth", "page_bytes", "pages_per_s", "pages_per_s_min", "pages_per_s_max",
              "cpu_us_per_page", "p50_us", "p99_us"}
SERVE_KEYS = {"method", "data", "tokens", "workers", "sequences", "class", "place", "building", "retrieve_us", "phase_us", "per_s",
              "bytes_moved", "resident_share", "slowest_over_mean", "ready_s", "kept_share", "daemon_cpu_us",
              "partial", "wrong_rows", "moved_over_turnover"}
BUILD_KEYS = {"build_tokens", "build_lanes", "builds", "build_s"}
MIX_KEYS = {"method", "tokens", "workers", "sequences", "class", "retrieve_us", "requests", "per_s", "slowest_over_mean",
            "seconds", "steps", "cut"}
IDLE_KEYS = {"method", "sequences", "lanes", "tokens", "class", "memory_of", "own_bytes_each", "index_bytes_each",
             "page_bytes_each", "beyond_bytes_each"}
SERVE_BASES = ["raw-zmq", "ring", "memcpy"]
TREES = ("tree", "tree-promotion")
SEARCH_RATIOS = {"tree_over_i8_at_0.95", "tree_over_best_peer_at_0.95", "tree_over_i8_at_share_0.98"}


def check(condition, text):
    if not condition:
        sys.exit(f"smoke: {text}")


def run(bench, *arguments, wanted=0):
    done = subprocess.run([bench, *arguments], capture_output=True, text=True)
    check(done.returncode == wanted, f"{arguments}: exit status {done.returncode}, {wanted} wanted\n{done.stderr}")
    return done.stdout


def run_json(bench, *arguments):
    result = json.loads(run(bench, *arguments, "--json"))
    check(OBJECT_KEYS <= result.keys(), f"keys of the object: {sorted(result)}")
    check(MACHINE_KEYS <= result["machine"].keys(), f"keys of the machine: {sorted(result['machine'])}")
    check(result["command"] == arguments[0] and result["rows"], "command or rows")
    check(result["ratios"] or arguments[0] == "spill", "ratios")
    return result


def check_tree(row):
    check(DEFAULT_KEYS <= row["default"].keys(), f"default lacks {DEFAULT_KEYS - row['default'].keys()}")
    check(0 < row["insert_p50_us"] <= row["insert_p99_us"], f"insertions: {row}")
    check(row["insert_behind"] < row["tokens"] / 4, f"clustering is {row['insert_behind']} tokens behind")
    check(abs(row["coverage_error"]["mean"]) <= row["coverage_error"]["mean_absolute"] < 0.5, f"{row['coverage_error']}")
    for target, found in row["coverage"].items():
        check(COVERAGE_KEYS <= found.keys(), f"coverage lacks {COVERAGE_KEYS - found.keys()}")
        check(found["reachable_share"] == 0 or abs(found["mass"] - float(target)) < 0.3, f"{target}: {found}")
    efforts = [tried["effort"] for tried in row["efforts"]]
    check(len(efforts) > 1 and efforts == sorted(efforts) and efforts[-1] <= 1, f"efforts: {efforts}")
    check(row["efforts"][-1]["share"] > row["efforts"][0]["share"], "more effort finds no more")


def check_search(result, combinations, trees=TREES):
    rows = result["rows"]
    check(len(result["ratios"]) == combinations, f"{len(result['ratios'])} ratios, {combinations} wanted")
    check({row["method"] for row in rows} == {*trees, "scan-f32", "scan-bf16", "scan-i8"}, "methods of search")
    for method in (*trees, "scan-f32", "scan-bf16", "scan-i8"):
        found = [row for row in rows if row["method"] == method]
        check(len(found) == 2 * combinations, f"{len(found)} rows of {method}")
        for row in found:
            wanted = TREE_KEYS if method in TREES else SEARCH_KEYS
            check(wanted <= row.keys(), f"{method} lacks {wanted - row.keys()}")
            check(set(row["at_recall"]) == {"0.5", "0.8", "0.9", "0.95"}, "levels of recall")
            check(set(row["at_share"]) == {"0.95", "0.98", "0.99"}, "levels of share")
            check(row["at_share"]["0.95"] > 0 and row["at_recall"]["0.8"] > 0, f"{method}: {row['at_share']}")
            if method in TREES:
                check_tree(row)
    for row in rows:
        if row["method"] != "scan-i8" and row["method"].startswith("scan"):
            check(row["default"]["share"] > 0.99, f"{row['method']}: share {row['default']['share']}")
        for budget, mass in row.get("mass", {}).items():
            check(MASS_KEYS <= mass.keys(), f"mass lacks {MASS_KEYS - mass.keys()}")
            check(mass["exact"] <= 1 and mass["token_wise"] <= mass["exact"] + 1e-6, f"mass at {budget}: {mass}")
            check(mass["page_wise"] <= mass["partition_optimum"] + 1e-6, f"mass at {budget}: {mass}")
            check(mass["sequential_optimum"] <= mass["exact"] + 1e-6, f"mass at {budget}: {mass}")
    for ratio in result["ratios"].values():
        for name in trees:
            wanted = {key.replace("tree", name.replace("-", "_"), 1) for key in SEARCH_RATIOS}
            check(wanted <= ratio.keys(), f"ratios: {sorted(ratio)}")
        check(ratio[f"{trees[0].replace('-', '_')}_over_i8_at_share_0.98"] > 0, "no ratio at .98")


def check_step(result, combinations, trees):
    for row in result["rows"]:
        check(STEP_KEYS <= row.keys(), f"step lacks {STEP_KEYS - row.keys()}")
        check(row["search_ms"] > 0 and row["gather_ms"] != 0 and 0 < row["share"] <= 1 + 1e-6, f"step row {row}")
        if row["method"] in TREES:
            check(row["build_s"] > 0 and row["insert_us_per_key"] > 0, "costs of the tree")
    check({row["method"] for row in result["rows"]} == {*trees, "scan-i8"}, "methods of step")
    scans = [row for row in result["rows"] if row["method"] == "scan-i8"]
    check(len(scans) == 2 * combinations, f"{len(scans)} rows of scan-i8")
    check(len(result["ratios"]) == combinations, "ratios of step")
    for ratio in result["ratios"].values():
        for name in trees:
            check(ratio[f"{name.replace('-', '_')}_over_i8"] > 0, f"ratio {ratio}")


def check_copy(result, paths):
    rows = result["rows"]
    check([row["path"] for row in rows] == [*paths] * 2, f"paths of copy: {rows}")
    for row in rows:
        check(COPY_KEYS <= row.keys() and row["us"] > 0, f"copy: {row}")
        check((row["gb_per_s"] > 0) == (row["changed"] > 0), f"copy: {row}")
    check([row["bytes"] for row in rows[:: len(paths)]] == [32 * 4096, 64 * 4096], "bytes of copy")
    for ratio in result["ratios"].values():
        check(ratio["over_memcpy"] > 0 and ("over_link" in ratio) == ("cuda-link" in paths), f"ratio {ratio}")
        check(("over_link_kernel" in ratio) == ("cuda-kernel" in paths), f"ratio {ratio}")


def check_spill(result, engines, depths):
    rows = result["rows"]
    wanted = [(engine, op, depth) for engine in engines for op in ("read", "write") for depth in depths]
    check([(row["engine"], row["op"], row["depth"]) for row in rows] == wanted, f"rows of spill: {rows}")
    for row in rows:
        check(SPILL_KEYS <= row.keys(), f"spill lacks {SPILL_KEYS - row.keys()}")
        check(0 < row["p50_us"] <= row["p99_us"] and row["cpu_us_per_page"] > 0, f"spill: {row}")
        check(0 < row["pages_per_s_min"] <= row["pages_per_s"] <= row["pages_per_s_max"], f"spill: {row}")
    ratios = result["ratios"]
    check(bool(ratios) == ("fio" in engines), f"ratios of spill: {ratios}")
    if ratios:
        for op in ("read", "write"):
            of = [ratios[f"depth={depth}"][f"{op}_over_fio"] for depth in depths]
            check(ratios[f"{op}_over_fio_min"] == min(of) > 0, f"worst depth: {ratios}")
        check(ratios["cpu_over_fio_max"] > 0, f"ratio of CPU: {ratios}")


# Here, with and without fio; nothing is left in the folder.
def run_spill(bench):
    small = ("spill", "--rounds", "1", "--seconds", "0.1", "--bytes", "4194304", "--depths", "1,8")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        done = subprocess.run([bench, *small, "--dir", folder, "--json"], capture_output=True, text=True)
        ring = () if "no io_uring" in done.stderr else ("io_uring",)
        fio = ("fio",) if ring and shutil.which("fio") else ()
        check(done.returncode == 0 and ("no fio" in done.stderr) == (bool(ring) and not fio), f"spill: {done}")
        check_spill(run_json(bench, *small, "--dir", folder), (*ring, "pread", *fio), (1, 8))
        path = os.environ["PATH"]
        os.environ["PATH"] = folder
        check_spill(run_json(bench, *small, "--dir", folder, "--page-bytes", "65536"), (*ring, "pread"), (1, 8))
        os.environ["PATH"] = path
        check(os.listdir(folder) == [], f"spill leaves {os.listdir(folder)}")
    run(bench, *small, "--dir", "/nowhere", wanted=3)
    run(bench, *small, "--page-bytes", "5000", wanted=2)
    run(bench, *small, "--depths", "65", wanted=2)
    run(bench, "copy", "--depths", "1", wanted=2)  # spill's


def check_serve_times(row):
    times = row["retrieve_us"]
    check(0 < times["p50_min"] <= times["p50"] <= times["p50_max"] and times["p50"] <= times["p99"] <= times["p999"],
          f"times of serve: {row}")


def check_serve(result, workers, heads, slot_bytes):
    rows = [row for row in result["rows"] if row["method"] == "retrieve"]
    bases = [row for row in result["rows"] if row["method"] not in ("retrieve", "mix", "idle")]
    building = [row["method"] for row in bases if row["building"]]
    check(building == ([] if "ram_cap" in rows[0] else SERVE_BASES[:1]), f"beside a build: {building}")
    working = [row["method"] for row in bases if "working_us" in row]
    check(working == SERVE_BASES[:1], f"beside a far side that computes: {working}")
    bases = [row for row in bases if not row["building"] and "working_us" not in row]
    check([row["workers"] for row in rows] == workers, f"rows of serve: {rows}")
    check([row["method"] for row in bases] == SERVE_BASES, f"baselines of serve: {bases}")
    for row in bases:
        check_serve_times(row)
    for row in rows:
        check(SERVE_KEYS <= row.keys(), f"serve lacks {SERVE_KEYS - row.keys()}")
        check_serve_times(row)
        check(row["wrong_rows"] == 0 and row["partial"] == 0 and row["per_s"] > 0, f"serve: {row}")
        # What is in the landing already need not be moved.
        check(0 < row["bytes_moved"] <= heads * (16 + 64 + 64) * slot_bytes == bases[2]["bytes_moved"], f"bytes: {row}")
        phases = row["phase_us"]
        check(set(phases) == {"queue", "search", "fetch", "copy", "wire"}, f"phases: {phases}")
        check(0 < phases["search"] < row["retrieve_us"]["p50_max"] and phases["wire"] > 0, f"phases: {phases}")
        check(0 < row["slowest_over_mean"] <= 1 + 1e-9 and 0 < row["kept_share"] < 1, f"serve: {row}")
        # Landings in GPU memory may be sent as whole blocks.
        check(row["moved_over_turnover"] >= 1 - 1e-6, f"less moved than has changed: {row}")
        check(row["place"] != "host" or row["moved_over_turnover"] < 1.05, f"more moved than has changed: {row}")
        check((BUILD_KEYS <= row.keys()) == row["building"], f"keys of building: {row}")
        check(row["daemon_cpu_us"] > 0 and 0 < row["ready_s"] < 60, f"serve: {row}")
    for of, ratio in result["ratios"].items():
        check(of.startswith("idle=") or ratio["overhead_over_raw_zmq"] > 0, f"ratios of serve: {ratio}")
    return rows, next(iter(result["ratios"].values()))


# The less memory there is, the more pages are read; with all of them in memory none is.
def check_serve_caps(rows, ratio, caps):
    check([row["ram_cap"] for row in rows] == caps, f"shares of serve: {rows}")
    check(rows[0]["resident_share"] == 1 and rows[0]["pages_read"] == 0, f"everything fits: {rows[0]}")
    for before, row in zip(rows, rows[1:]):
        check(row["pages_read"] > before["pages_read"] and row["resident_share"] < before["resident_share"], f"{rows}")
        check(row["resident_share"] < row["ram_cap"] + 0.07, f"more in memory than there is room for: {row}")
        check(row["phase_us"]["fetch"] > 0 and 0 < row["device_us"]["p50"] <= row["device_us"]["p99"], f"{row}")
        of = ratio[f"ram_cap={row['ram_cap']:g}"]
        check(of["retrieve_over_resident"] > 1 and of["retrieve_over_device"] > 0.5, f"ratios at a share: {of}")


# Known queries bring what is asked for; those of another layer or step are followed as long as that pays.
def check_serve_hints(rows, ratio, hints):
    check([row["hint"] for row in rows] == ["none", *hints], f"hints of serve: {rows}")
    for row in rows[1:]:
        of = ratio[f"ram_cap={row['ram_cap']:g},hint={row['hint']}"]
        check(row["pages_hinted"] >= 0 and "hinted_useful" in row, f"hints: {row}")
        check("device_us" not in row and of["retrieve_over_resident"] > 0, f"hints: {row} {of}")
    check(rows[-1]["hint"] == "exact" and rows[-1]["pages_hinted"] > 0 < rows[-1]["hinted_useful"], f"known queries: {rows[-1]}")


# A GPU that is asked for and not there is named; with one, each place has its rows.
def run_serve_places(bench, small, fake_cuda):
    os.environ["ICECACHE_CUDA_LIBRARY"] = "/nowhere/libcuda.so"
    for place in ("pull", "push"):
        run(bench, *small, "--place", place, wanted=3)
    (alone, building), _ = check_serve(run_json(bench, *small, "--place", "auto"), [1, 1], 2, 512)
    check(alone["place"] == building["place"] == "host", f"auto without a GPU: {alone}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(ICECACHE_CUDA_LIBRARY=fake_cuda, FAKE_CUDA_DIR=folder)
        result = run_json(bench, *small, "--place", "host,pull,push")
        rows, ratio = check_serve(result, [1] * 6, 2, 512)
        check([row["place"] for row in rows] == ["host"] * 2 + ["pull"] * 2 + ["push"] * 2, f"places: {rows}")
        check("retrieve_over_host" not in ratio, f"ratios of host: {ratio}")
        of_gpu = {key.rpartition("=")[2]: of for key, of in result["ratios"].items() if "place=" in key}
        check(set(of_gpu) == {"pull", "push"}, f"ratios of places: {result['ratios']}")
        check(all(of["retrieve_over_host"] > 0 for of in of_gpu.values()), f"ratios of places: {of_gpu}")
        rows, _ = check_serve(run_json(bench, *small, "--place", "auto"), [1, 1], 2, 512)
        check(rows[0]["place"] == "push", f"auto with a GPU: {rows[0]}")
    run(bench, *small, "--place", "gpu", wanted=2)
    run(bench, *small, "--place", "push,push", wanted=2)
    run(bench, *small, "--place", "pull,push", "--ram-cap", "0.5", wanted=2)


# A row for each class; the work is that of the seed, whatever the time it takes.
def check_mix(result, workers, sequences):
    rows = [row for row in result["rows"] if row["method"] == "mix"]
    check([row["class"] for row in rows] == ["decode", "bulk", "admin"], f"rows of the mixed load: {rows}")
    for row in rows:
        check(MIX_KEYS <= row.keys() and not row["cut"], f"mixed load lacks {MIX_KEYS - row.keys()}")
        check((row["workers"], row["sequences"]) == (workers, workers * sequences), f"mixed load: {row}")
        times = row["retrieve_us"]
        check(0 < times["p50"] <= times["p99"] <= times["p999"] and row["per_s"] > 0, f"mixed load: {row}")
        check(0 < row["slowest_over_mean"] <= 1 + 1e-9, f"mixed load: {row}")
    decode, bulk, admin = rows
    check(decode["wrong_rows"] == 0 and decode["bytes_moved"] > 0 and 1 <= decode["batch"] <= sequences, f"{decode}")
    check(set(decode["phase_us"]) == {"queue", "search", "fetch", "copy", "wire"}, f"{decode}")
    check(bulk["tokens_per_s"] > 0 and decode["tokens_per_s"] > 0, f"tokens of the mixed load: {rows}")
    check(admin["arrivals"] == admin["departures"] > workers and 0 < admin["forks"] < admin["arrivals"], f"{admin}")
    return [{kind: of["count"] for kind, of in row["requests"].items()} for row in rows]


def check_idle(result, sequences):
    empty, filled = [row for row in result["rows"] if row["method"] == "idle"]
    check(IDLE_KEYS <= empty.keys() and IDLE_KEYS <= filled.keys(), f"idle: {empty}, {filled}")
    check((empty["sequences"], empty["lanes"], empty["tokens"]) == (sequences, 256, 0), f"idle: {empty}")
    check(filled["tokens"] > 0 and filled["page_bytes_each"] > empty["page_bytes_each"] == 0, f"idle: {filled}")
    of = result["ratios"][f"idle={sequences}"]
    check(of["beyond_bytes_each"] == filled["beyond_bytes_each"] < 1 << 20, f"memory of idle sequences: {of}")


# By the clock, all parts, with 16 workers beside fewer.
def run_serve_parts(bench, where):
    small = ("serve", "--rounds", "1", "--seconds", "0.05", "--tokens", "512", "--shape", "small", "--build-tokens", "1024",
             *where)
    parts = ("--workers", "2,16", "--mix", "2x4", "--mix-steps", "48", "--idle", "10")
    result = run_json(bench, *small, *parts)
    rows, ratio = check_serve(result, [2, 2, 16, 16], 2, 256)
    check(all(row["build_tokens"] == 1024 and row["build_lanes"] == 2 for row in rows if row["building"]), f"{rows}")
    check(ratio["scaling_16"] > 0 and 0 < ratio["slowest_over_mean_16"] <= 1 + 1e-9, f"ratios of serve: {ratio}")
    counts = check_mix(result, 2, 4)
    check_idle(result, 10)
    again = run_json(bench, *small, "--workers", "1", "--mix", "2x4", "--mix-steps", "48", "--idle", "0")
    check(check_mix(again, 2, 4) == counts, "the same seed, other work")
    check(not any(row["method"] == "idle" for row in again["rows"]), "idle sequences that nobody asked for")
    for wrong in (("--mix", "0x4"), ("--mix", "4"), ("--mix", "4x1000"), ("--mix", "2x2x2"), ("--idle", "x"),
                  ("--steps", "4"), ("--ram-cap", "0.5"), ("--build-tokens", "1")):
        run(bench, *small, *wrong, wanted=2)
    run(bench, "step", "--mix", "2x4", wanted=2)  # serve's


# Nothing is left behind, neither files nor processes.
def run_serve(bench, trace, fake_cuda):
    before = set(glob.glob("/tmp/icecache-serve-*"))
    small = ("serve", "--rounds", "1", "--steps", "4", "--mix", "none", "--idle", "0", "--build-tokens", "1024")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        where = ("--dir", folder)
        rows, ratio = check_serve(run_json(bench, *small, *where, "--tokens", "1024", "--workers", "1,2"), [1, 1, 2, 2], 2, 512)
        check([row["building"] for row in rows] == [False, True] * 2, f"rows of serve: {rows}")
        check(ratio["p99_building_over_unloaded"] > 0 and ratio["p99_building_over_raw_zmq"] > 0 and "scaling_16" not in ratio, f"ratios of serve: {ratio}")
        rows, ratio = check_serve(run_json(bench, *small, *where, "--trace", trace, "--ram-cap", "0.5,0.15"), [1] * 3, 2, 256)
        check_serve_caps(rows, ratio, [1, 0.5, 0.15])
        hinted = [*where, "--tokens", "2048", "--ram-cap", "0.25", "--think-us", "2000", "--hint", "layer,exact"]
        rows, ratio = check_serve(run_json(bench, *small, *hinted), [1] * 3, 2, 512)
        check_serve_hints(rows, ratio, ["layer", "exact"])
        run(bench, *small, *where, "--daemon", "/nowhere/icecached", wanted=3)
        run(bench, *small, *where, "--daemon", "/bin/false", wanted=3)
        run_serve_parts(bench, where)
        run_serve_places(bench, (*small, *where, "--tokens", "1024", "--workers", "1"), fake_cuda)
        check(os.listdir(folder) == [], f"serve leaves {os.listdir(folder)}")
    check(set(glob.glob("/tmp/icecache-serve-*")) <= before, "serve leaves its sockets")
    run(bench, *small, "--hint", "exact", wanted=2)
    run(bench, *small, "--ram-cap", "0.5", "--hint", "exact,exact", wanted=2)
    run(bench, *small, "--ram-cap", "0.5", "--hint", "guess", wanted=2)
    run(bench, *small, "--workers", "1,2", "--ram-cap", "0.5", wanted=2)
    run(bench, *small, "--ram-cap", "0", wanted=2)
    run(bench, *small, "--tokens", "1024,2048", wanted=2)
    run(bench, "serve", "--steps", "200", "--trace", trace, wanted=2)  # more than it has
    run(bench, "search", "--workers", "1", wanted=2)  # serve's


def main():
    bench, trace, fake_cuda = sys.argv[1:]
    copy = ("copy", "--rounds", "1", "--budget", "32,64")
    host = ("memcpy", "host")
    os.environ["ICECACHE_CUDA_LIBRARY"] = "/nowhere/libcuda.so"
    check_copy(run_json(bench, *copy), host)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(ICECACHE_CUDA_LIBRARY=fake_cuda, FAKE_CUDA_DIR=folder)
        kernel = ("cuda-kernel",) * 4
        check_copy(run_json(bench, *copy), (*host, "cuda-link", "cuda-copy", "cuda-push", *kernel))
    run(bench, "copy", "--tokens", "512", wanted=2)  # of the others
    run_spill(bench)
    run_serve(bench, trace, fake_cuda)
    small = ("--rounds", "1", "--seeds", "1")
    search = run_json(bench, "search", *small, "--data", "attention,gauss", "--tokens", "1024", "--head-dim", "64",
                      "--query-heads", "1,2", "--queries", "4", "--budget", "32,64")
    check_search(search, 4)
    check_search(run_json(bench, "search", *small, "--trace", trace, "--queries", "2", "--policy", "means"), 1, TREES[:1])
    step = ("step", "--rounds", "1", "--shape", "small", "--tokens", "1024")
    check_step(run_json(bench, *step, "--budget", "32,64", "--cores", "1,2"), 4, TREES[:1])
    check_step(run_json(bench, *step, "--policy", "promotion,means", "--no-gather"), 2, TREES)
    check("tree_over_i8" in run(bench, "step", "--rounds", "1", "--shape", "small", "--tokens", "512"), "no table")
    rows = run_json(bench, "reuse", "--trace", trace, "--queries", "4", "--budget", "32")["rows"]
    check([row["keep"] for row in rows] == [0, 8, 16, 24, 32], "reuse: keep")
    for less, more in zip(rows, rows[1:]):
        check(more["bytes_per_step"] < less["bytes_per_step"] and more["mass"] < less["mass"] + 0.01, f"reuse: {more}")
    check(rows[-1]["searched"] == 0 and rows[0]["searched"] == 1, "reuse: searches")
    run(bench, "reuse", wanted=2)  # without a trace
    run(bench, "search", "--tokens", "3", wanted=2)
    run(bench, "search", "--policy", "best", wanted=2)
    run(bench, "nothing", wanted=2)
    run(bench, "search", "--cores", "2", wanted=2)  # step's
    run(bench, "step", "--peers", wanted=2)  # search's
    run(bench, "search", "--trace", "/nowhere", wanted=3)
    run(bench, "search", "--help")


if __name__ == "__main__":
    main()
