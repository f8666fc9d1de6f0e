"""Two processes that train together over a slow link, on one Linux computer; needs root.

    sudo .venv/bin/python recipes/two_networks.py RECIPE --delay-ms 50 --steps 60 [KEY=VALUE ...]

Each process lives in a network namespace of its own; the only way between them is a pair of tunnel
devices, and this program carries each packet from one to the other after the delay. Prints the
bytes that crossed for each step (IP packets, with headers and acknowledgements), the time of a
step, and whether the journal is that of one process alone.
"""

import argparse
import fcntl
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

ADDRESS = "10.77.0.{}"
SPACE, DEVICE = "qzo-{}", "qzo-link-{}"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
FIRST = 10  # steps that are not counted: connections are made, caches are cold


def main() -> None:
    """Run both, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--delay-ms", type=float, default=50, help="of every packet, either way")
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"max_steps={given.steps}", *given.overrides]
        alone, together = Path(folder, "alone"), Path(folder, "together")
        train = ["-m", "qzo", "train", given.recipe, *keys]
        command = [sys.executable, *train, f"output_dir={alone}"]
        single = timed([command], alone, given.steps)
        with two_networks(given.delay_ms / 1000) as link:
            commands = [
                [
                    *("ip", "netns", "exec", SPACE.format(node)),
                    *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2"),
                    *(f"--node-rank={node}", "--nproc-per-node=1", "--master-port=29517"),
                    *(f"--master-addr={ADDRESS.format(1)}", *train, f"output_dir={together}"),
                ]
                for node in (0, 1)
            ]
            double = timed(commands, together, given.steps, link)
        steps = step_lines(together)
        derivatives = len(steps[0]["derivatives"])
        result = {
            "delay_ms": given.delay_ms,
            "steps": given.steps - FIRST,
            "derivatives_per_step": derivatives,
            "bytes_per_step": round(double["bytes"], 1),
            "packets_per_step": round(double["packets"], 1),
            "bytes_per_derivative_and_process": round(double["bytes"] / derivatives / 2, 1),
            "seconds_per_step": {
                "one process": round(single["seconds"], 4),
                "two processes": round(double["seconds"], 4),
            },
            "journals_are_equal": step_lines(alone) == steps,
        }
        print(json.dumps(result))


class SlowLink(Thread):
    """Carries packets between two tunnel devices, each some time after it came.

    Args:
        delay: In seconds, of every packet, either way.
    """

    def __init__(self, delay: float) -> None:
        super().__init__(daemon=True)
        self.delay = delay
        self.files = [self._tunnel(DEVICE.format(node)) for node in (0, 1)]
        self.bytes = self.packets = 0

    @staticmethod
    def _tunnel(name: str) -> int:
        """Make a tunnel device of IP packets; it goes when its file is closed."""
        file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
        return file

    def run(self) -> None:
        """Carry packets until the devices are gone."""
        with suppress(OSError):
            self._carry()

    def _carry(self) -> None:
        waiting: deque[tuple[float, int, bytes]] = deque()
        while True:
            timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            ready, _, _ = select.select(self.files, [], [], timeout)
            for file in ready:
                packet = os.read(file, 65536)
                self.bytes += len(packet)
                self.packets += 1
                other = self.files[file == self.files[0]]
                waiting.append((time.monotonic() + self.delay, other, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, other, packet = waiting.popleft()
                os.write(other, packet)


@contextmanager
def two_networks(delay: float) -> Iterator[SlowLink]:
    """Make two namespaces with a slow link between them; remove them at the end."""
    link = SlowLink(delay)
    for node in (0, 1):
        ip("netns", "add", SPACE.format(node))
    try:
        for node in (0, 1):
            space, device = SPACE.format(node), DEVICE.format(node)
            ip("link", "set", device, "netns", space)
            inside = ("-n", space)
            ip(*inside, "addr", "add", f"{ADDRESS.format(node + 1)}/24", "dev", device)
            ip(*inside, "link", "set", device, "up")
            ip(*inside, "link", "set", "lo", "up")
        link.start()
        yield link
    finally:
        for node in (0, 1):
            ip("netns", "del", SPACE.format(node))


def ip(*arguments: str) -> None:
    """Call the program of that name, which manages networks."""
    subprocess.run(["ip", *arguments], check=True)


def timed(
    commands: list[list[str]], run: Path, steps: int, link: SlowLink | None = None
) -> dict[str, float]:
    """Run commands to their end; return time and traffic of the steps after the first ones.

    Raises:
        RuntimeError: One of them failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "GLOO_SOCKET_IFNAME": DEVICE.format(node)},
            stdout=subprocess.DEVNULL,
        )
        for node, command in enumerate(commands)
    ]
    marks = []
    for wanted in (FIRST, steps):
        while len(step_lines(run)) < wanted:
            if any(process.poll() not in (None, 0) for process in processes):
                raise RuntimeError("a process failed, see above")
            time.sleep(0.02)
        marks.append((time.monotonic(), *((link.bytes, link.packets) if link else (0, 0))))
    for process in processes:
        process.wait()
    first, last = marks
    measures = zip(("seconds", "bytes", "packets"), first, last, strict=True)
    return {name: (end - start) / (steps - FIRST) for name, start, end in measures}


def step_lines(run: Path) -> list[dict[str, Any]]:
    """Return the complete steps of a journal, as far as it is written."""
    journal = run / "journal.jsonl"
    if not journal.exists():
        return []
    lines = journal.read_bytes().rpartition(b"\n")[0].split(b"\n")[1:]
    return [value for value in map(json.loads, lines) if "derivatives" in value]


if __name__ == "__main__":
    main()
