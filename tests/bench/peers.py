"""FAISS and hnswlib beside the tree: started by `icecache-bench search --peers`, not by hand.

Arguments: a folder with K<lane>.npy (keys), Q<lane>.npy (queries), best<lane>.npy (the 64 best of one head of each
query) and range<lane>.npy (positions that may be selected), and the number of lanes. Reads commands from standard input,
one per line, and answers each with one line of JSON: build, warm, cold, rows.

A query is one head asked alone, one call each. The wheel's cost of a call is measured on an index of one key and taken
off. Cold: another 256 MiB are read before each query."""
import json
import statistics
import sys
import time

LEVELS = ("0.5", "0.8", "0.9", "0.95")
WANTED = 64
COLD_QUERIES = 16
CHEAPER_FIRST = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def quiet_import(name):
    try:
        return __import__(name)
    except ImportError:
        print(f"icecache-bench: Python has no module {name}: `pip install {name.replace('faiss', 'faiss-cpu')}`",
              file=sys.stderr)
        return None


numpy = quiet_import("numpy")
faiss = quiet_import("faiss") if numpy else None
hnswlib = quiet_import("hnswlib") if numpy else None


class Lane:
    def __init__(self, folder, number):
        def load(name):
            return numpy.load(f"{folder}/{name}{number}.npy")
        self.keys = load("K")
        queries = load("Q")
        heads = queries.shape[1]
        self.queries = [numpy.ascontiguousarray(queries[i, i % heads][None]) for i in range(len(queries))]
        self.best = [set(row[row != 0xffffffff].tolist()) for row in load("best")]
        self.ranges = load("range")
        hidden = len(self.keys) - int((self.ranges[:, 1] - self.ranges[:, 0]).min())
        # What may not be selected is dropped from the answers, so ask for that many more (a trace's sinks, window and
        # later tokens; none in generated data).
        self.asked = WANTED + min(hidden, 2 * WANTED)

    def recall(self, number, ids):
        first, end = self.ranges[number]
        kept = [i for i in ids.tolist() if first <= i < end][:WANTED]
        return len(self.best[number].intersection(kept)) / max(1, len(self.best[number]))


class Faiss:
    """One index type, swept over its parameters: groups of values, each from cheap to dear."""

    def __init__(self, name, factory, groups):
        self.name, self.factory, self.groups = name, factory, groups

    def build(self, keys):
        index = faiss.index_factory(keys.shape[1], self.factory, faiss.METRIC_INNER_PRODUCT)
        index.train(keys)
        index.add(keys)
        return index

    def set(self, index, value):
        if value:
            faiss.ParameterSpace().set_index_parameters(index, value)

    def search(self, index, query, count):
        return index.search(query, count)[1][0]

    def add(self, index, key):
        index.add(key)

    def bytes(self, index):
        return len(faiss.serialize_index(index))


class Hnswlib:
    """Keys get one more coordinate that makes the largest inner product the nearest neighbour."""
    name = "hnswlib"
    groups = [(64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)]

    def __init__(self):
        self.mean = self.most = None

    def build(self, keys):
        self.mean = keys.mean(0)
        centred = keys - self.mean
        squares = (centred ** 2).sum(1)
        self.most = squares.max()
        last = numpy.sqrt(numpy.maximum(self.most - squares, 0))[:, None]
        index = hnswlib.Index("l2", keys.shape[1] + 1)
        index.init_index(len(keys) + 4096, ef_construction=200, M=16)
        index.set_num_threads(1)
        index.add_items(numpy.hstack([centred, last]))
        return index

    def set(self, index, value):
        index.set_ef(value)

    def search(self, index, query, count):
        return index.knn_query(numpy.hstack([query, [[0]]]), min(count, index.get_current_count()))[0][0]

    def add(self, index, key):
        centred = key - self.mean
        last = max(self.most - (centred ** 2).sum(), 0) ** 0.5
        index.add_items(numpy.hstack([centred, [[last]]]))

    def bytes(self, index):
        return index.index_file_size()


def kinds(tokens, head_dim):
    lists = int(tokens ** 0.5)

    def probes(most, refine=""):
        return [f"nprobe={v}{refine}" for v in CHEAPER_FIRST if v <= most]

    def refined(most):
        return [probes(most, f",k_factor_rf={factor}") for factor in (2, 4, 8, 16)]

    if faiss:
        yield Faiss("faiss-flat", "Flat", [[""]])
        yield Faiss("faiss-ivf-flat", f"IVF{lists},Flat", [probes(lists)])
        yield Faiss("faiss-ivf4-flat", f"IVF{4 * lists},Flat", [probes(4 * lists)])
        yield Faiss("faiss-ivf-sq8", f"IVF{lists},SQ8", [probes(lists)])
        yield Faiss("faiss-ivf-pqfs", f"IVF{lists},PQ{head_dim // 2}x4fs,RFlat", refined(lists))
        yield Faiss("faiss-ivf-rabitq", f"IVF{lists},RaBitQ,RFlat", refined(lists))
        yield Faiss("faiss-hnsw", "HNSW32,Flat", [[f"efSearch={v}" for v in CHEAPER_FIRST if v >= 16]])
    if hnswlib:
        yield Hnswlib()


