"""The latest loads are kept, each bounded."""

from tlstunnel.processes.loads import LONGEST_LINE, MOST_LINES, MOST_LOADS, Loads


def test_the_latest_come_first_and_the_oldest_go() -> None:
    loads = Loads()
    for number in range(MOST_LOADS + 5):
        loads.note("reload", number)
    listed = loads.list_latest()
    assert len(listed) == MOST_LOADS
    assert listed[0].generation == MOST_LOADS + 4


def test_the_next_program_continues() -> None:
    loads = Loads()
    loads.note("start", 1)
    following = Loads(loads.hand_over())
    following.note("upgrade", 2, who="alice", changes=["0.1.0 -> 0.2.0"])
    assert [one.what for one in following.list_latest()] == ["upgrade", "start"]


def test_a_load_is_bounded_and_escaped() -> None:
    loads = Loads()
    loads.note("reload", 1, changes=["\x1b" + "x" * 1_000] * (MOST_LINES + 2))
    (load,) = loads.list_latest()
    assert len(load.changes) == MOST_LINES + 1
    assert load.changes[-1] == "and 2 more"
    assert load.changes[0].startswith("\\x1bx")
    assert len(load.changes[0]) == LONGEST_LINE


def test_a_failure_changes_nothing_of_what_is_served() -> None:
    loads = Loads()
    assert loads.loaded == 0.0
    loads.note("start", 1)
    began = loads.loaded
    loads.note("reload", 1, problems=["tlstunnel.toml:1: invalid"])
    assert loads.loaded == began > 0.0
