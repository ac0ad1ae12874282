"""Items come out of a spool as tensors: each once, at whichever worker, and acknowledged when the dataset says."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nats_engine.server import Server
from torch.utils.data import DataLoader

from spoolipc import SpoolReader, SpoolWriter, UnsupportedArray, stat
from spoolipc.torch import SpoolDataset

LARGE = 40_000
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def fill(spool: Path, count: int = 10, size: int = LARGE) -> None:
    with SpoolWriter(spool) as writer:
        writer.put_many([np.full(size, number, "f4") for number in range(count)])


def numbers(samples: Any) -> list[int]:
    return [int(sample.flatten()[0]) for sample in samples]


def to_number_in_place(tensor: torch.Tensor) -> int:
    return int(tensor.add_(1)[-1]) - 1


def to_number(tensor: torch.Tensor) -> int:
    return int(tensor[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_each_item_goes_to_one_worker_and_an_epoch_ends_with_the_writers(spool: Path, workers: int) -> None:
    loader: Any = DataLoader(
        SpoolDataset(spool, to_number),
        batch_size=4,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )
    for _ in range(2):
        fill(spool, 20)
        assert sorted(torch.cat(list(loader)).tolist()) == list(range(20))
        assert stat(spool).live_sessions == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_items_of_a_server_go_to_one_worker_each_and_may_be_written(tmp_path: Path, workers: int) -> None:
    server = Server(tmp_path)
    try:
        with SpoolWriter(server.url("tensors")) as writer:
            writer.put_many([np.full(LARGE * (1 + number % 2 * 9), number, "f4") for number in range(20)])
        data = SpoolDataset(server.url("tensors"), to_number_in_place, unacked=4)
        context = "spawn" if workers else None
        loader: Any = DataLoader(data, batch_size=4, num_workers=workers, multiprocessing_context=context)
        assert sorted(torch.cat(list(loader)).tolist()) == list(range(20))
        found = stat(server.url("tensors"))
        assert (found.depth, found.in_flight, found.live_sessions) == (0, 0, 0)
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"end": "never"}, 'end must be "shutdown" or "writers", not .never.'),
        ({"lease": 0}, "lease must be a positive number of seconds, not 0"),
        ({"unacked": -1}, "unacked must be a whole number"),
    ],
    ids=str,
)
def test_wrong_argument_is_named_where_the_dataset_is_made(spool: Path, wrong: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SpoolDataset(spool, **wrong)


@pytest.mark.parametrize("size", [10, LARGE])
def test_tensor_is_over_the_pages_of_the_item_and_writing_it_concerns_nobody(spool: Path, size: int) -> None:
    fill(spool, 1, size)
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        (item,) = [reader.receive()]
        item.nack()
        samples = iter(SpoolDataset(spool, unacked=1))
        tensor = next(samples)
        tensor += 5
        assert (tensor == 5).all()
        del samples  # which requeues it
        assert not reader.get().any()
        for _ in range(5):  # the file is not written while the tensor is there
            writer.put(np.ones(size, "f4"))
            reader.get()
        assert (tensor == 5).all()


def test_dicts_orders_and_dtypes_come_as_torch_has_them(spool: Path) -> None:
    put = {
        "image": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "big": np.arange(5, dtype=">i4"),
        "mask": np.array([True, False]),
        "none": np.zeros((0, 3), "f2"),
        "one": np.array(3, "u1"),
    }
    with SpoolWriter(spool) as writer:
        writer.put(put)
        assert writer.put(torch.arange(3).to(torch.bfloat16).float()) == 2
    found, plain = SpoolDataset(spool)
    assert {name: tensor.numpy().tolist() for name, tensor in found.items()} == {
        name: array.tolist() for name, array in put.items()
    }
    assert found["image"].stride() == (1, 3)
    assert plain.tolist() == [0, 1, 2]


def test_dtype_that_torch_has_not_is_refused_and_becomes_a_dead_letter(spool: Path) -> None:
    with SpoolWriter(spool, max_attempts=2) as writer:
        writer.put(np.zeros(3, "M8[s]"))
        writer.put(np.ones(3))
    for _ in range(2):
        with pytest.raises(UnsupportedArray, match=r"item 1 is an array of datetime64.*torch has not"):
            list(SpoolDataset(spool))
    assert numbers(SpoolDataset(spool)) == [1]
    assert stat(spool).failed == 1


def refuse(number: int, tensor: torch.Tensor) -> int:
    if to_number(tensor) == number:
        raise ValueError("this one")
    return to_number(tensor)


@pytest.mark.parametrize("unacked", [0, 1, 4])
def test_item_is_acknowledged_when_so_many_were_given_out_after_it(spool: Path, unacked: int) -> None:
    fill(spool, 6)
    samples = iter(SpoolDataset(spool, to_number, unacked=unacked))
    for given in range(1, 7):
        assert next(samples) == given - 1
        assert stat(spool).in_flight == min(given, unacked)
    assert next(samples, None) is None
    assert (stat(spool).in_flight, stat(spool).depth) == (0, 0)


@pytest.mark.parametrize("unacked", [0, 3])
def test_what_is_not_acknowledged_comes_again_when_the_loop_is_left_or_fails(
    spool: Path, unacked: int
) -> None:
    fill(spool, 6)
    samples = iter(SpoolDataset(spool, partial(refuse, 4), unacked=unacked))
    assert [next(samples) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="this one"):
        next(samples)
    assert sorted(numbers(SpoolDataset(spool))) == list(range(4 - unacked, 6))


def die_after(count: int, spool: Path) -> None:
    samples: Iterator[Any] = iter(SpoolDataset(spool, unacked=2))
    for _ in range(count):
        next(samples)
    os.kill(os.getpid(), signal.SIGKILL)


def test_items_of_a_killed_worker_go_to_another(spool: Path) -> None:
    fill(spool, 6)
    process = SPAWN.Process(target=die_after, args=(4, spool))
    process.start()
    process.join()
    assert sorted(numbers(SpoolDataset(spool))) == [2, 3, 4, 5]


def test_two_that_wait_for_each_others_items_acknowledge_them(spool: Path) -> None:
    fill(spool, 4)
    both = [iter(SpoolDataset(spool, to_number, unacked=9)) for _ in range(2)]
    assert [next(samples) for samples in both * 2] == [0, 1, 2, 3]
    with ThreadPool(2) as threads:
        assert threads.map(list, both) == [[], []]


def test_tensors_are_put_and_lent(spool: Path) -> None:
    with SpoolWriter(spool) as writer:
        with writer.loan((2, LARGE), np.float32) as lent:
            torch.from_numpy(lent).fill_(7)
        writer.put({"a": torch.ones(3).t(), "b": torch.eye(2)[:, ::1].t()})
        for wrong, why in (
            (torch.ones(3, requires_grad=True), "detach"),
            (torch.ones(3).bfloat16(), "dtype"),
        ):
            with pytest.raises(UnsupportedArray, match=why):
                writer.put(wrong)
    first, second = SpoolDataset(spool)
    assert (first == 7).all()
    assert second["b"].tolist() == [[1, 0], [0, 1]]
