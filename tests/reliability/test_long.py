"""Long runs do not decay."""

import json
import statistics

import pytest

from tests.reliability.run import start

STEPS, EVERY = 2000, 20


@pytest.mark.slow
def test_memory_files_and_threads_stay_constant(tmp_path, record_property):
    process = start(
        tmp_path,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        dataloader_num_workers=2,
        dataloader_persistent_workers=True,
        logging_steps=50,
        save_strategy="steps",
        save_steps=500,
        save_total_limit=1,
        measure=EVERY,
    )
    process.join()
    assert process.exitcode == 0, (tmp_path / "log.txt").read_text()
    samples = json.loads((tmp_path / "usage.json").read_text())["samples"]
    assert len(samples) == STEPS // EVERY
    warm, end = samples[len(samples) // 4 : len(samples) // 2], samples[-len(samples) // 4 :]
    before, after = (statistics.median(sample["bytes"] for sample in part) for part in (warm, end))
    record_property("growth", after / before - 1)
    record_property(
        "first and last 100 steps, seconds", [samples[n]["seconds"] - samples[n - 5]["seconds"] for n in (5, -1)]
    )
    assert after < 1.01 * before
    assert max(sample["files"] for sample in end) <= max(sample["files"] for sample in warm)
    assert max(sample["threads"] for sample in end) <= max(sample["threads"] for sample in warm)
