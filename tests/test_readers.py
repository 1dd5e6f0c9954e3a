"""Processes that read images end with the run, whatever ends it: nothing hangs at exit."""

from __future__ import annotations

import multiprocessing
import signal
import time

import pytest
from torch.utils.data import Dataset

from ovbench.benchmarks.synth.copies import synth
from ovbench.evaluate.readers import Readers


class Numbers(Dataset):
    """Numbers; reading one of them takes for ever."""

    def __init__(self, stuck=None):
        self.stuck = stuck

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == self.stuck:
            signal.pause()
        return index


@pytest.mark.parametrize("persistent", [False, True])
def test_an_exception_ends_the_processes_though_its_traceback_is_kept(persistent):
    with (
        pytest.raises(ZeroDivisionError) as kept,
        Readers(Numbers(), num_workers=1, persistent_workers=persistent) as all_of,
    ):
        for batch in all_of:
            (process,) = multiprocessing.active_children()
            _ = 1 / int(batch.sum())
    assert kept.traceback and not process.is_alive() and not multiprocessing.active_children()


def test_a_process_that_is_stuck_in_a_file_is_ended_as_well(monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    with Readers(Numbers(stuck=2), num_workers=1) as reader:
        assert int(next(iter(reader))) == 0
        time.sleep(0.2)
    assert not multiprocessing.active_children()


def test_a_whole_pass_and_another_one():
    with Readers(Numbers(), num_workers=1, batch_size=4) as reader:
        assert (
            [batch.tolist() for batch in reader] == [batch.tolist() for batch in reader] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        )
    assert not multiprocessing.active_children()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synth("ade20k", tmp_path_factory.mktemp("data"), images=3, train_images=6, size=(48, 64), classes=8)


def test_a_training_that_reaches_nan_ends_with_code_5(data, run_cli):
    done = run_cli(
        "train", "-m", "fcn", "-d", "ade20k", "--data-root", str(data), "--arch", "tiny", "--set", "crop=32",
        "--set", "batch=4", "--set", "resize=64,48", "--set", "lr=1e30", "--set", "iters=20", "--workers", "1",
        "--device", "cpu", "-o", "channels=16", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "NaN or infinity in" in done.stderr and "Nothing was saved yet" in " ".join(done.stderr.split())


def test_a_run_that_stops_at_a_broken_image_ends_with_code_3(data, tmp_path, run_cli):
    image = sorted((synth("ade20k", tmp_path / "broken", images=3, size=(48, 64)) / "images" / "validation").iterdir())[
        1
    ]
    image.write_bytes(image.read_bytes()[:500])
    done = run_cli(
        "run", "-m", "fcn", "-d", "ade20k", "--data-root", str(tmp_path / "broken"), "--weights", "random",
        "--arch", "tiny", "--workers", "1", "--device", "cpu", "-o", "channels=16", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert image.name in done.stderr
