"""How the benchmarks measure: alternating workloads in fresh processes, peak memory, foreign load, matmul rate.

A workload is a function `build(options) -> step`: it makes everything a step needs and returns a function that runs one
step and returns its loss. Every workload lives in a process of its own, so that peak memory is its own; workloads that
are compared take turns, so that a disturbance of the machine hits all of them.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Build = Callable[[dict[str, Any]], Callable[[], float]]


def run_alternating(
    workloads: dict[str, tuple[Build, dict[str, Any]]], warmup: int, steps: int, rounds: int, threads: int
) -> dict[str, Any]:
    """Time `steps` steps of every workload in turn, `rounds` times, after `warmup` steps each.

    Returns:
        The result of each workload by name (see `summarise`), and `foreign_cpu`, the share of the machine's processor
        time that other processes took while the clock was running.
    """
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name, (build, options) in workloads.items():
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, build, options, threads), daemon=True)
        process.start()
        there.close()  # so that a failed worker ends the conversation
        workers[name] = (process, here)
    for name, (_, pipe) in workers.items():
        _ask(pipe, ("warm up", warmup), name)
    timings: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    foreign, elapsed = 0.0, 0.0
    for _ in range(rounds):
        for name, (_, pipe) in workers.items():
            blocks = _ask(pipe, ("time", steps), name)
            timings[name] += blocks
            foreign += sum(block["foreign"] for block in blocks)
            elapsed += sum(block["seconds"] for block in blocks)
    results = {name: summarise(timings[name]) | _ask(pipe, ("memory",), name) for name, (_, pipe) in workers.items()}
    for process, pipe in workers.values():
        pipe.send(("stop",))
        process.join()
    return {"results": results, "foreign_cpu": round(foreign / elapsed / os.cpu_count(), 3)}


def _ask(pipe, request: tuple, name: str) -> Any:
    pipe.send(request)
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(f"The workload {name!r} failed; its error is printed above.") from None


def _work(pipe, build: Build, options: dict[str, Any], threads: int) -> None:
    if threads:
        torch.set_num_threads(threads)
    device = torch.device(options.get("device", "cpu"))
    imported = _resident()
    step = build(options)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what building left behind is not the step's
    held = _resident()
    losses: list[float] = []
    while (request := pipe.recv())[0] != "stop":
        if request[0] == "warm up":
            losses += [step() for _ in range(request[1])]
            getattr(step, "warmed_up", lambda: None)()
            _reset_peak(device)
            pipe.send(None)
        elif request[0] == "time":
            pipe.send([_timed(step, device, losses) for _ in range(request[1])])
        else:
            pipe.send({**_peak(device, imported, held), "losses": losses[:3], **getattr(step, "notes", dict)()})


def _timed(step: Callable[[], float], device: torch.device, losses: list[float]) -> dict[str, float]:
    busy, used, started = _busy_seconds(), time.process_time(), time.perf_counter()
    losses.append(step())
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds, used = time.perf_counter() - started, time.process_time() - used
    return {"seconds": seconds, "cpu": used, "foreign": max(_busy_seconds() - busy - used, 0.0)}


def summarise(timings: list[dict[str, float]]) -> dict[str, Any]:
    """Seconds a step: the fastest, the median, the quartiles; and the fewest processor seconds."""
    seconds = sorted(block["seconds"] for block in timings)
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {
        "step_seconds_min": round(seconds[0], 4),
        "step_seconds_median": round(statistics.median(seconds), 4),
        "step_seconds_quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "cpu_seconds_min": round(min(block["cpu"] for block in timings), 4),
        "timed_steps": len(seconds),
    }


def _busy_seconds() -> float:
    """Processor seconds, over all cores, since the machine started."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def busy_share() -> Callable[[], float]:
    """Start a clock; what it returns tells the share of the machine that other processes have had since, the children
    of this one not counted as others."""
    busy, used, started = _busy_seconds(), _own_seconds(), time.perf_counter()

    def share() -> float:
        foreign = _busy_seconds() - busy - (_own_seconds() - used)
        return round(max(foreign, 0.0) / (time.perf_counter() - started) / os.cpu_count(), 3)

    return share


def _own_seconds() -> float:
    """Processor seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _reset_peak(device: torch.device) -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device, imported: int, held: int) -> dict[str, float]:
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    memory = {"peak_rss_gb": peak, "rss_after_import_gb": imported, "rss_after_build_gb": held}
    if device.type == "cuda":
        memory["peak_allocated_gb"] = torch.cuda.max_memory_allocated()
        memory["peak_reserved_gb"] = torch.cuda.max_memory_reserved()
    return {name: round(value / 1e9, 3) for name, value in memory.items()}


def matmul_rate(device: str, dtype: torch.dtype, threads: int = 0) -> float:
    """FLOP/s of the fastest of a few large square matrix products: the ceiling that a step is held against."""
    if threads:
        torch.set_num_threads(threads)
    side = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        started = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def environment(device: str) -> dict[str, Any]:
    """What a result depends on besides the code."""
    import diffusers
    import transformers

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "machine": torch.cuda.get_device_name()
        if device != "cpu"
        else f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "diffusers": diffusers.__version__,
        "commit": commit,
    }
