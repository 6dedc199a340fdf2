"""What the PyTorch programs of this folder share: a daemon of their own, and how much memory there is for it."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "../../client/python"))

import icecache  # noqa: E402

READY_S = 240  # the pool is populated before the daemon answers


class Daemon:
    """icecached in a folder of its own; `sockets` is what a client is given."""

    def __init__(self, path, *options):
        self.folder = tempfile.TemporaryDirectory(prefix="icecache-")
        self.sockets = self.folder.name + "/s"
        self.log = open(os.path.join(self.folder.name, "log"), "w+", encoding="utf-8")
        self.process = subprocess.Popen([path, "--socket-dir", self.sockets, *options], stderr=self.log)
        try:
            self._wait_ready()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def _wait_ready(self):
        end = time.monotonic() + READY_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                icecache.Client(self.sockets).close()
                return
            except icecache.Error:
                time.sleep(0.05)
        raise RuntimeError("the daemon does not answer; its log:\n" + self._text())

    def _text(self):
        self.log.seek(0)
        return self.log.read()[-4000:]

    def stop(self):
        """Has it ended as it should?"""
        self.process.terminate()
        try:
            status = self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        if status != 0:
            print(self._text())
        return status == 0


def available_bytes():
    """What this machine, or the container around this process, has left in memory."""
    for line in pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            found = int(line.split()[1]) << 10
    folder = pathlib.Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        found = found if limit == "max" else min(found, int(limit) - used)
    except (OSError, ValueError):
        pass  # version 1, or none: the daemon looks for itself
    return found


def gpu_bytes(pid):
    """What the GPU's memory holds for a process, or None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    for line in listed.splitlines():
        found, used = line.split(",")
        if found.strip() == str(pid) and used.strip().isdigit():
            return int(used) << 20
    return 0 if listed.strip() else None
