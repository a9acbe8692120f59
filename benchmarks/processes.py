"""Wall time and peak memory of commands, each in a process of its own."""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
SAMPLING_SECONDS = 0.02


@dataclass(frozen=True)
class Cost:
    """What one or several runs of a command took: medians.

    Attributes
    ----------
    seconds
        Wall time from start to end of the process.
    resident
        Peak resident memory in bytes as the kernel counts it (`ru_maxrss` of wait4), with the pages of mapped files.
    anonymous
        Peak of what the process allocated itself (RssAnon in bytes, sampled every 20 ms): without mapped files.
    runs
        How many runs.
    """

    seconds: float
    resident: float
    anonymous: float
    runs: int = 1

    @classmethod
    def median_of(cls, costs: Sequence[Cost]) -> Cost:
        return cls(
            median(cost.seconds for cost in costs),
            median(cost.resident for cost in costs),
            median(cost.anonymous for cost in costs),
            runs=len(costs),
        )


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command in the root of the repository.

    The kernel counts memory of this process at the fork towards the child's peak, so nothing heavy is imported here.

    Raises
    ------
    RuntimeError
        The command failed; the message holds the end of what it wrote to standard error.
    """
    stop, anonymous = threading.Event(), [0]
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        sampler = threading.Thread(target=_sample_anonymous, args=(process.pid, stop, anonymous))
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        stop.set()
        sampler.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(
                f"{' '.join(command)} failed: {errors.read()[-2000:].decode(errors='replace')}"
            )
    return Cost(seconds, usage.ru_maxrss * 1024, max(anonymous))


def seconds_of_others() -> float:
    """Processor time that all but this process and its finished children took; only differences mean something."""
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    everyone = (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return everyone - sum(usage.ru_utime + usage.ru_stime for usage in own)


def _sample_anonymous(pid: int, stop: threading.Event, samples: list[int]) -> None:
    while not stop.wait(SAMPLING_SECONDS):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                samples.append(1024 * int(line.split()[1]))