class Contender:
    def __init__(self, kind, lanes):
        self.kind, self.lanes = kind, lanes
        begin = time.perf_counter()
        self.indexes = [kind.build(lane.keys) for lane in lanes]
        self.build_us = (time.perf_counter() - begin) * 1e6 / sum(len(lane.keys) for lane in lanes)
        self.bytes = sum(kind.bytes(index) for index in self.indexes) / sum(len(lane.keys) for lane in lanes)
        self.settings = self.find_settings()
        self.us = {(level, cold): [] for level in LEVELS for cold in (False, True)}
        self.call_us = {False: [], True: []}

    def find_settings(self):
        """The fastest value that reaches each level of recall. A group of values is walked until it reaches the last."""
        found = {}
        for group in self.kind.groups:
            for value in group:
                recalls = []
                begin = time.perf_counter()
                for lane, index in zip(self.lanes, self.indexes):
                    self.kind.set(index, value)
                    recalls += [lane.recall(i, self.kind.search(index, query, lane.asked))
                                for i, query in enumerate(lane.queries)]
                spent = time.perf_counter() - begin
                recall = statistics.fmean(recalls)
                for level in LEVELS:
                    if recall >= float(level) and (level not in found or spent < found[level][0]):
                        found[level] = (spent, value)
                if recall >= float(LEVELS[-1]):
                    break
        return {level: value for level, (_, value) in found.items()}

    def cost_of_a_call(self, cold, other):
        """What a call costs on an index of one key; cold, this is mostly the interpreter's way back into the caches."""
        query = self.lanes[0].queries[0]
        if isinstance(self.kind, Faiss):
            index = faiss.IndexFlatIP(query.shape[1])
            index.add(query)
        else:
            index = hnswlib.Index("l2", query.shape[1] + 1)
            index.init_index(16)
            index.add_items(numpy.hstack([query, [[0]]]))
        times = []
        for _ in range(COLD_QUERIES if cold else 200):
            if cold:
                other.sum()
            begin = time.perf_counter()
            self.kind.search(index, query, 1)
            times.append(time.perf_counter() - begin)
        return statistics.median(times) * 1e6

    def round(self, cold, other):
        call_us = self.cost_of_a_call(cold, other)
        self.call_us[cold].append(call_us)
        for value in sorted(set(self.settings.values())):
            spent, count = 0.0, 0
            for lane, index in zip(self.lanes, self.indexes):
                self.kind.set(index, value)
                for query in lane.queries[:COLD_QUERIES] if cold else lane.queries[:4] + lane.queries:
                    if cold:
                        other.sum()
                    begin = time.perf_counter()
                    self.kind.search(index, query, lane.asked)
                    spent += time.perf_counter() - begin
                    count += 1
            us = max(spent / count * 1e6 - call_us, 0.01)
            for level, chosen in self.settings.items():
                if chosen == value:
                    self.us[level, cold].append(us)

    def insert_us(self):
        """Single additions, of keys that are there already; last, because they change the index."""
        times = []
        for lane, index in zip(self.lanes, self.indexes):
            for i in range(0, len(lane.keys), max(1, len(lane.keys) // 32)):
                key = lane.keys[i:i + 1]
                begin = time.perf_counter()
                self.kind.add(index, key)
                times.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(times)

    def rows(self):
        insert_us = self.insert_us()
        for cold in (True, False):
            row = {"method": self.kind.name, "cold": cold, "build_us_per_key": self.build_us,
                   "insert_us_per_key": insert_us, "bytes_per_key": self.bytes, "call_us": statistics.median(self.call_us[cold] or [0])}
            for suffix, pick in (("", statistics.median), ("_min", min), ("_max", max)):
                row["at_recall" + suffix] = {level: pick(self.us[level, cold]) if self.us[level, cold] else None
                                             for level in LEVELS}
            yield row


def contenders(lanes):
    for kind in kinds(len(lanes[0].keys), lanes[0].keys.shape[1]):
        print(f"peers: {kind.name}", file=sys.stderr)
        try:
            yield Contender(kind, lanes)
        except RuntimeError as error:  # an index type that this FAISS does not know
            print(f"peers: {kind.name}: {str(error).splitlines()[0]}", file=sys.stderr)


def main():
    if not faiss and not hnswlib:
        return
    if faiss:
        faiss.omp_set_num_threads(1)
    lanes = [Lane(sys.argv[1], i) for i in range(int(sys.argv[2]))]
    other = numpy.ones((256 << 20) // 8)
    running = []
    for line in sys.stdin:
        command = line.strip()
        if command == "build":
            running = list(contenders(lanes))
            answer = bool(running)
        elif command in ("warm", "cold"):
            for contender in running:
                contender.round(command == "cold", other)
            answer = True
        else:
            answer = [row for contender in running for row in contender.rows()]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
