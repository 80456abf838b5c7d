"""The end of a process's communication."""

import hashlib
import os
import threading
import time

import torch.distributed as dist

from megatron_ds.engine import start_distributed, stop_distributed
from megatron_ds.parallel.rank_info import RENDEZVOUS_FILE, RankInfo
from tests.ranks import run_local_ranks


def test_threads_that_are_about_to_release_tensors_may_do_so() -> None:
    """Such a thread needs the interpreter; a process that ended it earlier would abort."""

    def stops(info: RankInfo) -> bool:
        start_distributed(info, timeout_s=60.0)
        del os.environ[RENDEZVOUS_FILE]  # as in a process that a launcher started
        busy = threading.Thread(target=hashlib.sha256, args=(bytes(2**28),))  # computes without Python's global lock
        busy.start()
        time.sleep(0.02)
        assert busy.is_alive()
        stop_distributed()
        assert not dist.is_initialized()
        return busy.is_alive()

    assert run_local_ranks(stops, 1) == [False]
