"""What recovery does to a command log: begin behind a snapshot, do things again, hold all for a while."""

from __future__ import annotations

from twinkle_serve.control.log import CommandLog, Entry


def filled(*seq_ids: int, first: int = 1) -> CommandLog[str]:
    log: CommandLog[str] = CommandLog(60.0, first)
    for seq_id in seq_ids:
        assert log.append(seq_id, f"request {seq_id}", f"command {seq_id}", 0.0) is None
    return log


def ready(log: CommandLog[str]) -> list[int]:
    return [entry.seq_id for entry in log.ready]


def test_a_restarted_log_begins_where_told_and_knows_duplicates():
    log = filled(1, 2).restarted(8)
    assert log.original(2) == "request 2"
    assert log.append(9, "request 9", "command 9", 0.0) is None
    assert ready(log) == []
    assert log.append(8, "request 8", "command 8", 0.0) is None
    assert ready(log) == [8, 9]
    assert log.append(3, "request 3", "command 3", 0.0) is not None


def test_rewound_entries_come_first_and_in_order():
    log = filled(1, 2, 3)
    done = [log.ready.popleft(), log.ready.popleft()]
    log.rewind([Entry(0, "restore", "restore"), *done])
    assert ready(log) == [0, 1, 2, 3]


def test_a_held_log_takes_in_and_gives_nothing():
    log = filled(1)
    assert [entry.seq_id for entry in log.hold()] == [1]
    assert log.append(2, "request 2", "command 2", 0.0) is None
    assert ready(log) == []
    assert log.is_held
    log.go_on(5.0)
    assert ready(log) == [2]


def test_giving_up_goes_on_behind_everything_that_is_here():
    log = filled(1, 3, 5)
    assert [request_id for request_id, _ in log.give_up()] == ["request 3", "request 5"]
    assert log.next_number == 6
    assert log.append(6, "request 6", "command 6", 0.0) is None
    assert ready(log) == [1, 6]
