"""SIGTERM is noted instead of ending the process, where that is asked for; test_faults.py sends one to a training."""

import os
import signal
import threading

import pytest

from pushpull_jax.preemption import EXIT_CODE, sigterm_noted


def test_sigterm_is_noted():
    with sigterm_noted() as notice:
        assert not notice.came
        for _ in range(2):  # clusters send it again
            os.kill(os.getpid(), signal.SIGTERM)
            assert notice.came


def test_the_handler_from_before_comes_back():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with pytest.raises(KeyboardInterrupt), sigterm_noted():
            os.kill(os.getpid(), signal.SIGTERM)
            raise KeyboardInterrupt
        assert not seen
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_each_has_a_notice_of_its_own():
    with sigterm_noted():
        os.kill(os.getpid(), signal.SIGTERM)
    with sigterm_noted() as notice:
        assert not notice.came


def test_outside_of_the_main_thread_nothing_is_changed():
    handlers, noticed = [], []

    def run():
        with sigterm_noted() as notice:
            handlers.append(signal.getsignal(signal.SIGTERM))
            noticed.append(notice.came)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)] and noticed == [False]


def test_the_exit_code_is_that_of_sysexits():
    assert EXIT_CODE == os.EX_TEMPFAIL
