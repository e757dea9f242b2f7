"""SIGTERM is noted or raised, where that is asked for, instead of ending the process; test_faults.py has whole runs."""

import os
import signal
import threading

import pytest

from pushpull_jax.preemption import EXIT_CODE, Preempted, sigterm_noted, sigterm_raised


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


def test_sigterm_is_raised_once_and_not_where_it_is_noted():
    ended = []
    with pytest.raises(Preempted, match="told to stop"), sigterm_raised():
        with sigterm_noted() as notice:
            os.kill(os.getpid(), signal.SIGTERM)
        assert notice.came
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:  # as of a library that expects failures
            pytest.fail("it was taken for a failure")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append(1)
    assert ended


def test_outside_of_the_main_thread_nothing_is_changed():
    handlers, noticed = [], []

    def run():
        with sigterm_raised(), sigterm_noted() as notice:
            handlers.append(signal.getsignal(signal.SIGTERM))
            noticed.append(notice.came)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)] and noticed == [False]


def test_the_exit_code_is_that_of_sysexits():
    assert EXIT_CODE == os.EX_TEMPFAIL
