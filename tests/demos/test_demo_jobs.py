import threading
import time

import pytest

from visalign.demos.jobs import Job, Jobs, Stopped, follow


def test_a_stop_before_and_during_the_work_ends_it_and_a_new_job_starts_fresh():
    jobs = Jobs()
    assert jobs.begin("a", "compare") == 0 and jobs.begin("b", "compare") == 1
    jobs.stop("a", "compare")
    with pytest.raises(Stopped):
        jobs.take("a", "compare").check()
    jobs.take("b", "compare").check()  # another visitor's goes on
    jobs.stop("a", "search")  # nothing there
    jobs.begin("a", "compare")
    jobs.take("a", "compare").check()


def test_the_place_in_the_queue_counts_those_before():
    jobs = Jobs()
    assert [jobs.begin(name, "compare") for name in "abc"] == [0, 1, 2]
    jobs.end(jobs.take("a", "compare"))
    assert jobs.begin("d", "prefer") == 2
    jobs.forget("b")
    assert jobs.begin("e", "compare") == 2
    assert jobs.begin("c", "compare") == 2  # to the end once more, not twice


def test_one_who_leaves_stops_and_a_second_press_replaces_the_first():
    jobs = Jobs()
    jobs.begin("a", "compare")
    first = jobs.take("a", "compare")
    jobs.begin("a", "compare")
    assert first.halt.is_set() and jobs.take("a", "compare") is not first
    jobs.end(first)  # only now has it seen that it is to stop; the second still waits
    assert jobs.begin("b", "compare") == 1
    second = jobs.take("a", "compare")
    jobs.forget("a")
    assert second.halt.is_set()


def test_following_gives_reports_then_the_result_and_hands_errors_on():
    job = Job()

    def work():
        for k in range(3):
            job.report(f"step {k}", k / 3, show="a view" if k == 1 else None)
            time.sleep(0.05)
        return 42

    seen = []

    def outer():
        seen.append((yield from follow(job, work, every=0.01)))

    reports = list(outer())
    assert seen == [42] and reports[-1].words == "step 2" and "a view" in [r.show for r in reports]

    def fail():
        raise ValueError("no model there")

    with pytest.raises(ValueError, match="no model there"):
        list(follow(Job(), fail, every=0.01))


def test_leaving_a_page_stops_its_work_and_waits_for_it():
    job, ended = Job(), threading.Event()

    def work():
        try:
            while True:
                job.report("at it")
                job.check()
                time.sleep(0.01)
        finally:
            ended.set()

    following = follow(job, work, every=0.01)
    next(following)
    following.close()
    assert ended.is_set() and job.halt.is_set()


def test_a_stop_is_told_by_the_work_itself_so_that_its_last_word_stays_the_last():
    jobs = Jobs()
    jobs.begin("a", "search")
    job = jobs.take("a", "search")
    told: list[str] = []

    def work():
        job.report("under way")
        assert job.halt.wait(30)
        time.sleep(0.05)

    for report in follow(job, work, every=0.01):
        told.append(report.words)
        jobs.stop("a", "search")
    assert told[0] == "under way" and set(told[1:]) == {"Stopping."}
