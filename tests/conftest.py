"""Fixtures that tests share. Nothing here imports torch: the tests of `plan` run without it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tuppence import host
from tuppence.config import Budget, Data, DataPlan, Machine, Model, Run, Train
from tuppence.plan.hardware import Calibration

# As every verb does, and before any test module imports torch.
host.settle_threads(host.usable_cores())


def fsync(handle: int) -> None:
    """No test pulls the plug, so that what is flushed here need not reach the disk."""
    os.fstat(handle)


os.fsync = fsync


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of the test's own: nothing reads the person's calibrations, prices or settings."""
    home = tmp_path_factory.mktemp("cache")
    for variable in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "LOCALAPPDATA", "APPDATA"):
        monkeypatch.setenv(variable, str(home))
    if sys.platform == "darwin":  # there the cache folder is ~/Library/Caches
        monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture(autouse=True, scope="module")
def imported_is_no_garbage() -> None:
    """Training collects garbage before it begins: a third of a second each time for what the test
    modules have imported, which is set aside."""
    gc.collect(1)
    gc.freeze()


@pytest.fixture(scope="session")
def calibration() -> Calibration:
    """A made-up machine: two cores of a server that have bf16 units. No shape was timed on it."""
    return Calibration(
        version=1,
        name="Test CPU",
        device="cpu",
        threads=2,
        torch="2.11.0",
        measured_at="2026-01-01T00:00:00+00:00",
        matmul_tflops={"fp32": 0.15, "bf16": 0.6},
        memory_gbs=20.0,
        memory_gib=8.0,
        disk_write_mbs=500.0,
        startup_seconds=3.0,
        startup_rss_gib=0.3,
        timings={},
    )


@pytest.fixture(scope="session")
def data_plan() -> DataPlan:
    """Tiny Shakespeare in characters, as `prepare` finds it."""
    return DataPlan(
        source="shakespeare",
        tokenizer="char",
        text_field="text",
        max_tokens=None,
        val_tokens_asked=None,
        vocab_size=65,
        train_tokens=1_003_854,
        val_tokens=111_540,
        bytes_per_token=1.0,
        inputs_sha256="0" * 64,
        exact=True,
        packing="plain",
    )


@pytest.fixture(scope="session")
def small_run() -> Run:
    """A run that plans anywhere: a small model, an hour's price, two cents."""
    return Run(
        name="small",
        budget=Budget(usd=0.02),
        machine=Machine(usd_per_hour=0.40),
        model=Model(family="gpt2", n_layer=2, n_head=2, n_embd=64, sequence_len=32),
        data=Data(source="shakespeare", tokenizer="char"),
        train=Train(batch_tokens=16 * 32, learning_rate=1e-3),
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes the one file system of a test, of so many megabytes."""
    place = tmp_path / "disk"
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")

    def small_disk(megabytes: int) -> Path:
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
        mounted = subprocess.run(words, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
        return place

    yield small_disk
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)
